"""The retrieval-head profile against hand-counted heads, brute force and the published profiles."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from retmask_jax.heads.profile import Scored, profile, profile_table
from retmask_jax.heads.scores import HeadScores
from retmask_jax.utils import stats

PUBLISHED = os.environ.get("RETMASK_PUBLISHED")
needs_published = pytest.mark.skipif(not PUBLISHED, reason="RETMASK_PUBLISHED is not set")
LAYOUT = ["layer_com", "layer_com_count", "early_frac", "mid_frac", "late_frac"]
LAYOUT += ["heads_per_active_group", "full_group_fraction"]
KEYS = ["n_heads", "frac", "gini", "zero_fraction", "top5_share", *LAYOUT]


def profile_of(mean_LH, **options):
    return profile(HeadScores.from_array(mean_LH), **options)


def test_profile_of_heads_counted_by_hand():
    # Six layers of two groups of two; the detected heads are one full group, a half one in the
    # middle and one head in the last layer. 0.05 is active but not detected.
    mean_LH = np.zeros((6, 4))
    mean_LH[0, :2] = 0.25
    mean_LH[2, 3] = 0.5
    mean_LH[5, 0] = 1.0
    mean_LH[1, 1] = mean_LH[4, 2] = 0.0625
    result = profile_of(mean_LH, n_kv_heads=2)
    assert list(result) == KEYS
    total = 2.125
    ranked = np.array([0.0625, 0.0625, 0.25, 0.25, 0.5, 1.0]) / total
    assert result == pytest.approx(
        {
            "n_heads": 4,
            "frac": 4 / 24,
            "gini": 1 + 1 / 24 - 2 * (ranked @ [6, 5, 4, 3, 2, 1]) / 24,
            "zero_fraction": 18 / 24,
            "top5_share": (total - 0.0625) / total,
            "layer_com": (0.5 * 2 + 1.0 * 5) / 2.0 / 5,
            "layer_com_count": (0 + 0 + 2 + 5) / 4 / 5,
            "early_frac": 2 / 4,
            "mid_frac": 1 / 4,
            "late_frac": 1 / 4,
            "heads_per_active_group": 4 / 3,
            "full_group_fraction": 1 / 3,
        }
    )
    assert {type(number) for number in result.values()} == {int, float}


def test_the_threshold_decides_which_heads_are_detected_and_nothing_else():
    mean_LH = np.zeros((3, 4))
    mean_LH[0, 0], mean_LH[2, 1] = 0.1, 0.05
    strict, loose = (profile_of(mean_LH, n_kv_heads=4, threshold=t) for t in (0.1, 0.05))
    assert (strict["n_heads"], loose["n_heads"]) == (1, 2)
    assert (strict["layer_com"], loose["layer_com_count"]) == (0, 0.5)
    assert loose["layer_com"] == pytest.approx(1 / 3)
    for key in ("gini", "zero_fraction", "top5_share"):
        assert strict[key] == loose[key]
    assert profile_of(mean_LH, n_kv_heads=4) == strict


@pytest.mark.parametrize("n_layers", range(1, 41))
def test_thirds_split_at_the_exact_fractions_of_the_depth(n_layers):
    result = profile_of(np.ones((n_layers, 1)), n_kv_heads=1)
    thirds = [0, 0, 0]
    for layer in range(n_layers):
        thirds[(3 * layer >= n_layers) + (3 * layer >= 2 * n_layers)] += 1 / n_layers
    assert [result[f"{part}_frac"] for part in ("early", "mid", "late")] == pytest.approx(thirds)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 4, 6, 12])
def test_groups_are_runs_of_query_heads_within_a_layer(n_kv_heads):
    mean_LH = np.random.default_rng(n_kv_heads).random((5, 12)) > 0.6
    groups = mean_LH.reshape(5 * n_kv_heads, -1)
    active = groups[groups.any(axis=1)]
    result = profile_of(mean_LH, n_kv_heads=n_kv_heads)
    assert result["heads_per_active_group"] == pytest.approx(active.sum(axis=1).mean())
    assert result["full_group_fraction"] == pytest.approx(active.all(axis=1).mean())


def test_sums_over_many_heads_keep_double_precision():
    mean_LH = np.random.default_rng(0).random((64, 64), dtype=np.float32)
    share = math.fsum(np.sort(mean_LH, axis=None)[-5:]) / math.fsum(mean_LH.ravel())
    result = profile_of(mean_LH, n_kv_heads=8)
    assert result["top5_share"] == pytest.approx(share, rel=1e-12)


def test_nothing_detected_leaves_the_layout_undefined():
    result = profile_of(np.full((2, 4), 0.01), n_kv_heads=2)
    assert (result["n_heads"], result["frac"], result["zero_fraction"]) == (0, 0, 0)
    assert result["top5_share"] == pytest.approx(5 / 8)
    assert all(math.isnan(result[key]) for key in LAYOUT)


def test_all_zero_scores_have_no_mass_to_share():
    result = profile_of(np.zeros((2, 4)), n_kv_heads=2)
    assert (result["gini"], result["zero_fraction"]) == (0, 1)
    assert math.isnan(result["top5_share"])


@pytest.mark.parametrize("n_kv_heads", [0, 3, 8])
def test_kv_heads_that_do_not_divide_the_query_heads_are_refused(n_kv_heads):
    with pytest.raises(ValueError, match=f"n_kv_heads={n_kv_heads} .* 4 query heads"):
        profile_of(np.zeros((2, 4)), n_kv_heads=n_kv_heads)


def test_signed_scores_are_refused():
    with pytest.raises(ValueError, match="signed"):
        profile_of([[0.5, -0.25]], n_kv_heads=1)


def _published(model):
    """(the whole file, its argmax scores, the parts of its profile that follow from them)."""
    published = json.loads(Path(PUBLISHED, "profiles", f"{model}.json").read_text())
    parts = [published["profile"][name] for name in ("concentration", "layer_profile", "gqa")]
    return published, HeadScores.from_array(published["argmax_scores"]), parts


@needs_published
@pytest.mark.parametrize("model", ["llama31_8b", "qwen25_7b"])
def test_published_scores_give_the_published_profile(model):
    published, scores, (concentration, layers, gqa) = _published(model)
    block = published["profile"]
    result = profile(scores, published["n_kv_heads"], threshold=block["threshold"])
    assert result == pytest.approx(
        {
            "n_heads": block["n_heads"],
            "frac": block["frac"],
            "gini": concentration["gini"],
            "zero_fraction": concentration["zero_fraction"],
            "top5_share": concentration["top5_mass_share"],
            "layer_com": layers["layer_com_weighted"],
            "layer_com_count": layers["layer_com"],
            "early_frac": layers["early_frac"],
            "mid_frac": layers["mid_frac"],
            "late_frac": layers["late_frac"],
            "heads_per_active_group": gqa["mean_heads_per_active_group"],
            "full_group_fraction": gqa["full_group_fraction"],
        },
        abs=1e-6,
        rel=0,
    )
    shared = ("n_heads", "frac", "gini", "zero_fraction", "layer_com")
    scalars = {key: block["scalars"][key] for key in shared}
    assert {key: result[key] for key in shared} == pytest.approx(scalars, abs=1e-6, rel=0)
    assert sorted(scores.heads(threshold=0.1)) == [tuple(h) for h in published["argmax_heads"]]


@needs_published
@pytest.mark.parametrize("model", ["llama31_8b", "qwen25_7b"])
def test_the_counts_beside_the_published_profile_follow_from_ours(model):
    published, scores, (concentration, layers, gqa) = _published(model)
    block = published["profile"]
    (row,) = profile_table([Scored(model, scores, published["n_kv_heads"], block["threshold"])])
    active = round((1 - row.zero_fraction) * scores.mean.size)
    assert row.n_layers == block["n_layers"] == layers["n_layers"]
    assert (scores.mean.size, active) == (block["n_heads_total"], concentration["n_active_heads"])
    assert row.heads_per_layer / row.n_kv_heads == gqa["group_size"]
    assert row.n_heads / row.heads_per_active_group == pytest.approx(gqa["n_active_groups"], abs=1e-6, rel=0)
    assert 1 - row.frac == pytest.approx(concentration["below_threshold_fraction"], abs=1e-6, rel=0)
    mean_active = scores.mean.sum(dtype=float) / active
    assert mean_active == pytest.approx(concentration["score_mean_active"], abs=1e-6, rel=0)


@needs_published
@pytest.mark.parametrize("model", ["llama31_8b", "qwen25_7b"])
def test_published_scores_of_two_detectors_agree_as_published(model):
    published = json.loads(Path(PUBLISHED, "profiles", f"{model}.json").read_text())
    block = published["profile"]
    agreement, ranks = block["detector_agreement"], block["detector_score_spearman"]
    scores = {name: HeadScores.from_array(published[f"{name}_scores"]) for name in ("argmax", "copy")}
    heads = {name: set(of.heads(threshold=block["threshold"])) for name, of in scores.items()}
    jaccard = stats.jaccard(*heads.values())
    assert [jaccard] * 2 == pytest.approx([agreement["jaccard"], block["scalars"]["detector_jaccard"]], abs=1e-6, rel=0)
    assert {name: len(of) for name, of in heads.items()} == {name: agreement[f"n_{name}"] for name in heads}
    both = len(heads["argmax"] & heads["copy"]), len(heads["argmax"] | heads["copy"])
    assert both == (agreement["intersection"], agreement["union"])
    for name, other in (("argmax", "copy"), ("copy", "argmax")):
        assert sorted(heads[name] - heads[other]) == [tuple(head) for head in agreement[f"only_{name}"]]
    result = stats.spearman(scores["argmax"].mean, scores["copy"].mean)
    assert result.value == pytest.approx(ranks["spearman_rho"], abs=1e-6, rel=0)
    assert math.log(result.p_value) == pytest.approx(math.log(ranks["spearman_p"]), abs=1e-6)


@needs_published
@pytest.mark.parametrize("model", ["llama31_8b", "qwen25_7b"])
def test_published_copy_scores_give_the_published_copy_heads(model):
    published = json.loads(Path(PUBLISHED, "profiles", f"{model}.json").read_text())
    scores = HeadScores.from_array(published["copy_scores"])
    result = profile(scores, published["n_kv_heads"])
    assert result["n_heads"] == published["profile"]["n_heads_copy"]
    assert result["frac"] == pytest.approx(published["profile"]["frac_copy"], abs=1e-6)
    assert sorted(scores.heads(threshold=0.1)) == [tuple(h) for h in published["copy_heads"]]
