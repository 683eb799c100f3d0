"""A model's retrieval-head profile: how many heads, how concentrated, where (arXiv 2606.21249)."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from retmask_jax.heads.scores import HeadScores
from retmask_jax.utils import stats


class Scored(NamedTuple):
    """A model's head scores under a name, for a comparison of models."""

    name: str
    scores: HeadScores
    n_kv_heads: int
    threshold: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """What was scored of a model, and its `profile`, with None for nan; cases: the largest number that a head counted."""

    model: str
    cases: int
    n_layers: int
    heads_per_layer: int
    n_kv_heads: int
    threshold: float
    n_heads: int
    frac: float
    gini: float
    zero_fraction: float
    top5_share: float | None
    layer_com: float | None
    layer_com_count: float | None
    early_frac: float | None
    mid_frac: float | None
    late_frac: float | None
    heads_per_active_group: float | None
    full_group_fraction: float | None


def profile(scores: HeadScores, n_kv_heads: int, threshold: float = 0.1) -> dict[str, int | float]:
    """Computes how many heads are detected, how concentrated their scores are, and where the heads are.

    Args:
        scores: Of one detector. Published profiles come from the argmax proxy.
        n_kv_heads: The model's key/value heads, which must divide its query heads.
        threshold: Heads whose mean score reaches it are detected.

    Returns:
        Numbers under the names of arXiv 2606.21249. Means and shares over nothing are nan.

        - n_heads, frac: detected heads, and their share of all heads.
        - Over all heads: gini; zero_fraction, the share whose score is exactly 0; top5_share, the share of the summed
          score that the five best heads have.
        - Over detected heads: layer_com, their mean layer / (L - 1) weighted by score (0 is the first layer, 1 the
          last); layer_com_count, the same unweighted; early_frac, mid_frac, late_frac, their shares by thirds of
          layer / L.
        - Over KV groups with a detected head: heads_per_active_group; full_group_fraction, the share of these groups
          whose query heads are all detected.

    Raises:
        ValueError: Scores are negative, for which Gini's coefficient is not defined, or n_kv_heads does not divide.

    >>> import retmask_jax as rm
    >>> scores = rm.HeadScores.from_array([[0.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.0, 0.0]])
    >>> found = rm.profile(scores, n_kv_heads=2)
    >>> found["n_heads"], found["zero_fraction"], found["layer_com"], found["full_group_fraction"]
    (2, 0.75, 1.0, 1.0)
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


def profile_table(models: Sequence[Scored]) -> list[ProfileRow]:
    """Profiles every model.

    Raises:
        ValueError: A profile cannot be made; the message names the model.
    """
    return [_row(model) for model in models]


def _row(model: Scored) -> ProfileRow:
    try:
        values = profile(model.scores, model.n_kv_heads, model.threshold)
    except ValueError as error:
        raise ValueError(f"{model.name}: {error}") from error
    n_layers, n_heads = model.scores.mean.shape
    sizes: dict[str, Any] = {name: stats.defined(value) for name, value in values.items()}
    return ProfileRow(
        model=model.name,
        cases=int(model.scores.counts.max()),
        n_layers=n_layers,
        heads_per_layer=n_heads,
        n_kv_heads=model.n_kv_heads,
        threshold=model.threshold,
        **sizes,
    )


def _group_size(n_heads: int, n_kv_heads: int) -> int:
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"n_kv_heads={n_kv_heads} does not divide the {n_heads} query heads per layer: "
            "take num_key_value_heads of the model these scores belong to"
        )
    return n_heads // n_kv_heads


def _concentration(mean_LH: Float64[np.ndarray, "L H"]) -> dict[str, float]:
    best_first = np.sort(mean_LH, axis=None)[::-1]
    return {
        "gini": stats.gini(mean_LH),
        "zero_fraction": float((mean_LH == 0).mean()),
        "top5_share": _ratio(best_first[:5].sum(), best_first.sum()),
    }


def _layer_layout(
    layers: Int[np.ndarray, " heads"], weights: Float64[np.ndarray, " heads"], n_layers: int
) -> dict[str, float]:
    depths = layers / max(n_layers - 1, 1)
    # In whole numbers: layer 10 of 30 begins the middle third, however 10 / 30 is rounded.
    thirds = 3 * layers // n_layers
    return {
        "layer_com": _ratio(float(depths @ weights), weights.sum()),
        "layer_com_count": _ratio(depths.sum(), len(layers)),
        "early_frac": _ratio((thirds == 0).sum(), len(layers)),
        "mid_frac": _ratio((thirds == 1).sum(), len(layers)),
        "late_frac": _ratio((thirds == 2).sum(), len(layers)),
    }


def _group_layout(heads: Int[np.ndarray, "heads 2"], group_size: int) -> dict[str, float]:
    """Counts detected heads, rows of (layer, head), by the KV head that group_size query heads share."""
    sizes = Counter((layer, head // group_size) for layer, head in heads.tolist())
    n_full = sum(size == group_size for size in sizes.values())
    return {"heads_per_active_group": _ratio(len(heads), len(sizes)), "full_group_fraction": _ratio(n_full, len(sizes))}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
