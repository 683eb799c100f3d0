"""Statistics against closed forms, brute force, SciPy's own and the published profiles."""

import dataclasses
import itertools
import json
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from retmask_jax.utils import stats

PUBLISHED = os.environ.get("RETMASK_PUBLISHED")
PROFILES = sorted(Path(PUBLISHED, "profiles").glob("*.json")) if PUBLISHED else []
needs_published = pytest.mark.skipif(not PUBLISHED, reason="RETMASK_PUBLISHED is not set")
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@quick
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=12).filter(any))
def test_gini_is_half_the_relative_mean_absolute_difference(x):
    differences = np.abs(np.subtract.outer(x, x)).mean()
    assert stats.gini(x) == pytest.approx(differences / (2 * np.mean(x)), abs=1e-9)


def test_gini_of_one_owner_of_equals_and_of_nothing():
    assert stats.gini(np.eye(1, 8).reshape(2, 4)) == pytest.approx(7 / 8)
    assert stats.gini([3.0, 3.0, 3.0]) == pytest.approx(0)
    assert stats.gini(np.zeros((2, 3))) == 0


def test_gini_refuses_signed_empty_and_non_finite_scores():
    with pytest.raises(ValueError, match="-0.5"):
        stats.gini([1.0, -0.5])
    with pytest.raises(ValueError, match="no values"):
        stats.gini([])
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        stats.gini([1.0, math.nan])


@quick
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_a_fair_coin_over_the_discordant_pairs(pairs):
    a, b = np.array(pairs).T
    result = stats.mcnemar(a, b)
    wins, losses = pairs.count((True, False)), pairs.count((False, True))
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    assert (result.b, result.c, result.n_discordant) == (wins, losses, n)
    assert result.p_value == pytest.approx(min(1, 2 * tail))


def test_mcnemar_refuses_what_is_not_paired_outcomes():
    with pytest.raises(ValueError, match="3 and 2"):
        stats.mcnemar([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match=r"\[0, 0.5\]"):
        stats.mcnemar([0, 0.5], [1, 0])
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        stats.mcnemar(np.eye(2), np.eye(2))


@quick
@given(st.integers(1, 200), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(n, share, level):
    successes = round(share * n)
    reference = scipy.stats.binomtest(successes, n).proportion_ci(level, "wilson")
    result = stats.wilson(successes, n, level)
    assert (result.value, result.n) == (successes / n, n)
    assert (result.low, result.high) == pytest.approx(tuple(reference), abs=1e-12)
    assert 0 <= result.low <= result.value <= result.high <= 1


def test_wilson_of_none_and_of_all_ends_exactly_at_the_edge():
    for n in range(1, 200):
        assert stats.wilson(0, n).low == 0
        assert stats.wilson(n, n).high == 1


def test_wilson_refuses_impossible_counts_and_levels():
    for successes, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"{successes} of {n}"):
            stats.wilson(successes, n)
    with pytest.raises(ValueError, match="95"):
        stats.wilson(1, 2, level=95)


def test_proportion_counts_the_true_outcomes():
    assert stats.proportion([True, False, True, True], 0.9) == stats.wilson(3, 4, 0.9)
    with pytest.raises(ValueError, match="right-or-wrong"):
        stats.proportion([0, 2])


def test_bootstrap_reaches_the_distribution_of_all_resamples():
    x = [0.0, 1.0, 10.0, 100.0]
    means = [np.mean(draw) for draw in itertools.product(x, repeat=4)]
    expected = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    result = stats.bootstrap_mean(x, level=0.8, seed=3)
    assert (result.low, result.high) == pytest.approx(expected)
    assert (result.value, result.n) == (np.mean(x), 4)


def test_bootstrap_of_many_samples_has_the_width_of_the_normal_interval():
    x = np.random.default_rng(0).exponential(size=2000)
    result = stats.bootstrap_mean(x, n_resamples=4000)
    half = scipy.stats.norm.ppf(0.975) * x.std() / math.sqrt(x.size)
    assert result.high - result.low == pytest.approx(2 * half, rel=0.05)


def test_bootstrap_does_not_depend_on_how_many_numbers_are_drawn_at_once(monkeypatch):
    x = np.random.default_rng(1).normal(size=50)
    whole = stats.bootstrap_mean(x, n_resamples=101, seed=5)
    monkeypatch.setattr(stats, "_BLOCK", 150)
    assert stats.bootstrap_mean(x, n_resamples=101, seed=5) == whole


def test_bootstrap_memory_does_not_grow_with_the_number_of_resamples():
    x = np.random.default_rng(1).normal(size=5000)
    tracemalloc.start()
    stats.bootstrap_mean(x, n_resamples=4000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # one index per drawn sample would be 160 MB


def test_bootstrap_repeats_by_seed_and_differs_between_seeds():
    x = np.random.default_rng(2).normal(size=40)
    first = stats.bootstrap_mean(x, n_resamples=200, seed=1)
    assert stats.bootstrap_mean(x, n_resamples=200, seed=1) == first
    assert stats.bootstrap_mean(x, n_resamples=200, seed=2) != first


def test_paired_bootstrap_sees_the_pairing():
    b = np.random.default_rng(3).normal(size=60)
    constant = stats.paired_bootstrap(b + 0.25, b, n_resamples=500)
    assert [getattr(constant, key) for key in ("value", "low", "high")] == pytest.approx([0.25] * 3)
    shuffled = stats.paired_bootstrap(b[::-1] + 0.25, b, n_resamples=500)
    assert shuffled.high - shuffled.low > 0.3


def test_paired_bootstrap_is_the_bootstrap_of_the_differences():
    a, b = np.random.default_rng(4).normal(size=(2, 30))
    assert stats.paired_bootstrap(a, b, seed=9) == stats.bootstrap_mean(a - b, seed=9)
    assert stats.paired_bootstrap(a, b, level=0.5) != stats.paired_bootstrap(a, b, level=0.9)


def test_runs_over_the_same_samples_are_not_more_samples():
    a, b = np.random.default_rng(5).normal(size=(2, 30))
    once = stats.paired_bootstrap(a, b)
    tiled = stats.paired_bootstrap(np.tile(a, (7, 1)), b)
    assert dataclasses.astuple(tiled) == pytest.approx(dataclasses.astuple(once))
    assert once.n == 30


def test_runs_are_averaged_and_not_resampled():
    noise = np.random.default_rng(6).normal(size=30)
    result = stats.bootstrap_mean([noise, -noise])
    assert [getattr(result, key) for key in ("value", "low", "high")] == pytest.approx([0, 0, 0])


def test_bootstraps_refuse_unpaired_samples_and_bad_settings():
    with pytest.raises(ValueError, match="3 and 2 samples"):
        stats.paired_bootstrap(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"\(1, 1, 2\)"):
        stats.bootstrap_mean(np.zeros((1, 1, 2)))
    with pytest.raises(ValueError, match="n_resamples .* 0"):
        stats.bootstrap_mean([1.0], n_resamples=0)
    with pytest.raises(ValueError, match="level .* 1.5"):
        stats.bootstrap_mean([1.0], level=1.5)


def test_intervals_are_plain_numbers():
    for result in (
        stats.proportion(np.array([True, False])),
        stats.bootstrap_mean(np.array([1.0, 2.0]), n_resamples=10),
        stats.paired_bootstrap(np.array([1.0, 2.0]), np.zeros(2), n_resamples=10),
    ):
        assert [type(number) for number in dataclasses.astuple(result)] == [float, float, float, int]


def test_jaccard_of_head_sets_in_any_container():
    assert stats.jaccard([(0, 1), (2, 3)], {(2, 3), (4, 5), (6, 7)}) == 1 / 4
    assert stats.jaccard([[0, 1], [2, 3]], np.array([[2, 3], [0, 1]])) == 1
    assert stats.jaccard([(0, 1)], []) == 0
    assert stats.jaccard([], []) == 1


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_benjamini_hochberg_agrees_with_scipy(p):
    reference = scipy.stats.false_discovery_control(p)
    np.testing.assert_allclose(stats.benjamini_hochberg(p), reference, rtol=1e-12)


def test_benjamini_hochberg_keeps_the_shape_and_refuses_what_is_no_probability():
    adjusted = stats.benjamini_hochberg([[0.03, 0.01], [0.04, 0.9]])
    np.testing.assert_allclose(adjusted, [[4 * 0.04 / 3, 0.04], [4 * 0.04 / 3, 0.9]])
    with pytest.raises(ValueError, match="1.2"):
        stats.benjamini_hochberg([0.1, 1.2])


def brute_force_permutation(values_LH, labels_LH):
    """p-value over every relabelling within the layers, of the centred difference of means."""
    n_heads = values_LH.shape[1]
    choices = [itertools.combinations(range(n_heads), int(row.sum())) for row in labels_LH]
    differences = []
    for picks in itertools.product(*choices):
        labels = np.array([[head in pick for head in range(n_heads)] for pick in picks])
        differences.append(values_LH[labels].mean() - values_LH[~labels].mean())
    centre = np.mean(differences)
    observed = values_LH[labels_LH].mean() - values_LH[~labels_LH].mean()
    far = np.abs(np.array(differences) - centre) >= abs(observed - centre) - 1e-9
    return observed, centre, far.mean()


@pytest.mark.parametrize("seed", range(4))
def test_permutation_test_reaches_the_exact_p_value(seed):
    # Whole numbers make ties; the layers differ in level and in their number of labelled heads.
    values_LH = np.random.default_rng(seed).integers(0, 4, (4, 4)) + np.array([[0], [5], [1], [9]])
    labels_LH = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=bool)
    value, expected, p_value = brute_force_permutation(values_LH, labels_LH)
    result = stats.layer_clustered_permutation(values_LH, labels_LH, n_permutations=20000)
    assert result.value == pytest.approx(value)
    assert result.expected == pytest.approx(expected)
    assert result.p_value == pytest.approx(p_value, abs=0.015)
    assert result.n == 6


def test_permutation_test_repeats_by_seed_and_differs_between_seeds():
    values_LH = np.random.default_rng(7).normal(size=(4, 8))
    labels_LH = np.arange(32).reshape(4, 8) % 3 == 0
    first, again, other = (
        stats.layer_clustered_permutation(values_LH, labels_LH, n_permutations=999, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.p_value != other.p_value


def test_permutation_test_is_blind_to_differences_between_layers():
    values_LH = np.repeat([[0.0], [1.0]], 8, axis=1)
    values_LH[:, 0] += 1e-3
    labels_LH = np.zeros((2, 8), dtype=bool)
    labels_LH[0, :1] = labels_LH[1, :7] = True
    result = stats.layer_clustered_permutation(values_LH, labels_LH)
    assert result.value == pytest.approx(result.expected, abs=1e-3)
    assert result.value > 0.7
    assert result.p_value > 0.05


def test_permutation_test_finds_a_difference_within_layers(monkeypatch):
    values_LH = np.random.default_rng(8).normal(size=(6, 16))
    labels_LH = np.zeros((6, 16), dtype=bool)
    labels_LH[:, :3] = True
    values_LH[labels_LH] += 3
    result = stats.layer_clustered_permutation(values_LH, labels_LH, n_permutations=999, seed=1)
    assert result.p_value == 1 / 1000
    monkeypatch.setattr(stats, "_BLOCK", 500)
    small = stats.layer_clustered_permutation(values_LH, labels_LH, n_permutations=999, seed=1)
    assert small == result


def test_many_numbers_per_head_are_tested_by_the_same_permutations_as_each_alone():
    values_LHV = np.random.default_rng(4).integers(0, 5, (5, 6, 4)).astype(float)  # whole numbers make ties
    labels_LH = np.arange(30).reshape(5, 6) % 4 == 1
    together = stats.layer_clustered_p_values(values_LHV, labels_LH, 300, seed=2)
    alone = [stats.layer_clustered_permutation(values_LHV[..., v], labels_LH, 300, seed=2).p_value for v in range(4)]
    assert together.tolist() == alone and len(set(alone)) > 1


def test_permutation_test_refuses_labels_that_cannot_be_permuted():
    values_LH = np.arange(6.0).reshape(2, 3)
    with pytest.raises(ValueError, match="no layer has both"):
        stats.layer_clustered_permutation(values_LH, np.array([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match=r"\(2, 3\).*bool\(3, 2\)"):
        stats.layer_clustered_permutation(values_LH, np.eye(3, 2, dtype=bool))
    with pytest.raises(ValueError, match="int64"):
        stats.layer_clustered_permutation(values_LH, np.eye(2, 3, dtype=np.int64))
    with pytest.raises(ValueError, match="n_permutations"):
        stats.layer_clustered_permutation(values_LH, np.eye(2, 3, dtype=bool), n_permutations=0)


def test_cohens_d_is_the_t_statistic_without_the_sample_sizes():
    rng = np.random.default_rng(9)
    a, b = rng.normal(1, 2, size=7), rng.normal(size=12)
    t = scipy.stats.ttest_ind(a, b).statistic
    assert stats.cohens_d(a, b) == pytest.approx(t * math.sqrt(1 / 7 + 1 / 12))
    assert stats.cohens_d([1.0, 3.0], [0.0, 2.0]) == pytest.approx(1 / math.sqrt(2))


def test_cohens_d_without_a_spread_or_with_single_values():
    assert math.isnan(stats.cohens_d([0.1] * 3, [0.3] * 3))
    with pytest.raises(ValueError, match="1, 3"):
        stats.cohens_d([1.0], [1.0, 2.0, 3.0])


def test_spearman_is_pearson_of_the_ranks_over_all_entries():
    x, y = np.random.default_rng(10).integers(0, 5, size=(2, 4, 6))
    ranks = [scipy.stats.rankdata(side) for side in (x, y)]
    result = stats.spearman(x, y)
    assert result.value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert result.n == 24
    assert stats.spearman([1, 2, 3], [1, 8, 27]).value == pytest.approx(1)


def test_spearman_of_a_constant_and_of_unpaired_values():
    result = stats.spearman([1.0, 1.0], [1.0, 2.0])
    assert math.isnan(result.value)
    assert math.isnan(result.p_value)
    with pytest.raises(ValueError, match="2 and 3"):
        stats.spearman([1, 2], [1, 2, 3])


def test_spearman_interval_covers_the_correlation_of_the_population():
    rng, rho = np.random.default_rng(11), 0.6
    draws = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(1000, 12))
    expected = 6 / math.pi * math.asin(rho / 2)  # rank correlation of a bivariate normal
    results = [stats.spearman_interval(*draw.T) for draw in draws]
    covered = np.mean([result.low <= expected <= result.high for result in results])
    assert covered == pytest.approx(0.95, abs=0.025)
    assert all(result.low < result.value < result.high for result in results)
    assert results[0].value == stats.spearman(*draws[0].T).value
    assert results[0].n == 12


def test_spearman_interval_of_perfect_order_of_a_constant_and_of_too_few():
    perfect = stats.spearman_interval(range(10), range(10, 0, -1))
    assert [getattr(perfect, key) for key in ("value", "low", "high")] == pytest.approx([-1] * 3)
    assert math.isnan(stats.spearman_interval([1.0] * 5, range(5)).low)
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        stats.spearman_interval([1, 2, 3], [1, 2, 3])


def residual_correlation(x_LH, y_LH, fixed=()):
    """Correlation of what a regression on layers and on `fixed` leaves of the ranks within layers."""
    ranked = [np.stack([scipy.stats.rankdata(row) for row in side]).ravel() for side in (x_LH, y_LH, *fixed)]
    layers = np.repeat(np.eye(len(x_LH)), np.shape(x_LH)[1], axis=0)
    design = np.column_stack([layers, *ranked[2:]])
    left = [side - design @ np.linalg.lstsq(design, side, rcond=None)[0] for side in ranked[:2]]
    return np.corrcoef(*left)[0, 1]


@pytest.mark.parametrize("n_given", [0, 1, 2])
def test_partial_spearman_is_the_correlation_of_the_residuals_of_a_regression(n_given):
    x, y, *fixed = np.random.default_rng(12).integers(0, 9, size=(2 + n_given, 4, 7)).astype(float)
    result = stats.partial_spearman(x, y, fixed, n_resamples=50)
    assert result.value == pytest.approx(residual_correlation(x, y, fixed))
    assert result.n == 4


def test_partial_spearman_reaches_the_distribution_of_all_resamples_of_layers():
    x, y, z = np.random.default_rng(13).normal(size=(3, 4, 6)).cumsum(axis=0)
    every = [residual_correlation(x[list(i)], y[list(i)], [z[list(i)]]) for i in itertools.product(range(4), repeat=4)]
    result = stats.partial_spearman(x, y, [z], n_resamples=20000, level=0.8)
    expected = np.quantile(every, [0.1, 0.9], method="inverted_cdf")
    assert (result.low, result.high) == pytest.approx(expected, abs=0.02)
    first, again, other = (stats.partial_spearman(x, y, n_resamples=20, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_partial_spearman_sees_order_within_layers_only():
    rng = np.random.default_rng(14)
    x, y = rng.normal(size=(2, 6, 20))
    scale, shift = rng.uniform(1, 9, size=(6, 1)), rng.normal(scale=99, size=(6, 1))
    moved = stats.partial_spearman(scale * np.exp(x) + shift, y + shift, n_resamples=100)
    assert moved == stats.partial_spearman(x, y, n_resamples=100)
    assert stats.spearman(np.exp(x) + shift, y + shift).value > 0.9 > 0.3 > abs(moved.value)


def test_what_a_third_quantity_explains_is_no_partial_correlation():
    z, x, y = np.random.default_rng(15).normal(size=(3, 12, 30))
    plain = stats.partial_spearman(z + 0.5 * x, z + 0.5 * y, n_resamples=500)
    partial = stats.partial_spearman(z + 0.5 * x, z + 0.5 * y, [z], n_resamples=500)
    assert plain.low > 0.6
    assert partial.low < 0.1 and abs(partial.value) < 0.2


def test_partial_spearman_of_what_does_not_vary_is_undefined():
    x = np.random.default_rng(16).normal(size=(3, 4))
    for other, fixed in ((np.repeat([[0.0], [1.0], [2.0]], 4, axis=1), ()), (-x, [np.exp(x)])):
        result = stats.partial_spearman(x, other, fixed, n_resamples=20)
        assert all(math.isnan(getattr(result, key)) for key in ("value", "low", "high")) and result.n == 3
    for shape in ((1, 4), (4,)):
        with pytest.raises(ValueError, match="2 or more layers"):
            stats.partial_spearman(np.ones(shape), np.ones(shape))
    with pytest.raises(ValueError, match=r"\(3, 4\), \(4, 3\)"):
        stats.partial_spearman(x, x.T)


@needs_published
def test_published_mcnemar_counts_give_the_published_p_values():
    tests = [
        (block[key], block["n_samples"])
        for path in PROFILES
        for block, key in (
            (json.loads(path.read_text())["profile"]["knockout"], "mcnemar"),
            (json.loads(path.read_text())["profile"]["freq_patch"], "frequency_mcnemar"),
        )
    ]
    assert len(tests) == 4
    for published, n in tests:
        b, c = (published[key] for key in published if key[:2] in ("b_", "c_"))
        samples = np.arange(n)
        result = stats.mcnemar(samples < b, (samples >= b) & (samples < b + c))
        assert (result.b, result.c, result.n_discordant) == (b, c, b + c)
        assert result.p_value == pytest.approx(published["p_value"], rel=1e-9)


@needs_published
def test_published_frequency_effects_have_the_published_intervals():
    for path in PROFILES:
        block = json.loads(path.read_text())["profile"]["freq_patch"]
        n = block["n_samples"]
        low_frequency, high_frequency = (
            np.arange(n) < round(block[condition] * n) for condition in ("low_freq", "high_freq")
        )
        result = stats.paired_bootstrap(low_frequency, high_frequency)
        # The bounds are steps of 1/n, which another stream of random numbers may pass by one.
        expected = block["frequency_effect_ci95"]
        assert (result.low, result.high) == pytest.approx(expected, abs=1.01 / n)
        assert result.value == pytest.approx(block["frequency_effect"])


@needs_published
def test_published_detectors_agree_as_published():
    for path in PROFILES:
        published = json.loads(path.read_text())
        agreement = published["profile"]["detector_agreement"]
        heads = published["argmax_heads"], published["copy_heads"]
        assert stats.jaccard(*heads) == pytest.approx(agreement["jaccard"])
        result = stats.spearman(published["argmax_scores"], published["copy_scores"])
        spearman = published["profile"]["detector_score_spearman"]
        assert result.value == pytest.approx(spearman["spearman_rho"])
        assert result.p_value == pytest.approx(spearman["spearman_p"], rel=1e-6)


def test_shares_of_a_whole_are_ratios_of_means_resampled_together():
    rng = np.random.default_rng(0)
    whole_N = rng.normal(2, 1, 40)
    parts_PN = np.stack([0.5 * whole_N, rng.normal(1, 1, 40), 0 * whole_N])
    found = stats.bootstrap_shares(parts_PN, whole_N, n_resamples=4000)
    assert (found[0].value, found[0].low, found[0].high) == pytest.approx((0.5, 0.5, 0.5))
    assert (found[2].value, found[2].low, found[2].high) == (0, 0, 0)
    alone = stats.bootstrap_of_means(np.stack([parts_PN[1], whole_N]), lambda means: means[0] / means[1], 4000, seed=1)
    assert found[1].value == pytest.approx(alone.value) and found[1].n == 40
    assert (found[1].low, found[1].high) == pytest.approx((alone.low, alone.high), abs=0.1 * (alone.high - alone.low))


def test_shares_of_nothing_are_undefined():
    assert stats.bootstrap_shares([[1.0, 2.0]], [1.0, -1.0]) == [stats.Number(None, None, None, 2)]
    found = stats.bootstrap_shares([[1.0, 1.0]], [0.0, 2.0])  # a quarter of the draws have no whole
    assert (found[0].value, found[0].low, found[0].high) == (1.0, 0.5, 1.0)
    with pytest.raises(ValueError, match="paired, got 3 and 2"):
        stats.bootstrap_shares([[1.0, 2.0, 3.0]], [1.0, 2.0])
