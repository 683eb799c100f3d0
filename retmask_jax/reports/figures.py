"""The pictures of the report: each function draws one panel from parts of a stage's result and returns a Figure.

A panel is as wide as a phone, so that a page can set several side by side or below each other. `numbers` are dicts
{"value", "low", "high", "n"}; where low and high are None no interval is drawn.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from retmask_jax.reports.html import signed
from retmask_jax.reports.plotting import (  # noqa: F401  (until their users import them from there)
    DASHES,
    LARGE,
    MARKERS,
    WIDTH,
    colour,
    drawn,
    head_map,
    inline,
    style,
    use_style,
)
from retmask_jax.reports.plotting import colormap as _colormap
from retmask_jax.reports.plotting import interval as _interval
from retmask_jax.reports.plotting import note as _note
from retmask_jax.reports.plotting import panel as _panel
from retmask_jax.reports.plotting import rows as _rows

# --- pairs and training ---


def stacked_counts(title: str, counts: Mapping[str, Mapping[str, int]]):
    """Prompts per run, split into kept, identical and empty."""
    looks = {
        "kept": {"color": "#666666"},
        "identical": {"color": "#cccccc"},
        "empty": {"color": "white", "hatch": "////"},
    }
    figure, ax = _panel(title, 1.2 + 0.26 * len(counts))
    for y, parts in enumerate(counts.values()):
        left = 0
        for name, look in looks.items():
            ax.barh(
                y,
                parts.get(name, 0),
                0.62,
                left,
                edgecolor="#444444",
                linewidth=0.6,
                label=name if y == 0 else None,
                **look,
            )
            left += parts.get(name, 0)
        _note(ax, y, str(parts["kept"]))
    _rows(ax, list(counts), "prompts (right: kept)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def curves(title: str, runs: Sequence[Mapping], key: str, label: str, rate: bool = False):
    """A number per step, a line a run: lightly smoothed, over the raw values in pale; rate adds the learning rate."""
    figure, ax = _panel(title, 2.3 + 0.2 * math.ceil((len({run["arm"] for run in runs}) + rate) / 2))
    seen = {}
    for run in runs:
        steps, values = ([row[name] for row in run["steps"]] for name in ("step", key))
        ax.plot(steps, values, color=colour(run["arm"]), alpha=0.22, linewidth=0.8)
        (seen[run["arm"]],) = ax.plot(steps, smooth(values), color=colour(run["arm"]))
    if rate:
        twin = ax.twinx()
        steps, rates = ([row[name] for row in runs[0]["steps"]] for name in ("step", "learning_rate"))
        (seen["learning rate"],) = twin.plot(steps, rates, color="#999999", linewidth=0.8, linestyle="--")
        top = max(rates) or 1.0
        twin.set_yticks([0, top / 2, top], ["0", f"{top / 2:.2g}", f"{top:.2g}"])
        twin.set(ylabel="learning rate", ylim=(0, 1.05 * top))
        twin.spines["right"].set_visible(True)
    ax.set(xlabel="step", ylabel=label)
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=2)
    return figure


def smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over about a twentieth of the values, over what there is at the ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


# --- evaluation ---


def before_after(
    title: str, pooled: Mapping[str, Mapping], runs: Mapping[str, Sequence[float]], xlabel: str, share: bool = True
):
    """A task for the start model and every arm; single runs are pale dots where an arm has several."""
    figure, ax = _panel(title, 0.9 + 0.26 * len(pooled))
    for y, (arm, number) in enumerate(pooled.items()):
        if len(runs[arm]) > 1:
            ax.plot(runs[arm], np.full(len(runs[arm]), y + 0.25), ".", color=colour(arm, y), alpha=0.6)
        _interval(ax, number, y, colour(arm, y), marker=MARKERS[y % 5])
        _note(ax, y, f"{number['value']:.3f}")
    ax.axvline(pooled["start"]["value"], color=colour("start"), linestyle=":", linewidth=0.9, zorder=0)
    _rows(ax, list(pooled), xlabel)
    if share:
        ax.set_xlim(-0.03, 1.03)
    return figure


def over(title: str, points: Mapping[str, Sequence[tuple[int, Mapping]]], xlabel: str, ylabel: str):
    """A number over lengths or positions, on a scale of doublings: a line with intervals for each model."""
    figure, ax = _panel(title, 2.3 + 0.2 * math.ceil(len(points) / 2))
    handles = []
    for i, (name, line) in enumerate(points.items()):
        look = {"color": colour(name, i), "marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
        handles += ax.plot([at for at, _ in line], [number["value"] for _, number in line], label=name, **look)
        for at, number in line:
            _interval(ax, number, at, look["color"], look["marker"], vertical=True)
    places = sorted({at for line in points.values() for at, _ in line})
    ax.set_xscale("log", base=2)
    ax.set_xticks(places, map(str, places), rotation=90 if len(places) > 5 else 0)
    ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    # By itself matplotlib leaves names out that begin with "_".
    figure.legend(handles, list(points), loc="outside lower center", ncols=2)
    return figure


def forest(title: str, changes: Mapping[str, Mapping[str, Mapping]], xlabel: str, limits: tuple[float, float]):
    """Paired changes against the start model with a line at zero: task -> arm -> number."""
    from matplotlib.transforms import blended_transform_factory

    figure, ax = _panel(title, 0.9 + 0.2 * sum(1 + len(arms) for arms in changes.values()))
    labels = []
    for task, arms in changes.items():
        across = blended_transform_factory(figure.transFigure, ax.transData)
        ax.text(
            0.02,
            len(labels),
            textwrap.shorten(task, 44, placeholder=" …"),
            transform=across,
            va="center",
            style="italic",
            in_layout=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
        labels.append("")
        for i, (arm, number) in enumerate(arms.items()):
            _interval(ax, number, len(labels), colour(arm, i + 1), marker=MARKERS[(i + 1) % 5])
            _note(ax, len(labels), signed(number["value"]))
            labels.append(arm)
    ax.axvline(0, color="black", linewidth=0.9, zorder=0)
    _rows(ax, labels, xlabel)
    ax.set_xlim(limits)
    return figure


def niah(title: str, cells: Sequence[Mapping]):
    """Recall by length and depth on a scale from 0 to 1, its value in each cell. Cells of one length and depth are averaged."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    total, count = np.zeros((2, len(depths), len(lengths)))
    for cell in cells:
        at = depths.index(cell["depth"]), lengths.index(cell["length"])
        total[at] += cell["value"]
        count[at] += 1
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    figure, ax = _panel(title, 1.1 + 0.26 * len(depths), max(WIDTH, 1.4 + 0.3 * len(lengths)))
    image = ax.imshow(mean, cmap=_colormap(), vmin=0, vmax=1, aspect="auto", interpolation="none")
    for (y, x), value in np.ndenumerate(mean):
        if count[y, x]:
            ax.text(
                x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black"
            )
    ax.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=90 if len(lengths) > 6 else 0)
    ax.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    ax.spines[:].set_visible(False)
    ax.set(xlabel="length (tokens)", ylabel="depth")
    figure.colorbar(image, ax=ax, label="recall", pad=0.02, fraction=0.06)
    return figure
