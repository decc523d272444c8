"""HTML pages of steps and of the loop."""
