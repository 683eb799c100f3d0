"""The stages of the causal study: other detectors, norms of queries, other RoPE bases, checkpoints of a training run."""
