"""Causal experiments: answers under masks against a slow reference, and the statistics of their outcomes."""

import numpy as np
import pytest
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, in_float64, reference_answer

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.needles import Case, Needle, Spec
from retmask_jax.generation.decode import generate_batch
from retmask_jax.heads import conditions as causal
from retmask_jax.heads.conditions import Condition, answers, hits, mean_over_draws, summarise
from retmask_jax.model.interventions import Interventions, all_heads, mask_heads, mask_queries, mask_rope, stream_heads
from retmask_jax.model.masking import normalise
from retmask_jax.utils import stats

LM = copying_lm()


def _case(tokens, answer="", memory=None):
    return Case(tuple(tokens), (0, 0), Needle("", "", answer, memory=memory), Spec(0, 0.0, 0, (), 0))


def _cases(n):
    rng = np.random.default_rng(3)
    return [_case(map(int, rng.choice(rng.integers(4, CONFIG.vocab_size, 20), 25 + 5 * i))) for i in range(n)]


# --- answers ---


# Both means are in every mask that has one of them, so that one program takes them all.
HEAD_MEAN, QUERY_MEAN = (np.random.default_rng(9).normal(0, size, (2, 4, 32)).astype(np.float32) for size in (1, 2))
MASKS = {
    "none": Interventions(),
    "two heads": mask_heads(CONFIG, [(1, 0), (0, 2)]),
    "all heads": mask_heads(CONFIG, all_heads(CONFIG)),
    "rotary pairs": mask_rope(CONFIG, [(1, 0), (1, 3)], [0, 1, 4]),
    "both": mask_heads(CONFIG, [(1, 1)]) | mask_rope(CONFIG, [(1, 0)], range(8)),
    "mean": mask_heads(CONFIG, [(1, 0), (0, 2)], HEAD_MEAN).replace(query_mean=QUERY_MEAN),
    "query": mask_queries(CONFIG, [(1, 0)]),
    "streams": stream_heads(CONFIG, [(1, 0), (0, 2)], sink=2, window=6),
    "query mean": mask_queries(CONFIG, [(1, 0)], QUERY_MEAN).replace(head_mean=HEAD_MEAN),
}


def test_answers_under_many_masks_equal_runs_with_one():
    cases, params = _cases(3), in_float64(LM.params)
    before = generate_batch._cache_size()
    together = answers(LM, cases, list(MASKS.values()), max_new_tokens=NEW, batch_size=BATCH)
    assert generate_batch._cache_size() - before <= 1  # one program served them all
    for mask, texts in zip(MASKS.values(), together, strict=True):
        assert answers(LM, cases, [mask], max_new_tokens=NEW, batch_size=BATCH) == [texts]
        dense = normalise(CONFIG, mask)
        masks = {"head_mask": dense.head_BLH[0], "rope_mask": dense.rope_BLHR[0]}
        masks |= {} if mask.head_mean is None else {"head_mean": dense.mean_BLHD[0]}
        masks |= {} if dense.streams is None else {"streams": (dense.streams.gate[0], 2, 6)}
        masks |= {"query_mask": dense.query_BLH[0], "query_mean": dense.query_mean_BLHD[0]}
        slow = [reference_answer(params, case.tokens, NEW, (tl.EOS,), **masks)[0] for case in cases]
        assert texts == [" ".join(tl.VOCABULARY[i] for i in tokens if i > tl.UNK) for tokens in slow]
    assert len({tuple(texts) for texts in together}) == len(MASKS)  # every mask made a difference


def test_the_sites_are_two_programs_whatever_the_masks():
    cases = _cases(2)
    at_projection = [mask_rope(CONFIG, [(1, 0)], [pair], site="projection") for pair in (0, 5)]
    answers(LM, cases, [Interventions()], max_new_tokens=NEW, batch_size=BATCH)
    before = generate_batch._cache_size()
    masks = [Interventions(), at_projection[0], mask_rope(CONFIG, [(1, 0)], [3]), at_projection[1]]
    together = answers(LM, cases, masks, max_new_tokens=NEW, batch_size=BATCH)
    assert generate_batch._cache_size() - before <= 1
    assert together == [answers(LM, cases, [mask], max_new_tokens=NEW, batch_size=BATCH)[0] for mask in masks]


def test_many_masks_are_repeated_for_the_cases_in_parts(monkeypatch):
    cases, masks = _cases(3), list(MASKS.values())
    whole = answers(LM, cases, masks, max_new_tokens=NEW, batch_size=BATCH)
    monkeypatch.setattr(causal, "_MASK_BYTES", 3000)
    assert len(causal._together(CONFIG, masks, len(cases))) > 3
    assert answers(LM, cases, masks, max_new_tokens=NEW, batch_size=BATCH) == whole


@pytest.mark.parametrize("masks", [["none", "two heads", "query"], ["two heads"]], ids=["several", "one"])
def test_answers_that_are_known_are_not_computed_again(masks):
    """Whether prompts are shared among masks or not, each new answer is given away as soon as it is there."""
    cases, chosen, made = _cases(3), [MASKS[name] for name in masks], {}
    options = {"max_new_tokens": NEW, "batch_size": BATCH}
    whole = answers(LM, cases, chosen, done=made.__setitem__, **options)
    assert set(made) == {(mask, case) for mask in range(len(masks)) for case in range(3)}

    again, left = {}, {(len(masks) - 1, 0), (0, 2)}
    known = {place: tokens for place, tokens in made.items() if place not in left}
    assert answers(LM, cases, chosen, known=known, done=again.__setitem__, **options) == whole
    assert again == {place: made[place] for place in left}
    assert answers(LM, cases, chosen, known=made, done=None, **options) == whole


def test_hits_are_whole_words_in_order():
    cases = [_case([], "Fig elm oak", memory="Rome") for _ in range(7)]
    texts = [
        "it is fig elm oak .",
        "FIG, elm: oak!",
        "fig oak elm",
        "fig elm",
        "figs elm oak",
        "",
        "fig elm and oak in rome",
    ]
    assert hits(texts, cases).tolist() == [True, True, False, False, False, False, False]
    assert hits(texts, cases, "memory").tolist() == [False] * 6 + [True]
    with pytest.raises(ValueError):
        hits(texts[:2], cases)


# --- summaries ---


def test_a_contrast_is_paired_over_cases_and_pools_draws():
    conditions = [Condition("none", 0, Interventions()), Condition("retrieval", 0, Interventions())]
    conditions += [Condition("random", draw, Interventions()) for draw in range(3)]
    rng = np.random.default_rng(11)
    outcome_CN = rng.random((5, 50)) < np.array([0.9, 0.3, 0.8, 0.7, 0.9])[:, None]
    found = causal.contrast(conditions, outcome_CN, {"kind": "retrieval"}, {"kind": "random"})
    assert found.change == stats.paired_bootstrap(outcome_CN[2:].astype(float), outcome_CN[1:2].astype(float))
    assert found.change.value == pytest.approx(outcome_CN[2:].mean() - outcome_CN[1].mean())
    assert found.p_value == np.median([stats.mcnemar(outcome_CN[i], outcome_CN[1]).p_value for i in (2, 3, 4)])


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
    assert [(row.task, row.kind, row.draw, row.k) for row in rows] == [
        (task, c.kind, c.draw, len(c.pairs)) for task in by_task for c in conditions
    ]
    for row, (task, i) in zip(rows, [(task, i) for task in by_task for i in range(5)], strict=True):
        outcome, untouched = by_task[task][i], by_task[task][0]
        interval = stats.wilson(int(outcome.sum()), len(outcome))
        assert row.number == interval
        assert row.change == stats.paired_bootstrap(outcome, untouched)
        assert row.change.value == pytest.approx(outcome.mean() - untouched.mean())
        assert row.mcnemar == stats.mcnemar(untouched, outcome)
        assert row.mcnemar.b == sum(bool(u and not o) for u, o in zip(untouched, outcome, strict=True))
    assert rows[1].heads == [(1, 2), (0, 3)] and rows[2].pairs == [4, 5]
    for task in by_task:
        of_task = [row for row in rows if row.task == task]
        adjusted = stats.benjamini_hochberg([row.mcnemar.p_value for row in of_task[1:]])
        assert [row.q for row in of_task] == [1.0, *adjusted]


def test_mean_over_draws_averages_the_draws_of_one_kind_and_size(outcomes):
    conditions, by_task = outcomes
    outcome_CN = by_task["needle"]
    pooled = mean_over_draws(conditions, outcome_CN, kind="random", n_pairs=2)
    assert pooled == stats.bootstrap_mean(outcome_CN[2:4].mean(axis=0))
    assert pooled.n == 40  # cases, not cases times draws
    assert mean_over_draws(conditions, outcome_CN, kind="random").value == pytest.approx(outcome_CN[2:].mean())
    assert mean_over_draws(conditions, outcome_CN, kind="retrieval") == stats.proportion(
        outcome_CN[1]
    )  # one draw: a share
