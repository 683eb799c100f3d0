"""The stage `utility`: norms of the query projections of retrieval heads against others."""

import dataclasses
from pathlib import Path

import numpy as np

from retmask_jax.heads.query_norms import NormComparison, norm_utility, query_norms
from retmask_jax.model.interventions import Head
from retmask_jax.model.rope import inverse_frequencies
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.detect import DETECT, head_scores, retrieval_heads
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class UtilityResult(Result):
    """Query norms of the retrieval heads and of all others.

    Attributes:
        heads: The retrieval heads.
        norms: [L][H] Mean L1 norm of the rows of each head's query projection.
        max_length: Tokens of the model's context.
        wavelengths: By kind of layer, [R] tokens.
        comparison: None where it is undefined.
        undefined: Why there is no comparison.
    """

    heads: list[Head]
    norms: list[list[float]]
    max_length: int
    wavelengths: dict[str, list[float]]
    comparison: NormComparison | None
    undefined: str | None = None


def utility_stage(context: Context, folder: Path) -> UtilityResult:
    """Compares the query norms of retrieval heads with those of others, by head and by rotary pair."""
    section, config, heads = context.config.utility, context.lm.config, retrieval_heads(context)
    norms = query_norms(config, context.lm.params)
    scores = head_scores(context)
    found, undefined = None, None
    try:
        found = norm_utility(norms, scores, heads, section.permutations, section.resamples, section.seed)
    except ValueError as error:  # with one retrieval head nothing can be compared; the study goes on
        undefined = str(error)
    return UtilityResult(
        heads=heads,
        norms=norms.head_LH.tolist(),
        max_length=config.max_length,
        wavelengths={kind: (2 * np.pi / inverse_frequencies(config, kind)).tolist() for kind in config.ropes},
        comparison=found,
        undefined=undefined,
        numbers={} if found is None else _numbers(found),
    )


def _numbers(found: NormComparison) -> dict[str, Number]:
    test, rho = found.permutation, found.partial_spearman
    exact = {
        "utility/Cohen's d": found.cohens_d,
        "utility/difference of norms": test.value,
        "utility/difference expected from layers": test.expected,
        "utility/permutation p": test.p_value,
        "utility/rotary pairs that differ": sum(p < 0.05 for p in found.pair_adjusted_p),
    }
    numbers = {name: stats.exact(value, found.n) for name, value in exact.items() if value is not None}
    if rho.value is not None:
        numbers["utility/norm against score (partial rank correlation)"] = rho
    return numbers


UTILITY = Stage(
    name="utility", work=utility_stage, result=UtilityResult, upstream=(DETECT,), settings=("dtype", "utility.*")
)
