"""The page of `retmask arena`, arena.html: lists of heads by what ablating them does, and how far they overlap."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, fixed, interval, p_value, section, table
from retmask_jax.reports.knockout import MODES
from retmask_jax.reports.page import PageResult, write_page
from retmask_jax.reports.panel.profiles import wide_figure
from retmask_jax.reports.report import provenance, where_time_went
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.stages.study.arena import ARENA, ArenaResult, ArenaRow
from retmask_jax.stages.study.listed_heads import ListRow
from retmask_jax.utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SOURCES = {"detector": "a detector of this library", "file": "a file"}


def write_arena(path: Path, results: Mapping[str, Any], model: str) -> None:
    """Write the page. results: {"arena": that stage's `ArenaResult`}."""
    result = results[ARENA.name]
    with plotting.style():
        sections = [
            html.lines(*provenance(results)),
            _effects(result),
            _overlap(result),
            _lists(result),
            where_time_went(results),
        ]
    write_atomically(path, html.document(f"Lists of heads of {model}", sections))


# --- what ablating them does ---


def _effects(result: ArenaResult) -> Markup:
    of_size = {size: [row for row in result.rows if row.size == size] for size in result.sizes}
    panels = {f"{size} heads of each list ablated": _figure(result, size, rows) for size, rows in of_size.items()}
    header = ["list", "heads", "ablated", "recall", "change", "text loss", "change of it"]
    every = [
        [row.name, row.size, row.mode, *(show(n) for show, n in zip(_SHOWN, _numbers(row), strict=True))]
        for row in result.rows
    ]
    return section(
        "What ablating them does",
        [
            f"Recall of {result.task} is {interval(result.recall)} in the untouched model, over "
            f"{count(result.recall.n, 'case')}; the loss on plain text is {interval(result.loss)} nats per token.",
            *(_extremes(rows, size) for size, rows in of_size.items()),
            f"Controls are as many heads that are not of {result.reference}: of any layer, of its layers, of similar activity, "
            "and, where it scores heads, the lowest-scoring ones.",
            f"An ablated head, by mode: {'; '.join(f'{mode}: {MODES[mode]}' for mode in result.modes)}.",
        ],
        plotting.drawn(
            panels,
            "Left: recall with the best heads of each list ablated; dotted: untouched. Right: by how much the loss on plain "
            "text rises. 95% intervals: Wilson over cases for recall, bootstrap over cases where several draws of a control "
            "are averaged, bootstrap over windows of text for the loss.",
        ),
        *(_table(result, size, rows) for size, rows in of_size.items()),
        html.folded("Every number", table(header, every)),
        html.replies(result.examples),
    )


_SHOWN = (interval, change, interval, change)


def _numbers(row: ArenaRow):
    return row.recall, row.change, row.loss, row.cost


def _extremes(rows: Sequence[ArenaRow], size: int) -> str:
    """Whose heads matter most and least in the first mode."""
    recall = {row.name: row.recall.estimate for row in rows if row.mode == rows[0].mode}
    ends = dict.fromkeys(choose(recall.values()) for choose in (min, max))
    named = [
        f"{word} for {', '.join(name for name, value in recall.items() if value == end)} ({fixed(end)})"
        for word, end in zip(("lowest", "highest"), ends, strict=False)
    ]
    return f"With {count(size, 'head')} ablated ({rows[0].mode}) it is {' and '.join(named)}."


def _table(result: ArenaResult, size: int, rows: Sequence[ArenaRow]) -> Markup:
    """A row per list: recall and the change of the text loss in every mode."""
    by_list: dict[str, list[str]] = {}
    for row in rows:
        by_list.setdefault(row.name, []).extend((interval(row.recall), change(row.cost)))
    head = [f"best {size} heads of", *(cell for mode in result.modes for cell in (f"{mode}: recall", "text loss"))]
    return table(head, [[name, *cells] for name, cells in by_list.items()])


def _figure(result: ArenaResult, size: int, rows: Sequence[ArenaRow]) -> "Figure":
    names = list(dict.fromkeys(row.name for row in rows))
    figure = wide_figure(f"{size} heads of each list ablated", 1.3 + 0.13 * len(names) * (1 + len(result.modes)))
    recall, text = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    recall.axvline(result.recall.estimate, color=plotting.colour("none"), linestyle=":", label="untouched")
    text.axvline(0, color=plotting.colour("none"), linestyle=":")
    for y, name in enumerate(names):
        recall.axhspan(y - 0.5, y + 0.5, color="#f3f3f3" if y % 2 else "white", zorder=0)
        text.axhspan(y - 0.5, y + 0.5, color="#f3f3f3" if y % 2 else "white", zorder=0)
        for row in (row for row in rows if row.name == name):
            _mark(result, row, y, recall, text)
    for i, mode in enumerate(result.modes):
        recall.plot([], [], plotting.MARKERS[i], color=plotting.SHADES[i], label=mode)
    plotting.rows(recall, names, f"recall of {result.task} (n = {result.recall.n})")
    recall.set_xlim(-0.03, 1.03)
    text.set_xlabel("rise of the text loss (nats per token)")
    text.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=1 + len(result.modes))
    return figure


def _mark(result: ArenaResult, row: ArenaRow, y: float, recall: "Axes", text: "Axes") -> None:
    """The two numbers of a row, each mode at its height within the list."""
    i = result.modes.index(row.mode)
    at = y + float(np.linspace(-0.3, 0.3, len(result.modes))[i]) if len(result.modes) > 1 else y
    for ax, number in ((recall, row.recall), (text, row.cost)):
        plotting.interval(ax, number, at, plotting.SHADES[i], plotting.MARKERS[i])


# --- what the lists are ---


def _overlap(result: ArenaResult) -> Markup:
    """How many heads each two lists share, above the diagonal; below it the chance that random lists share as many."""
    names = [row.name for row in result.lists if row.heads]
    if len(names) < 2:
        return Markup()
    tables = []
    for size in result.sizes:
        pairs = {(pair.a, pair.b): pair for pair in result.overlaps if pair.size == size}
        rows = []
        for i, a in enumerate(names):
            cells = [f"{pairs[a, b].shared} ({pairs[a, b].jaccard:.2f})" for b in names[i + 1 :]]
            rows.append([a, *(p_value(pairs[b, a].p_value) for b in names[:i]), "–", *cells])
        expected = next(iter(pairs.values())).expected
        note = f"Two random lists of {count(size, 'head')} share {expected:.2g} on average."
        tables.append(table([f"best {size} heads", *names], rows, note))
    return section(
        "Overlap of the lists",
        [
            "Above the diagonal: the heads that two lists share (Jaccard: the share of their heads that both have). Below: the "
            "chance that two random lists share at least so many (hypergeometric)."
        ],
        *tables,
    )


def _lists(result: ArenaResult) -> Markup:
    sets = [
        [one.name, one.size, one.draw, ", ".join(f"{layer}-{head}" for layer, head in one.heads)] for one in result.sets
    ]
    return section(
        "The lists",
        [
            "A list of KV heads names whole groups of query heads, of which the last may be cut to make the number equal."
            if any(row.of_kv_heads for row in result.lists)
            else "",
            *(
                f"{one.name} is cut at {one.size} among equals: its last head scores as {count(one.tied, 'head')} left out."
                for one in result.sets
                if one.tied
            ),
        ],
        lists_table(result.lists),
        html.folded("The heads of each", table(["list", "heads", "draw", "layer-head"], sets)),
    )


def lists_table(lists: Sequence[ListRow]) -> Markup:
    """A row per list: who made it, and how many heads it has."""
    rows = [[row.name, _made_by(row), row.heads or "–", _counted(row)] for row in lists]
    return table(["list", "from", "heads in order", "cases that count"], rows)


def _made_by(row: ListRow) -> str:
    return f"{_SOURCES[row.source]} ({row.form})" if row.form else _SOURCES[row.source]


def _counted(row: ListRow) -> str:
    return f"{row.counted} of {row.cases}" if row.cases else "–"


def _page_stage(context: Context, folder: Path) -> PageResult:
    return write_page(context, ARENA_PAGE, write_arena, ARENA.name)


ARENA_PAGE = Stage(name="arena-page", work=_page_stage, result=PageResult, upstream=(ARENA,), needs_model=False)
