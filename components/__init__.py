"""The steps of the pipeline as lightweight KFP components: thin wrappers of perennial.steps."""
