"""Answers under many masks, with what lies before the first masked layer computed once, are those of a run for each mask."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers_tiny import in_float64, reference

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


def test_answers_are_those_of_the_definition_under_each_mask(random_model):
    """Heads of the first layer, a middle one and the last, in groups of two layers and a tail, one after the other."""
    config = dataclasses.replace(CONFIG, tied_embeddings=True)
    lm, rng = random_model(config), np.random.default_rng(3)
    params64 = in_float64(lm.params)
    every, tail = (params64[part].values() for part in ("blocks", "tail"))
    in_order = jax.tree.map(lambda a, b, last: np.stack([a[0], b[0], a[1], b[1], last]), *every, *tail)
    params64 |= {"blocks": {"0": in_order}}
    sliding_LH = np.repeat([[kind == "sliding"] for kind in (*config.layer_pattern * 2, *config.tail)], 4, axis=1)

    def best_next(tokens, head_mask):
        """The best token after each of these."""
        masks = {"head_mask": head_mask, "streams": (sliding_LH, 0, config.window)}
        return reference(params64, np.array(tokens), config=config, **masks)[0].argmax(axis=-1)

    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (30, 12, 21)]
    masks = [Interventions(np.float32(mask.head_mask)) for mask in _masks(config)[1:3]]
    masks += [Interventions(np.zeros_like(masks[0].head_mask)), _masks(config)[6]]
    found = answers_under(lm, prompts, masks, max_new_tokens=NEW, batch_size=3)
    for mask, ours in zip(masks, found, strict=True):
        for prompt, one in zip(prompts, ours, strict=True):
            best_N = best_next([*prompt, *one.tokens], mask.head_mask)[len(prompt) - 1 :].tolist()
            stopped = [i for i, token in enumerate(best_N) if token in config.eos_ids]
            end = min([*stopped, NEW])
            assert one.tokens.tolist() == best_N[:end] and int(one.stops) == (best_N[end] if end < NEW else -1)
    answers = {str([one.tokens.tolist() for one in ours]) for ours in found}
    assert len(answers) >= len(masks) - 2  # the masks do something


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(CONFIG, id="patterned"), pytest.param(PLAIN, id="dynamic")])
def test_answers_are_those_of_a_run_for_each_mask(random_model, config):
    lm, rng = random_model(config), np.random.default_rng(3)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (30, 12, 21)]
    masks = _masks(config)
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
    if config.depends_on_length:  # then a row's answer depends on its batch
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
