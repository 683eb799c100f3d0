"""The stage `theta`: recall and retrieval heads under other RoPE bases."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from retmask_jax.heads.conditions import UNTOUCHED
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, cases_cost, task_cost
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.detect import DETECT, DETECTION
from retmask_jax.stages.outcomes import task_outcomes
from retmask_jax.stages.study.detector_runs import Found, check_detector_names, heads_found, scored
from retmask_jax.stages.study.variants import with_base
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import McNemar, Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseRow(Number):
    """Recall on a task under one RoPE base.

    Attributes:
        factor: Of the model's base; theta is their product.
        change: Against factor 1.
        mcnemar: Test of factor 1 (a) against this factor (b).
    """

    task: str
    factor: float
    theta: float
    change: Number
    mcnemar: McNemar


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseHeads(Found):
    """The retrieval heads under one RoPE base; jaccard: with those of factor 1."""

    factor: float
    theta: float
    jaccard: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThetaResult(Result):
    """Recall and retrieval heads under several RoPE bases.

    Attributes:
        theta: The model's base, which `factors` multiply.
        detector: Which finds the heads, those with a score of at least `threshold`.
        rows: Recall by task and factor.
        heads: By factor.
    """

    theta: float
    factors: list[float]
    detector: str
    threshold: float
    rows: list[BaseRow]
    heads: list[BaseHeads]


def theta_stage(context: Context, folder: Path) -> ThetaResult:
    """Measures recall and the retrieval heads with the RoPE base changed at inference; the weights stay the same."""
    section, base = context.config.theta, context.lm.config.rope.theta
    tasks = section.tasks or context.config.knockout.tasks[:1]
    threshold = DETECT.of(context).reached
    outcomes: dict[str, list] = {}
    found = []
    for factor in section.factors:
        changed = context.of(with_base(context.lm, factor))
        for task, outcome_CN in task_outcomes(changed, tasks, [UNTOUCHED]).outcomes.items():
            outcomes.setdefault(task, []).append(outcome_CN[0])
        run = scored(changed, section.detector, section.cases, folder / f"factor_{factor:g}.json")
        found.append(heads_found(run, threshold))
    own = section.factors.index(1)
    heads = [
        BaseHeads(
            factor=factor, theta=factor * base, jaccard=stats.jaccard(at_base.heads, found[own].heads), **vars(at_base)
        )
        for factor, at_base in zip(section.factors, found, strict=True)
    ]
    rows = [
        BaseRow.of(
            stats.proportion(outcome),
            task=task,
            factor=factor,
            theta=factor * base,
            change=stats.paired_bootstrap(outcome, of_task[own]),
            mcnemar=stats.mcnemar(of_task[own], outcome),
        )
        for task, of_task in outcomes.items()
        for factor, outcome in zip(section.factors, of_task, strict=True)
    ]
    return ThetaResult(
        theta=base,
        factors=list(section.factors),
        detector=section.detector,
        threshold=threshold,
        rows=rows,
        heads=heads,
        numbers=_numbers(rows, heads),
    )


def _numbers(rows: Sequence[BaseRow], heads: Sequence[BaseHeads]) -> dict[str, Number]:
    numbers = {f"theta/{row.task}/factor {row.factor:g}": row.number for row in rows}
    counts = {f"theta/heads/factor {at.factor:g}": stats.exact(len(at.heads), at.counted) for at in heads}
    return numbers | counts


def _check(config) -> None:
    check_detector_names("theta.detector", [config.theta.detector])
    _check_factors(config.theta.factors)


def _check_factors(factors: Sequence[float]) -> None:
    if 1 not in factors:
        raise ValueError(f"theta.factors {tuple(factors)} lack 1, the unchanged base, which others are compared with")
    if len(set(factors)) < len(factors) or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"theta.factors {tuple(factors)} must be positive, finite and without repeats")


def _cost(context: Context) -> Cost:
    config, section = context.config, context.config.theta
    tasks = [task_cost(config, task) for task in section.tasks or config.knockout.tasks[:1]]
    return len(section.factors) * sum(tasks, cases_cost(config, config.detect.task, section.cases))


THETA = Stage(
    name="theta",
    work=theta_stage,
    result=ThetaResult,
    upstream=(DETECT,),
    settings=(*PROMPTS, "theta.*", "knockout.tasks", *DETECTION),
    tasks=lambda config: (config.detect.task, *(config.theta.tasks or config.knockout.tasks[:1])),
    check=_check,
    cost=_cost,
)
