"""The pictures of heads and rotary pairs taken out: each function draws one panel and returns a Figure."""

from collections.abc import Mapping, Sequence

import numpy as np

from retmask_jax.reports.figures import colour
from retmask_jax.reports.plotting import MARKERS, interval, note, panel, rows


def head_curve(title: str, curve: Sequence[Mapping], n_retrieval: int):
    """Recall against the number of heads masked: the highest-scoring first, and as many random others (a dot each).

    curve: rows with "kind" and "heads"; the first is the untouched model.
    """
    none, *masked = curve
    figure, ax = panel(title, 3.0)
    ax.axhline(none["value"], color=colour("none"), linestyle=":", label="nothing masked")
    ax.axvline(n_retrieval, color="black", linestyle="--", linewidth=0.9, label="retrieval heads")
    best = [row for row in masked if row["kind"] == "highest-scoring"]
    others = [row for row in masked if row["kind"] == "random"]
    for row in best:
        interval(ax, row, len(row["heads"]), colour("retrieval"), "", vertical=True)
    ax.plot(
        [len(row["heads"]) for row in best],
        [row["value"] for row in best],
        "o-",
        color=colour("retrieval"),
        label="highest-scoring",
    )
    if others:
        means = {
            n: np.mean([row["value"] for row in others if len(row["heads"]) == n])
            for n in dict.fromkeys(len(row["heads"]) for row in others)
        }
        ax.plot([len(row["heads"]) for row in others], [row["value"] for row in others], ".", color=colour("random"))
        ax.plot(list(means), list(means.values()), "s-", color=colour("random"), label="random others, mean")
    numbers = sorted({len(row["heads"]) for row in masked})
    ax.set(xscale="log", ylim=(-0.03, 1.03), xlabel="heads masked", ylabel=f"recall (n = {none['n']})")
    ax.set_xticks(numbers, [str(n) for n in numbers])
    ax.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def spectrum(title: str, windows: Sequence[Mapping], none: Mapping, wavelengths: Sequence[float], context: int):
    """Recall without each window of the spectrum, against the wavelengths of its pairs; the context's length is marked.

    windows: rows with "kind" ("window", or of control heads) and "pairs".
    """
    figure, ax = panel(title, 3.0)
    ax.axhline(none["value"], color=colour("none"), linestyle=":", label="nothing taken out")
    for kind, label, name in (
        ("window", "retrieval heads", "retrieval"),
        ("control heads, window", "layer-matched heads", "layer matched"),
    ):
        shown = sorted((row for row in windows if row["kind"] == kind), key=lambda row: _wave(row, wavelengths))
        places = [_wave(row, wavelengths) for row in shown]
        for row, at in zip(shown, places, strict=True):
            interval(ax, row, at, colour(name), "", vertical=True)
        ax.plot(
            places, [row["value"] for row in shown], "o-" if kind == "window" else "s-", color=colour(name), label=label
        )
    if ax.get_xlim()[0] < context < 10 * ax.get_xlim()[1]:
        ax.axvline(context, color="black", linestyle="--", linewidth=0.9, label=f"context: {context} tokens")
    ax.set(
        xscale="log",
        ylim=(-0.03, 1.03),
        xlabel="mean wavelength of the window (tokens)",
        ylabel=f"recall (n = {none['n']})",
    )
    ax.xaxis.set_major_formatter("{x:,g}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def variance(title: str, found: Sequence[Mapping], none: Mapping):
    """Recall against the share of the variance of q.k that went with the pairs; a mark per condition."""
    figure, ax = panel(title, 3.2)
    ax.axhline(none["value"], color=colour("none"), linestyle=":", label="nothing taken out")
    for i, kind in enumerate(dict.fromkeys(row["kind"] for row in found)):
        shown = [row for row in found if row["kind"] == kind]
        for row in shown:
            interval(ax, row, row["variance"], colour(kind), "", vertical=True)
        ax.plot(
            [row["variance"] for row in shown],
            [row["value"] for row in shown],
            MARKERS[i % len(MARKERS)],
            color=colour(kind),
            label=kind,
        )
    ax.set(ylim=(-0.03, 1.03), xlabel="share of the variance of q.k taken out", ylabel=f"recall (n = {none['n']})")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def coverage(title: str, covered: Sequence[Mapping], none: Mapping):
    """Recall against the number of retrieval heads that lose their lowest pairs, the best first."""
    figure, ax = panel(title)
    ax.axhline(none["value"], color=colour("none"), linestyle=":", label="no head")
    numbers = [len(row["heads"]) for row in covered]
    for row, n in zip(covered, numbers, strict=True):
        interval(ax, row, n, colour("lowest"), "", vertical=True)
    ax.plot(numbers, [row["value"] for row in covered], "o-", color=colour("lowest"), label="lowest pairs out")
    ax.set(ylim=(-0.03, 1.03), xlabel="retrieval heads, best first", ylabel=f"recall (n = {none['n']})")
    ax.set_xticks(numbers)
    ax.legend(loc="lower left")
    return figure


def patches(title: str, patched: Sequence[Mapping], none: Mapping):
    """Recall with the lowest, or the highest, pairs out of one head alone."""
    heads = list(dict.fromkeys(tuple(row["heads"][0]) for row in patched))
    figure, ax = panel(title, 1.3 + 0.3 * len(heads))
    ax.axvline(none["value"], color=colour("none"), linestyle=":", label="nothing taken out")
    for kind, shift, marker in (("lowest", -0.13, "o"), ("highest", 0.13, "s")):
        for y, head in enumerate(heads):
            row = next(row for row in patched if (row["kind"], tuple(row["heads"][0])) == (kind, head))
            interval(ax, row, y + shift, colour(kind), marker)
            if kind == "lowest":
                note(ax, y, f"{row['value']:.2f}")
        ax.plot([], [], marker, color=colour(kind), label=f"{kind} pairs")
    rows(ax, [f"head {layer}-{head}" for layer, head in heads], f"recall (n = {none['n']}; right: lowest)")
    ax.set_xlim(-0.03, 1.03)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _wave(row: Mapping, wavelengths: Sequence[float]) -> float:
    return float(np.exp(np.mean([np.log(wavelengths[pair]) for pair in row["pairs"]])))
