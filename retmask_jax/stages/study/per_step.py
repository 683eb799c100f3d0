"""The stage `per_step`: which heads retrieve at each token of an answer, and how long such sets of heads persist."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from retmask_jax.heads.detection import NoCaseCounts
from retmask_jax.heads.patterns.steps import (
    MEASURES,
    HeadSteps,
    Persistence,
    StepRow,
    by_position,
    follow,
    most_active,
    persistence,
)
from retmask_jax.model.interventions import Head
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, cases_cost
from retmask_jax.runs.stage import PROMPTS, SHOWN, Stage, Table
from retmask_jax.runs.workdir import Example, Result
from retmask_jax.stages.detect import DETECT, retrieval_heads
from retmask_jax.stages.study.detector_runs import spread
from retmask_jax.utils.numbers import Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerStepResult(Result):
    """The heads that retrieve at each token of the answers to cases that detection has not seen.

    Attributes:
        heads: The retrieval heads, which are the same at every token.
        outcomes: Number of cases by outcome; where none counts there are no rows.
        rows: By kind and position.
        persistence: By kind.
        active: By kind, the heads that retrieve at most tokens.
    """

    heads: list[Head]
    outcomes: dict[str, int]
    rows: list[StepRow]
    persistence: list[Persistence]
    active: list[HeadSteps]


def per_step_stage(context: Context, folder: Path) -> PerStepResult:
    """Follows the heads through the answers to other cases of the detection task."""
    config, heads = context.config, retrieval_heads(context)
    cases = context.cases(config.detect.task, seed=config.per_step.seed)
    cases = [cases[i] for i in spread(len(cases), config.per_step.cases)]
    settings = {"max_new_tokens": config.detect.max_new_tokens, "batch_size": config.batch_size}
    try:
        found = follow(context.lm, cases, **settings)
    except NoCaseCounts as error:
        outcomes = dict(Counter(error.outcomes))
        return PerStepResult(heads=heads, outcomes=outcomes, rows=[], persistence=[], active=[], numbers={})
    each = [persistence(kind, answers, heads) for kind, answers in found.active.items()]
    replies = zip(cases[:SHOWN], found.answers[:SHOWN], strict=True)
    return PerStepResult(
        heads=heads,
        outcomes=dict(Counter(found.outcomes)),
        rows=[row for kind, answers in found.active.items() for row in by_position(kind, answers, heads)],
        persistence=each,
        active=[row for kind, answers in found.active.items() for row in most_active(kind, answers, heads)],
        examples=[Example.of(case.needle, {"reply": answer}) for case, answer in replies],
        numbers=_numbers(each),
    )


def _numbers(each: Sequence[Persistence]) -> dict[str, Number]:
    measured = {f"per_step/{of.kind}/{words}": getattr(of, name) for of in each for name, words in MEASURES.items()}
    return {name: number for name, number in measured.items() if number is not None}


def _check(config) -> None:
    section, task = config.per_step, config.detect.task
    if task in config.tasks and section.seed == config.tasks[task].seed:
        raise ValueError(
            f"per_step.seed is {section.seed}, the seed of task {task!r} on whose cases heads are found: choose another"
        )


def _tables(result: PerStepResult) -> list[Table]:
    """The heads that retrieve at most tokens."""
    rows = [
        (
            row.kind,
            f"{row.layer}-{row.head}",
            f"{row.estimate:.3f}",
            "" if row.low is None else f"[{row.low:.3f}, {row.high:.3f}]",
            "–" if row.run is None else f"{row.run:.2f}",
            "retrieval head" if row.listed else "",
        )
        for row in result.active
    ]
    cases = [(outcome, str(n)) for outcome, n in result.outcomes.items()]
    head = ("", "head", "share of tokens", "95% interval", "tokens in a row", "")
    return [Table(head, rows), Table(("cases", "n"), cases)]


def _cost(context: Context) -> Cost:
    return cases_cost(context.config, context.config.detect.task, context.config.per_step.cases)


PER_STEP = Stage(
    name="per_step",
    work=per_step_stage,
    result=PerStepResult,
    upstream=(DETECT,),
    settings=(*PROMPTS, "per_step.*", "detect.task", "detect.max_new_tokens"),
    tasks=lambda config: (config.detect.task,),
    tables=_tables,
    cost=_cost,
    check=_check,
)
