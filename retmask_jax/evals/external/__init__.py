"""Suites of others, run on our models: lm-evaluation-harness and HELMET."""
