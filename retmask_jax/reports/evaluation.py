"""The section on what models do on tasks and suites, against the start model, with its figures."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64
from markupsafe import Markup

from retmask_jax.evals.compare import START, ArmContrast, ModelRow
from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, p_value, section, signed, table
from retmask_jax.reports.plotting import DASHES, MARKERS, WIDTH, colour, drawn
from retmask_jax.reports.wording import axis, directions, is_loss
from retmask_jax.stages.eval import CONTRAST, MASKED, Cell, EvalResult, Helmet, HelmetMean
from retmask_jax.utils.numbers import Number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_UNTRAINED = {
    MASKED: "Masking the retrieval heads",
    CONTRAST: "Contrast decoding, away from the model with its retrieval heads masked,",
}


def evaluation_section(result: EvalResult, trained: bool = True) -> Markup:
    """Models against the start model, from the result of `eval`, or (not trained here) of `compare`."""
    changes, grids = result.changes, _by_model(result.grids)
    seeds = len({row.seed for row in result.rows if row.arm != START})
    over = f" and {count(seeds, 'training seed')}" if trained else ""
    subject = "Training with {}" if trained else "{}"
    fixed = (
        "Seeds are held fixed, so an interval does not cover what another seed would give; it"
        if trained
        else "An interval"
    )
    return section(
        "Evaluation",
        [directions(_UNTRAINED.get(arm) or subject.format(arm), by_task) for arm, by_task in changes.items()]
        + _missing(result.missing),
        drawn(
            _panels(result),
            f"Mean over cases{over}{' (pale dots: single seeds)' if seeds > 1 else ''} with its 95% interval, bootstrap over "
            "cases. Dotted line: the start model. Losses: lower is better.",
        ),
        drawn(
            _forests(changes),
            "Changes against the start model, paired by case, with 95% intervals: bootstrap over "
            f"cases, not adjusted for the number of tasks. {fixed} has no width where no case changes.",
        ),
        _change_table(changes, result.rows),
        _contrast_table(result.contrasts),
        _helmet(result.helmet),
        html.lines(*_grid_means(grids)),
        drawn(
            {f"{task}: {name}": _recall_map(f"{task}: {name}", cells) for (task, name), cells in grids.items()},
            "Recall by length and depth (0%: start of the text), the same scale in every map"
            + (", means over seeds." if seeds > 1 else "."),
        ),
    )


def _panels(result: EvalResult) -> dict[str, "Figure"]:
    """A panel for each task; one for a task of several lengths, with the models as lines."""
    means, series, panels = result.means, _series(result), {}
    for task, by_arm in means.items():
        metric, n = result.metrics.get(task) or axis(task), by_arm[START].n
        place = result.series.get(task)
        if place and len(series[place.of]) > 1:
            points = {arm: [(at, means[name][arm]) for at, name in series[place.of]] for arm in by_arm}
            panels[f"Evaluation: {place.of}"] = _over(place.of, points, f"{place.axis}; n = {n} at each", metric)
            continue
        runs = {arm: [row for row in result.rows if (row.task, row.arm) == (task, arm)] for arm in by_arm}
        share = not is_loss(task) and all(number.value is None or number.value <= 1 for number in by_arm.values())
        panels[f"Evaluation: {task}"] = _before_after(task, by_arm, runs, f"{metric} (n = {n})", share=share)
    return panels


def _series(result: EvalResult) -> dict[str, list[tuple[int, str]]]:
    """{series: [(its place on the axis, task), ...] in order}, of the tasks that all models have."""
    series: dict[str, list[tuple[int, str]]] = {}
    for task in result.means:
        if task in result.series:
            series.setdefault(result.series[task].of, []).append((result.series[task].at, task))
    return {name: sorted(points) for name, points in series.items()}


def _change_table(changes: Mapping[str, Mapping[str, Number]], rows: Sequence[ModelRow]) -> Markup:
    """Every task's change of every arm; with McNemar's p where an arm is one model and answers are right or wrong."""
    tests: dict[tuple[str, str], list] = {}
    for row in rows:
        tests.setdefault((row.arm, row.task), []).append(row.mcnemar)

    def p(arm: str, task: str) -> str:
        found = tests.get((arm, task), [])
        return p_value(found[0].p_value) if len(found) == 1 and found[0] else "–"

    def both(arm: str, task: str) -> tuple[str, str]:
        return (change(changes[arm][task]), p(arm, task)) if task in changes[arm] else ("–", "–")

    head = ["change against start", *(cell for arm in changes for cell in (arm, "p"))]
    tasks = dict.fromkeys(task for by_task in changes.values() for task in by_task)
    cells = [[task, *(cell for arm in changes for cell in both(arm, task))] for task in tasks]
    return table(head, cells, note="p: McNemar's exact test, for single models and answers that are right or wrong.")


def _contrast_table(contrasts: Sequence[ArmContrast]) -> Markup:
    """By how much more the arm retmask does than each other arm, which is what its heads add to training as such."""
    if not contrasts:
        return Markup()
    found = {(row.other, row.task): row for row in contrasts}
    others, tasks = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))

    def both(row: ArmContrast | None) -> tuple[str, str]:
        if row is None:
            return "–", "–"
        return change(row.change), p_value(row.mcnemar.p_value) if row.mcnemar else "–"

    head = ["retmask minus", *(cell for other in others for cell in (other, "p"))]
    cells = [[task, *(cell for other in others for cell in both(found.get((other, task))))] for task in tasks]
    return table(head, cells, note="Paired by case. p: McNemar's exact test, as above.")


def _helmet(by_model: Mapping[str, Mapping[str, Helmet]]) -> Markup:
    """HELMET's categories and means, in the paper's layout: a row per model and length, with what it changes against the
    start model. A dash where a part is missing."""
    found = [helmet for lengths in by_model.values() for helmet in lengths.values()]
    if not found:
        return Markup()
    rows = [
        [name, length, *_helmet_cells(helmet, by_model[START][length] if name != START else None)]
        for name, lengths in by_model.items()
        for length, helmet in lengths.items()
    ]
    categories = itertools.chain.from_iterable(helmet.categories.values() for helmet in found)
    lacking = dict.fromkeys(line for category in categories for line in category.missing)
    note = "HELMET, per cent. Missing parts: " + "; ".join(lacking) + "." if lacking else "HELMET, per cent."
    head = ["model", "tokens", *found[0].categories, *(f"mean, {name}" for name in found[0].means)]
    return table(head, rows, note=note)


def _helmet_cells(helmet: Helmet, start: Helmet | None) -> list[str]:
    before = [None] * len(_entries(helmet)) if start is None else _entries(start)
    return [_helmet_cell(*pair) for pair in zip(_entries(helmet), before, strict=True)]


def _entries(helmet: Helmet) -> list[HelmetMean]:
    return [*helmet.categories.values(), *helmet.means.values()]


def _helmet_cell(entry: HelmetMean, before: HelmetMean | None) -> str:
    """Per cent, and the points it is above the start model."""
    if entry.value is None or before is None or before.value is None:
        return "–" if entry.value is None else f"{entry.value:.2f}"
    return f"{entry.value:.2f} ({signed(entry.value - before.value, 2)})"


def _missing(missing: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Samples of suites that have no value, a line per model, task and reason."""
    return [
        f"{name}, {task}: {n} samples are missing, {why}."
        for name, tasks in missing.items()
        for task, reasons in tasks.items()
        for why, n in reasons.items()
    ]


def _grid_means(grids: Mapping[tuple[str, str], Sequence[Cell]]) -> list[str]:
    """What each model recalls over a whole grid, in a sentence per task."""
    means: dict[str, list[str]] = {}
    for (task, name), cells in grids.items():
        mean = np.average(_values(cells), weights=[cell.n for cell in cells])
        means.setdefault(task, []).append(f"{mean:.3f} ({name})")
    return [f"Over all lengths and depths of {task} recall is {', '.join(values)}." for task, values in means.items()]


def _by_model(grids: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """{(task, model): cells}, or {(task, arm): cells} where an arm has several seeds."""
    several = len({cell.model for cell in grids}) > len({cell.arm for cell in grids})
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in grids:
        groups.setdefault((cell.task, cell.arm if several else cell.model), []).append(cell)
    return groups


# --- figures ---


def _forests(changes: Mapping[str, Mapping[str, Number]]) -> dict[str, "Figure"]:
    """Forest plots, recall and text loss apart, split where one would not fit on a printed page."""
    by_task: dict[str, dict[str, Number]] = {}
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
            panels[f"Changes: {', '.join(shown)}"] = _forest("Change against start", shown, unit, limits)
    return panels


def _limits(numbers: Sequence[Number]) -> tuple[float, float]:
    """A common axis for intervals and zero."""
    ends = [0.0, *(x for number in numbers for x in (number.value, number.low, number.high) if x is not None)]
    margin = 0.08 * (max(ends) - min(ends)) or 0.01
    return min(ends) - margin, max(ends) + margin


def _before_after(
    title: str, pooled: Mapping[str, Number], runs: Mapping[str, Sequence[Number]], xlabel: str, share: bool = True
) -> "Figure":
    """A task for the start model and every arm; single runs are pale dots where an arm has several."""
    figure, ax = plotting.panel(title, 0.9 + 0.26 * len(pooled))
    for y, (arm, number) in enumerate(pooled.items()):
        if len(runs[arm]) > 1:
            ax.plot(_values(runs[arm]), np.full(len(runs[arm]), y + 0.25), ".", color=colour(arm, y), alpha=0.6)
        plotting.interval(ax, number, y, colour(arm, y), marker=MARKERS[y % 5])
        plotting.note(ax, y, f"{number.value:.3f}")
    ax.axvline(_values([pooled[START]])[0], color=colour(START), linestyle=":", linewidth=0.9, zorder=0)
    plotting.rows(ax, list(pooled), xlabel)
    if share:
        ax.set_xlim(-0.03, 1.03)
    return figure


def _over(title: str, points: Mapping[str, Sequence[tuple[int, Number]]], xlabel: str, ylabel: str) -> "Figure":
    """A number over lengths or positions, on a scale of doublings: a line with intervals for each model."""
    figure, ax = plotting.panel(title, 2.3 + 0.2 * math.ceil(len(points) / 2))
    handles = []
    for i, (name, line) in enumerate(points.items()):
        look = {"color": colour(name, i), "marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
        handles += ax.plot([at for at, _ in line], _values([number for _, number in line]), label=name, **look)
        for at, number in line:
            plotting.interval(ax, number, at, look["color"], look["marker"], vertical=True)
    places = sorted({at for line in points.values() for at, _ in line})
    ax.set_xscale("log", base=2)
    ax.set_xticks(places, map(str, places), rotation=90 if len(places) > 5 else 0)
    ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    # By itself matplotlib leaves names out that begin with "_".
    figure.legend(handles, list(points), loc="outside lower center", ncols=2)
    return figure


def _forest(
    title: str, changes: Mapping[str, Mapping[str, Number]], xlabel: str, limits: tuple[float, float]
) -> "Figure":
    """Paired changes against the start model with a line at zero: task -> arm -> number."""
    from matplotlib.transforms import blended_transform_factory

    figure, ax = plotting.panel(title, 0.9 + 0.2 * sum(1 + len(arms) for arms in changes.values()))
    labels = []
    for task, arms in changes.items():
        across = blended_transform_factory(figure.transFigure, ax.transData)
        ax.text(
            0.02,
            len(labels),
            textwrap.shorten(task, 44, placeholder=" …"),
            transform=across,
            va="center",
            style="italic",
            in_layout=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
        labels.append("")
        for i, (arm, number) in enumerate(arms.items()):
            plotting.interval(ax, number, len(labels), colour(arm, i + 1), marker=MARKERS[(i + 1) % 5])
            plotting.note(ax, len(labels), "–" if number.value is None else signed(number.value))
            labels.append(arm)
    ax.axvline(0, color="black", linewidth=0.9, zorder=0)
    plotting.rows(ax, labels, xlabel)
    ax.set_xlim(limits)
    return figure


def _values(numbers: Sequence[Number]) -> Float64[np.ndarray, " numbers"]:
    """The values; nan where one is undefined."""
    return np.array([number.value for number in numbers], np.float64)


def _recall_map(title: str, cells: Sequence[Cell]) -> "Figure":
    """Recall by length and depth on a scale from 0 to 1, its value in each cell. Cells of one length and depth are averaged."""
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    total, number = np.zeros((2, len(depths), len(lengths)))
    for cell in cells:
        at = depths.index(cell.depth), lengths.index(cell.length)
        total[at] += cell.value
        number[at] += 1
    mean = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    figure, ax = plotting.panel(title, 1.1 + 0.26 * len(depths), max(WIDTH, 1.4 + 0.3 * len(lengths)))
    image = ax.imshow(mean, cmap=plotting.colormap(), vmin=0, vmax=1, aspect="auto", interpolation="none")
    for (y, x), value in np.ndenumerate(mean):
        if number[y, x]:
            ax.text(
                x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black"
            )
    ax.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=90 if len(lengths) > 6 else 0)
    ax.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    ax.spines[:].set_visible(False)
    ax.set(xlabel="length (tokens)", ylabel="depth")
    figure.colorbar(image, ax=ax, label="recall", pad=0.02, fraction=0.06)
    return figure
