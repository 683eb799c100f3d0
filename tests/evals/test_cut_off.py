"""Measurements that are cut off go on sample by sample, to the same values."""

import numpy as np
import pytest
from helpers_cut_off import Cut, stop_after
from helpers_tiny import copying_lm

from retmask_jax.evals import perplexity, scoring
from retmask_jax.utils.store import Store, request_key

RNG = np.random.default_rng(0)
ROWS = [RNG.integers(4, 60, n).tolist() for n in (20, 9, 33, 14, 27, 20)]
ROWS.append(ROWS[0])  # asked twice, computed once

MEASURES = {
    "answers": lambda lm, kept: scoring.answered(lm, ROWS, max_new_tokens=6, batch_size=2, kept=kept),
    "draws": lambda lm, kept: scoring.answered(lm, ROWS, max_new_tokens=6, batch_size=2, temperature=1.0, kept=kept),
    "log-likelihoods": lambda lm, kept: scoring.continuation_logprobs(
        lm, [(row[:-3], row[-3:]) for row in ROWS], batch_size=2, kept=kept
    ),
    "losses": lambda lm, kept: perplexity.token_losses(
        lm, np.array([row[:9] for row in ROWS]), batch_size=2, kept=kept
    ),
}


@pytest.mark.parametrize("name", MEASURES)
def test_what_was_cut_off_goes_on_with_what_is_missing(name, tmp_path, monkeypatch):
    lm, measure = copying_lm(), MEASURES[name]
    whole = measure(lm, None)
    with monkeypatch.context() as patch, pytest.raises(Cut), Store(tmp_path) as kept:
        stop_after(patch, 3)
        measure(lm, kept)
    added = stop_after(monkeypatch, 99)
    with Store(tmp_path) as kept:
        np.testing.assert_array_equal(measure(lm, kept), whole)
        n = 7 if name == "draws" else 6
        assert len(added) == n - 3  # draws of equal prompts differ: each has its own seed
        np.testing.assert_array_equal(measure(lm, kept), whole)
        assert len(added) == n - 3
    if name == "draws":
        assert whole[0] != whole[-1]


def test_keys_tell_requests_apart():
    keys = [
        request_key("a", [1, 2]),
        request_key("a", [1], [2]),
        request_key("b", [1, 2]),
        request_key("a", [1, 2], n=3),
    ]
    assert len(set(keys)) == 4 and request_key("a", np.array([1, 2])) == keys[0]
    kept = Store()
    kept.add(keys[2], 5)
    assert kept.missing([keys[1], keys[2], keys[1], keys[0]]) == [0, 3]
    kept.add(keys[2], 6)
    assert kept[keys[2]] == 5
