"""Causal experiments: answers under masks against a slow reference, and the conditions and summaries by their rules."""

import numpy as np
import pytest
from helpers_tiny import (
    BATCH,
    CONFIG,
    NEW,
    copying_lm,
    copying_params,
    in_float64,
    reference,
    reference_answer,
)

from retmask_jax import stats
from retmask_jax.causal import (
    Condition,
    activity,
    activity_matched,
    answers,
    hits,
    knockout_conditions,
    mean_over_draws,
    rope_conditions,
    summarise,
)
from retmask_jax.data import tiny_language as tl
from retmask_jax.generate import _generate
from retmask_jax.haystack import Case, Needle, Spec
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions, all_heads, mask_heads, mask_rope

LM = copying_lm()
# More heads than a random model needs: here only indices count, nothing is computed.
WIDE = ModelConfig(
    vocab_size=8, hidden_size=8, mlp_size=8, n_layers=3, n_heads=12, n_kv_heads=3, head_dim=16, max_length=64
)
HEADS = [(2, 7), (0, 1), (2, 0), (2, 11)]


def _case(tokens, answer="", memory=None):
    return Case(tuple(tokens), (0, 0), Needle("", "", answer, memory=memory), Spec(0, 0.0, 0, (), 0))


def _cases(n):
    rng = np.random.default_rng(3)
    return [_case(map(int, rng.choice(rng.integers(4, CONFIG.vocab_size, 20), 25 + 5 * i))) for i in range(n)]


def _true_at(mask):
    return {tuple(map(int, index)) for index in np.argwhere(np.asarray(mask))}


# --- answers ---


MASKS = {
    "none": Interventions(),
    "two heads": mask_heads(CONFIG, [(1, 0), (0, 2)]),
    "all heads": mask_heads(CONFIG, all_heads(CONFIG)),
    "rotary pairs": mask_rope(CONFIG, [(1, 0), (1, 3)], [0, 1, 4]),
    "both": mask_heads(CONFIG, [(1, 1)]) | mask_rope(CONFIG, [(1, 0)], range(8)),
}


def test_answers_under_many_masks_equal_runs_with_one():
    cases, params = _cases(3), in_float64(LM.params)
    before = _generate._cache_size()
    together = answers(LM, cases, list(MASKS.values()), max_new_tokens=NEW, batch_size=BATCH)
    for mask, texts in zip(MASKS.values(), together, strict=True):
        assert answers(LM, cases, [mask], max_new_tokens=NEW, batch_size=BATCH) == [texts]
        filled = mask.fill(CONFIG)
        masks = {"head_mask": np.asarray(filled.head_mask), "rope_mask": np.asarray(filled.rope_mask)}
        slow = [reference_answer(params, case.tokens, NEW, (tl.EOS,), **masks)[0] for case in cases]
        assert texts == [" ".join(tl.VOCABULARY[i] for i in tokens if i > tl.UNK) for tokens in slow]
    assert len({tuple(texts) for texts in together}) == len(MASKS)  # every mask made a difference
    assert _generate._cache_size() - before <= 1  # one program served them all


def test_hits_are_whole_words_in_order():
    cases = [_case([], "Fig elm oak", memory="Rome") for _ in range(7)]
    texts = [
        "it is fig elm oak .", "FIG, elm: oak!", "fig oak elm", "fig elm", "figs elm oak", "", "fig elm and oak in rome"
    ]  # fmt: skip
    assert hits(texts, cases).tolist() == [True, True, False, False, False, False, False]
    assert hits(texts, cases, "memory").tolist() == [False] * 6 + [True]
    with pytest.raises(ValueError):
        hits(texts[:2], cases)


# --- conditions ---


@pytest.fixture(scope="module")
def knockout():
    return knockout_conditions(WIDE, HEADS, np.random.default_rng(0).random((3, 12)), draws=5, seed=11)


def test_knockout_kinds_and_draws(knockout):
    expected = [("none", 0), ("retrieval", 0)]
    for kind in ("any layer", "layer-matched", "activity-matched"):
        expected += [(kind, draw) for draw in range(5)]
    assert [(c.kind, c.draw) for c in knockout] == expected
    assert knockout[0].heads == () and not np.asarray(knockout[0].interventions.fill(WIDE).head_mask).any()
    assert set(knockout[1].heads) == set(HEADS)
    for kind in ("any layer", "layer-matched", "activity-matched"):
        assert len({c.heads for c in knockout if c.kind == kind}) > 1


def test_knockout_masks_are_those_of_their_heads(knockout):
    for condition in knockout:
        filled = condition.interventions.fill(WIDE)
        assert _true_at(filled.head_mask) == set(condition.heads)
        assert not np.asarray(filled.rope_mask).any()


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


def test_rope_conditions_name_pairs_and_heads():
    conditions = rope_conditions(WIDE, HEADS, [2, 3], draws=3, seed=5)
    kinds = ["lowest", "highest", "control heads, lowest"] + ["random"] * 3
    assert [c.kind for c in conditions] == ["none", *kinds, *kinds]
    assert [c.draw for c in conditions if c.kind == "random"] == [0, 1, 2] * 2
    for k, part in ((2, conditions[1:7]), (3, conditions[7:])):
        lowest, highest, control, *drawn = part
        assert lowest.pairs == control.pairs == tuple(range(8 - k, 8))  # frequencies fall with the index
        assert highest.pairs == tuple(range(k))
        assert {len(set(c.pairs)) for c in drawn} == {k} and len({c.pairs for c in drawn}) > 1
        assert all(c.heads == tuple(HEADS) for c in (lowest, highest, *drawn))
        assert sorted(layer for layer, _ in control.heads) == [0, 2, 2, 2]
        assert not set(control.heads) & set(HEADS)
    for condition in conditions:
        filled = condition.interventions.fill(WIDE)
        assert _true_at(filled.rope_mask) == {(*head, pair) for head in condition.heads for pair in condition.pairs}
        assert not np.asarray(filled.head_mask).any()


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


# --- summaries ---


@pytest.fixture(scope="module")
def outcomes():
    conditions = [
        Condition("none", 0, Interventions()),
        Condition("retrieval", 0, Interventions(), heads=((1, 2), (0, 3))),
        *[Condition("random", d, Interventions(), heads=((1, d),), pairs=(4, 5)) for d in range(2)],
        Condition("random", 0, Interventions(), heads=((1, 0),), pairs=(5,)),
    ]
    rng = np.random.default_rng(6)
    shares = np.array([0.9, 0.2, 0.7, 0.6, 0.5])[:, None]
    return conditions, {"needle": rng.random((5, 40)) < shares, "memory": rng.random((5, 30)) < shares}


def test_summary_rows_hold_the_statistics_of_their_outcomes(outcomes):
    conditions, by_task = outcomes
    rows = summarise(conditions, by_task)
    assert [(row["task"], row["kind"], row["draw"], row["k"]) for row in rows] == [
        (task, c.kind, c.draw, len(c.pairs)) for task in by_task for c in conditions
    ]
    for row, (task, i) in zip(rows, [(task, i) for task in by_task for i in range(5)], strict=True):
        outcome, untouched = by_task[task][i], by_task[task][0]
        interval = stats.wilson(int(outcome.sum()), len(outcome))
        assert {name: row[name] for name in interval} == interval
        assert row["change"] == stats.paired_bootstrap(outcome, untouched)
        assert row["change"]["value"] == pytest.approx(outcome.mean() - untouched.mean())
        assert row["mcnemar"] == stats.mcnemar(untouched, outcome)
        assert row["mcnemar"]["b"] == sum(bool(u and not o) for u, o in zip(untouched, outcome, strict=True))
    assert rows[1]["heads"] == [[1, 2], [0, 3]] and rows[2]["pairs"] == [4, 5]


def test_mean_over_draws_averages_the_draws_of_one_kind_and_size(outcomes):
    conditions, by_task = outcomes
    outcome_CN = by_task["needle"]
    pooled = mean_over_draws(conditions, outcome_CN, "random", k=2)
    assert pooled == stats.bootstrap_mean(outcome_CN[2:4].mean(axis=0))
    assert pooled["n"] == 40  # cases, not cases times draws
    assert mean_over_draws(conditions, outcome_CN, "random")["value"] == pytest.approx(outcome_CN[2:].mean())
    assert mean_over_draws(conditions, outcome_CN, "retrieval") == stats.proportion(outcome_CN[1])  # one draw: a share
