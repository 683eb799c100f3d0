"""Data only: the bundled model, texts, needles and prompts."""
