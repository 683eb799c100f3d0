"""Shares of the machine's peaks: the work that is needed, counted by hand, and the peaks, measured on small matrices."""

from types import SimpleNamespace

import numpy as np
import pytest

from retmask_jax.benchmarks import chip, harness, models
from retmask_jax.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=100,
    hidden_size=8,
    mlp_size=12,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    max_length=64,
    layer_pattern=("sliding", "full"),
    window=3,
)


def test_needed_work_is_counted_by_hand():
    a_layer = 8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 12
    full, sliding = 1 + 2 + 3 + 4 + 5, 1 + 2 + 3 + 3 + 3  # layers 0 and 2 slide
    attention = 4 * 4 * 4 * (2 * sliding + full)
    assert chip.forward_flops(CONFIG, 5, counted=2) == 2 * 5 * 3 * a_layer + attention + 2 * 2 * 8 * 100
    cached = 2 * 2 * 4 * (3 + 5 + 3)  # keys and values of two heads
    assert chip.decode_bytes(CONFIG, rows=7, context=5, itemsize=2) == 2 * (3 * a_layer + 8 * 100 + 7 * cached)


def test_shares_are_of_what_the_machine_did(monkeypatch):
    """Generation is a stand-in here that takes a second for the prompts and two for each new token."""
    monkeypatch.setitem(chip._PRODUCT, "cpu", 128)
    monkeypatch.setitem(chip._COPIED, "cpu", 2**20)
    monkeypatch.setattr(harness, "gc", SimpleNamespace(collect=lambda: None))  # takes long where torch is imported
    clock, calls = SimpleNamespace(perf_counter=lambda: clock.now, now=0.0), []

    def generate(tokens, n):
        calls.append((tokens.shape, n))
        clock.now += 1 + 2 * n

    peaks = chip.product_peak(models.mesh(), np.float32), chip.copy_bandwidth(models.mesh())
    for name, peak in zip(("product_peak", "copy_bandwidth"), peaks, strict=True):
        monkeypatch.setattr(chip, name, lambda *_, peak=peak: peak)
    monkeypatch.setattr(harness, "time", clock)
    lm = SimpleNamespace(config=CONFIG, params=[np.float32(0)])
    rows = chip.generation_rows(lm, models.mesh(), 2, 16, 3, 1, generate)
    assert calls == [((2, 16), 1), ((2, 16), 3)] * 2
    *rows, rate = rows
    assert [row.unit for row in rows] == ["GFLOP/s", "GB/s"]
    assert (rate.ours, rate.unit, rate.facts) == (1.0, "tokens/s", {"tokens/s with prompts": 6 / 7})
    done = 2 * chip.forward_flops(CONFIG, 16, counted=1) / 3, chip.decode_bytes(CONFIG, 2, 17, 4) / 2
    assert [row.ours for row in rows] == pytest.approx([rate / 1e9 for rate in done])
    assert [row.peer for row in rows] == pytest.approx([peak / 1e9 for peak in peaks]) and min(peaks) > 1e7
    assert [row.ratio for row in rows] == pytest.approx([row.ours / row.peer for row in rows])
