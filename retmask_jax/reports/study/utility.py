"""The section on query norms: retrieval heads against others, by head and by rotary pair."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from retmask_jax.heads.query_norms import NormComparison
from retmask_jax.model.interventions import Head
from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, p_value, signed, table
from retmask_jax.stages.study.utility import UtilityResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def norms_section(result: UtilityResult) -> Markup:
    """The comparison of query norms, from the result of `utility`."""
    found, (kind, waves) = result.comparison, next(iter(result.wavelengths.items()))
    panels = {"Query norms": norms_by_layer("Query norms by layer", result.norms, result.heads)}
    if found is None:
        return html.section(
            "Query norms",
            [f"Nothing is compared: {result.undefined}."],
            plotting.drawn(panels, "A dot is a head: mean L1 norm of the rows of its query projection."),
        )
    title = f"Difference by rotary pair ({found.n} against {found.n_other} heads)"
    panels["Query norms of rotary pairs"] = _pair_differences(title, found, waves, result.max_length)
    more = f" Wavelengths are those of {kind} layers." if len(result.wavelengths) > 1 else ""
    head = ["pair", "wavelength (tokens)", "mean norm, retrieval", "mean norm, other", "Cohen's d", "p", "adjusted p"]
    return html.section(
        "Query norms",
        _sentences(found),
        plotting.drawn(
            panels,
            "Left: a dot is a head, its height the mean L1 norm of the rows of its query projection. Right: the same "
            "for each rotary pair, retrieval against other heads, in pooled standard deviations (Cohen's d, no interval: "
            "these are all heads of the model); filled where the layer-clustered permutation test, adjusted over all pairs "
            "(Benjamini and Hochberg), is below 0.05. With few heads in few layers p cannot be much smaller than that."
            + more,
        ),
        html.folded("Every rotary pair", table(head, _cells(found, waves))),
    )


def _sentences(found: NormComparison) -> list[str]:
    test, rho, d = found.permutation, found.partial_spearman, found.cohens_d
    differ = sum(p < 0.05 for p in found.pair_adjusted_p)
    said = [
        f"The mean query norms of the {found.n} retrieval heads and of the {found.n_other} other heads differ by "
        f"{signed(test.value)}"
        + ("" if d is None else f" (Cohen's d {signed(d, 2)})")
        + f"; the layers of the heads alone explain {signed(test.expected)} of that.",
        f"A test that permutes the labels within layers gives p = {p_value(test.p_value)}.",
        f"After adjustment over all pairs p is below 0.05 for {differ} of "
        f"{count(len(found.pair_adjusted_p), 'rotary pair')}.",
    ]
    if rho.value is not None:
        said.append(f"Within layers the norm's rank correlation with the score is {change(rho)} over {rho.n} layers.")
    return said


def _cells(found: NormComparison, waves: Sequence[float]) -> list[list[str]]:
    columns = found.pair_retrieval, found.pair_other, found.pair_cohens_d, found.pair_p_value, found.pair_adjusted_p
    return [
        [str(i), f"{wave:,.1f}", f"{ours:.3f}", f"{other:.3f}", "–" if d is None else signed(d), p_value(p), p_value(q)]
        for i, (wave, ours, other, d, p, q) in enumerate(zip(waves, *columns, strict=True))
    ]


# --- figures ---


def norms_by_layer(title: str, norms_LH: ArrayLike, heads: Sequence[Head]) -> "Figure":
    """Norm of every head's query projection, a dot each, by layer."""
    norms_LH = np.asarray(norms_LH, float)
    chosen_LH = np.zeros(norms_LH.shape, bool)
    for layer, head in heads:
        chosen_LH[layer, head] = True
    figure, ax = plotting.panel(title, 2.9)
    aside_LH = np.arange(len(norms_LH))[:, None] + np.linspace(-0.25, 0.25, norms_LH.shape[1])
    for mask_LH, name, mark, size in ((~chosen_LH, "none", ".", 4), (chosen_LH, "retrieval", "o", 5)):
        label = f"{'retrieval' if name == 'retrieval' else 'other'} heads (n = {mask_LH.sum()})"
        shade = plotting.colour(name)
        ax.plot(aside_LH[mask_LH], norms_LH[mask_LH], mark, color=shade, markersize=size, label=label)
    plotting.whole_numbers(ax.xaxis)
    ax.set(xlabel="layer", ylabel="mean L1 norm of a query row")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _pair_differences(title: str, found: NormComparison, waves: Sequence[float], max_length: int) -> "Figure":
    """Standardised difference of the query norms by wavelength of the rotary pair; filled: adjusted p below 0.05."""
    every = zip(waves, found.pair_cohens_d, found.pair_adjusted_p, strict=True)
    points = [(wave, d, p) for wave, d, p in every if d is not None]
    figure, ax = plotting.panel(title, 3.0)
    ax.axhline(0, color="black", linewidth=0.9)
    ax.plot([wave for wave, _, _ in points], [d for _, d, _ in points], color="#bbbbbb", linewidth=0.9, zorder=1)
    shade = plotting.colour("retrieval")
    for clear, label in ((True, "adjusted p < 0.05"), (False, "not clear")):
        some = [(wave, d) for wave, d, p in points if (p < 0.05) == clear]
        if some:
            fill = shade if clear else "white"
            ax.plot(*zip(*some, strict=True), "o", color=shade, markerfacecolor=fill, label=label)
    if min(waves) < max_length < max(waves):
        label = f"context, {max_length:,} tokens"
        ax.axvline(max_length, color=plotting.colour("none"), linestyle="--", linewidth=0.9, label=label)
    ax.set(xscale="log", xlabel="wavelength of the rotary pair (tokens)", ylabel="Cohen's d, retrieval − other")
    ax.xaxis.set_major_formatter("{x:,g}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
