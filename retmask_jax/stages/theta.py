"""The stage `theta`: recall and retrieval heads under other RoPE bases."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retmask_jax.heads.variants import with_base
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.stages.detect import DETECT, DETECTION
from retmask_jax.stages.detector_runs import UNTOUCHED, check_detector_names, heads_found, number_of, scored
from retmask_jax.stages.outcomes import task_outcomes
from retmask_jax.utils import stats


def _check(config) -> None:
    """Raise ValueError for settings of this stage that could only fail later."""
    check_detector_names("theta.detector", [config.theta.detector])
    _check_factors(config.theta.factors)


def theta_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Recall and the number of retrieval heads with the RoPE base changed at inference, the weights as they are."""
    section, base = context.config.theta, context.lm.config.rope.theta
    tasks = section.tasks or context.config.knockout.tasks[:1]
    threshold = DETECT.of(context).reached
    outcomes: dict[str, list] = {}
    counts = []
    for factor in section.factors:
        changed = context.of(with_base(context.lm, factor))
        for task, outcome_CN in task_outcomes(changed, tasks, [UNTOUCHED])[0].items():
            outcomes.setdefault(task, []).append(outcome_CN[0])
        run = scored(changed, section.detector, section.cases, folder / f"factor_{factor:g}.json")
        counts.append({"factor": factor, "theta": factor * base} | heads_found(run, threshold))
    own = section.factors.index(1)
    for count in counts:
        count["jaccard"] = stats.jaccard(count["heads"], counts[own]["heads"])
    rows = [
        {
            "task": task,
            "factor": factor,
            "theta": factor * base,
            **stats.proportion(outcome),
            "change": stats.paired_bootstrap(outcome, of_task[own]),
            "mcnemar": stats.mcnemar(of_task[own], outcome),
        }
        for task, of_task in outcomes.items()
        for factor, outcome in zip(section.factors, of_task, strict=True)
    ]
    numbers = {f"theta/{row['task']}/factor {row['factor']:g}": number_of(row) for row in rows}
    for count in counts:
        numbers[f"theta/heads/factor {count['factor']:g}"] = stats.exact(len(count["heads"]), count["counted"])
    return {
        "theta": base,
        "factors": list(section.factors),
        "detector": section.detector,
        "threshold": threshold,
        "rows": rows,
        "heads": counts,
        "numbers": numbers,
    }


def _check_factors(factors: Sequence[float]) -> None:
    if 1 not in factors:
        raise ValueError(
            f"theta.factors {tuple(factors)} lack 1, the model as it is, which the others are compared with"
        )
    if len(set(factors)) < len(factors) or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"theta.factors {tuple(factors)} must be positive and each one there once")


THETA = Stage(
    name="theta",
    work=theta_stage,
    result=dict,
    upstream=(DETECT,),
    settings=(*PROMPTS, "theta.*", "knockout.tasks", *DETECTION),
    tasks=lambda config: (config.detect.task, *(config.theta.tasks or config.knockout.tasks[:1])),
    check=_check,
)
