"""Which heads are ablated, how, and their controls; activity against a slow reference."""

import jax
import numpy as np
import pytest
from helpers_tiny import CONFIG, WIDE, copying_lm, copying_params, in_float64, reference, true_at
from helpers_tiny import WIDE_HEADS as HEADS

from retmask_jax.generation.logprobs import token_logprobs
from retmask_jax.heads import knockout as knockout_module
from retmask_jax.heads.knockout import (
    MODES,
    ablate,
    activity,
    activity_matched,
    curve_conditions,
    head_numbers,
    knockout_conditions,
    lowest_scoring,
    minimal_set,
)
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.config import ModelConfig, Rope
from retmask_jax.model.interventions import all_heads, mask_heads
from retmask_jax.model.masking import normalise
from retmask_jax.utils import progress

LM = copying_lm()


# --- conditions ---


@pytest.fixture(scope="module")
def knockout():
    return knockout_conditions(WIDE, HEADS, np.random.default_rng(0).random((3, 12)), draws=5, seed=11)


def test_knockout_kinds_and_draws(knockout):
    expected = [("none", 0), ("retrieval", 0)]
    for kind in ("any layer", "layer-matched", "activity-matched"):
        expected += [(kind, draw) for draw in range(5)]
    assert [(c.kind, c.draw) for c in knockout] == expected
    assert knockout[0].heads == () and not normalise(WIDE, knockout[0].interventions).head_BLH.any()
    assert set(knockout[1].heads) == set(HEADS)
    for kind in ("any layer", "layer-matched", "activity-matched"):
        assert len({c.heads for c in knockout if c.kind == kind}) > 1


def test_knockout_masks_are_those_of_their_heads(knockout):
    for condition in knockout:
        masks = normalise(WIDE, condition.interventions)
        assert true_at(masks.head_BLH[0]) == set(condition.heads)
        assert not masks.rope_BLHR.any()


def test_controls_are_as_many_heads_and_never_retrieval_heads(knockout):
    layers = []
    for condition in knockout[2:]:
        assert len(set(condition.heads)) == len(HEADS)
        assert not set(condition.heads) & set(HEADS)
        if condition.kind == "layer-matched":
            assert sorted(layer for layer, _ in condition.heads) == [0, 2, 2, 2]
        if condition.kind == "any layer":
            layers.append(sorted(layer for layer, _ in condition.heads))
    assert any(1 in drawn for drawn in layers)  # layers without a retrieval head take part


def test_knockout_controls_depend_on_the_seed():
    active = np.random.default_rng(0).random((3, 12))

    def draw(seed):
        return [c.heads for c in knockout_conditions(WIDE, HEADS, active, draws=2, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_activity_matched_takes_the_nearest_by_ratio():
    active = np.full((3, 12), 1e4)
    active[0, 0], active[1, 1], active[1, 2], active[1, 3], active[1, 4] = 1.0, 2.0, 0.4, 2.9, 0.0
    assert activity_matched([(0, 0)], active, nearest=1) == [(1, 1)]
    drawn = {activity_matched([(0, 0)], active, seed=seed)[0] for seed in range(40)}
    assert drawn == {(1, 1), (1, 2), (1, 3)}


def test_activity_matched_heads_are_disjoint():
    """Four equal heads compete for the same neighbours: nobody is taken twice, and no head is its own control."""
    active = np.full((3, 12), 1e-3)
    active[2, :8] = 1.0
    heads = [(2, 0), (2, 1), (2, 2), (2, 3)]
    assert activity_matched(heads, active, nearest=1) == [(2, 4), (2, 5), (2, 6), (2, 7)]
    for seed in range(10):
        drawn = activity_matched(heads, active, seed=seed)
        assert len(set(drawn)) == 4 and not set(drawn) & set(heads)
    assert activity_matched([list(head) for head in heads], active, seed=3) == activity_matched(heads, active, seed=3)
    with pytest.raises(ValueError, match="19 control heads are wanted, the model has only 17 others"):
        activity_matched(all_heads(WIDE)[:19], active)


def test_lowest_scoring_heads_are_a_control_where_scores_are_known():
    scores_LH = np.linspace(0, 1, 36).reshape(3, 12)
    found = knockout_conditions(WIDE, HEADS, np.ones((3, 12)), draws=2, scores_LH=scores_LH)
    lowest = [c for c in found if c.kind == "lowest-scoring"]
    assert [set(c.heads) for c in lowest] == [{(0, 0), (0, 2), (0, 3), (0, 4)}] * 2  # (0, 1) is a retrieval head
    tied = {tuple(lowest_scoring(np.zeros((3, 12)), HEADS, seed=seed)) for seed in range(5)}
    assert len(tied) == 5 and not any(set(heads) & set(HEADS) for heads in tied)


def test_modes_take_the_same_heads_out_in_their_own_way():
    mean_LHD = np.random.default_rng(0).random((3, 12, 16)).astype(np.float32)
    zero, mean, query, query_mean = (ablate(WIDE, HEADS, mode, mean_LHD) for mode in MODES)
    assert true_at(zero.head_mask) == true_at(mean.head_mask) == set(HEADS)
    assert zero.head_mean is None and zero.rope_mask is None
    np.testing.assert_array_equal(mean.head_mean, mean_LHD)
    assert query.head_mask is None and true_at(query.rope_mask) == {(*head, r) for head in HEADS for r in range(8)}
    assert query_mean.head_mask is None and query_mean.rope_mask is None
    assert true_at(query_mean.query_mask) == set(HEADS)
    np.testing.assert_array_equal(query_mean.query_mean, mean_LHD)
    for mode in ("mean", "query_mean"):
        with pytest.raises(ValueError, match=f"knock-out mode '{mode}' needs means"):
            ablate(WIDE, HEADS, mode)
    with pytest.raises(ValueError, match="knock-out mode is 'median'; it must be one of zero, mean, query, query_mean"):
        ablate(WIDE, HEADS, "median")


# --- curves and the smallest set ---


def test_a_curve_masks_the_best_heads_and_as_many_others():
    mean_LH = np.random.default_rng(1).permutation(36).reshape(3, 12).astype(np.float32)
    scores = HeadScores.from_array(mean_LH)
    heads = scores.heads(top_k=6)
    found = curve_conditions(WIDE, scores, heads, (1, 12, 0.5, 1.0, 30), draws=2, seed=3)
    best = [c for c in found if c.kind == "highest-scoring"]
    assert [len(c.heads) for c in best] == [1, 3, 6, 12, 30]
    assert all(list(c.heads) == scores.heads(top_k=len(c.heads)) for c in best)
    others = [c for c in found if c.kind == "random"]
    assert [len(c.heads) for c in others] == [1, 1, 3, 3, 6, 6, 12, 12]  # none of 30: only 6 are left
    for condition in others:
        assert not set(condition.heads) & (set(heads) | set(scores.heads(top_k=len(condition.heads))))


def test_sizes_of_a_curve():
    assert head_numbers((2, 0.5, 1.0), 3, 36) == [2, 3]
    assert head_numbers((), 3, 36) == []
    with pytest.raises(ValueError, match="a curve over 40 heads: the model has 36, so its numbers lie in 1 to 36"):
        head_numbers((1, 40), 3, 36)


def test_the_smallest_set_is_what_recall_cannot_do_without():
    """Recall is gone where two heads are masked together, and lower still with a third."""
    a, b, helper, *idle = [(0, i) for i in range(6)]
    asked = []

    def recall_of(sets):
        asked.append(len(sets))
        return [0.1 - 0.05 * (helper in some) if {a, b} <= set(some) else 0.9 for some in sets]

    kept, steps = minimal_set([a, helper, b, *idle], recall_of, limit=0.2)
    assert kept == [a, b]
    assert [step.head for step in steps] == [*idle[::-1], helper]  # the last of equal ones first
    assert [step.recall for step in steps] == pytest.approx([0.05] * 3 + [0.1])
    assert asked == [6, 5, 4, 3, 2]
    assert minimal_set([a, b], lambda sets: [1.0] * len(sets), limit=0.2) == ([a, b], [])


# --- activity ---


def test_activity_is_the_mean_change_of_a_tokens_log_probability():
    rng = np.random.default_rng(4)
    rows = [rng.integers(4, CONFIG.vocab_size, length).tolist() for length in (9, 20, 14, 6)]
    params = copying_params()
    attn = params["blocks"]["0"]["attn"]
    silent = slice(2 * CONFIG.head_dim, 3 * CONFIG.head_dim)
    attn["o"] = {"kernel": attn["o"]["kernel"].at[1, silent].set(0)}
    found = activity(LM.replace(params=params), rows, batch_size=2)

    def logps(mask):
        parts = []
        for row in rows:
            logits_TV, _ = reference(in_float64(params), np.array(row), head_mask=mask)
            shifted_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
            parts.append(shifted_TV[np.arange(len(row) - 1), row[1:]])
        return np.concatenate(parts)

    untouched = logps(None)
    expected = np.zeros((CONFIG.n_layers, CONFIG.n_heads))
    for layer, head in all_heads(CONFIG):
        mask = np.zeros_like(expected, bool)
        mask[layer, head] = True
        expected[layer, head] = np.abs(logps(mask) - untouched).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert found[1, 2] == 0
    assert (np.delete(found.ravel(), 6) > 1e-3).all()


# All that the families below have, in one model: it is traced and compiled once, where each of them is on its own.
EVERYTHING = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=40,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    max_length=64,
    norm_placement="both",
    layer_pattern=("sliding", "full"),
    window=6,
    rope=Rope(kind="dynamic", theta=100.0, factor=4.0, original_length=8),
    rope_pattern=(True, False),
    expert_pattern=(False, True),
    n_experts=4,
    experts_per_token=2,
    expert_size=12,
    embed_scale=2.0,
    residual_scale=0.7,
    logit_scale=0.8,
    attention_softcap=3.0,
    logit_softcap=9.0,
)


def test_activity_from_the_first_masked_layer_is_that_of_whole_passes(random_model):
    """Windows, layers in groups with a tail, experts, frequencies that depend on the length, scales, layers without RoPE."""
    _activity_is_that_of_whole_passes(random_model(EVERYTHING))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "olmo3", "phi3_longrope", "mixtral_window", "granite", "smollm3_window"])
def test_activity_of_families_is_that_of_whole_passes(read_golden, name):
    """Each of what the model above has, as a family has it."""
    _activity_is_that_of_whole_passes(read_golden(name).lm)


def _activity_is_that_of_whole_passes(lm):
    tokens = np.random.default_rng(5).integers(4, lm.config.vocab_size, (3, 20))
    heads = all_heads(lm.config)
    untouched, *masked = (
        token_logprobs(lm.config, lm.params, tokens, mask_heads(lm.config, some))
        for some in ([], *([head] for head in heads))
    )
    expected = np.array([np.abs(np.asarray(logps) - np.asarray(untouched)).mean() for logps in masked])
    found = activity(lm, tokens.tolist(), batch_size=7)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Passes of `activity` give numbers of their own for every mask and token, and nothing is compiled."""
    of_head_LH = np.arange(1.0, 9.0).reshape(2, 4)

    def masked_logprobs(config, params, mask_KLH, start, tokens_BT, states_RBTE):
        of_mask_K = (mask_KLH * of_head_LH).sum(axis=(1, 2))
        return of_mask_K[None, :, None] * tokens_BT[:, None, 1:]

    monkeypatch.setattr(knockout_module, "_masked_logprobs", masked_logprobs)
    monkeypatch.setattr(knockout_module, "_states", lambda config, params, tokens_BT: None)


@pytest.fixture
def passes(monkeypatch):
    """Of each compiled pass of `activity`, in order: (texts, masks of each, first group of layers)."""
    made, compiled = [], knockout_module._masked_logprobs

    def masked_logprobs(config, params, mask_KLH, start, tokens_BT, states_RBTE):
        made.append((len(tokens_BT), len(mask_KLH), int(start)))
        return compiled(config, params, mask_KLH, start, tokens_BT, states_RBTE)

    monkeypatch.setattr(knockout_module, "_masked_logprobs", masked_logprobs)
    return made


ROWS = np.random.default_rng(6).integers(4, CONFIG.vocab_size, (3, 12)).tolist()


@pytest.mark.parametrize("batch_size, texts, masks", [(1, 1, 1), (2, 2, 1), (3, 3, 1), (6, 3, 2), (64, 3, 8)])
def test_a_pass_of_activity_has_no_more_rows_than_the_batch_and_no_layer_before_the_mask(
    nothing_compiled, passes, batch_size, texts, masks
):
    activity(LM, ROWS, batch_size=batch_size)
    assert {(rows, some) for rows, some, _ in passes} == {(texts, masks)}
    if masks < CONFIG.n_heads:  # else one pass has heads of both layers
        begun = [start for _, _, start in passes]
        assert begun.count(0) == -(-3 // texts) * -(-CONFIG.n_heads // masks)  # of the first layer's heads alone


def test_activity_says_how_far_it_is_after_every_pass(monkeypatch, nothing_compiled, passes):
    updates = []
    update = progress._Bar.update
    monkeypatch.setattr(
        progress._Bar, "update", lambda bar, n=1: (updates.append((bar.desc, n, len(passes))), update(bar, n))
    )
    activity(LM, ROWS, batch_size=3)
    assert sum(n for _, n, _ in updates) == len(ROWS) * len(all_heads(CONFIG))
    assert {what for what, _, _ in updates} == {"activity"}
    assert np.diff([0, *(made for _, _, made in updates)]).max() <= 2  # the untouched model, and the first mask


def test_activity_goes_on_with_half_where_memory_runs_out(monkeypatch, nothing_compiled, passes):
    whole, compiled = activity(LM, ROWS, batch_size=6), knockout_module._masked_logprobs
    passes.clear()

    def scarce(config, params, mask_KLH, start, tokens_BT, states_RBTE):
        if len(mask_KLH) * len(tokens_BT) > 3 and len(passes) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")
        return compiled(config, params, mask_KLH, start, tokens_BT, states_RBTE)

    monkeypatch.setattr(knockout_module, "_masked_logprobs", scarce)
    np.testing.assert_allclose(activity(LM, ROWS, batch_size=6), whole, rtol=1e-5, atol=1e-7)
    assert len(np.unique(whole)) == whole.size
    assert {rows * masks for rows, masks, _ in passes} == {6, 3}
