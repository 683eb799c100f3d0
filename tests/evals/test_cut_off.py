"""Measurements that are cut off go on sample by sample, to the same values."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers_tiny import copying_lm

from retmask_jax.cli.main import main
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


class _Cut(Exception):
    pass


def _stop_after(monkeypatch, n: int) -> list:
    """Values are stored n times more, then the process is stopped."""
    added, add = [], Store.add

    def stopping(self, key, value):
        if key in self:  # rows that fill up a batch
            return
        if len(added) == n:
            raise _Cut
        added.append(key)
        add(self, key, value)

    monkeypatch.setattr(Store, "add", stopping)
    return added


@pytest.mark.parametrize("name", MEASURES)
def test_what_was_cut_off_goes_on_with_what_is_missing(name, tmp_path, monkeypatch):
    lm, measure = copying_lm(), MEASURES[name]
    whole = measure(lm, None)
    with monkeypatch.context() as patch, pytest.raises(_Cut), Store(tmp_path) as kept:
        _stop_after(patch, 3)
        measure(lm, kept)
    added = _stop_after(monkeypatch, 99)
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


def test_an_evaluation_that_was_stopped_asks_only_for_the_rest(tmp_path, monkeypatch):
    config, root = Path(__file__).parents[1] / "tiny_small.py", tmp_path / "work"
    settings = {
        "niah.needles": "bundled/test_needles.jsonl",
        "niah.haystack": "bundled/test_text.txt",
        "niah.shortest": 96,
        "niah.longest": 128,
        "niah.n_lengths": 2,
        "niah.n_depths": 3,
        "niah.max_new_tokens": 8,
    }
    arguments = [
        "eval",
        f"--config={config}",
        f"--workdir={root}",
        "--compare",
        "same=bundled",
        "--config.eval.tasks=('closed-book',)",
        "--config.eval.grids=()",
        "--config.text.file=",
        *(f"--config.suites.{key}={value}" for key, value in settings.items()),
    ]
    for answered in (4, 12 + 4):  # first within the task, whose 16 cases come before those of the suite
        with monkeypatch.context() as patch:
            _stop_after(patch, answered)
            with pytest.raises(_Cut):
                main(arguments)
    assert [path.is_dir() for path in (root / "measured").iterdir()] == [True, True]
    added = _stop_after(monkeypatch, 99)
    assert main(arguments) == 0 and len(added) == 2
    (file,) = (root / "measured").glob("*.json")
    # What was answered stays, also when it has been scored.
    assert sorted(len(list(Store(path))) for path in (root / "measured").iterdir() if path.is_dir()) == [6, 16]
    assert {len(one["ids"]) for one in json.loads(file.read_text())["measured"]} == {3}
    assert os.path.isfile(file)
