"""Retrieval heads in JAX: find them, mask them, train against the masked model."""

__version__ = "0.1.0"
