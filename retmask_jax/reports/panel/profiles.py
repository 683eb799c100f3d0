"""Pictures of head scores over several models, each readable on its own: title, axes, n, and what the marks mean."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retmask_jax.heads.profile import ProfileRow, Scored
from retmask_jax.reports import plotting
from retmask_jax.reports.html import fixed
from retmask_jax.reports.plotting import DASHES, SHADES
from retmask_jax.utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2  # inches


def profiles(models: Sequence[Scored], rows: Sequence[ProfileRow]) -> "Figure":
    """Scores of all heads, best first, of every model, and below the layers in which each one's detected heads lie.

    rows: of `profile_table`.
    """
    figure = wide_figure("Retrieval heads by model", 3.6 + 0.95 * len(models))
    grid = figure.add_gridspec(1 + len(models), 1, height_ratios=[2.6] + [0.62] * len(models))
    _curves(figure.add_subplot(grid[0]), models, rows)
    for i, (model, row) in enumerate(zip(models, rows, strict=True)):
        ax = figure.add_subplot(grid[1 + i])
        _layers(ax, model, row, SHADES[i % len(SHADES)])
        if i < len(models) - 1:
            ax.tick_params(labelbottom=False)
        else:
            ax.set_xlabel("relative depth (0: first layer, 1: last)")
    return captioned(
        figure,
        "Above: mean score over the cases; a curve that falls early is a sparse model. Below: detected heads "
        "per layer; dashed: their mean depth, weighted by score. No intervals: these are all heads of a model, "
        "not a sample of them.",
    )


def write_both(figure: "Figure", stem: Path) -> list[Path]:
    """Write a figure as STEM.png and STEM.svg; returns the paths."""
    paths = [stem.with_name(f"{stem.name}.{form}") for form in ("png", "svg")]
    for path in paths:
        stream = io.BytesIO()
        figure.savefig(stream, format=path.suffix[1:], dpi=200)
        write_atomically(path, stream.getvalue())
    return paths


def wide_figure(title: str, height: float) -> "Figure":
    """A figure of WIDTH under a title; height in inches."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.02, ha="left")
    return figure


def captioned(figure: "Figure", text: str) -> "Figure":
    """The figure, with a caption below."""
    figure.supxlabel(textwrap.fill(text, 115), x=0.02, ha="left", fontsize=8)
    return figure


def _curves(ax: "Axes", models: Sequence[Scored], rows: Sequence[ProfileRow]) -> None:
    for i, (model, row) in enumerate(zip(models, rows, strict=True)):
        ranked = np.sort(model.scores.mean, axis=None)[::-1]
        ax.plot(
            np.arange(1, ranked.size + 1) / ranked.size,
            ranked,
            color=SHADES[i % len(SHADES)],
            linestyle=DASHES[i // len(SHADES) % len(DASHES)],
            label=f"{model.name} (n = {row.cases})",
        )
    thresholds = {model.threshold for model in models}
    if len(thresholds) == 1:
        ax.axhline(
            models[0].threshold,
            color=plotting.colour("none"),
            linewidth=0.9,
            linestyle=(0, (1, 3)),
            label=f"threshold {models[0].threshold:.3g}",
        )
    ax.set(xscale="log", xlabel="share of all heads, best first", ylabel="mean score")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.figure.legend(loc="outside right upper", title="model (n: cases)")


def _layers(ax: "Axes", model: Scored, row: ProfileRow, shade: str) -> None:
    from matplotlib.ticker import MaxNLocator

    n_layers, n_heads = model.scores.mean.shape
    layers = [layer for layer, _ in model.scores.heads(threshold=model.threshold)]
    step = 1 / max(n_layers - 1, 1)
    ax.bar(np.arange(n_layers) * step, np.bincount(layers, minlength=n_layers), min(0.8 * step, 0.06), color=shade)
    if row.layer_com is not None:
        ax.axvline(row.layer_com, color="black", linestyle="--", linewidth=1)
    found = f"{row.n_heads} of {n_layers * n_heads} heads at {model.threshold:.3g} or above"
    ax.set_title(f"{model.name}: {found}, Gini {fixed(row.gini)}", loc="left", fontsize=8.5)
    ax.set(xlim=(-0.04, 1.04), ylabel="heads")
    ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
