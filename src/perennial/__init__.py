"""A model that keeps itself fresh."""

__version__ = "0.1.0"
