"""Norm-utility: the norms of the query projections, and whether those of retrieval heads differ (arXiv 2606.21249)."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, PyTree

from retmask_jax.heads.scores import HeadScores
from retmask_jax.model import lora
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head
from retmask_jax.model.layers import merge_layers
from retmask_jax.utils import stats
from retmask_jax.utils.hosts import to_host
from retmask_jax.utils.numbers import Number, Permutation


@dataclasses.dataclass(frozen=True)
class QueryNorms:
    """Mean L1 norms of rows of q_proj, by head and by rotary pair; pairs in the order of `inverse_frequencies`."""

    head_LH: Float32[np.ndarray, "L H"]
    pair_LHR: Float32[np.ndarray, "L H R"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormComparison:
    """The query norms of some heads against those of all others; None where a number is undefined.

    Attributes:
        n: Number of these heads; n_other of the others.
        cohens_d: Standardised difference of the norms.
        permutation: Test of the difference, the labels permuted within layers.
        partial_spearman: Rank correlation of norm and score within layers.
        pair_cohens_d: [R] `cohens_d` of each rotary pair.
        pair_p_value: [R] p of each pair's difference, by the same permutations.
        pair_adjusted_p: [R] The same, adjusted for the number of pairs (Benjamini and Hochberg).
        pair_retrieval: [R] Mean norm of each pair in these heads; pair_other in the others.
    """

    n: int
    n_other: int
    cohens_d: float | None
    permutation: Permutation
    partial_spearman: Number
    pair_cohens_d: list[float | None]
    pair_p_value: list[float]
    pair_adjusted_p: list[float]
    pair_retrieval: list[float]
    pair_other: list[float]


def query_norms(config: ModelConfig, params: PyTree) -> QueryNorms:
    """Computes the mean L1 norm of the rows of q_proj (in HF's layout, a row per dimension) of each head and rotary pair.

    Pair r is the rows r and r + R of a head. A head's mean is over all its rows, including those that are not rotated.
    Only the weights count, neither a bias nor a query norm. In layers without RoPE the same rows count, though nothing rotates
    them. Adapters are merged first.
    """
    rows_L = merge_layers(
        config,
        {
            group: {place: _row_norms(config, block["attn"]["q"]) for place, block in params.get(group, {}).items()}
            for group in ("blocks", "tail")
        },
    )
    rows_LHD = to_host(rows_L).reshape(config.n_layers, config.n_heads, config.head_dim)
    first, second = rows_LHD[..., : config.n_pairs], rows_LHD[..., config.n_pairs : 2 * config.n_pairs]
    return QueryNorms(rows_LHD.mean(axis=-1), (first + second) / 2)


def norm_utility(
    norms: QueryNorms,
    scores: HeadScores,
    heads: Sequence[Head],
    n_permutations: int = 10000,
    n_resamples: int = 10000,
    seed: int = 0,
) -> NormComparison:
    """Compares the query norms of some heads with those of all others.

    Raises:
        ValueError: The scores are another model's, a group has fewer than two heads, or no layer has heads of both
            groups, so that nothing can be permuted.
    """
    labels_LH = _labels(norms.head_LH.shape, scores, heads)
    ours, others = norms.pair_LHR[labels_LH], norms.pair_LHR[~labels_LH]
    p_R = stats.layer_clustered_p_values(norms.pair_LHR, labels_LH, n_permutations, seed)
    rho = stats.partial_spearman(norms.head_LH, scores.mean, n_resamples=n_resamples, seed=seed)
    return NormComparison(
        n=len(ours),
        n_other=len(others),
        cohens_d=stats.defined(stats.cohens_d(norms.head_LH[labels_LH], norms.head_LH[~labels_LH])),
        permutation=stats.layer_clustered_permutation(norms.head_LH, labels_LH, n_permutations, seed),
        partial_spearman=rho if math.isfinite(rho.estimate) else Number(None, None, None, rho.n),
        pair_cohens_d=[stats.defined(stats.cohens_d(*pair)) for pair in zip(ours.T, others.T, strict=True)],
        pair_p_value=p_R.tolist(),
        pair_adjusted_p=stats.benjamini_hochberg(p_R).tolist(),
        pair_retrieval=ours.mean(axis=0).tolist(),
        pair_other=others.mean(axis=0).tolist(),
    )


def _row_norms(config: ModelConfig, dense):
    """Returns the L1 norm of each output dimension of a dense layer, f32[..., H*D] for a kernel [..., E, H*D]."""
    kernel = (dense if config.lora is None else lora.merged(dense, config.lora))["kernel"]
    return jnp.abs(kernel.astype(jnp.float32)).sum(axis=-2)


def _labels(shape: tuple[int, ...], scores: HeadScores, heads: Sequence[Head]) -> Bool[np.ndarray, "L H"]:
    if scores.mean.shape != shape:
        raise ValueError(
            f"scores are of {scores.mean.shape} layers and heads, the model has {shape}: take the scores of this model"
        )
    labels_LH = np.zeros(shape, bool)
    for layer, head in heads:
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise ValueError(f"head ({layer}, {head}) is out of range for {shape[0]} layers of {shape[1]} heads")
        labels_LH[layer, head] = True
    return labels_LH
