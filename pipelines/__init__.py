"""The pipelines: what runs after what, compiled to YAML beside the code."""
