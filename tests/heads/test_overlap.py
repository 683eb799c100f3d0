"""Overlaps of lists of heads, against a count of every pair of lists that there can be."""

import itertools

import numpy as np
import pytest

from retmask_jax.heads.lists.overlap import overlaps

HEADS = [(layer, head) for layer in range(2) for head in range(4)]


def test_what_is_expected_by_chance_is_the_mean_over_all_lists():
    first = HEADS[:3]
    shared = [len(set(first) & set(other)) for other in itertools.combinations(HEADS, 4)]
    for second in (HEADS[:4], HEADS[2:6], HEADS[4:]):
        (pair,) = overlaps({"a": first, "b": second}, total=8)
        assert pair.shared == len(set(first) & set(second))
        assert pair.jaccard == pytest.approx(pair.shared / (7 - pair.shared))
        assert pair.expected == pytest.approx(np.mean(shared))
        assert pair.p_value == pytest.approx(np.mean([n >= pair.shared for n in shared]))


def test_each_two_lists_are_compared_once():
    found = overlaps({"a": HEADS[:2], "b": HEADS[1:3], "c": HEADS[:2]}, total=8)
    assert [(pair.a, pair.b, pair.shared) for pair in found] == [("a", "b", 1), ("a", "c", 2), ("b", "c", 1)]
    assert overlaps({"a": HEADS[:2]}, total=8) == []
