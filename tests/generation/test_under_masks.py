"""Answers under many masks, with what lies before the first masked layer computed once, are those of a run for each mask."""

import numpy as np
import pytest

from retmask_jax.generation import under_masks
from retmask_jax.generation.batching import padded_width
from retmask_jax.generation.decode import generate_many
from retmask_jax.generation.under_masks import answers_under, can_share
from retmask_jax.model.config import ModelConfig, Rope
from retmask_jax.model.interventions import Interventions, mask_heads, mask_rope

NEW = 6
# Groups of two layers and a tail, a window shorter than the prompts; and frequencies that depend on the longest row.
CONFIG = ModelConfig(
    vocab_size=41,
    hidden_size=16,
    mlp_size=20,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    max_length=128,
    layer_pattern=("sliding", "full"),
    window=7,
    eos_ids=(5, 9),
)
PLAIN = ModelConfig(
    vocab_size=41,
    hidden_size=16,
    mlp_size=20,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    max_length=128,
    rope=Rope(kind="dynamic", theta=100.0, factor=4.0, original_length=8),
)


def _masks(config):
    """Of the first layer, a middle one and the last; of heads, means, rotary pairs at both sites, and nothing."""
    last = config.n_layers - 1
    mean = (
        np.random.default_rng(0).standard_normal((config.n_layers, config.n_heads, config.head_dim)).astype(np.float32)
    )
    return [
        Interventions(),
        mask_heads(config, [(0, 1), (last, 0)]),
        mask_heads(config, [(1, 0), (1, 3)]),
        mask_heads(config, [(last, 2)], mean),
        mask_rope(config, [(2, 1), (2, 2)], [0, 2]),
        mask_rope(config, [(2, 1)], [1, 3], site="projection"),
        Interventions(head_mask=np.linspace(0, 1, config.n_layers * config.n_heads).reshape(config.n_layers, -1)),
    ]


@pytest.mark.parametrize(
    "config, chosen",
    [  # Each kind of mask is a program more.
        pytest.param(CONFIG, (0, 1, 2, 6), id="heads"),
        pytest.param(CONFIG, range(7), id="patterned", marks=pytest.mark.slow),
        pytest.param(PLAIN, range(7), id="dynamic", marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_a_run_for_each_mask(random_model, config, chosen):
    lm, rng = random_model(config), np.random.default_rng(3)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (30, 12, 21)]
    masks = [_masks(config)[i] for i in chosen]
    found = answers_under(lm, prompts, masks, max_new_tokens=NEW, batch_size=3)
    options = {"max_new_tokens": NEW, "batch_size": 3}
    different = set()
    for mask, ours in zip(masks, found, strict=True):
        theirs = generate_many(lm.config, lm.params, prompts, interventions=mask, **options)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            assert int(a.stops) == int(b.stops)
        different.add(tuple(tuple(one.tokens.tolist()) for one in ours))
    assert len(different) >= len(masks) - 2  # the masks do something
    if config.depends_on_length or len(masks) < 7:  # then a row's answer depends on its batch; or quickly
        return
    again = answers_under(lm, prompts, masks[2:4], max_new_tokens=NEW, batch_size=1)
    assert [[one.tokens.tolist() for one in row] for row in again] == [
        [one.tokens.tolist() for one in row] for row in found[2:4]
    ]


def test_rows_are_as_many_as_the_memory_holds_states_of(random_model, monkeypatch):
    lm = random_model(PLAIN)
    row = (PLAIN.repeats + 1) * padded_width(PLAIN, 30, 1) * PLAIN.hidden_size * 4
    monkeypatch.setattr(under_masks.memory, "limit", lambda: 8 * 5 * row + 1)
    monkeypatch.setattr(under_masks.jax, "local_device_count", lambda: 1)
    assert under_masks._most_rows(lm, 30) == 5
    monkeypatch.setattr(under_masks.memory, "limit", lambda: 0)
    assert under_masks._most_rows(lm, 30) == 1


def test_prompts_that_are_read_in_chunks_share_nothing(monkeypatch):
    assert can_share(PLAIN, [[1] * 60], NEW) and not can_share(PLAIN, [], NEW)
    monkeypatch.setattr(under_masks, "usual_chunk", lambda: 32)
    assert not can_share(PLAIN, [[1] * 60], NEW)
