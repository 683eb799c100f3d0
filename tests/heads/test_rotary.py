"""Which rotary pairs are ablated; what they carry, against a slow reference and published figures."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from helpers_tiny import CONFIG, WIDE, copying_lm, in_float64, reference, true_at
from helpers_tiny import WIDE_HEADS as HEADS

from retmask_jax.heads.conditions import Condition
from retmask_jax.heads.head_outputs import HeadStatistics, head_statistics, variance_removed
from retmask_jax.heads.query_norms import QueryNorms
from retmask_jax.heads.rotary import (
    condition_variance,
    cost_intervals,
    coverage_conditions,
    dose_conditions,
    matched_conditions,
    matched_pairs,
    patch_conditions,
    specificity,
    spectrum_centre,
    window_conditions,
    windows,
)
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions, mask_rope
from retmask_jax.model.masking import normalise

LM = copying_lm()
TEXTS = np.random.default_rng(8).integers(4, CONFIG.vocab_size, (3, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def statistics():
    return head_statistics(LM, TEXTS, batch_size=2)


def _diagonal(variances_R):
    """Statistics of WIDE in which pairs vary apart from each other, alike in all heads."""
    covariance = np.broadcast_to(np.diag(np.asarray(variances_R, np.float32)), (3, 12, 8, 8))
    zeros = np.zeros((3, 12, 16), np.float32)
    return HeadStatistics(zeros, covariance, zeros)


# --- conditions ---


def test_doses_name_pairs_and_heads():
    conditions = list(dose_conditions(WIDE, HEADS, [2, 3], draws=3, seed=5))
    kinds = ["lowest", "highest", "control heads, lowest"] + ["random"] * 3
    assert [c.kind for c in conditions] == [*kinds, *kinds]
    assert [c.draw for c in conditions if c.kind == "random"] == [0, 1, 2] * 2
    for k, part in ((2, conditions[:6]), (3, conditions[6:])):
        lowest, highest, control, *drawn = part
        assert lowest.pairs == control.pairs == tuple(range(8 - k, 8))  # frequencies fall with the index
        assert highest.pairs == tuple(range(k))
        assert {len(set(c.pairs)) for c in drawn} == {k} and len({c.pairs for c in drawn}) > 1
        assert all(c.heads == tuple(HEADS) for c in (lowest, highest, *drawn))
        assert sorted(layer for layer, _ in control.heads) == [0, 2, 2, 2]
        assert not set(control.heads) & set(HEADS)
    for condition in conditions:
        masks = normalise(WIDE, condition.interventions)
        assert true_at(masks.rope_BLHR[0]) == {(*head, pair) for head in condition.heads for pair in condition.pairs}
        assert not masks.head_BLH.any()


def test_utility_takes_each_heads_own_pairs():
    pair_LHR = np.random.default_rng(2).random((3, 12, 8))
    found = list(dose_conditions(WIDE, HEADS, [3], draws=0, norms=QueryNorms(pair_LHR.mean(axis=-1), pair_LHR)))
    by_kind = {c.kind: c for c in found}
    for kind, choose in (("low utility", lambda x: np.argsort(x)[:3]), ("high utility", lambda x: np.argsort(x)[-3:])):
        condition = by_kind[kind]
        assert (condition.n_pairs, condition.pairs, condition.heads) == (3, (), tuple(HEADS))
        expected = {(*head, int(pair)) for head in HEADS for pair in choose(pair_LHR[head])}
        assert true_at(condition.interventions.rope_mask) == expected


def test_windows_part_the_spectrum_from_the_lowest_frequency_on():
    assert windows(WIDE, 4) == [[6, 7], [4, 5], [2, 3], [0, 1]]
    assert sorted(sum(windows(WIDE, 3), [])) == list(range(8))
    with pytest.raises(ValueError, match="9 windows over the spectrum: the model has 8 rotary pairs"):
        windows(WIDE, 9)
    found = list(window_conditions(WIDE, HEADS, 4, seed=1))
    ours = [c for c in found if c.kind == "window"]
    assert [list(c.pairs) for c in ours] == windows(WIDE, 4) and [c.draw for c in ours] == [0, 1, 2, 3]
    for condition, control in zip(found[::2], found[1::2], strict=True):
        assert control.kind == "control heads, window" and control.pairs == condition.pairs
        assert not set(control.heads) & set(HEADS) and len(control.heads) == len(HEADS)


def test_coverage_and_patches_take_out_of_more_heads_and_of_each():
    assert [c.heads for c in coverage_conditions(WIDE, HEADS, (0.25, 0.3, 1.0), 2)] == [
        tuple(HEADS[:1]),
        tuple(HEADS[:2]),
        tuple(HEADS),
    ]
    found = list(patch_conditions(WIDE, HEADS, 2))
    assert [(c.kind, c.heads) for c in found] == [(kind, (head,)) for head in HEADS for kind in ("lowest", "highest")]
    assert {c.pairs for c in found} == {(6, 7), (0, 1)}


def test_the_site_reaches_every_condition():
    at = {c.site for c in dose_conditions(WIDE, HEADS, [1], draws=1, site="projection")}
    assert at == {"projection"}


# --- what pairs carry ---


def test_statistics_of_heads_equal_the_reference(statistics):
    """With texts of fewer tokens than are looked at, every position counts. The logarithm of an attention weight is q.k
    but for a constant of its row, so its variance over keys is that of q.k, with pairs ablated or not."""
    params = in_float64(LM.params)
    means, values, queries = [], [], []
    for row in TEXTS:
        kept, asked = [], []
        _, attention = reference(params, row, kept=kept, queries=asked)
        queries.append(np.mean(asked, axis=1))
        v_LTKD = np.stack(kept[:-1]).repeat(2, axis=2)
        means.append(np.einsum("lhts,lshd->lhd", attention, v_LTKD) / len(row))
    np.testing.assert_allclose(statistics.mean_LHD, np.mean(means, axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(statistics.query_LHD, np.mean(queries, axis=0), rtol=1e-3, atol=1e-4)
    assert statistics.mean_for("mean") is statistics.mean_LHD and statistics.mean_for("zero") is None
    assert statistics.mean_for("query_mean") is statistics.query_LHD

    for head, pairs in (((0, 1), [0, 5, 9]), ((1, 2), [3]), ((1, 3), range(14))):
        mask = np.zeros((CONFIG.n_layers, CONFIG.n_heads, CONFIG.n_pairs), bool)
        mask[*head, list(pairs)] = True
        before, after = (np.mean([_spread(params, row, head, m) for row in TEXTS]) for m in (None, mask))
        found = variance_removed(statistics, [head], mask[head][None])
        assert found.shape == (1, 1) and found[0, 0] == pytest.approx(1 - after / before, rel=1e-3, abs=1e-4)
        values.append(found[0, 0])
    assert len(set(np.round(values, 3))) == 3


def _spread(params, row, head, rope_mask):
    """Mean over queries of the variance of a head's q.k over the keys it sees."""
    _, attention = reference(params, row, rope_mask=rope_mask)
    return np.mean([np.log(attention[*head, t, : t + 1]).var() for t in range(len(row))])


def test_what_is_not_rotated_carries_its_share(random_model):
    config = ModelConfig(
        vocab_size=31,
        hidden_size=16,
        mlp_size=8,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        rotary_dim=4,
        max_length=64,
    )
    found = head_statistics(random_model(config), TEXTS[:2] % 31)
    assert found.covariance_LHRR.shape == (2, 2, 3, 3)
    assert 0.02 < variance_removed(found, [(1, 1)], [[True, True]])[0, 0] < 0.98


def test_nothing_out_removes_nothing_and_everything_out_all(statistics):
    none, everything = variance_removed(statistics, [(0, 0), (1, 3)], [[False] * 16, [True] * 16])
    assert none.tolist() == [0, 0] and everything.tolist() == [1, 1]


def test_matched_pairs_are_others_that_carry_as_much():
    statistics = _diagonal([5, 1, 2, 3, 1, 1, 4, 3])
    sets = matched_pairs(WIDE, HEADS, [6, 7], statistics, 6)  # 7 of 20
    assert len(set(map(tuple, sets))) == 6 and not any(set(found) & {6, 7} for found in sets)
    assert [np.take([5, 1, 2, 3, 1, 1, 4, 3], found).sum() for found in sets] == [7] * 6
    drawn = list(matched_conditions(WIDE, HEADS, [2], statistics, draws=6))
    assert {c.n_pairs for c in drawn} == {2} and [list(c.pairs) for c in drawn] == sets
    assert [condition_variance(c, statistics) for c in drawn] == [pytest.approx(7 / 20)] * 6
    assert list(matched_conditions(WIDE, HEADS, [8], statistics, draws=2)) == []
    with pytest.raises(ValueError, match="all 8 rotary pairs are ablated"):
        matched_pairs(WIDE, HEADS, range(8), statistics, 1)


def test_variance_of_a_condition_is_its_own_heads_and_of_the_rotary_site_alone():
    statistics = _diagonal([1, 1, 1, 1, 1, 1, 1, 3])
    condition = Condition("lowest", 0, mask_rope(WIDE, HEADS, [7]), tuple(HEADS), (7,))
    assert condition_variance(condition, statistics) == pytest.approx(0.3)
    at_projection = dataclasses.replace(condition, interventions=mask_rope(WIDE, HEADS, [7], site="projection"))
    assert condition_variance(at_projection, statistics) is None
    assert condition_variance(Condition("none", 0, Interventions()), statistics) is None


# --- what it comes to ---


def test_centre_of_the_spectrum():
    assert spectrum_centre([0, 0, 0.4, 0, 0, 0, 0, 0]) == (0.3125, 0)
    centre, width = spectrum_centre([0.3, 0, 0, 0.3])
    assert (centre, width) == (pytest.approx(0.5), pytest.approx(0.375))
    assert spectrum_centre([0.5, -0.4, 0, 0])[0] == pytest.approx(0.125)  # what rises does not pull
    assert all(map(math.isnan, spectrum_centre([0.0, -0.1])))


def test_costs_are_relative_and_undefined_without_a_drop():
    untouched, patched = np.ones(200, bool), np.arange(200) < 50
    found = cost_intervals(np.full(30, math.log(1.2)), untouched, patched)
    assert found.perplexity_increase.value == pytest.approx(0.2)
    assert found.recall_drop.value == pytest.approx(0.75)
    assert found.ratio.value == pytest.approx(0.2 / 0.75) == specificity(math.log(1.2), 1.0, 0.25)
    assert found.ratio.low < found.ratio.value < found.ratio.high
    assert (found.perplexity_increase.n, found.recall_drop.n) == (30, 200)
    assert cost_intervals(np.zeros(3), untouched, untouched).ratio is None
    assert math.isnan(specificity(0.1, 0.0, 0.0))


@pytest.mark.skipif("RETMASK_PUBLISHED" not in os.environ, reason="needs the published profiles")
def test_published_centres_and_ratios_follow_from_the_published_figures():
    paths = sorted(Path(os.environ["RETMASK_PUBLISHED"]).glob("profiles/*.json"))
    assert paths
    for path in paths:
        published = json.loads(path.read_text())["profile"]
        sweep, patch = published["freq_signature"], published["freq_patch"]
        centre, width = spectrum_centre(sweep["drop"])
        assert (centre, width) == (pytest.approx(sweep["freq_com"]), pytest.approx(sweep["freq_width"], abs=1e-9))
        change = math.log(patch["perplexity_ratio"])
        ratio = specificity(change, patch["baseline"], patch["low_freq"])
        assert ratio == pytest.approx(patch["specificity_ratio"], nan_ok=True)
