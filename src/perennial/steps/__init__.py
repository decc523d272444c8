"""One module a pipeline step; what they share stands in context."""
