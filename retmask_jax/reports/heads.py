"""The section on the detected heads: their scores, how concentrated and how settled they are."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from retmask_jax.heads.detection import Settled
from retmask_jax.reports import plotting
from retmask_jax.reports.html import count, fixed, interval, replies, section, table
from retmask_jax.reports.plotting import colour, drawn
from retmask_jax.stages.detect import DetectResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROFILE = {
    "n_heads": "heads at or above the threshold",
    "frac": "their share of all heads",
    "gini": "Gini coefficient of all scores",
    "zero_fraction": "share of heads that score exactly 0",
    "top5_share": "share of the summed score in the best five heads",
    "layer_com": "mean layer, weighted by score (0 first, 1 last)",
    "layer_com_count": "mean layer, unweighted",
    "early_frac": "share in the first third of the layers",
    "mid_frac": "share in the middle third",
    "late_frac": "share in the last third",
    "heads_per_active_group": "heads per KV group that has one",
    "full_group_fraction": "share of those groups that are complete",
}


def heads_section(result: DetectResult) -> Markup:
    """The detected heads, from the result of `detect`."""
    heads, mean_LH, outcomes, threshold = result.heads, np.array(result.mean), result.outcomes, result.threshold
    chosen = (
        f"their mean score is at least {threshold:g}"
        if threshold is not None
        else f"they have the highest scores, the last of them {min(result.scores):.3f}"
    )
    counted, total = result.numbers["detect/heads"].n, sum(outcomes.values())
    source = (
        f"{counted} of {count(total, 'case')} count, those that the model answers right."
        if outcomes
        else f"The scores were given, of {count(counted, 'case')}; none was measured here."
    )
    panels = {
        "Head scores": plotting.head_map("Head scores", mean_LH, heads, "mean score"),
        "Sorted head scores": score_ranks("Scores, best first", mean_LH, len(heads), threshold),
        "Lorenz curve": _lorenz(f"Concentration: Gini {fixed(result.profile['gini'])}", mean_LH),
        "Stability": _stability("Stability (size of each set below)", result.stability),
    }
    if outcomes:
        panels["Detection cases"] = _outcome_bars(f"Detection cases (n = {total})", outcomes)
    caption = (
        "A head's score in a case is the share of the needle's tokens that it looks at while the model writes them; shown "
        f"is the mean over {count(counted, 'counted case')}. Retrieval heads are outlined. The Lorenz curve bends further "
        "from the dotted line the fewer heads hold the score (Gini 0: all equal, 1: one has all). Stability compares the "
        "set found on the first cases with the final one (Jaccard: shared over all members)."
    )
    return section(
        "Retrieval heads",
        [
            f"{count(len(heads), 'head')} of {mean_LH.size} ({mean_LH.shape[0]} layers of {mean_LH.shape[1]}) copy from the "
            f"needle: {chosen}.",
            source,
            _settled(result.stability),
        ],
        drawn(panels, caption, {"Head scores": plotting.Tips(_score_texts(result))}),
        replies(result.examples),
        table(
            ["profile", "value"], [[_PROFILE.get(name, name), fixed(value)] for name, value in result.profile.items()]
        ),
    )


def _score_texts(result: DetectResult) -> list[list[str]]:
    """The score of each head, with its interval where that is known."""
    known = {(number.layer, number.head): number for number in result.best}
    return [
        [f"mean score {interval(known[i, j]) if (i, j) in known else fixed(score)}" for j, score in enumerate(row)]
        for i, row in enumerate(result.mean)
    ]


def _settled(rows: Sequence[Settled]) -> str:
    """From how many cases on the head set stays the final one."""
    if len(rows) < 2:
        return f"With {count(rows[-1].cases, 'counted case')} nothing tells how stable this set is."
    changed = [i for i, row in enumerate(rows) if row.jaccard < 1]
    if not changed:
        return f"The set is the same from {count(rows[0].cases, 'case')} on."
    start, end = rows[changed[-1]], rows[changed[-1] + 1]
    return f"The set still changed between {start.cases} and {end.cases} cases (Jaccard {start.jaccard:.2f})."


# --- figures ---


def score_ranks(title: str, mean_LH: ArrayLike, n_detected: int, threshold: float | None) -> "Figure":
    """Scores of all heads, best first, with the threshold if there is one."""
    ranked = np.sort(np.asarray(mean_LH, float), axis=None)[::-1]
    figure, ax = plotting.panel(title)
    ranks = np.arange(1, ranked.size + 1)
    dots = "." if ranked.size <= 100 else ""  # a thousand of them are a heavy picture
    ax.plot(ranks[n_detected:], ranked[n_detected:], "-", marker=dots, color=colour("none"), label="other heads")
    ax.plot(ranks[:n_detected], ranked[:n_detected], "o", color=colour("retrieval"), label="retrieval heads")
    if threshold is not None:
        ax.axhline(threshold, color="black", linestyle="--", linewidth=0.9, label=f"threshold {threshold:g}")
    ax.set(xscale="log", xlabel=f"rank of {ranked.size} heads", ylabel="mean score")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(loc="upper right")
    return figure


def _lorenz(title: str, mean_LH):
    """Share of the summed score that the lowest-scoring heads hold, against their share of all heads."""
    values = np.sort(np.asarray(mean_LH, float), axis=None)
    held = np.concatenate([[0], np.cumsum(values)])
    figure, ax = plotting.panel(title)
    ax.plot([0, 1], [0, 1], color=colour("none"), linestyle=":", label="all heads equal")
    ax.plot(np.linspace(0, 1, held.size), held / (held[-1] or 1), color=colour("retrieval"), label="this model")
    ax.set(xlabel="share of heads, lowest scores first", ylabel="share of the summed score")
    ax.legend(loc="upper left")
    return figure


def _stability(title: str, rows: Sequence[Settled]):
    """Overlap of the head set with the final one as cases are added; each point bears the size of its set."""
    cases, overlap = [row.cases for row in rows], [row.jaccard for row in rows]
    figure, ax = plotting.panel(title)
    ax.plot(cases, overlap, "o-", color=colour("retrieval"))
    for row in rows:
        ax.annotate(
            str(row.heads), (row.cases, row.jaccard), (0, -12), textcoords="offset points", ha="center", fontsize=8
        )
    ax.set(xlim=(0, 1.08 * max(cases)), ylim=(0, 1.08), xlabel="counted cases", ylabel="Jaccard with the final set")
    return figure


def _outcome_bars(title: str, outcomes: Mapping[str, int]):
    """Cases per outcome."""
    figure, ax = plotting.panel(title, 0.9 + 0.36 * len(outcomes))
    for y, (name, n) in enumerate(outcomes.items()):
        ax.barh(y, n, 0.6, color="#444444" if name == "counted" else "#bbbbbb")
        plotting.note(ax, y, str(n))
    plotting.rows(ax, [textwrap.fill(name, 20) for name in outcomes], "cases")
    return figure
