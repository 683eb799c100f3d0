"""Texts and tasks: needles, prompts, answers, pairs. Nothing here runs a model."""
