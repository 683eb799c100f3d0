"""Which KV heads a list keeps, and how many keys that leaves, against counting by hand."""

import dataclasses

import numpy as np
import pytest
from helpers_tiny import CONFIG, WIDE, true_at

from retmask_jax.heads.lists.keys_kept import (
    kept_for,
    kv_heads_of,
    numbers_kept,
    random_kv_heads,
    share_of_keys,
    stream_all_but,
)

HEADS = [(2, 7), (0, 1), (2, 4), (2, 11), (0, 0)]  # of WIDE, where 4 query heads share each of 3 KV heads


def test_a_kv_head_is_kept_for_the_first_of_its_query_heads():
    assert kv_heads_of(WIDE, HEADS) == [(2, 1), (0, 0), (2, 2)]
    assert [kept_for(WIDE, HEADS, size) for size in (0, 1, 2, 3, 4)] == [
        (0, []),
        (1, [(2, 1)]),
        (3, [(2, 1), (0, 0)]),  # the third head has a KV head that is kept already
        (5, [(2, 1), (0, 0), (2, 2)]),
        (5, [(2, 1), (0, 0), (2, 2)]),
    ]


def test_all_query_heads_of_other_kv_heads_stream():
    mask = stream_all_but(WIDE, [(2, 1), (0, 0)], sink=3, window=9)
    whole = {(2, head) for head in (4, 5, 6, 7)} | {(0, head) for head in (0, 1, 2, 3)}
    assert true_at(mask.stream_mask) == {(layer, head) for layer in range(3) for head in range(12)} - whole
    assert (mask.stream_sink, mask.stream_window) == (3, 9)


def test_random_lists_name_every_kv_head_once():
    draws = [random_kv_heads(WIDE, seed) for seed in range(20)]
    assert all(sorted(draw) == [(layer, head) for layer in range(3) for head in range(3)] for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 20 and random_kv_heads(WIDE, 3) == draws[3]
    assert {draw[0] for draw in draws} > {(0, 0), (2, 2)}


def test_budgets_are_numbers_or_shares():
    assert numbers_kept((0.5, 0.0, 1, 3, 1.0, 0.26), 8) == [0, 1, 2, 3, 4, 8]
    for wrong in (9, -1):
        with pytest.raises(
            ValueError, match=f"a budget of {wrong} KV heads: the model has 8, so its numbers lie in 0 to 8"
        ):
            numbers_kept((2, wrong), 8)


@pytest.mark.parametrize(
    "length, sink, window", [(40, 4, 9), (12, 4, 9), (13, 4, 9), (40, 0, 9), (40, 12, 30), (1, 4, 1)]
)
@pytest.mark.parametrize("own", [None, 5, 9, 20])
def test_the_share_of_keys_is_counted_key_by_key(length, sink, window, own):
    """In a model whose layers slide and do not, in turn."""
    config = dataclasses.replace(WIDE, layer_pattern=("full", "sliding"), window=own) if own else WIDE
    kept, seen, all_keys = [(0, 1), (1, 0), (1, 2)], 0, 0
    for layer, head in np.ndindex(3, 3):
        keys = [key for key in range(length) if not (own and layer == 1) or key > length - 1 - own]
        streams = (layer, head) not in kept
        all_keys += len(keys)
        seen += sum(not streams or key < sink or key > length - 1 - window for key in keys)
    assert share_of_keys(config, kept, length, sink, window) == pytest.approx(seen / all_keys)


def test_what_is_kept_is_between_what_streams_and_everything():
    shares = [share_of_keys(CONFIG, random_kv_heads(CONFIG, 0)[:n], 100, 2, 8) for n in range(5)]
    assert shares == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])
