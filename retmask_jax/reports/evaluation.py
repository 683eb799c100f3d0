"""What models do on tasks and suites, against the start model, as a section of a page."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from retmask_jax.evals.compare import START, numbers_by_task
from retmask_jax.reports import figures, html
from retmask_jax.reports.figures import drawn as _figure
from retmask_jax.reports.html import change, p_value, signed, table
from retmask_jax.reports.html import count as _n
from retmask_jax.reports.html import section as _section
from retmask_jax.reports.wording import axis, directions, is_loss


def evaluation_section(result, trained: bool = True) -> str:
    """Models against the start model, from the result of `eval`, or (not trained here) of `compare`."""
    _, changes = numbers_by_task(result)
    rows, grids = result["rows"], _by_model(result["grids"])
    maps = {f"{task}: {name}": figures.niah(f"{task}: {name}", cells) for (task, name), cells in grids.items()}
    seeds = len({row["seed"] for row in rows if row["arm"] != "start"})
    over = f" and {_n(seeds, 'training seed')}" if trained else ""
    fixed = (
        "Seeds are held fixed, so an interval does not cover what another seed would give; it"
        if trained
        else "An interval"
    )
    subject = "Training with {}" if trained else "{}"
    return _section(
        "Evaluation",
        [
            directions("Masking the retrieval heads" if arm == "masked" else subject.format(arm), by_task)
            for arm, by_task in changes.items()
        ]
        + _missing(result["missing"]),
        _figure(
            _panels(result),
            f"Mean over cases{over}"
            f"{' (pale dots: single seeds)' if seeds > 1 else ''} with its 95% interval, bootstrap over "
            "cases. Dotted line: the start model. Losses: lower is better.",
        ),
        _figure(
            _forests(changes),
            "Changes against the start model, paired by case, with 95% intervals: bootstrap over "
            f"cases, not adjusted for the number of tasks. {fixed} has no width where no case changes.",
        ),
        _change_table(changes, rows),
        _helmet(result["helmet"]),
        html.lines(*_grid_means(grids)),
        _figure(
            maps,
            "Recall by length and depth (0%: start of the text), the same scale in every map"
            + (", means over seeds." if seeds > 1 else "."),
        ),
    )


def _panels(result) -> dict[str, object]:
    """A panel for each task; one for a task of several lengths, with the models as lines."""
    of_tasks, _ = numbers_by_task(result)
    panels, series = {}, _series(result, of_tasks)
    for task, means in of_tasks.items():
        metric = result["metrics"].get(task) or axis(task)
        place = result["series"].get(task)
        if place and len(series[place["of"]]) > 1:
            points = {arm: [(at, of_tasks[name][arm]) for at, name in series[place["of"]]] for arm in means}
            label = f"{place['axis']}; n = {means['start']['n']} at each"
            panels[f"Evaluation: {place['of']}"] = figures.over(place["of"], points, label, metric)
            continue
        runs = {
            arm: [row["value"] for row in result["rows"] if (row["task"], row["arm"]) == (task, arm)] for arm in means
        }
        share = not is_loss(task) and max(number["value"] for number in means.values()) <= 1
        label = f"{metric} (n = {means['start']['n']})"
        panels[f"Evaluation: {task}"] = figures.before_after(task, means, runs, label, share=share)
    return panels


def _series(result, tasks: Iterable[str]) -> dict[str, list[tuple[int, str]]]:
    """{series: [(its place on the axis, task), ...] in order}, of the tasks that all models have."""
    series: dict[str, list[tuple[int, str]]] = {}
    for task in tasks:
        if task in result["series"]:
            series.setdefault(result["series"][task]["of"], []).append((result["series"][task]["at"], task))
    return {name: sorted(points) for name, points in series.items()}


def _change_table(changes: Mapping[str, Mapping[str, Mapping]], rows: Sequence[Mapping]) -> str:
    """Every task's change of every arm; with McNemar's p where an arm is one model and answers are right or wrong."""
    tests: dict[tuple[str, str], list] = {}
    for row in rows:
        tests.setdefault((row["arm"], row["task"]), []).append(row.get("mcnemar"))

    def p(arm: str, task: str) -> str:
        found = tests.get((arm, task), [])
        return p_value(found[0]["p_value"]) if len(found) == 1 and found[0] else "–"

    head = ["change against start", *(cell for arm in changes for cell in (arm, "p"))]
    cells = [
        [task, *(cell for arm, by_task in changes.items() for cell in (change(by_task[task]), p(arm, task)))]
        for task in next(iter(changes.values()), {})
    ]
    return table(head, cells, note="p: McNemar's exact test, for single models and answers that are right or wrong.")


def _helmet(by_model: Mapping[str, Mapping]) -> str:
    """HELMET's categories and means, in the paper's layout: a row per model and length, with what it changes against the
    start model. A dash where a part is missing."""
    start = by_model.get(START, {})
    rows = [
        [
            name,
            length,
            *(
                _helmet_cell(entry, before if name != START else None)
                for entry, before in zip(_entries(found), _entries(start[length]), strict=True)
            ),
        ]
        for name, lengths in by_model.items()
        for length, found in lengths.items()
    ]
    if not rows:
        return ""
    first = next(found for lengths in by_model.values() for found in lengths.values())
    lacking = dict.fromkeys(
        line
        for lengths in by_model.values()
        for found in lengths.values()
        for entry in found["categories"].values()
        for line in entry["missing"]
    )
    note = "HELMET, per cent. Missing parts: " + "; ".join(lacking) + "." if lacking else "HELMET, per cent."
    return table(
        ["model", "tokens", *first["categories"], *(f"mean, {name}" for name in first["means"])], rows, note=note
    )


def _entries(found) -> list[Mapping]:
    return [*found["categories"].values(), *found["means"].values()]


def _helmet_cell(entry: Mapping, before: Mapping | None) -> str:
    """Per cent, and the points it is above the start model."""
    if entry["value"] is None or before is None or before["value"] is None:
        return "–" if entry["value"] is None else f"{entry['value']:.2f}"
    return f"{entry['value']:.2f} ({signed(entry['value'] - before['value'], 2)})"


def _missing(missing: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Samples of suites that have no value, a line per model, task and reason."""
    return [
        f"{name}, {task}: {n} samples are missing, {why}."
        for name, tasks in missing.items()
        for task, reasons in tasks.items()
        for why, n in reasons.items()
    ]


def _grid_means(grids: Mapping[tuple[str, str], Sequence[Mapping]]) -> list[str]:
    """What each model recalls over a whole grid, in a sentence per task."""
    means: dict[str, list[str]] = {}
    for (task, name), cells in grids.items():
        mean = np.average([cell["value"] for cell in cells], weights=[cell["n"] for cell in cells])
        means.setdefault(task, []).append(f"{mean:.3f} ({name})")
    return [f"Over all lengths and depths of {task} recall is {', '.join(values)}." for task, values in means.items()]


def _by_model(grids: Sequence[Mapping]) -> dict[tuple[str, str], list]:
    """{(task, model): cells}, or {(task, arm): cells} where an arm has several seeds."""
    several = len({cell["model"] for cell in grids}) > len({cell["arm"] for cell in grids})
    groups: dict[tuple[str, str], list] = {}
    for cell in grids:
        groups.setdefault((cell["task"], cell["arm" if several else "model"]), []).append(cell)
    return groups


def _forests(changes: Mapping[str, Mapping[str, Mapping]]) -> dict[str, object]:
    """Forest plots, recall and text loss apart, split where one would not fit on a printed page."""
    by_task: dict[str, dict] = {}
    for arm, of_arm in changes.items():
        for task, number in of_arm.items():
            by_task.setdefault(task, {})[arm] = number
    panels, per_panel = {}, max(1, 24 // (1 + len(changes)))
    for unit, tasks in (
        ("change of recall or score", [task for task in by_task if not is_loss(task)]),
        ("change of loss (nats per token)", [task for task in by_task if is_loss(task)]),
    ):
        limits = _limits([number for task in tasks for number in by_task[task].values()])
        for i in range(0, len(tasks), per_panel):
            shown = {task: by_task[task] for task in tasks[i : i + per_panel]}
            panels[f"Changes: {', '.join(shown)}"] = figures.forest("Change against start", shown, unit, limits)
    return panels


def _limits(numbers: Sequence[Mapping]) -> tuple[float, float]:
    """A common axis for intervals and zero."""
    ends = [0.0] + [number[key] for number in numbers for key in ("value", "low", "high") if number[key] is not None]
    margin = 0.08 * (max(ends) - min(ends)) or 0.01
    return min(ends) - margin, max(ends) + margin
