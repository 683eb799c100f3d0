"""The section on the RoPE base: recall and retrieval heads under other bases."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, fixed, interval, p_value, table
from retmask_jax.reports.wording import direction
from retmask_jax.stages.study.theta import BaseHeads, BaseRow, ThetaResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def base_section(result: ThetaResult) -> Markup:
    """Recall and heads by RoPE base, from the result of `theta`."""
    base, heads = result.theta, result.heads
    tasks: dict[str, list[BaseRow]] = {}
    for row in result.rows:
        tasks.setdefault(row.task, []).append(row)
    panels = {
        f"RoPE base: {task}": _recall_by_base(f"Recall by RoPE base: {task}", rows, base)
        for task, rows in tasks.items()
    }
    panels["RoPE base: heads"] = heads_by_base("Retrieval heads by RoPE base", heads, base)
    return html.section(
        "RoPE base",
        [
            f"The model's base is {base:,.0f}. Other bases are set at inference; the weights stay the same.",
            *(_changes(task, rows) for task, rows in tasks.items()),
        ],
        plotting.drawn(
            panels,
            "Recall: 95% Wilson interval over cases. Heads: those whose score "
            f"({result.detector}) is at least {result.threshold:.3g} on {count(heads[0].cases, 'detection case')}, "
            "and none where no case counts. They have no interval.",
        ),
        table(
            ["task", "factor", "base", "recall", "change against factor 1", "McNemar p"],
            [_recall_cells(row) for row in result.rows],
            note="Changes: bootstrap over cases, paired; McNemar's exact test, not adjusted for the number of bases.",
        ),
        table(
            ["factor", "heads", "cases counted", "best score", "Jaccard with factor 1"],
            [_head_cells(at_base) for at_base in heads],
        ),
    )


def _changes(task: str, rows: Sequence[BaseRow]) -> str:
    """At which bases recall on a task changes."""
    clear = [f"{row.theta:,.0f} ({change(row.change)})" for row in rows if direction(row.change)]
    if not clear:
        return f"Recall on {task} does not clearly change: every 95% interval contains 0."
    return f"Judged by the 95% interval alone, recall on {task} changes at {', '.join(clear)}."


def _recall_cells(row: BaseRow) -> list[str]:
    p = p_value(row.mcnemar.p_value)
    return [row.task, f"{row.factor:g}", f"{row.theta:,.0f}", interval(row), change(row.change), p]


def _head_cells(found: BaseHeads) -> list[str]:
    counted = f"{found.counted} of {found.cases}"
    return [f"{found.factor:g}", str(len(found.heads)), counted, fixed(found.top), f"{found.jaccard:.3f}"]


# --- figures ---


def _recall_by_base(title: str, rows: Sequence[BaseRow], base: float) -> "Figure":
    """Recall at each RoPE base, with the same weights."""
    figure, ax = plotting.panel(title, 2.6)
    ordered = sorted(rows, key=lambda row: row.theta)
    for row in ordered:
        plotting.interval(ax, row, row.theta, plotting.colour("retrieval"), vertical=True)
    ax.plot([row.theta for row in ordered], [row.estimate for row in ordered], color=plotting.colour("retrieval"))
    ax.set(ylabel=f"recall (n = {ordered[0].n})", ylim=(-0.03, 1.03))
    _bases(figure, ax, [row.theta for row in ordered], base)
    return figure


def heads_by_base(title: str, found: Sequence[BaseHeads], base: float) -> "Figure":
    """Heads at the detection threshold at each RoPE base, and how many of them are found at the model's base, too."""
    figure, ax = plotting.panel(title, 2.8)
    ordered = sorted(found, key=lambda at_base: at_base.theta)
    own = {head for at_base in found if at_base.factor == 1 for head in at_base.heads}
    thetas = [at_base.theta for at_base in ordered]
    numbers = [len(at_base.heads) for at_base in ordered]
    shared = [len(own & set(at_base.heads)) for at_base in ordered]
    ax.plot(thetas, numbers, "o-", color=plotting.colour("retrieval"), linewidth=3, markersize=8, label="heads")
    ax.plot(thetas, shared, "s--", color=plotting.colour("layer matched"), label="of these, found at the model's base")
    ax.set(ylabel="heads")
    ax.set_ylim(bottom=0)
    plotting.whole_numbers(ax.yaxis)
    _bases(figure, ax, thetas, base)
    return figure


def _bases(figure: "Figure", ax: "Axes", thetas: Sequence[float], base: float) -> None:
    """Draw the axis of bases, with the model's base marked."""
    ax.axvline(base, color=plotting.colour("none"), linestyle=":", label="the model's base")
    ax.set_xscale("log")
    ax.set_xticks(thetas, [f"{theta:,.0f}" for theta in thetas], rotation=30)
    ax.minorticks_off()
    ax.set_xlabel("RoPE base")
    figure.legend(loc="outside lower center", ncols=2 if len(ax.get_legend_handles_labels()[0]) < 3 else 1)
