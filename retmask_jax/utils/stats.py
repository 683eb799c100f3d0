"""Statistics of paired outcomes, score distributions and head sets (as in arXiv 2606.21249).

Everything random takes a seed and repeats exactly. Empty input, numbers that are not finite and shapes that do not fit
raise ValueError. SciPy is imported where it is used, because that takes most of a second.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from retmask_jax.utils.numbers import Correlation, McNemar, Number, Permutation

_BLOCK = 1 << 20  # numbers drawn at once: bounds memory whatever the number of resamples


def gini(x: ArrayLike) -> float:
    """Gini coefficient of scores of any shape: 0 if all are equal, 1 - 1/n if a single score is not 0.

    Scores that are all 0 count as equal. Negative scores raise ValueError.
    """
    x = np.sort(_numbers(x, "gini"), axis=None)
    if x[0] < 0:
        raise ValueError(f"gini has no meaning for signed scores, the smallest is {x[0]:g}")
    total, n = x.sum(), x.size
    if total == 0:
        return 0.0
    return float((2 * np.arange(1, n + 1) - n - 1) @ (x / total) / n)


def mcnemar(a: ArrayLike, b: ArrayLike) -> McNemar:
    """Exact two-sided McNemar test of two conditions on the same samples.

    Args:
        a, b: bool[samples], outcomes of the same samples in the same order.
    """
    from scipy.stats import binomtest

    a, b = _outcomes(a, "mcnemar"), _outcomes(b, "mcnemar")
    _same_length(a.size, b.size)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    p_value = float(binomtest(only_a, n, 0.5).pvalue) if n else 1.0
    return McNemar(only_a, only_b, n, p_value)


def wilson(successes: int, n: int, level: float = 0.95) -> Number:
    """Share of successes with its Wilson score interval, which lies in [0, 1] and has a width > 0 even at 0 of n.

    SciPy's (`binomtest(...).proportion_ci`) differs in the last bits and takes sixty times as long.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    _check_level(level)
    z, share = statistics.NormalDist().inv_cdf((1 + level) / 2), successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly 0 or 1; rounding must not push it past the value.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return _interval(share, low, high, n)


def proportion(outcomes: ArrayLike, level: float = 0.95) -> Number:
    """Share of true outcomes, bool[samples], with its Wilson interval."""
    right = _outcomes(outcomes, "proportion")
    return wilson(int(right.sum()), right.size, level)


def exact(value: float, n: int) -> Number:
    """A number that is counted from n things and not estimated, so it has no interval."""
    return Number(float(value), None, None, n)


def defined(value: float | None) -> float | None:
    """The value, or None if it is nan, infinite or None."""
    return value if value is not None and math.isfinite(value) else None


def bootstrap_mean(x: ArrayLike, n_resamples: int = 10000, seed: int = 0, level: float = 0.95) -> Number:
    """Mean with its percentile bootstrap interval.

    SciPy's `bootstrap` with the same seed differs in the last bits and takes half as long again.

    Args:
        x: [samples], or [runs, samples] where several runs share the samples: the runs are averaged first and the samples
            resampled, so more runs of the same samples are not more samples.
    """
    return _bootstrap(_per_sample(x, "bootstrap_mean"), n_resamples, seed, level)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, n_resamples: int = 10000, seed: int = 0, level: float = 0.95
) -> Number:
    """mean(a) - mean(b) with its percentile bootstrap interval, both sides resampled together.

    Args:
        a, b: [samples] or [runs, samples], the same samples in the same order. The numbers of runs may differ (one
            retrieval mask against five random masks); runs are averaged first and held fixed.
    """
    a, b = _per_sample(a, "paired_bootstrap"), _per_sample(b, "paired_bootstrap")
    _same_length(a.size, b.size)
    return _bootstrap(a - b, n_resamples, seed, level)


def bootstrap_of_means(
    x_VN: ArrayLike,
    function: Callable[[np.ndarray], float],
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Number:
    """A function of the means [V] of variables that share their N samples, with its percentile bootstrap interval.

    Draws for which it is not finite do not count; value, low and high are None if its value or all draws are not finite.
    """
    _check_level(level)
    _check_draws(n_resamples, "n_resamples")
    x_VN = _numbers(x_VN, "bootstrap_of_means")
    rng, n = np.random.default_rng(seed), x_VN.shape[1]
    drawn = np.array([function(x_VN[:, rng.integers(n, size=n)].mean(axis=1)) for _ in range(n_resamples)])
    value, drawn = function(x_VN.mean(axis=1)), drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not drawn.size:
        return Number(None, None, None, n)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return _interval(value, low, high, n)


def bootstrap_shares(
    parts_PN: ArrayLike, whole_N: ArrayLike, n_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> list[Number]:
    """mean(part) / mean(whole) of many parts of a whole, with percentile bootstrap intervals, all resampled together.

    Draws in which the whole is 0 do not count; value, low and high are None if its mean is 0 or all draws are.

    Args:
        parts_PN, whole_N: The same samples in the same order.
    """
    _check_level(level)
    _check_draws(n_resamples, "n_resamples")
    parts_PN, whole_N = _numbers(parts_PN, "bootstrap_shares"), _numbers(whole_N, "bootstrap_shares")
    n = whole_N.size
    _same_length(parts_PN.shape[-1], n)
    # A resample is how often each sample is drawn.
    drawn_RN = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    wholes_R = drawn_RN @ whole_N
    counted = wholes_R != 0
    if whole_N.sum() == 0 or not counted.any():
        return [Number(None, None, None, n)] * len(parts_PN)
    drawn_RP = (drawn_RN[counted] @ parts_PN.T) / wholes_R[counted, None]
    low_P, high_P = np.quantile(drawn_RP, [(1 - level) / 2, (1 + level) / 2], axis=0)
    value_P = parts_PN.sum(axis=1) / whole_N.sum()
    return [_interval(value, low, high, n) for value, low, high in zip(value_P, low_P, high_P, strict=True)]


def jaccard(set_a: Iterable[Any], set_b: Iterable[Any]) -> float:
    """Shared members over all members of two sets of heads (layer, head); 1.0 if both are empty."""
    set_a, set_b = _members(set_a), _members(set_b)
    union = set_a | set_b
    return len(set_a & set_b) / len(union) if union else 1.0


def benjamini_hochberg(p: ArrayLike) -> Float64[np.ndarray, "..."]:
    """p-values adjusted for the false discovery rate over all of them, in their shape.

    SciPy's `false_discovery_control` differs in the last bits and takes four times as long.
    """
    p = _numbers(p, "benjamini_hochberg")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"p-values lie in [0, 1], got {p.min():g} to {p.max():g}")
    order = np.argsort(p, axis=None)
    stepped = p.ravel()[order] * p.size / np.arange(1, p.size + 1)
    adjusted = np.empty(p.size)
    # Each p-value takes the smallest of its step and all later steps, which keeps the order of the p-values.
    adjusted[order] = np.minimum.accumulate(stepped[::-1])[::-1]
    return adjusted.reshape(p.shape)


def layer_clustered_permutation(
    values_LH: ArrayLike, labels_LH: ArrayLike, n_permutations: int = 10000, seed: int = 0
) -> Permutation:
    """Two-sided test of labelled against other heads, the labels permuted within each layer.

    Raises ValueError if no layer has both kinds of heads.

    Args:
        labels_LH: bool[L, H].
    """
    values_LH, labels_LH = _numbers(values_LH, "values_LH"), np.asarray(labels_LH)
    _check_labels(values_LH, labels_LH)
    layer_means_LH = np.broadcast_to(values_LH.mean(axis=1, keepdims=True), values_LH.shape)
    return Permutation(
        _mean_difference(values_LH, labels_LH),
        _mean_difference(layer_means_LH, labels_LH),
        float(layer_clustered_p_values(values_LH[..., None], labels_LH, n_permutations, seed)[0]),
        int(labels_LH.sum()),
    )


def layer_clustered_p_values(
    values_LHV: ArrayLike, labels_LH: ArrayLike, n_permutations: int = 10000, seed: int = 0
) -> Float64[np.ndarray, " V"]:
    """The p-value of `layer_clustered_permutation` for each of V numbers per head, by the same permutations."""
    values_LHV, labels_LH = _numbers(values_LHV, "values_LHV"), np.asarray(labels_LH)
    _check_labels(values_LHV[..., 0], labels_LH)
    _check_draws(n_permutations, "n_permutations")
    # With fixed counts the difference of means is linear in the labelled heads' sum, so the sum of
    # their deviations from their layers' means tests it, and is 0 on average.
    centred_LHV = values_LHV - values_LHV.mean(axis=1, keepdims=True)
    reached_V = np.abs(centred_LHV[labels_LH].sum(axis=0))
    slack_V = 1e-12 * np.abs(values_LHV).sum(axis=(0, 1))  # the same sum in another order is still a tie
    n_extreme_V = np.zeros(values_LHV.shape[-1], int)
    for sums_PV in _permuted_sums(centred_LHV, labels_LH, n_permutations, seed):
        n_extreme_V += (np.abs(sums_PV) >= reached_V - slack_V).sum(axis=0)
    return (1 + n_extreme_V) / (1 + n_permutations)  # the observed labels are one of them


def cohens_d(a: ArrayLike, b: ArrayLike) -> float:
    """(mean(a) - mean(b)) / pooled standard deviation (ddof 1); nan if both are constant."""
    a, b = _numbers(a, "cohens_d").ravel(), _numbers(b, "cohens_d").ravel()
    if min(a.size, b.size) < 2:
        raise ValueError(f"cohens_d needs two values per side, got {a.size}, {b.size}")
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return math.nan
    squares = (a.size - 1) * a.var(ddof=1) + (b.size - 1) * b.var(ddof=1)
    return float((a.mean() - b.mean()) / math.sqrt(squares / (a.size + b.size - 2)))


def spearman(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Rank correlation over all entries; nan if one side is constant."""
    from scipy.stats import spearmanr

    x, y = _numbers(x, "spearman").ravel(), _numbers(y, "spearman").ravel()
    _same_length(x.size, y.size)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(math.nan, math.nan, x.size)
    result = spearmanr(x, y)
    return Correlation(float(result.statistic), float(result.pvalue), x.size)


def spearman_interval(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> Number:
    """Rank correlation of at least 4 independent samples, with its interval.

    The interval is normal in the inverse hyperbolic tangent, with the variance (1 + value^2 / 2) / (n - 3) of Bonett and
    Wright (2000). Heads of the same model are not independent samples.
    """
    _check_level(level)
    result = spearman(x, y)
    rho, n = result.value, result.n
    if n < 4:
        raise ValueError(f"spearman_interval needs at least 4 samples, got {n}")
    half = statistics.NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((1 + rho * rho / 2) / (n - 3))
    centre = math.copysign(math.inf, rho) if abs(rho) >= 1 else math.atanh(rho)
    return _interval(rho, math.tanh(centre - half), math.tanh(centre + half), n)


def partial_spearman(
    x_LH: ArrayLike,
    y_LH: ArrayLike,
    given: Sequence[ArrayLike] = (),
    n_resamples: int = 10000,
    seed: int = 0,
    level: float = 0.95,
) -> Number:
    """Rank correlation of two numbers per head within layers, with a bootstrap interval over layers.

    Heads are ranked within their layer and the mean rank of the layer is subtracted, so differences between layers do not
    count; the ranks of the numbers `given`, each [L, H], are then held fixed (partial correlation). Whole layers are
    resampled, because heads of a layer are not independent; n is the number of layers. nan if a side is constant in every
    layer; resamples in which that is so are left out.
    """
    _check_level(level)
    _check_draws(n_resamples, "n_resamples")
    products_LVV = _rank_products([_numbers(side, "partial_spearman") for side in (x_LH, y_LH, *given)])
    n_layers = len(products_LVV)
    rng = np.random.default_rng(seed)
    # A resample is how often each layer is drawn.
    drawn = rng.multinomial(n_layers, np.full(n_layers, 1 / n_layers), size=n_resamples)
    resampled = _partial_correlation(np.einsum("rl,lvw->rvw", drawn, products_LVV))
    value = float(_partial_correlation(products_LVV.sum(axis=0)))
    defined = resampled[np.isfinite(resampled)]
    if math.isnan(value) or not defined.size:
        return _interval(math.nan, math.nan, math.nan, n_layers)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return _interval(value, low, high, n_layers)


def _rank_products(sides):
    """f64[L, V, V]: products of V variables' ranks within a layer, summed over its heads, about the mean rank."""
    from scipy.stats import rankdata

    shapes = [side.shape for side in sides]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] < 2:
        raise ValueError(f"partial_spearman needs numbers [L, H] of the same 2 or more layers, got shapes {shapes}")
    ranks_VLH = np.stack([rankdata(side, axis=1) for side in sides]) - (shapes[0][1] + 1) / 2
    return np.einsum("vlh,wlh->lvw", ranks_VLH, ranks_VLH)


def _partial_correlation(products_VV):
    """Correlation of the first two of V variables with the rest held fixed, from sums of products [..., V, V]."""
    ours, shared, rest = products_VV[..., :2, :2], products_VV[..., :2, 2:], products_VV[..., 2:, 2:]
    left_22 = ours - shared @ np.linalg.pinv(rest, hermitian=True) @ shared.swapaxes(-1, -2)
    # Of a variable that the rest explains fully, only rounding is left.
    spread_2 = np.diagonal(left_22, axis1=-2, axis2=-1)
    whole_2 = np.diagonal(ours, axis1=-2, axis2=-1)
    defined = (spread_2 > 1e-9 * whole_2).all(axis=-1)
    scale = np.sqrt(np.where(defined, spread_2.prod(axis=-1), 1.0))
    return np.where(defined, np.clip(left_22[..., 0, 1] / scale, -1, 1), np.nan)


def _bootstrap(x, n_resamples, seed, level):
    _check_level(level)
    _check_draws(n_resamples, "n_resamples")
    rng, n = np.random.default_rng(seed), x.size
    means = [x[rng.integers(n, size=(rows, n))].mean(axis=1) for rows in _blocks(n_resamples, n)]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return _interval(x.mean(), low, high, n)


def _permuted_sums(values_LHV, labels_LH, n_permutations, seed):
    """Blocks f64[permutations, V] of sums over the labelled heads, the labels shuffled within each layer."""
    rng, values_NV = np.random.default_rng(seed), values_LHV.reshape(labels_LH.size, -1)
    for rows in _blocks(n_permutations, labels_LH.size):
        labels_PLH = rng.permuted(np.broadcast_to(labels_LH, (rows, *labels_LH.shape)), axis=-1)
        yield labels_PLH.reshape(rows, -1).astype(np.float64) @ values_NV


def _blocks(n_draws, size):
    """Splits n_draws of `size` numbers each into counts of draws that stay within _BLOCK."""
    rows = max(1, _BLOCK // size)
    return [min(rows, n_draws - start) for start in range(0, n_draws, rows)]


def _mean_difference(values_LH, labels_LH):
    return float(values_LH[labels_LH].mean() - values_LH[~labels_LH].mean())


def _interval(value, low, high, n):
    return Number(float(value), float(low), float(high), int(n))


def _numbers(x, name):
    """f64 array with at least one entry, all finite."""
    x = np.asarray(x, dtype=np.float64)
    if x.size == 0:
        raise ValueError(f"{name}: no values")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: {(~np.isfinite(x)).sum()} of {x.size} values are not finite")
    return x


def _outcomes(x, name):
    x = _numbers(x, name)
    if x.ndim != 1 or not np.isin(x, (0, 1)).all():
        raise ValueError(
            f"{name} needs right-or-wrong outcomes, bool[samples], got shape {x.shape} in [{x.min():g}, {x.max():g}]"
        )
    return x.astype(bool)


def _per_sample(x, name):
    x = _numbers(x, name)
    if x.ndim not in (1, 2):
        raise ValueError(f"{name} needs [samples] or [runs, samples], got shape {x.shape}")
    return x if x.ndim == 1 else x.mean(axis=0)


def _members(heads):
    # Heads read from JSON are lists, which cannot be members of a set.
    return {tuple(head) if isinstance(head, (list, np.ndarray)) else head for head in heads}


def _same_length(n_a, n_b):
    if n_a != n_b:
        raise ValueError(f"the two sides must be paired, got {n_a} and {n_b} samples")


def _check_labels(values_LH, labels_LH):
    shapes = f"values {values_LH.shape} and labels {labels_LH.dtype}{labels_LH.shape}"
    if values_LH.ndim != 2 or labels_LH.dtype != bool or labels_LH.shape != values_LH.shape:
        raise ValueError(f"needs values [L, H] and labels bool[L, H], got {shapes}")
    if not (labels_LH.any(axis=1) & ~labels_LH.all(axis=1)).any():
        raise ValueError(f"no layer has both labelled and other heads to permute: {shapes}")


def _check_level(level):
    if not 0 < level < 1:
        raise ValueError(f"level lies between 0 and 1, such as 0.95, got {level}")


def _check_draws(n, name):
    if n < 1:
        raise ValueError(f"{name} must be at least 1, got {n}")
