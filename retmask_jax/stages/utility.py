"""The stage `utility`: norms of the query projections of retrieval heads against others."""

from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.heads.query_norms import norm_utility, query_norms
from retmask_jax.model.rope import inverse_frequencies
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.stages.detect import DETECT, head_scores, retrieval_heads
from retmask_jax.utils import stats


def utility_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Norms of the query projections of retrieval heads against others, by head and by rotary pair."""
    section, config, heads = context.config.utility, context.lm.config, retrieval_heads(context)
    norms = query_norms(config, context.lm.params)
    scores = head_scores(context)
    result = {
        "heads": heads,
        "norms": norms.head_LH.tolist(),
        "max_length": config.max_length,
        "wavelengths": {kind: (2 * np.pi / inverse_frequencies(config, kind)).tolist() for kind in config.ropes},
    }
    try:
        found = norm_utility(norms, scores, heads, section.permutations, section.resamples, section.seed)
    except ValueError as error:  # a model with one retrieval head has nothing to compare; the study goes on
        return result | {"comparison": None, "undefined": str(error), "numbers": {}}
    n, test, rho = found["n"], found["permutation"], found["partial_spearman"]
    exact = {
        "utility/Cohen's d": found["cohens_d"],
        "utility/difference of norms": test["value"],
        "utility/difference expected from layers": test["expected"],
        "utility/permutation p": test["p_value"],
        "utility/rotary pairs that differ": sum(p < 0.05 for p in found["pair_adjusted_p"]),
    }
    numbers = {name: stats.exact(value, n) for name, value in exact.items() if value is not None}
    if rho["value"] is not None:
        numbers["utility/norm against score (partial rank correlation)"] = rho
    return result | {"comparison": found, "undefined": None, "numbers": numbers}


UTILITY = Stage(name="utility", work=utility_stage, result=dict, upstream=(DETECT,), settings=("dtype", "utility.*"))
