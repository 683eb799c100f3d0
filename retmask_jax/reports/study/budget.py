"""The page of `retmask budget`, budget.html: recall and text loss against the share of keys kept, by list of heads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, interval, section, table
from retmask_jax.reports.page import PageResult, write_page
from retmask_jax.reports.panel.profiles import wide_figure
from retmask_jax.reports.report import provenance, where_time_went
from retmask_jax.reports.study.arena import lists_table
from retmask_jax.reports.wording import direction, is_loss
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.stages.study.budget import BUDGET, BudgetResult, shares_of
from retmask_jax.stages.study.budget_rows import ENOUGH, BudgetRow, Enough
from retmask_jax.stages.study.listed_heads import RANDOM
from retmask_jax.utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_budget(path: Path, results: Mapping[str, Any], model: str) -> None:
    """Write the page. results: {"budget": that stage's `BudgetResult`}."""
    result = results[BUDGET.name]
    with plotting.style():
        sections = [
            html.lines(*provenance(results)),
            _effects(result),
            section("The lists", [], lists_table(result.lists), _kept(result)),
            where_time_went(results),
        ]
    write_atomically(path, html.document(f"Budgets of keys of {model}", sections))


def _effects(result: BudgetResult) -> Markup:
    title = "What is left of a model whose heads stream"
    return section(
        title,
        [
            f"A streaming head sees the first {count(result.sink, 'token')} of its row and its last {result.window} keys. A KV "
            "head keeps all its keys for the sake of any of its query heads, best heads of a list first; all others stream. It "
            "measures what such a model could still do: keys are hidden, and no cache is smaller.",
            *(_ends(result, measure) for measure in result.untouched),
            *(_enough(result, task) for task in result.tasks),
            *(_margins(result, measure) for measure in result.untouched),
        ],
        plotting.drawn(
            {title: budget_figure(result)},
            f"Recall, and the rise of the loss on plain text (nats per token), against the share of its keys that the model "
            f"keeps at the end of a prompt or text; dotted: untouched. Bands: 95% intervals, over cases by Wilson (by bootstrap "
            f"for {RANDOM} lists, whose draws are averaged), over texts by bootstrap.",
        ),
        *(_table(result, measure) for measure in result.untouched),
        html.replies(result.examples),
    )


# --- sentences ---


def _ends(result: BudgetResult, measure: str) -> str:
    """What streaming of all heads does; nothing where that was not measured."""
    row = next((row for row in result.rows if row.measure == measure and row.kept == 0), None)
    untouched = interval(result.untouched[measure])
    if row is None:
        return f"{_called(measure)} of the untouched model is {untouched}."
    return (
        f"{_called(measure)} is {untouched} in the untouched model, and {interval(row)} where all heads stream and "
        f"{row.share:.1%} of the keys are kept."
    )


def _enough(result: BudgetResult, task: str) -> str:
    said = [f"{one.name}: {_from(result, one)}" for one in result.enough if one.task == task]
    return f"Recall of {task} stays at {ENOUGH:.0%} of that or more from so many keys on: {'; '.join(said)}."


def _from(result: BudgetResult, one: Enough) -> str:
    if one.kept is None or one.share is None:
        return "at no budget that was measured"
    return f"{one.share:.1%} ({one.kept} of {result.total} KV heads)"


def _margins(result: BudgetResult, measure: str) -> str:
    """Each list against random ones."""
    said = [f"{one.name} {change(one)}{_clear(direction(one))}" for one in result.margins if one.measure == measure]
    if not said:
        return ""
    better = "lower" if is_loss(measure) else "higher"
    return (
        f"{_called(measure)} less that with as many random KV heads, mean over the budgets ({better} is better): "
        f"{'; '.join(said)}."
    )


def _clear(found: str) -> str:
    return "" if found else " (no clear difference)"


def _called(measure: str) -> str:
    return "The loss on plain text" if is_loss(measure) else f"Recall of {measure}"


# --- picture and tables ---


def budget_figure(result: BudgetResult) -> "Figure":
    """A panel per measure, a line with its interval per list."""
    figure = wide_figure("What is left on a budget of keys", 3.4)
    axes = figure.subplots(1, len(result.untouched), squeeze=False)[0]
    for ax, (measure, untouched) in zip(axes, result.untouched.items(), strict=True):
        loss = is_loss(measure)
        ax.axhline(0 if loss else untouched.estimate, color=plotting.colour("none"), linestyle=":", label="untouched")
        for i, name in enumerate(result.names):
            rows = [row for row in result.rows if row.measure == measure and row.name == name]
            _line(ax, sorted(rows, key=lambda row: row.kept), name, i)
        ax.set_xlabel("keys kept (%)")
        what = f"rise of the {measure} (n = {untouched.n})" if loss else f"recall of {measure} (n = {untouched.n})"
        ax.set_ylabel(what)
        if not loss:
            ax.set_ylim(-0.03, 1.03)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _line(ax: "Axes", rows: Sequence[BudgetRow], name: str, i: int) -> None:
    """The numbers of a list at its budgets; of a loss its rise."""
    shade = "#777777" if name == RANDOM else plotting.SHADES[i % (len(plotting.SHADES) - 1)]
    numbers = [row.change if is_loss(row.measure) else row.number for row in rows]
    shares = [100 * row.share for row in rows]
    dash, marker = plotting.DASHES[i % len(plotting.DASHES)], plotting.MARKERS[i % len(plotting.MARKERS)]
    ax.plot(shares, [one.estimate for one in numbers], dash, marker=marker, color=shade, label=name)
    low = [one.estimate if one.low is None else one.low for one in numbers]
    high = [one.estimate if one.high is None else one.high for one in numbers]
    ax.fill_between(shares, low, high, color=shade, alpha=0.15, linewidth=0)


def _table(result: BudgetResult, measure: str) -> Markup:
    """A row per budget, a column per list."""
    rows = [
        [kept, shares_of(there), *("–" if row is None else _cell(row) for row in there)]
        for kept, there in result.budgets(measure)
    ]
    return table([f"{measure}: KV heads kept", "keys kept", *result.names], rows)


def _cell(row: BudgetRow) -> str:
    return f"{interval(row)} ({change(row.change)})" if is_loss(row.measure) else interval(row)


def _kept(result: BudgetResult) -> Markup:
    """The KV heads of each list, once, in order."""
    longest = {(one.name, one.draw): one for one in sorted(result.sets, key=lambda one: one.kept)}
    rows = [
        [name, draw, ", ".join(f"{layer}-{head}" for layer, head in one.kv_heads)]
        for (name, draw), one in longest.items()
    ]
    counted = [[one.name, one.kept, one.k] for one in result.sets if one.name != RANDOM and one.kept]
    return html.folded(
        "The KV heads of each, best first",
        Markup().join(
            [
                table(["list", "draw", "layer-KV head"], rows),
                table(["list", "KV heads kept", "of so many of its best heads"], counted),
            ]
        ),
    )


def _page_stage(context: Context, folder: Path) -> PageResult:
    return write_page(context, BUDGET_PAGE, write_budget, BUDGET.name)


BUDGET_PAGE = Stage(name="budget-page", work=_page_stage, result=PageResult, upstream=(BUDGET,), needs_model=False)
