"""A small training run: its settings, its rows, one device."""

import jax
import numpy as np
from helpers_tiny import CONFIG

from retmask_jax.data.pair_rows import PairRows
from retmask_jax.model.sharding import make_mesh
from retmask_jax.training.settings import Settings

SETTINGS = Settings(
    objective="dpo",
    learning_rate=3e-3,
    final_learning_rate=3e-4,
    warmup=0.3,
    steps=6,
    batch_size=4,
    microbatch_size=2,
    beta=0.5,
    b1=0.9,
    b2=0.95,
    eps=1e-5,
    weight_decay=0.1,
    clip=1.0,
    compute_dtype="float32",
    remat=False,
    checkpoint_every=2,
    seed=0,
)


def example_rows(n=11, width=16):
    """Pairs with a common beginning of 7 tokens and answers of different lengths."""
    rng = np.random.default_rng(2)
    pieces = []
    for _ in range(n):
        lengths = 7, *rng.integers(2, width - 7, 2)
        pieces.append([rng.integers(4, CONFIG.vocab_size, length, dtype=np.int32) for length in lengths])
    ends = np.cumsum([[len(piece) for piece in pair] for pair in pieces]).reshape(n, 3)
    bounds = np.concatenate([np.concatenate([[0], ends[:-1, 2]])[:, None], ends], axis=1)
    return PairRows([f"pair {i}" for i in range(n)], np.concatenate(sum(pieces, [])), bounds)


ROWS = example_rows()


def one_device():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
