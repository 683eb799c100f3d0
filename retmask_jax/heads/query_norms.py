"""Norm-utility: how strongly a head's query projection writes, and whether retrieval heads differ (arXiv 2606.21249)."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from retmask_jax.model import lora
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.transformer import merge_layers
from retmask_jax.utils import stats
from retmask_jax.utils.hosts import to_host


@dataclasses.dataclass(frozen=True)
class QueryNorms:
    """head_LH: f32[L,H]; pair_LHR: f32[L,H,R], pairs in the order of `inverse_frequencies`; layers in absolute order."""

    head_LH: np.ndarray
    pair_LHR: np.ndarray


def query_norms(config: ModelConfig, params) -> QueryNorms:
    """Mean L1 norm of the rows of q_proj (as HF stores it: one row per dimension) of each head and each rotary pair.

    Pair r is the rows r and r + R of a head; a head's mean is over all its rows, those without rotation included. Only
    the weights count: no bias, and no query norm behind them. Adapters are merged first.
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


def norm_utility(norms: QueryNorms, scores, heads, n_permutations=10000, n_resamples=10000, seed=0) -> dict:
    """Query norms of `heads`, (layer, head) each, against all others, as JSON values.

    - cohens_d: standardised difference of the norms; pair_cohens_d: the same for each rotary pair, [R];
    - pair_p_value, pair_adjusted_p: of each pair's difference, [R], by the permutations below, and adjusted by
      Benjamini and Hochberg for the number of pairs;
    - permutation: `stats.layer_clustered_permutation` of the difference;
    - partial_spearman: norm against the mean of `scores` (HeadScores), `stats.partial_spearman`;
    - pair_retrieval, pair_other: mean norm of each pair in either group, [R]; n, n_other: heads in each.

    What is undefined is None. Raises ValueError where the scores are another model's, or fewer than two heads, or
    nothing to permute, are on a side.
    """
    labels_LH = _labels(norms.head_LH.shape, scores, heads)
    ours, others = norms.pair_LHR[labels_LH], norms.pair_LHR[~labels_LH]
    p_R = stats.layer_clustered_p_values(norms.pair_LHR, labels_LH, n_permutations, seed)
    return {
        "n": len(ours),
        "n_other": len(others),
        "cohens_d": stats.defined(stats.cohens_d(norms.head_LH[labels_LH], norms.head_LH[~labels_LH])),
        "permutation": stats.layer_clustered_permutation(norms.head_LH, labels_LH, n_permutations, seed),
        "partial_spearman": {
            name: stats.defined(value)
            for name, value in vars(
                stats.partial_spearman(norms.head_LH, scores.mean, n_resamples=n_resamples, seed=seed)
            ).items()
        },
        "pair_cohens_d": [stats.defined(stats.cohens_d(*pair)) for pair in zip(ours.T, others.T, strict=True)],
        "pair_p_value": p_R.tolist(),
        "pair_adjusted_p": stats.benjamini_hochberg(p_R).tolist(),
        "pair_retrieval": ours.mean(axis=0).tolist(),
        "pair_other": others.mean(axis=0).tolist(),
    }


def _row_norms(config: ModelConfig, dense):
    """L1 norm of each output dimension of a dense layer, f32[..., H*D] of a kernel [..., E, H*D]."""
    kernel = (dense if config.lora is None else lora.merged(dense, config.lora))["kernel"]
    return jnp.abs(kernel.astype(jnp.float32)).sum(axis=-2)


def _labels(shape, scores, heads) -> np.ndarray:
    if scores.mean.shape != shape:
        raise ValueError(
            f"scores are of {scores.mean.shape} layers and heads, the model has {shape}: take its own scores"
        )
    labels_LH = np.zeros(shape, bool)
    for layer, head in heads:
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise ValueError(f"head ({layer}, {head}) is out of range for {shape[0]} layers of {shape[1]} heads")
        labels_LH[layer, head] = True
    return labels_LH
