"""Work in batches, of which some results are known beforehand."""

import pytest

from retmask_jax.utils import memory, progress


def test_known_results_stay_and_are_neither_reported_nor_counted_as_progress(capsys, monkeypatch):
    """Batches compute a known result along with others, and repeat an index to be full."""
    monkeypatch.setattr(progress, "_DELAY", 0.0)  # however short the work, it is shown
    seen = []

    def work(todo, batch_size):
        assert todo == [1, 2, 3] and batch_size == 3
        yield [0, 1, 1], ["again", "b", "b"]
        yield [2, 3, 0], ["c", "d", "again"]

    found = memory.in_batches(
        4, 3, "count", "row", work, known={0: "a"}, done=lambda i, result: seen.append((i, result))
    )
    assert found == ["a", "b", "c", "d"]
    assert seen == [(1, "b"), (2, "c"), (3, "d")]
    assert "100% (4 of 4)" in capsys.readouterr().err


def test_nothing_is_begun_where_all_is_known():
    assert memory.in_batches(2, 1, "count", "row", pytest.fail, known={0: "a", 1: "b"}) == ["a", "b"]
