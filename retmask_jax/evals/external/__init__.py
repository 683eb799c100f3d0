"""Suites of other projects, run on models of this package: lm-evaluation-harness and HELMET."""
