"""A model at work: loading it, reading prompts, decoding answers, log-probabilities. Nothing here knows what is measured."""
