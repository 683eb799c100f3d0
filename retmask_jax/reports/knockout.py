"""The section on heads that are ablated, from the result of `knockout`: sentences, tables and pictures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from retmask_jax.heads.conditions import ConditionRow
from retmask_jax.model.interventions import Head
from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, interval, p_value, section, signed, table
from retmask_jax.reports.plotting import colour, drawn
from retmask_jax.reports.wording import TEXT_LOSS, axis, directions
from retmask_jax.stages.knockout import KindNumber, KnockoutResult, LossRow, MinimalSet, TaskMean
from retmask_jax.stages.outcomes import FROM_MEMORY, mask_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = {
    "zero": "writes nothing",
    "mean": "writes its mean over text",
    "query": "has a query of zeros, so it writes the mean of all values",
    "query_mean": "has its mean query over text, whatever it reads",
}


def knockout_section(result: KnockoutResult, heads: Sequence[Head]) -> Markup:
    """The effect of ablated heads; heads: the retrieval heads."""
    tasks = list(dict.fromkeys(mean.task for mean in result.means))
    masked = {row.task: row.change for row in result.rows if _named(row) == "retrieval"}
    untouched, ablated = (_of_kind(result.text_loss_means, kind) for kind in ("none", "retrieval"))
    activity = plotting.head_map("Activity of heads", result.activity, heads, "change (nats)", log=True)
    return section(
        "Knock-out",
        [
            directions(f"Masking the {count(len(heads), 'retrieval head')}", masked),
            f"With them masked the text loss goes from {untouched.value:.3f} to {ablated.value:.3f} nats per token.",
            _other_kinds(only_zero(result.means)),
            f"Heads of each layer-matched set that are of the nearest other layer, since theirs has too few others: "
            f"{result.moved} of {result.masked}."
            if result.moved
            else "",
        ],
        drawn(
            _kinds(result, tasks),
            "Each kind of mask ablates as many heads as there are retrieval heads; the control heads are never "
            "retrieval heads. Dots: single draws; bar (text loss: point): their mean. 95% interval: Wilson for a single "
            "mask, bootstrap over cases for text loss and for a mean over draws, which are held fixed (no width where "
            "all cases agree). “From memory” is the share of answers that follow what the model remembers instead of "
            "the context.",
        ),
        _modes(result, tasks),
        table(
            ["task", "masked", "value", "change from the untouched model", "McNemar p", "q"],
            [_test(result.rows, mean) for mean in result.means if mean.kind != "none"],
            note="McNemar's exact test of the cases' outcomes against the untouched model; q: adjusted for the false discovery "
            "rate over the masks of a task (Benjamini-Hochberg). Of several draws: the mean change, and the median p and q.",
        ),
        html.replies(result.examples),
        html.lines(_idle(result)),
        drawn(
            {"Head activity": activity},
            "Mean change of the log-probability of a token of text when one head alone is "
            "masked, on a logarithmic scale. Retrieval heads are outlined.",
            {"Head activity": plotting.Tips([[f"change of {x:.3g} nats" for x in row] for row in result.activity])},
        ),
        _curve(result.curve, len(heads)),
        _minimal(result.minimal),
    )


def only_zero(means: Sequence[TaskMean]) -> list[TaskMean]:
    """The means over masks whose heads write nothing."""
    return [mean for mean in means if mean.experiment == "zero"]


# --- pictures ---


def _kinds(result: KnockoutResult, tasks: Sequence[str]) -> "dict[str, Figure]":
    """Every task, and the text loss, under each kind of mask."""
    panels = {}
    for task in tasks:
        means = [mean for mean in only_zero(result.means) if mean.task == task]
        rows = [row for row in result.rows if row.task == task]
        panels[f"Knock-out: {task}"] = _kinds_figure(task, rows, means, _axis(task, means))
    means = [mean for mean in result.text_loss_means if mean.experiment == "zero"]
    label = f"nats per token (n = {_of_kind(means, 'none').n} windows)"
    panels["Knock-out: text loss"] = _kinds_figure(TEXT_LOSS, result.text_loss, means, label, share=False)
    return panels


def _modes(result: KnockoutResult, tasks: Sequence[str]) -> Markup:
    """The retrieval heads, and those matched by activity, ablated in every mode."""
    modes = list(dict.fromkeys(row.experiment for row in result.rows))
    panels = {}
    for task in tasks if len(modes) > 1 else ():
        rows = [row for row in result.rows if row.task == task]
        kinds = ("none", "retrieval", "activity-matched")
        means = [mean for mean in result.means if mean.task == task and mean.kind in kinds]
        panels[f"Ways to ablate heads: {task}"] = _kinds_figure(
            f"{task}: ways to ablate", rows, means, _axis(task, means)
        )
    explained = "; ".join(f"{mode}: {MODES[mode]}" for mode in modes)
    return drawn(
        panels,
        f"What an ablated head does ({explained}). A name without a mode stands for zero. Dots: single draws; "
        "bar: their mean; 95% interval as above.",
    )


def _kinds_figure(
    title: str,
    rows: Sequence[ConditionRow] | Sequence[LossRow],
    means: Sequence[KindNumber],
    xlabel: str,
    share: bool = True,
) -> "Figure":
    """A number under each kind of mask: every draw a dot, their mean a bar (a point where `share` is False).

    A kind of one draw has the interval of that draw.
    """
    figure, ax = plotting.panel(title, 0.9 + 0.3 * len(means))
    for y, mean in enumerate(means):
        shade, draws = colour(_named(mean)), [row for row in rows if _named(row) == _named(mean)]
        number = draws[0] if len(draws) == 1 else mean
        if share:
            ax.barh(y, number.value, 0.62, color=shade, alpha=0.55)
        if len(draws) > 1:
            spread = np.linspace(-0.2, 0.2, len(draws))
            ax.plot([row.value for row in draws], y + spread, ".", color=shade, markersize=4, alpha=0.8)
        plotting.interval(ax, number, y, "black" if share else shade, marker="" if share else "o")
        plotting.note(ax, y, f"{number.value:.2f}" if share else f"{number.value:.3f}")
    if share:
        ax.set_xlim(0, 1)
    plotting.rows(ax, [_named(mean) for mean in means], xlabel)
    return figure


def _curve(curve: Sequence[ConditionRow], n_retrieval: int) -> Markup:
    """Recall by the number of heads masked."""
    if not curve:
        return Markup()
    task = curve[0].task
    rows = [row for row in curve if row.task == task]
    return drawn(
        {f"Number of heads: {task}": _curve_figure(f"{task}: number of heads", rows, n_retrieval)},
        "Heads are masked in the order of their scores, the highest first. The random others are neither among them nor "
        "retrieval heads, and end where too few heads are left (dots: single draws). 95% interval: Wilson.",
    )


def _curve_figure(title: str, curve: Sequence[ConditionRow], n_retrieval: int) -> "Figure":
    """The highest-scoring heads masked, and as many random others (a dot per draw); the first row is the untouched model."""
    none, *masked = curve
    figure, ax = plotting.panel(title, 3.0)
    ax.axhline(none.value, color=colour("none"), linestyle=":", label="nothing masked")
    ax.axvline(n_retrieval, color="black", linestyle="--", linewidth=0.9, label="retrieval heads")
    best = [row for row in masked if row.kind == "highest-scoring"]
    others = [row for row in masked if row.kind == "random"]
    for row in best:
        plotting.interval(ax, row, len(row.heads), colour("retrieval"), "", vertical=True)
    sizes, values = [len(row.heads) for row in best], [row.value for row in best]
    ax.plot(sizes, values, "o-", color=colour("retrieval"), label="highest-scoring")
    if others:
        sizes = dict.fromkeys(len(row.heads) for row in others)
        means = [np.mean([row.value for row in others if len(row.heads) == n]) for n in sizes]
        ax.plot([len(row.heads) for row in others], [row.value for row in others], ".", color=colour("random"))
        ax.plot(list(sizes), means, "s-", color=colour("random"), label="random others, mean")
    numbers = sorted({len(row.heads) for row in masked})
    ax.set(xscale="log", ylim=(-0.03, 1.03), xlabel="heads masked", ylabel=f"recall (n = {none.n})")
    ax.set_xticks(numbers, [str(n) for n in numbers])
    ax.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


# --- sentences and cells ---


def _named(row: ConditionRow | KindNumber) -> str:
    return mask_name(row.kind, row.experiment)


def _of_kind(means: Sequence[KindNumber], kind: str) -> KindNumber:
    """The mean over masks of a kind whose heads write nothing."""
    return next(mean for mean in means if _named(mean) == kind)


def _axis(task: str, means: Sequence[TaskMean]) -> str:
    return f"{axis(task)} (n = {_of_kind(means, 'none').n})"


def _other_kinds(means: Sequence[TaskMean]) -> str:
    """How much masks of other heads change recall, from the smallest to the largest change over the tasks."""
    untouched = {mean.task: mean.value for mean in means if mean.kind == "none"}
    shifts: dict[str, list[float]] = {}
    for mean in means:
        if mean.kind not in ("none", "retrieval") and FROM_MEMORY not in mean.task:
            shifts.setdefault(mean.kind, []).append(mean.value - untouched[mean.task])
    parts = [f"{html.span(values)} ({kind})" for kind, values in shifts.items()]
    return (
        f"Masking as many other heads changes recall by {', '.join(parts)} over the tasks, mean over draws."
        if parts
        else ""
    )


def _idle(result: KnockoutResult) -> str:
    total = np.size(result.activity)
    text = (
        f"{result.idle} of {total} heads {'is' if result.idle == 1 else 'are'} idle: masking one of them alone changes "
        f"the text's log-probabilities by less than {100 * result.idle_below:g}% of what masking the most active head does."
    )
    warning = " With most heads idle, masks of any layer prove little; compare with activity-matched ones."
    return text + (warning if 2 * result.idle > total else "")


def _test(rows: Sequence[ConditionRow], mean: TaskMean) -> list[str]:
    """The cells of a kind of mask: its draws against the untouched model."""
    draws = [row for row in rows if row.task == mean.task and _named(row) == _named(mean)]
    p = p_value(float(np.median([row.mcnemar.p_value for row in draws])))
    q = p_value(float(np.median([row.q for row in draws])))
    if len(draws) == 1:
        return [mean.task, _named(mean), interval(draws[0]), change(draws[0].change), p, q]
    shift = float(np.array([row.change.value for row in draws], float).mean())
    return [mean.task, f"{_named(mean)} ({len(draws)} draws)", interval(mean), signed(shift), p, q]


def _minimal(minimal: MinimalSet | None) -> Markup:
    if minimal is None:
        return Markup()
    kept = ", ".join(f"{layer}-{head}" for layer, head in minimal.heads)
    spared = ", ".join(f"{layer}-{head}" for layer, head in (step.head for step in minimal.steps))
    return html.lines(
        f"A greedy search on {minimal.searched} cases of {minimal.task}, sparing one head at a time while recall stays at "
        f"most {minimal.limit:.3f}, ends with {count(len(minimal.heads), 'head')}: {kept}."
        + (f" It spared {spared}." if spared else ""),
        f"On the other {minimal.recall_untouched.n} cases recall is {interval(minimal.recall_without_set)} with these masked, "
        f"{interval(minimal.recall_without_all)} with all retrieval heads masked and {interval(minimal.recall_untouched)} in "
        "the untouched model. A smaller set may exist: the search is greedy.",
    )
