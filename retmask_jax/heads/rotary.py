"""Which rotary pairs of heads to ablate, and controls: other heads, other pairs, pairs that carry as much variance."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from retmask_jax.heads.conditions import Condition
from retmask_jax.heads.head_outputs import HeadStatistics, variance_removed
from retmask_jax.heads.query_norms import QueryNorms
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head, Interventions, layer_matched, mask_rope
from retmask_jax.model.rope import inverse_frequencies, rope_pairs
from retmask_jax.utils.numbers import Number

SPECIFIC = 0.33  # arXiv 2606.21249 calls an ablation specific to retrieval if its ratio of costs is below this

_CANDIDATES = 2000  # random sets of pairs tried for a matched control


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What ablating rotary pairs costs plain text, and what it costs recall; None where a number is undefined.

    perplexity_increase, recall_drop: relative; ratio: of the two, as `specificity`.
    """

    perplexity_increase: Number | None
    recall_drop: Number | None
    ratio: Number | None


def dose_conditions(
    config: ModelConfig,
    heads: Sequence[Head],
    ks: Sequence[int],
    *,
    draws: int,
    seed: int = 0,
    site: str = "rotary",
    norms: QueryNorms | None = None,
) -> Iterator[Condition]:
    """For each k, k pairs of the retrieval heads ablated: the lowest and the highest by frequency, and `draws` random sets.

    As a control, also the k lowest pairs of layer-matched heads. With `norms`, also the k pairs of each head that its query
    projection writes least or most.
    """
    control = layer_matched(config, heads, seed)
    for k in ks:
        low, high = (rope_pairs(config, k, which) for which in ("low", "high"))
        yield _condition(config, "lowest", heads, low, site)
        yield _condition(config, "highest", heads, high, site)
        yield _condition(config, "control heads, lowest", control, low, site)
        for draw in range(draws):
            yield _condition(
                config, "random", heads, rope_pairs(config, k, "random", seed=seed + draw), site, draw=draw
            )
        if norms is not None:
            for kind, order in (("low utility", 1), ("high utility", -1)):
                yield _by_utility(config, kind, heads, k, site, norms, order)


def window_conditions(
    config: ModelConfig, heads: Sequence[Head], n_windows: int, *, seed: int = 0, site: str = "rotary"
) -> Iterator[Condition]:
    """Each window of the spectrum ablated in the retrieval heads, and in layer-matched heads; the lowest frequencies first."""
    control = layer_matched(config, heads, seed)
    for i, pairs in enumerate(windows(config, n_windows)):
        for kind, chosen in (("window", heads), ("control heads, window", control)):
            yield _condition(config, kind, chosen, pairs, site, draw=i, experiment="windows")


def coverage_conditions(
    config: ModelConfig, heads: Sequence[Head], shares: Sequence[float], k: int, *, site: str = "rotary"
) -> Iterator[Condition]:
    """The k lowest pairs of a growing share of the retrieval heads ablated, the best heads first."""
    for n in sorted({math.ceil(share * len(heads)) for share in shares}):
        low = rope_pairs(config, k, "low")
        yield _condition(config, "lowest", heads[:n], low, site, experiment="coverage")


def patch_conditions(
    config: ModelConfig, heads: Sequence[Head], k: int, *, site: str = "rotary"
) -> Iterator[Condition]:
    """The k lowest, and the k highest, pairs of one retrieval head at a time ablated."""
    for head in heads:
        for kind, which in (("lowest", "low"), ("highest", "high")):
            yield _condition(config, kind, [head], rope_pairs(config, k, which), site, experiment="patches")


def matched_conditions(
    config: ModelConfig,
    heads: Sequence[Head],
    ks: Sequence[int],
    statistics: HeadStatistics,
    *,
    draws: int,
    seed: int = 0,
    site: str = "rotary",
) -> Iterator[Condition]:
    """For each k, `draws` sets of other pairs whose share of the variance of q.k is nearest to that of the k lowest pairs.

    The sets may be of any size. If low frequencies matter only because they carry more variance, these do as much harm.
    """
    for k in ks:
        low = rope_pairs(config, k, "low")
        sets = matched_pairs(config, heads, low, statistics, draws, seed=seed) if k < config.n_pairs else []
        for draw, others in enumerate(sets):
            yield _condition(config, "matched", heads, others, site, draw=draw, experiment="matched", k=k)


def matched_pairs(
    config: ModelConfig,
    heads: Sequence[Head],
    pairs: Sequence[int],
    statistics: HeadStatistics,
    n: int,
    *,
    seed: int = 0,
) -> list[list[int]]:
    """Up to n different sets of other pairs: of random sets, those whose share of the variance is nearest to that of `pairs`.

    Shares are means over the heads. Raises ValueError where `pairs` are all pairs of the model.
    """
    rng = np.random.default_rng(seed)
    free = np.setdiff1d(np.arange(config.n_pairs), pairs)
    if not len(free):
        raise ValueError(f"all {config.n_pairs} rotary pairs are ablated: no others are left to match them")
    sets_NR = np.zeros((_CANDIDATES, config.n_pairs), bool)
    for row in sets_NR:
        row[rng.choice(free, rng.integers(1, len(free) + 1), replace=False)] = True
    sets_NR = np.unique(sets_NR, axis=0)
    wanted_1R = np.isin(np.arange(config.n_pairs), pairs)[None]
    wanted, found_N = (variance_removed(statistics, heads, sets).mean(axis=1) for sets in (wanted_1R, sets_NR))
    nearest = np.argsort(np.abs(found_N - wanted), kind="stable")[:n]
    return [np.flatnonzero(sets_NR[i]).tolist() for i in nearest]


def condition_variance(condition: Condition, statistics: HeadStatistics) -> float | None:
    """The share of the variance of q.k that a condition removes, mean over its heads.

    None where no head is ablated, and at the projection site, because norms after it change what is left.
    """
    if not condition.heads or condition.interventions.rope_site != "rotary":
        return None
    mask_LHR = np.asarray(condition.interventions.rope_mask)
    shares = [variance_removed(statistics, [head], mask_LHR[head][None])[0, 0] for head in condition.heads]
    return float(np.mean(shares))


def windows(config: ModelConfig, n: int) -> list[list[int]]:
    """Indices of the rotary pairs in n windows of the spectrum, the lowest frequencies first."""
    if not 1 <= n <= config.n_pairs:
        raise ValueError(f"{n} windows over the spectrum: the model has {config.n_pairs} rotary pairs")
    order = np.argsort(inverse_frequencies(config), kind="stable")
    return [sorted(part.tolist()) for part in np.array_split(order, n)]


def spectrum_centre(drops: ArrayLike) -> tuple[float, float]:
    """Centre of mass and standard deviation of the drops of recall over windows of the spectrum.

    Places in the spectrum run from 0, the lowest frequency, to 1, the highest. Rises count as 0; both are nan where
    recall drops in no window.
    """
    drops = np.maximum(np.asarray(drops, float), 0)
    if not drops.sum():
        return math.nan, math.nan
    places = (np.arange(len(drops)) + 0.5) / len(drops)
    centre = drops @ places / drops.sum()
    return float(centre), float(np.sqrt(drops @ (places - centre) ** 2 / drops.sum()))


def specificity(loss_change: float, recall: float, patched_recall: float) -> float:
    """The relative increase of perplexity over the relative drop of recall (arXiv 2606.21249).

    nan where recall does not drop.

    Args:
        loss_change: On plain text, in nats per token.
    """
    drop = (recall - patched_recall) / recall if recall else 0.0
    return (math.exp(loss_change) - 1) / drop if drop > 0 else math.nan


def cost_intervals(
    loss_change_W: Float[np.ndarray, " windows"],
    untouched_N: Bool[np.ndarray, " cases"],
    patched_N: Bool[np.ndarray, " cases"],
    seed: int = 0,
    n_resamples: int = 2000,
) -> Costs:
    """The costs with their bootstrap intervals; windows of text and cases are drawn independently.

    Args:
        loss_change_W: On plain text, in nats per token.
        untouched_N, patched_N: Right or wrong without and with the ablation.
    """
    rng, loss_change_W = np.random.default_rng(seed), np.asarray(loss_change_W, float)
    both_2N = np.stack([untouched_N, patched_N]).astype(float)

    def measured(change, both):
        drop = (both[0] - both[1]) / both[0] if both[0] else 0.0
        return math.exp(change) - 1, drop, specificity(change, *both)

    def drawn():
        texts, cases = (rng.integers(n, size=n) for n in (len(loss_change_W), both_2N.shape[1]))
        return measured(loss_change_W[texts].mean(), both_2N[:, cases].mean(axis=1))

    values = measured(loss_change_W.mean(), both_2N.mean(axis=1))
    draws = np.array([drawn() for _ in range(n_resamples)])
    ns = len(loss_change_W), both_2N.shape[1], both_2N.shape[1]
    increase, drop, ratio = map(_where_defined, values, draws.T, ns)
    return Costs(perplexity_increase=increase, recall_drop=drop, ratio=ratio)


def _where_defined(value: float, drawn: np.ndarray, n: int) -> Number | None:
    """A value with its interval over the draws of which it is defined; None where it is not defined itself."""
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (math.nan, math.nan)
    return Number(float(value), float(low), float(high), n) if math.isfinite(value) else None


def _condition(config, kind, heads, pairs, site, *, draw=0, experiment="dose", k=None) -> Condition:
    return Condition(kind, draw, mask_rope(config, heads, pairs, site), tuple(heads), tuple(pairs), experiment, k)


def _by_utility(config, kind, heads, k, site, norms: QueryNorms, order: int) -> Condition:
    """A condition in which each head loses k pairs, those that come first in the `order` of that head's norms."""
    mask_LHR = np.zeros((config.n_layers, config.n_heads, config.n_pairs), bool)
    for layer, head in heads:
        mask_LHR[layer, head, np.argsort(order * norms.pair_LHR[layer, head], kind="stable")[:k]] = True
    masked = Interventions(rope_mask=jnp.asarray(mask_LHR), rope_site=site)
    return Condition(kind, 0, masked, tuple(heads), experiment="dose", k=k)
