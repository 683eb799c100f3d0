"""The model card of a model that is exported: what it is, what was done, what it does, how it is loaded."""
