"""Hugging Face checkpoints in and out: configs, families, weights, tokenizers, the hub. No maths."""
