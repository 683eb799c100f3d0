"""Patterns that say what a head does: on repeated random tokens, and from token to token of an answer."""
