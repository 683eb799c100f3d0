"""Measuring models, and comparing the measurements. Knows nothing of runs and their files."""
