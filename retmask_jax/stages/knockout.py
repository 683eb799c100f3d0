"""The stage `knockout`: answers and losses with the retrieval heads, or others, ablated."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retmask_jax.heads import knockout
from retmask_jax.heads.conditions import Condition, ConditionRow, Contrast, contrast, hits, mean_over_draws, summarise
from retmask_jax.heads.head_outputs import head_statistics
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.interventions import Head, Interventions, mask_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, activity_cost, task_cost
from retmask_jax.runs.stage import PROMPTS, Stage, Table
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.detect import DETECT, head_scores, retrieval_heads
from retmask_jax.stages.outcomes import (
    check_choices,
    head_activity,
    mask_name,
    task_answers,
    task_outcomes,
    text_losses,
)
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindNumber(Number):
    """A number under a kind of mask, mean over its draws. experiment: one of `knockout.MODES`."""

    value: float
    kind: str
    experiment: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossRow(KindNumber):
    """The loss on text (nats per token) under one mask."""

    draw: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskMean(KindNumber):
    """The share of a task's cases that are right under a kind of mask, mean over its draws."""

    task: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlContrast(Contrast):
    """How many more cases are right with other heads ablated than with the retrieval heads ablated in the same mode."""

    task: str
    kind: str
    experiment: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinimalSet:
    """A small set of heads whose masking keeps recall of a task at most `limit` (`knockout.minimal_set`).

    steps: the heads spared, in order. searched: cases that the search used. recall: on the other cases.
    """

    task: str
    heads: list[Head]
    steps: list[knockout.Spared]
    limit: float
    searched: int
    recall: dict[str, Number]

    @property
    def recall_untouched(self) -> Number:
        """Recall of the untouched model."""
        return self.recall["none"]

    @property
    def recall_without_all(self) -> Number:
        """Recall with all retrieval heads masked."""
        return self.recall["all retrieval heads"]

    @property
    def recall_without_set(self) -> Number:
        """Recall with this set masked."""
        return self.recall["smallest set"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnockoutResult(Result):
    """rows: every mask on every task. means: over the draws of a kind. text_loss, text_loss_means: the same for the loss on
    text. activity: [L][H] of `knockout.activity`. idle: how many heads are idle, those below the share `idle_below` of the
    most active head. curve: more and more heads masked. minimal: None where it was not searched. moved: how many heads of a
    layer-matched set are of another layer, because theirs has too few others."""

    rows: list[ConditionRow]
    means: list[TaskMean]
    text_loss: list[LossRow]
    text_loss_means: list[KindNumber]
    activity: list[list[float]]
    idle: int
    idle_below: float
    curve: list[ConditionRow]
    minimal: MinimalSet | None
    contrasts: list[ControlContrast]
    moved: int = 0

    @property
    def masked(self) -> int:
        """How many heads each set has."""
        return next((len(row.heads) for row in self.rows if row.kind == "retrieval"), 0)


def knockout_stage(context: Context, folder: Path) -> KnockoutResult:
    """Every task, and the loss on plain text, with the retrieval heads or others ablated.

    Where the config asks for them: other ways to ablate a head, curves over the number of heads, and the smallest set that
    matters.
    """
    section, heads, scores = context.config.knockout, retrieval_heads(context), head_scores(context)
    windows = context.windows()
    activity_LH = head_activity(context)
    conditions = _conditions(context, heads, scores, activity_LH, windows)
    answered = task_outcomes(context, section.tasks, conditions)
    outcomes = answered.outcomes
    with_loss = [c for c in conditions if c.experiment == "zero" or c.kind == "retrieval"]
    losses = text_losses(context, windows, with_loss)
    means, loss_means = _task_means(conditions, outcomes), _loss_means(with_loss, losses)
    idle = int((activity_LH < knockout.IDLE * activity_LH.max()).sum())
    curve = _curve(context, scores, heads)
    minimal = None if section.minimal is None else _minimal(context, heads)
    return KnockoutResult(
        rows=summarise(conditions, outcomes),
        means=means,
        text_loss=[
            LossRow.of(stats.bootstrap_mean(loss), kind=c.kind, draw=c.draw, experiment=c.experiment)
            for c, loss in zip(with_loss, losses, strict=True)
        ],
        text_loss_means=loss_means,
        activity=activity_LH.tolist(),
        idle=idle,
        idle_below=knockout.IDLE,
        curve=curve,
        minimal=minimal,
        contrasts=_against_controls(conditions, outcomes),
        moved=_moved(heads, conditions),
        examples=answered.examples({"untouched": 0, "retrieval heads masked": 1}),
        numbers={f"knockout/{row.task}/{_named(row)}": row.number for row in means}
        | {f"knockout/text loss/{_named(row)}": row.number for row in loss_means}
        | {"knockout/idle heads": stats.exact(idle, activity_LH.size)}
        | _minimal_numbers(minimal),
    )


def _check(config) -> None:
    check_choices("knockout.modes", config.knockout.modes, knockout.MODES)


def _check_model(context: Context) -> None:
    config, section = context.outline.config, context.config.knockout
    numbers = [size for size in section.curve if not isinstance(size, float)]
    knockout.head_numbers(numbers, n_retrieval=0, n_all=config.n_layers * config.n_heads)
    if "query" in section.modes:  # which not every model takes
        knockout.ablate(config, [], "query")


def _conditions(context: Context, heads: Sequence[Head], scores: HeadScores, activity_LH, windows) -> list[Condition]:
    """The conditions of every mode, with the untouched model once."""
    section, conditions = context.config.knockout, []
    statistics = head_statistics(context.lm, windows) if {"mean", "query_mean"} & set(section.modes) else None
    for mode in section.modes:
        of_mode = knockout.knockout_conditions(
            context.lm.config,
            heads,
            activity_LH,
            draws=section.draws if mode == "zero" else section.mode_draws,
            seed=section.seed,
            scores_LH=scores.mean,
            mode=mode,
            mean_LHD=None if statistics is None else statistics.mean_for(mode),
        )
        conditions += of_mode if not conditions else of_mode[1:]
    return conditions


def _task_means(conditions: Sequence[Condition], outcomes) -> list[TaskMean]:
    return [
        TaskMean.of(
            mean_over_draws(conditions, outcome_CN, kind=c.kind, experiment=c.experiment),
            task=task,
            kind=c.kind,
            experiment=c.experiment,
        )
        for task, outcome_CN in outcomes.items()
        for c in _first_draws(conditions)
    ]


def _loss_means(conditions: Sequence[Condition], losses) -> list[KindNumber]:
    means = []
    for first in _first_draws(conditions):
        chosen = [loss for c, loss in zip(conditions, losses, strict=True) if _named(c) == _named(first)]
        means.append(
            KindNumber.of(stats.bootstrap_mean(np.stack(chosen)), kind=first.kind, experiment=first.experiment)
        )
    return means


def _against_controls(conditions: Sequence[Condition], outcomes) -> list[ControlContrast]:
    rows = []
    for task, outcome_CN in outcomes.items():
        for control in _first_draws(conditions):
            if control.kind != "retrieval":
                mode = control.experiment
                ours = {"kind": "retrieval", "experiment": mode}
                others = {"kind": control.kind, "experiment": mode}
                measured = contrast(conditions, outcome_CN, ours, others)
                rows.append(
                    ControlContrast(
                        task=task, kind=control.kind, experiment=mode, change=measured.change, p_value=measured.p_value
                    )
                )
    return rows


def _curve(context: Context, scores: HeadScores, heads: Sequence[Head]) -> list[ConditionRow]:
    """The first task with more and more heads masked."""
    section = context.config.knockout
    if not section.curve:
        return []
    masked = knockout.curve_conditions(
        context.lm.config, scores, heads, section.curve, draws=section.mode_draws, seed=section.seed
    )
    conditions = [Condition("none", 0, Interventions(), experiment="curve"), *masked]
    return summarise(conditions, task_outcomes(context, section.tasks[:1], conditions).outcomes)


def _minimal(context: Context, heads: Sequence[Head]) -> MinimalSet:
    """The smallest set found without which recall of the first task falls to the share `knockout.minimal` of the untouched
    model's; searched on every other case and measured on the rest."""
    section, task = context.config.knockout, context.config.knockout.tasks[0]
    cases, config = context.cases(task), context.lm.config

    def outcomes(sets, cases):
        conditions = [Condition("set", 0, mask_heads(config, some)) for some in sets]
        return np.stack([hits(texts, cases) for texts in task_answers(context, task, cases, conditions)])

    searched, rest = cases[::2], cases[1::2]
    start, everything = outcomes([[], heads], searched).mean(axis=1)
    limit = max(section.minimal * start, everything)
    kept, steps = knockout.minimal_set(heads, lambda sets: outcomes(sets, searched).mean(axis=1), limit)
    measured = zip(("none", "all retrieval heads", "smallest set"), outcomes([[], heads, kept], rest), strict=True)
    return MinimalSet(
        task=task,
        heads=kept,
        steps=steps,
        limit=float(limit),
        searched=len(searched),
        recall={name: stats.proportion(right) for name, right in measured},
    )


def _minimal_numbers(minimal: MinimalSet | None) -> dict[str, Number]:
    if minimal is None:
        return {}
    return {
        f"knockout/{minimal.task}/smallest set": minimal.recall_without_set,
        "knockout/heads of the smallest set": stats.exact(len(minimal.heads), minimal.searched),
    }


def _named(row: Condition | KindNumber) -> str:
    return mask_name(row.kind, row.experiment)


def _first_draws(conditions: Sequence[Condition]) -> list[Condition]:
    return list({_named(c): c for c in reversed(conditions)}.values())[::-1]


def _moved(heads: Sequence[Head], conditions: Sequence[Condition]) -> int:
    """How many heads of a layer-matched set are not of the layers of these heads."""
    matched = next((c.heads for c in conditions if c.kind == "layer-matched"), ())
    return (Counter(layer for layer, _ in matched) - Counter(layer for layer, _ in heads)).total()


def _tables(result: KnockoutResult) -> list[Table]:
    if not result.moved:
        return []
    text = f"{result.moved} of {result.masked}, since their layers have too few other heads"
    return [Table(("layer-matched heads from the nearest other layer",), [(text,)])]


def _cost(context: Context) -> Cost:
    section, model, text = context.config.knockout, context.outline.config, context.config.text
    kinds, modes = 4, len(section.modes) - 1  # kinds of controls
    conditions = 2 + kinds * section.draws + modes * (1 + kinds * section.mode_draws)
    cost = activity_cost(context.config, model) + Cost(conditions * text.windows * text.length)
    return sum((conditions * task_cost(context.config, task) for task in section.tasks), cost)


KNOCKOUT = Stage(
    name="knockout",
    work=knockout_stage,
    result=KnockoutResult,
    upstream=(DETECT,),
    settings=(*PROMPTS, "knockout.*", "text.*"),
    tasks=lambda config: config.knockout.tasks,
    check=_check,
    check_model=_check_model,
    tables=_tables,
    cost=_cost,
)
