"""When is a new model worth its cost, and who makes it: inbox, policy, service, launchers."""
