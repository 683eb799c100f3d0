"""A model's retrieval-head profile: how many heads, how concentrated, where (arXiv 2606.21249)."""

import math
from collections import Counter

import numpy as np

from retmask_jax import stats


def profile(scores, n_kv_heads, threshold=0.1):
    """Sparsity and layout of the heads whose mean score reaches `threshold`: a dict of numbers.

    scores: HeadScores of one detector (published profiles come from the argmax proxy alone).
    n_kv_heads: the model's key/value heads, which must divide its query heads.

    - n_heads, frac: detected heads, and their share of all;
    - over all heads: gini; zero_fraction, the share exactly 0; top5_share, the part of the summed
      score that the five best heads hold;
    - over detected heads: layer_com, their mean layer / (L - 1) weighted by score (0 first layer,
      1 last); layer_com_count, the same unweighted; early_frac, mid_frac, late_frac, their shares
      by thirds of layer / L;
    - over KV groups with a detected head: heads_per_active_group; full_group_fraction, the share of
      those groups whose query heads are all detected.

    Means and shares over nothing are nan. Signed scores raise, as their Gini has no meaning.
    """
    mean_LH = scores.mean.astype(np.float64)
    group_size = _group_size(mean_LH.shape[1], n_kv_heads)
    heads = np.array(scores.heads(threshold=threshold), dtype=int).reshape(-1, 2)
    layers, weights = heads[:, 0], mean_LH[heads[:, 0], heads[:, 1]]
    return {
        "n_heads": len(heads),
        "frac": len(heads) / mean_LH.size,
        **_concentration(mean_LH),
        **_layer_layout(layers, weights, mean_LH.shape[0]),
        **_group_layout(heads, group_size),
    }


def _group_size(n_heads, n_kv_heads):
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"n_kv_heads={n_kv_heads} does not divide the {n_heads} query heads per layer: "
            "take num_key_value_heads of the model these scores belong to"
        )
    return n_heads // n_kv_heads


def _concentration(mean_LH):
    best_first = np.sort(mean_LH, axis=None)[::-1]
    return {
        "gini": stats.gini(mean_LH),
        "zero_fraction": float((mean_LH == 0).mean()),
        "top5_share": _ratio(best_first[:5].sum(), best_first.sum()),
    }


def _layer_layout(layers, weights, n_layers):
    depths = layers / max(n_layers - 1, 1)
    # Whole-number thirds: layer 10 of 30 opens the middle third whatever 10 / 30 rounds to.
    thirds = 3 * layers // n_layers
    return {
        "layer_com": _ratio(depths @ weights, weights.sum()),
        "layer_com_count": _ratio(depths.sum(), len(layers)),
        "early_frac": _ratio((thirds == 0).sum(), len(layers)),
        "mid_frac": _ratio((thirds == 1).sum(), len(layers)),
        "late_frac": _ratio((thirds == 2).sum(), len(layers)),
    }


def _group_layout(heads, group_size):
    """heads: rows of (layer, head); runs of group_size heads share a KV head."""
    sizes = Counter((layer, head // group_size) for layer, head in heads.tolist())
    n_full = sum(size == group_size for size in sizes.values())
    return {
        "heads_per_active_group": _ratio(len(heads), len(sizes)),
        "full_group_fraction": _ratio(n_full, len(sizes)),
    }


def _ratio(part, whole):
    return float(part / whole) if whole else math.nan
