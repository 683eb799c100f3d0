"""The section on detectors: how far they agree, what they cost, and what masking the heads of each does."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from retmask_jax.heads.conditions import UNTOUCHED, ConditionRow
from retmask_jax.heads.detection import Settled
from retmask_jax.heads.detectors import Agreement
from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, fixed, interval, p_value, signed, table
from retmask_jax.stages.study.detectors import DetectorRow, DetectorsResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHADES = (*plotting.SHADES, "#000000", "#332288", "#882255")  # there are ten detectors


def detectors_section(result: DetectorsResult) -> Markup:
    """The comparison of detectors, from the result of `detectors`."""
    top_k, by_task = result.top_k, _by_task(result.masked)
    panels = {
        "Agreement of detectors": agreement_matrix(
            f"Agreement (best {top_k} heads; all scores)",
            [row.name for row in result.rows if row.counted],
            result.agreement,
        ),
        **{
            f"Heads of each detector masked: {task}": _masked_recall(f"Best {top_k} heads masked: {task}", masked)
            for task, masked in by_task.items()
        },
        "Time of detectors": _costs("Time, compiling included", result.rows),
        "Stability of detectors": _settling(f"Stability of the best {top_k} heads", result.stability),
    }
    caption = (
        f"Agreement: Jaccard (shared over all members) of the best {top_k} heads of two detectors above the diagonal, "
        "Spearman's rank correlation of their scores over all heads below. Recall: 95% Wilson interval over the task's cases; "
        "dotted: nothing masked. Time: wall clock on the device of this run, with compiling, which matters less the more "
        "cases there are; hatched: the scores are from the stage detect, and so is the time, that of the whole stage. "
        "Stability: overlap of the best heads on the first cases with those on all cases."
    )
    head = ["detector", "cases counted", "seconds", "cases per second", "Gini", "Jaccard with detect's heads"]
    head += ["Jaccard over seeds", *(f"{task}, its heads masked" for task in by_task)]
    head += [*(f"change, {task}" for task in by_task), "McNemar p"]
    return html.section(
        "Detectors",
        _sentences(result, by_task),
        plotting.drawn(panels, caption),
        table(
            head,
            [_cells(row, result, by_task) for row in result.rows],
            note="Gini: none where scores are signed. McNemar's exact test against nothing masked, on the first task, not "
            "adjusted for the number of detectors.",
        ),
        html.folded("Best heads of each detector", _best(result.rows)),
    )


def _best(rows: Sequence[DetectorRow]) -> Markup:
    """The best heads of each detector with the intervals of their scores."""
    cells = [
        [row.name, f"{head.layer}-{head.head}", interval(head), head.n, "yes" if head.chosen else ""]
        for row in rows
        for head in row.best
    ]
    note = "95% bootstrap interval over cases; each case is another text of random tokens for induction and previous_token."
    return table(["detector", "head", "score", "n", "head of detect"], cells, note=note)


def _by_task(masked: Sequence[ConditionRow]) -> dict[str, dict[str, ConditionRow]]:
    """Recall of each task by detector, the untouched model first."""
    by_task: dict[str, dict[str, ConditionRow]] = {}
    for row in masked:
        by_task.setdefault(row.task, {})[row.kind] = row
    return by_task


def _sentences(result: DetectorsResult, by_task: Mapping[str, Mapping[str, ConditionRow]]) -> list[str]:
    rows = result.rows
    said = [
        f"{count(len(rows), 'detector')} ran on {count(result.cases, 'detection case')}; the best {result.top_k} heads of "
        "each are compared."
    ]
    said += [_lowest_and_highest(task, masked) for task, masked in by_task.items()]
    if empty := [row.name for row in rows if not row.counted]:
        said.append(f"No case counts for {', '.join(empty)}, which the comparisons leave out.")
    if reused := [row.name for row in rows if row.reused]:
        said.append(f"The scores of {', '.join(reused)} are those of the stage detect; nothing was decoded again.")
    return said


def _lowest_and_highest(task: str, masked: Mapping[str, ConditionRow]) -> str:
    """Whose heads matter most and least for a task."""
    recall = {kind: row.estimate for kind, row in masked.items() if kind != UNTOUCHED.kind}
    ends = dict.fromkeys(choose(recall.values()) for choose in (min, max))
    named = [
        f"{word} for {', '.join(kind for kind, value in recall.items() if value == end)} ({fixed(end)})"
        for word, end in zip(("lowest", "highest"), ends, strict=False)
    ]
    said = f"Recall on {task} is {fixed(masked[UNTOUCHED.kind].value)} untouched."
    return f"{said} With a detector's heads masked it is {' and '.join(named)}."


def _cells(row: DetectorRow, result: DetectorsResult, by_task: Mapping[str, Mapping[str, ConditionRow]]) -> list[str]:
    masked = [of_task.get(row.name) for of_task in by_task.values()]
    repeats = result.over_seeds.get(row.name)
    return [
        row.name,
        f"{row.counted} of {sum(row.outcomes.values())}",
        f"{row.seconds:.1f}",
        f"{row.cases_per_second:.2f}",
        fixed(row.gini),
        fixed(row.shared),
        f"{repeats.jaccard:.3f} ({repeats.n} seeds)" if repeats else "–",
        *(interval(of_task) if of_task else "–" for of_task in masked),
        *(change(of_task.change) if of_task else "–" for of_task in masked),
        p_value(masked[0].mcnemar.p_value) if masked and masked[0] else "–",
    ]


# --- figures ---


def agreement_matrix(title: str, names: Sequence[str], pairs: Sequence[Agreement]) -> "Figure":
    """How far each two detectors agree: Jaccard of their best heads above the diagonal, Spearman of all scores below."""
    values = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        a, b = sorted((names.index(pair.a), names.index(pair.b)))
        values[a, b] = pair.jaccard
        values[b, a] = np.nan if pair.spearman is None else pair.spearman
    figure, ax = plotting.panel(title, 1.7 + 0.26 * len(names))
    lowest = min(0.0, np.nanmin(values, initial=0))
    ax.imshow(values, cmap=plotting.colormap(), vmin=lowest, vmax=1, aspect="auto", interpolation="none")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            text, ink = signed(value, 2).removeprefix("+"), "white" if value < (lowest + 1) / 2 else "black"
            ax.text(x, y, text, ha="center", va="center", fontsize=7, color=ink)
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    figure.supxlabel("above the diagonal: Jaccard; below: Spearman", fontsize=8)
    return figure


def _masked_recall(title: str, masked: Mapping[str, ConditionRow]) -> "Figure":
    """Recall with the best heads of each detector masked, and untouched (dotted)."""
    none, shown = masked[UNTOUCHED.kind], [row for kind, row in masked.items() if kind != UNTOUCHED.kind]
    figure, ax = plotting.panel(title, 1.2 + 0.26 * len(shown))
    ax.axvline(none.estimate, color=plotting.colour("none"), linestyle=":", label="nothing masked")
    for y, row in enumerate(shown):
        plotting.interval(ax, row, y, plotting.colour("retrieval"))
        plotting.note(ax, y, f"{row.value:.2f}")
    plotting.rows(ax, [row.kind for row in shown], f"recall (n = {none.n})")
    ax.set_xlim(-0.03, 1.03)
    figure.legend(loc="outside lower center")
    return figure


def _costs(title: str, detectors: Sequence[DetectorRow]) -> "Figure":
    """Seconds of each detector, compiling included; hatched: those of the whole stage `detect`."""
    figure, ax = plotting.panel(title, 1.0 + 0.26 * len(detectors))
    for y, row in enumerate(detectors):
        look = {"color": "#bbbbbb", "edgecolor": "#444444", "linewidth": 0.6, "hatch": "////" if row.reused else ""}
        ax.barh(y, row.seconds, 0.62, **look)
        plotting.note(ax, y, f"{row.cases_per_second:.2g}")
    plotting.rows(ax, [row.name for row in detectors], "seconds (right: cases per second)")
    return figure


def _settling(title: str, by_detector: Mapping[str, Sequence[Settled]]) -> "Figure":
    """Overlap of each detector's best heads on the first cases with those on all, as cases are added."""
    figure, ax = plotting.panel(title, 2.4 + 0.19 * -(-len(by_detector) // 2))
    # Thick lines first, thinner ones on top: those that coincide can all be seen.
    widths = np.linspace(5, 1, len(by_detector))
    for i, (name, steps) in enumerate(by_detector.items()):
        ax.plot(
            [row.cases for row in steps],
            [row.jaccard for row in steps],
            plotting.MARKERS[i % len(plotting.MARKERS)],
            linestyle="-",
            linewidth=widths[i],
            markersize=3 + 1.2 * widths[i],
            color=_SHADES[i % len(_SHADES)],
            label=name,
        )
    ax.set(xlabel="counted cases", ylabel="Jaccard with the final set", ylim=(-0.04, 1.08))
    ax.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
