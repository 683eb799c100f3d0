"""The section on the tokens of an answer: which heads retrieve at each, and how long such sets persist."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from retmask_jax.heads.patterns.steps import COPIES, MEASURES, HeadSteps, StepRow
from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import count, interval, table
from retmask_jax.stages.study.per_step import PerStepResult
from retmask_jax.utils.numbers import Number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = {
    "following": "overlap with the next token's heads",
    "listed": "overlap with the retrieval heads",
    "active": "share of the retrieval heads",
}


def per_step_section(result: PerStepResult) -> Markup:
    """The heads of each token, from the result of `per_step`."""
    counted, cases = result.outcomes.get("counted", 0), sum(result.outcomes.values())
    said = [
        f"{counted} of {count(cases, 'case')} count, other cases of the task than those on which the heads were found; they "
        f"are followed through the answers beside {count(len(result.heads), 'retrieval head')}."
    ]
    if not result.rows:
        return html.section("Token by token", said)
    (found,) = [one for one in result.persistence if one.kind == COPIES]
    if found.run is not None:
        said.append(
            f"At a token of an answer {interval(found.heads)} heads copy it, in a whole answer {interval(found.distinct)}; a "
            f"head copies {interval(found.run)} tokens in a row, {_interval(found.shuffled)} if their order were random."
        )
    rows = [row for row in result.rows if row.kind == COPIES]
    panels = {
        "Heads that copy at each token": _heads([row for row in result.active if row.kind == COPIES]),
        "Overlap of the heads from token to token": _overlaps(rows),
    }
    return html.section(
        "Token by token",
        said,
        plotting.drawn(
            {name: figure for name, figure in panels.items() if figure is not None},
            "Left: the share of the answers in which a head copies the token at each position, the heads that copy at most "
            "tokens first; retrieval heads are outlined. Right: Jaccard index of the heads that copy at a token with those "
            "at the next one and with the retrieval heads, and how many of these copy; 95% bootstrap interval over the "
            "answers that have such a token.",
        ),
        table(
            ["", *MEASURES.values()],
            [[one.kind, *(_interval(getattr(one, name)) for name in MEASURES)] for one in result.persistence],
            note="In the needle: a head's strongest key is in the needle's answer part. Copies: it is also the token that is "
            "said. Overlap: Jaccard index. By chance: as many tokens of the same answers, in random order. Means over the "
            "tokens of an answer, then over answers, with 95% bootstrap intervals.",
        ),
        html.folded("Every position", table(["", "token", *_POSITION], [_cells(row) for row in result.rows])),
    )


_POSITION = ("answers", "heads", *_LINES.values())


def _interval(number: Number | None) -> str:
    """The value with its interval; a dash where there is none."""
    return "–" if number is None else interval(number)


def _cells(row: StepRow) -> list[str]:
    lines = [_interval(getattr(row, name)) for name in _LINES]
    return [row.kind, str(row.position + 1), str(row.heads.n), interval(row.heads), *lines]


# --- figures ---


def _heads(active: Sequence[HeadSteps]) -> "Figure | None":
    """Share of the answers in which a head copies, by position; retrieval heads outlined."""
    if not active:
        return None
    from matplotlib.patches import Rectangle

    figure, ax = plotting.panel("Heads that copy at each token", 1.5 + 0.17 * len(active))
    shares_HP = np.array([row.by_position for row in active])
    image = ax.imshow(shares_HP, cmap=plotting.colormap(), vmin=0, vmax=1, aspect="auto", interpolation="none")
    for y, row in enumerate(active):
        if row.listed:
            width, shade = shares_HP.shape[1], plotting.colour("retrieval")
            ax.add_patch(Rectangle((-0.5, y - 0.5), width, 1, fill=False, edgecolor=shade, linewidth=1.3))
    ax.set_yticks(range(len(active)), [f"{row.layer}-{row.head}" for row in active])
    places = range(0, shares_HP.shape[1], 1 + shares_HP.shape[1] // 8)
    ax.set_xticks(places, [str(place + 1) for place in places])
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="token of the answer", ylabel="layer-head")
    figure.colorbar(image, ax=ax, label="share of answers", pad=0.02, fraction=0.06)
    return figure


def _overlaps(rows: Sequence[StepRow]) -> "Figure":
    """How far the heads of a token are those of the next one, and the retrieval heads, by position."""
    figure, ax = plotting.panel("Overlap from token to token", 3.3)
    for i, (name, label) in enumerate(_LINES.items()):
        shade, mark = plotting.SHADES[i], plotting.MARKERS[i]
        points = [(row.position + 1, number) for row in rows if (number := getattr(row, name)) is not None]
        for position, number in points:
            plotting.interval(ax, number, position + 0.12 * (i - 1), shade, marker=mark, vertical=True)
        values = [(position + 0.12 * (i - 1), number.value) for position, number in points]
        ax.plot(*zip(*values, strict=True), color=shade, marker=mark, linestyle=plotting.DASHES[i], label=label)
    ax.set(xlabel="token of the answer", ylabel="share", ylim=(-0.04, 1.06))
    plotting.whole_numbers(ax.xaxis)
    figure.legend(loc="outside lower center", ncols=1)
    return figure
