"""The stage `budget`: recall, and the loss on plain text, against the share of keys kept where all but some KV heads stream."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.builtin_files import path_of
from retmask_jax.heads.conditions import UNTOUCHED, Condition
from retmask_jax.heads.lists.formats import HeadList
from retmask_jax.heads.lists.keys_kept import (
    KVHead,
    kept_for,
    numbers_kept,
    random_kv_heads,
    share_of_keys,
    stream_all_but,
)
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, cases_cost, task_cost
from retmask_jax.runs.stage import PROMPTS, Stage, Table
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.outcomes import task_outcomes, text_losses
from retmask_jax.stages.study.budget_rows import TEXT, BudgetRow, BudgetSet, Enough, Margin, Measured
from retmask_jax.stages.study.detector_runs import PASSES, check_detector_names
from retmask_jax.stages.study.listed_heads import RANDOM, ListRow, all_lists, detection_task, given_lists
from retmask_jax.utils.fingerprints import fingerprint
from retmask_jax.utils.numbers import Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetResult(Result):
    """Lists of heads by what a model still does on the keys that they keep.

    Attributes:
        tasks: Whose cases are answered.
        sink, window: Of streaming heads.
        total: KV heads of the model.
        sizes: Numbers of KV heads that keep all keys.
        lists: Of detectors and files; random ones are in `sets` alone.
        untouched: By measure.
    """

    tasks: list[str]
    sink: int
    window: int
    total: int
    sizes: list[int]
    lists: list[ListRow]
    sets: list[BudgetSet]
    untouched: dict[str, Number]
    rows: list[BudgetRow]
    margins: list[Margin]
    enough: list[Enough]

    @property
    def names(self) -> list[str]:
        """Of the lists that were measured, random ones last."""
        return list(dict.fromkeys(row.name for row in self.rows))

    def budgets(self, measure: str) -> list[tuple[int, list[BudgetRow | None]]]:
        """(KV heads kept, the rows of `names`, None for a list that does not name so many), for each number."""
        found = {(row.kept, row.name): row for row in self.rows if row.measure == measure}
        return [
            (kept, [found.get((kept, name)) for name in self.names]) for kept in sorted({kept for kept, _ in found})
        ]


def budget_stage(context: Context, folder: Path) -> BudgetResult:
    """Keeps the KV heads of every list's best heads, and of random ones, while all others stream."""
    section, config, tasks = context.config.budget, context.lm.config, _tasks(context.config)
    rows, lists = all_lists(context, "budget")
    total = config.n_layers * config.n_kv_heads
    sizes = numbers_kept(section.kept, total)
    sets = _sets(context, lists, sizes)
    masks, places = _distinct(sets, total)
    ways = section.sink, section.window
    conditions = [UNTOUCHED] + [Condition("streams", 0, stream_all_but(config, kept, *ways)) for kept in masks]
    answered = task_outcomes(context, tasks, conditions)
    windows = context.windows(section.length)[: section.windows]
    by_condition = {task: answered.outcomes[task].astype(float) for task in tasks}
    by_condition[TEXT] = text_losses(context, windows, conditions)
    lengths = {task: [len(case.tokens) for case in answered.cases[task]] for task in tasks}
    lengths[TEXT] = [windows.shape[1]]
    measured = [
        Measured(measure, sets, x_CN[0], x_CN[places], [_share(context, one, lengths[measure]) for one in sets])
        for measure, x_CN in by_condition.items()
    ]
    untouched = {one.measure: one.untouched for one in measured}
    margins = [margin for one in measured for margin in one.margins(total)]
    return BudgetResult(
        tasks=tasks,
        sink=section.sink,
        window=section.window,
        total=total,
        sizes=sizes,
        lists=rows,
        sets=sets,
        untouched=untouched,
        rows=[row for one in measured for row in one.rows()],
        margins=margins,
        enough=[found for one in measured if one.measure != TEXT for found in one.enough()],
        examples=answered.examples(_shown(sets, places)),
        numbers={f"budget/{measure}/untouched": number for measure, number in untouched.items()}
        | {f"budget/{one.measure}/{one.name} less random": one.number for one in margins},
    )


# --- what is kept ---


def _sets(context: Context, lists: Mapping[str, HeadList], sizes: Sequence[int]) -> list[BudgetSet]:
    """The budgets of every list that names enough heads, and of random lists."""
    config, section = context.lm.config, context.config.budget
    sets = []
    for name, found in lists.items():
        for size in sizes:
            k, kept = kept_for(config, found.heads, size)
            if len(kept) == size:
                sets.append(BudgetSet(name=name, draw=0, k=k, kv_heads=kept))
    for draw in range(section.draws):
        order = random_kv_heads(config, section.seed + draw)
        sets += [BudgetSet(name=RANDOM, draw=draw, k=0, kv_heads=order[:size]) for size in sizes]
    return sets


def _distinct(sets: Sequence[BudgetSet], total: int) -> tuple[list[list[KVHead]], list[int]]:
    """(the KV heads kept, each choice once and without that of all; the place of each set among the conditions, of which the
    first is the untouched model, where all are kept)."""
    masks: list[list[KVHead]] = []
    found: dict[frozenset[KVHead], int] = {}
    places = []
    for one in sets:
        kept = frozenset(one.kv_heads)
        if len(kept) == total:
            places.append(0)
            continue
        if kept not in found:
            masks.append(one.kv_heads)
            found[kept] = len(masks)
        places.append(found[kept])
    return masks, places


def _share(context: Context, one: BudgetSet, lengths: Sequence[int]) -> float:
    section, config = context.config.budget, context.lm.config
    of_length = {n: share_of_keys(config, one.kv_heads, n, section.sink, section.window) for n in set(lengths)}
    return float(np.mean([of_length[n] for n in lengths]))


def _shown(sets: Sequence[BudgetSet], places: Sequence[int]) -> dict[str, int]:
    """The conditions whose answers are shown."""
    none = next((place for one, place in zip(sets, places, strict=True) if not one.kept), None)
    return {"untouched": 0} | ({} if none is None else {"all heads stream": none})


# --- settings ---


def _tasks(config) -> list[str]:
    return list(config.budget.tasks or config.knockout.tasks[:1])


def _all_tasks(config) -> list[str]:
    return [*_tasks(config), *([detection_task(config, "budget")] if config.budget.detectors else [])]


def _inputs(context: Context) -> dict[str, Any]:
    return {f"heads of {file}": fingerprint(path_of(file)) for file in context.config.budget.files}


def _check(config) -> None:
    check_detector_names("budget.detectors", config.budget.detectors)
    if not config.budget.kept:
        raise ValueError("budget.kept is empty: name shares or numbers of KV heads, such as (0.0, 0.1, 0.5)")


def _check_run(config) -> None:
    section = config.budget
    if not (section.detectors or section.files):
        raise ValueError("budget.detectors and budget.files are empty: name a list of heads")
    if not _tasks(config):
        raise ValueError("budget.tasks and knockout.tasks are empty: name a task that is answered while heads stream")
    if not config.text.file:
        raise ValueError("text.file names no file: what streaming costs is measured on plain text")
    reach = section.sink + section.window
    longest = {task: max(config.tasks[task].lengths, default=0) for task in _tasks(config)} | {TEXT: _length(config)}
    for what, length in longest.items():
        if length <= reach:
            raise ValueError(
                f"streaming heads see {reach} tokens, and those of {what} are at most {length}: lower budget.window, or take "
                f"longer ones ({'budget.length' if what == TEXT else 'budget.tasks'})"
            )


def _check_fit(context: Context) -> None:
    model, section = context.outline.config, context.config.budget
    numbers_kept(section.kept, model.n_layers * model.n_kv_heads)
    given_lists(context, "budget")
    if share_of_keys(model, [], _length(context.config), section.sink, section.window) == 1:
        raise ValueError(
            f"every layer of the model has a window of {model.window}, so nothing is lost where heads see their last "
            f"{section.window} keys: lower budget.window"
        )
    if _length(context.config) > model.max_length:
        raise ValueError(
            f"texts of {_length(context.config)} tokens exceed the model's context of {model.max_length}: lower budget.length"
        )


def _length(config) -> int:
    return config.budget.length or config.text.length


def _cost(context: Context) -> Cost:
    config, model = context.config, context.outline.config
    section = config.budget
    total = model.n_layers * model.n_kv_heads
    between = len(set(numbers_kept(section.kept, total)) - {0, total})
    masks = 2 + between * (len(section.detectors) + len(section.files) + section.draws)
    detection = cases_cost(config, detection_task(config, "budget"), section.cases).read if section.detectors else 0
    passes = sum(PASSES.get(name, 1) for name in section.detectors)
    text = min(config.text.windows, section.windows or config.text.windows) * _length(config)
    answers = sum((task_cost(config, task) for task in _tasks(config)), Cost())
    return masks * answers + Cost(passes * detection + masks * text)


def _tables(result: BudgetResult) -> list[Table]:
    """A row per budget, a column per list."""
    tables = []
    for measure in result.untouched:
        rows = [
            (f"{kept} of {result.total}", shares_of(there), *("" if row is None else _cell(row) for row in there))
            for kept, there in result.budgets(measure)
        ]
        tables.append(Table((f"{measure}: KV heads kept", "keys", *result.names), rows))
    return tables


def shares_of(rows: Sequence[BudgetRow | None]) -> str:
    """The share of keys that is kept, or the least and the most of several lists."""
    found = [f"{share:.1%}" for share in sorted(row.share for row in rows if row is not None)]
    return found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _cell(row: BudgetRow) -> str:
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


BUDGET = Stage(
    name="budget",
    work=budget_stage,
    result=BudgetResult,
    settings=(
        *PROMPTS,
        *(
            f"budget.{key}"
            for key in (
                "detectors",
                "detect",
                "cases",
                "kept",
                "sink",
                "window",
                "tasks",
                "draws",
                "seed",
                "length",
                "windows",
            )
        ),
        *("detect.max_new_tokens", "detectors.null_query", "text.*"),
    ),
    tasks=_all_tasks,
    inputs=_inputs,
    check=_check,
    check_run=_check_run,
    check_fit=_check_fit,
    tables=_tables,
    cost=_cost,
)
