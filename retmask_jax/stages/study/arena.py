"""The stage `arena`: lists of heads, whoever made them, compared by what ablating as many heads of each does."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.builtin_files import path_of
from retmask_jax.evals.perplexity import Windows
from retmask_jax.heads import knockout
from retmask_jax.heads.conditions import UNTOUCHED, Condition
from retmask_jax.heads.head_outputs import head_statistics
from retmask_jax.heads.lists.formats import HeadList
from retmask_jax.heads.lists.overlap import Overlap, overlaps
from retmask_jax.model.interventions import Head
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, activity_cost, cases_cost, task_cost
from retmask_jax.runs.stage import PROMPTS, Stage, Table
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.outcomes import head_activity, task_outcomes, text_losses
from retmask_jax.stages.study.detector_runs import PASSES, check_detector_names
from retmask_jax.stages.study.listed_heads import ListRow, all_lists, check_sizes, detection_task, given_lists, sizes_of
from retmask_jax.utils import stats
from retmask_jax.utils.fingerprints import fingerprint
from retmask_jax.utils.numbers import Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSet:
    """The heads of a list that are ablated together.

    Attributes:
        draw: Of a control, of which there may be several.
        tied: How many more heads score as the last of these, so that which are taken is the order of layers and heads.
    """

    name: str
    source: str
    size: int
    draw: int
    heads: list[Head]
    tied: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArenaRow:
    """What ablating `size` heads of a list in a mode does; means over the draws of a control.

    Attributes:
        mode: One of `knockout.MODES`.
        recall: Share of the task's cases that are right.
        change: Of recall against the untouched model, paired by case.
        loss: On plain text, in nats per token.
        cost: By how much the loss is above that of the untouched model, paired by window.
    """

    name: str
    source: str
    mode: str
    size: int
    recall: Number
    change: Number
    loss: Number
    cost: Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeOverlap(Overlap):
    """An overlap of the best `size` heads of two lists."""

    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArenaResult(Result):
    """Lists of heads side by side.

    Attributes:
        task: Whose cases are answered.
        reference: The list that controls are made for: as many heads of any layer, of its layers, of similar activity, and
            the lowest-scoring ones.
        sizes: Numbers of heads, the same for all lists.
        recall, loss: Of the untouched model.
        overlaps: Of each two lists but controls.
    """

    task: str
    reference: str
    sizes: list[int]
    modes: list[str]
    recall: Number
    loss: Number
    lists: list[ListRow]
    sets: list[HeadSet]
    rows: list[ArenaRow]
    overlaps: list[SizeOverlap]


def arena_stage(context: Context, folder: Path) -> ArenaResult:
    """Ablates as many heads of every list, and of controls, in every mode: recall of a task, and the loss on plain text."""
    section, task, config = context.config.arena, _task(context.config), context.lm.config
    rows, lists = all_lists(context)
    sizes, windows = sizes_of(context, lists), context.windows()
    sets = _sets(context, lists, sizes)
    conditions = _conditions(context, sets, windows)
    distinct, places = _distinct(conditions)
    answered = task_outcomes(context, [task], distinct)
    outcome_CN = answered.outcomes[task][places]
    loss_CW = text_losses(context, windows[: section.windows], distinct)[places]
    untouched = stats.proportion(outcome_CN[0]), stats.bootstrap_mean(loss_CW[0])
    return ArenaResult(
        task=task,
        reference=next(iter(lists)),
        sizes=sizes,
        modes=list(section.modes),
        recall=untouched[0],
        loss=untouched[1],
        lists=rows,
        sets=sets,
        rows=_rows(conditions, sets, outcome_CN, loss_CW),
        overlaps=[
            SizeOverlap(**vars(pair), size=size)
            for size in sizes
            for pair in overlaps(_best(lists, size), config.n_layers * config.n_heads)
        ],
        examples=answered.examples({"untouched": 0, f"{sets[0].name}, {section.modes[0]}": 1}),
        numbers={f"arena/{task}/untouched": untouched[0], "arena/text loss/untouched": untouched[1]},
    )


# --- what is ablated ---


def _best(lists: Mapping[str, HeadList], size: int) -> dict[str, list[Head]]:
    return {name: found.heads[:size] for name, found in lists.items()}


def _sets(context: Context, lists: Mapping[str, HeadList], sizes: Sequence[int]) -> list[HeadSet]:
    """The best heads of every list, and controls of the first one, at every size."""
    section, (reference, first), sets = context.config.arena, next(iter(lists.items())), []
    activity_LH = head_activity(context)
    for size in sizes:
        best = _best(lists, size)
        for name, heads in best.items():
            source = "detector" if name in section.detectors else "file"
            tied = _tied(lists[name], size)
            sets.append(HeadSet(name=name, source=source, size=size, draw=0, heads=heads, tied=tied))
        controls = knockout.control_heads(
            context.lm.config,
            best[reference],
            activity_LH,
            draws=section.draws,
            seed=section.seed,
            scores_LH=None if first.scores is None else first.scores.mean,
        )
        sets += [
            HeadSet(name=kind, source="control", size=size, draw=draw, heads=heads) for kind, draw, heads in controls
        ]
    return sets


def _tied(found: HeadList, size: int) -> int:
    if found.scores is None:
        return 0
    mean_LH = found.scores.mean
    return sum(bool(mean_LH[head] == mean_LH[found.heads[size - 1]]) for head in found.heads[size:])


# --- what ablating them does ---


def _conditions(context: Context, sets: Sequence[HeadSet], windows: Windows) -> list[Condition]:
    """The untouched model, and every set in every mode."""
    modes, config = context.config.arena.modes, context.lm.config
    measured = head_statistics(context.lm, windows) if {"mean", "query_mean"} & set(modes) else None
    conditions = [UNTOUCHED]
    for mode in modes:
        mean_LHD = None if measured is None else measured.mean_for(mode)
        for one in sets:
            mask = knockout.ablate(config, one.heads, mode, mean_LHD)
            conditions.append(Condition(one.name, one.draw, mask, tuple(one.heads), experiment=mode))
    return conditions


def _distinct(conditions: Sequence[Condition]) -> tuple[list[Condition], list[int]]:
    """(conditions without those that ablate the same heads in the same mode, the place of each condition among them)."""
    first: dict[Any, int] = {}
    places = [first.setdefault((c.experiment, frozenset(c.heads)), len(first)) for c in conditions]
    return [conditions[places.index(place)] for place in range(len(first))], places


def _rows(conditions: Sequence[Condition], sets: Sequence[HeadSet], outcome_CN, loss_CW) -> list[ArenaRow]:
    """A row per list, size and mode; draws of a control are averaged."""
    places: dict[tuple[str, int, str], list[int]] = {}
    for i, condition in enumerate(conditions[1:], 1):
        places.setdefault((condition.kind, len(condition.heads), condition.experiment), []).append(i)
    source, untouched = {one.name: one.source for one in sets}, (outcome_CN[0], loss_CW[0])
    return [
        _row(outcome_CN[drawn], loss_CW[drawn], untouched, name=name, source=source[name], mode=mode, size=size)
        for (name, size, mode), drawn in places.items()
    ]


def _row(right_DN, loss_DW, untouched, **of_list: Any) -> ArenaRow:
    """untouched: the outcomes and the losses of the untouched model."""
    right_N, loss_W = untouched
    several, right_DN = len(right_DN) > 1, right_DN.astype(float)
    return ArenaRow(
        recall=stats.bootstrap_mean(right_DN) if several else stats.proportion(right_DN[0]),
        change=stats.paired_bootstrap(right_DN, right_N.astype(float)),
        loss=stats.bootstrap_mean(loss_DW),
        cost=stats.paired_bootstrap(loss_DW, loss_W),
        **of_list,
    )


# --- settings ---


def _task(config) -> str:
    return config.arena.task or next(iter(config.knockout.tasks), "")


def _tasks(config) -> list[str]:
    return [task for task in (_task(config), detection_task(config) if config.arena.detectors else "") if task]


def _inputs(context: Context) -> dict[str, Any]:
    return {f"heads of {file}": fingerprint(path_of(file)) for file in context.config.arena.files}


def _check(config) -> None:
    check_detector_names("arena.detectors", config.arena.detectors)
    modes = config.arena.modes
    if not modes or not set(modes) <= set(knockout.MODES):
        raise ValueError(f"arena.modes is {tuple(modes)}; it must have some of {', '.join(knockout.MODES)}")


def _check_run(config) -> None:
    if not (config.arena.detectors or config.arena.files):
        raise ValueError("arena.detectors and arena.files are empty: name a list of heads")
    if not _task(config):
        raise ValueError(
            "arena.task is None and knockout.tasks is empty: name a task that is answered with heads ablated"
        )
    if not config.text.file:
        raise ValueError("text.file names no file: what ablated heads cost is measured on plain text")


def _check_fit(context: Context) -> None:
    model, section = context.outline.config, context.config.arena
    lengths = {name: len(found.heads) for name, found in given_lists(context).items()}
    if section.heads:
        check_sizes(section.heads, lengths, model.n_layers * model.n_heads)
    for mode in section.modes:
        knockout.ablate(model, [], mode, np.zeros((model.n_layers, model.n_heads, model.head_dim), np.float32))


def _cost(context: Context) -> Cost:
    config, model = context.config, context.outline.config
    section, text = config.arena, config.text
    lists, kinds = len(section.detectors) + len(section.files), 4  # kinds of controls
    masks = 1 + len(section.modes) * (len(section.heads) or 1) * (lists + kinds * section.draws)
    passes = sum(PASSES.get(name, 1) for name in section.detectors)
    detection = Cost(cases_cost(config, detection_task(config), section.cases).read) if section.detectors else Cost()
    plain = activity_cost(config, model) + Cost(
        masks * min(text.windows, section.windows or text.windows) * text.length
    )
    return passes * detection + masks * task_cost(config, _task(config)) + plain


def _tables(result: ArenaResult) -> list[Table]:
    """A row per list: recall and what it costs plain text, in every mode."""
    tables = []
    for size in result.sizes:
        header = [f"{size} heads ablated", *(cell for mode in result.modes for cell in (mode, "text loss"))]
        by_list: dict[str, list[str]] = {}
        for row in (row for row in result.rows if row.size == size):
            recall, cost = row.recall, row.cost
            by_list.setdefault(row.name, []).extend(
                (f"{recall.value:.3f} [{recall.low:.3f}, {recall.high:.3f}]", f"{cost.value:+.3f}")
            )
        tables.append(Table(header, [[name, *cells] for name, cells in by_list.items()]))
    return tables


# All of its section but the files, of which the content counts: a list that is added makes no other work directory.
_SETTINGS = """arena.detectors arena.detect arena.cases arena.heads arena.task arena.modes arena.draws arena.seed
    arena.windows detect.threshold detect.top_k detect.max_new_tokens detectors.null_query knockout.activity_windows
    text.*""".split()

ARENA = Stage(
    name="arena",
    work=arena_stage,
    result=ArenaResult,
    settings=(*PROMPTS, *_SETTINGS),
    tasks=_tasks,
    inputs=_inputs,
    check=_check,
    check_run=_check_run,
    check_fit=_check_fit,
    tables=_tables,
    cost=_cost,
)
