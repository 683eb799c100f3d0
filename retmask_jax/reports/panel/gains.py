"""What training gained against how concentrated the head scores are, over finished runs: the numbers and their picture."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from retmask_jax.reports import plotting
from retmask_jax.reports.panel.profiles import captioned, wide_figure
from retmask_jax.reports.plotting import MARKERS, SHADES
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import Number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORRELATE_FROM = 10  # models; a rank correlation of fewer says next to nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class GainRun:
    """A finished run.

    Attributes:
        weights: Identity of the start model.
        gini: Gini coefficient of its head scores.
        share: Of all heads, those that reach the threshold.
        gain: What training changed.
    """

    name: str
    weights: str
    gini: float
    share: float
    gain: Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gains:
    """Gains of several runs against the Gini coefficients of their start models.

    Attributes:
        n_models: How many different start models there are.
        spearman: Over models; None for fewer than CORRELATE_FROM models, or where one side is constant.
        finding: A sentence.
    """

    rows: list[GainRun]
    n_models: int
    spearman: Number | None
    finding: str


def gain_against_sparsity(runs: Sequence[GainRun]) -> Gains:
    """Correlates the gains of runs with Gini coefficients. Runs of one start model are one sample: they are averaged."""
    by_model: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        by_model.setdefault(run.weights, []).append((run.gini, run.gain.estimate))
    means = np.array([np.mean(points, axis=0) for points in by_model.values()])
    rho = stats.spearman_interval(*means.T) if len(means) >= CORRELATE_FROM else None
    rho = rho if rho and math.isfinite(rho.estimate) else None
    return Gains(rows=list(runs), n_models=len(means), spearman=rho, finding=_finding(len(means), rho))


def sparsity(gains: Gains, number: str) -> "Figure":
    """Gain of each run, a number of this name, with its interval against the sparsity of its head scores: their Gini
    coefficient, and the share of the heads that retrieve."""
    figure = wide_figure(f"Gain against sparsity: {number}", 3.7 + 0.1 * len(gains.rows))
    axes = figure.subplots(1, 2, sharey=True)
    sides = {"Gini coefficient of the head scores": "gini", "share of heads above the threshold": "share"}
    for ax, (label, side) in zip(axes, sides.items(), strict=True):
        ax.axhline(0, color="black", linewidth=0.9)
        for i, row in enumerate(gains.rows):
            shade, marker = SHADES[i % len(SHADES)], MARKERS[i // len(SHADES) % len(MARKERS)]
            plotting.interval(ax, row.gain, getattr(row, side), shade, marker, vertical=True)
        ax.margins(x=0.15)
        ax.set_xlabel(label)
    axes[0].set_ylabel("gain")
    for i, row in enumerate(gains.rows):
        shade, marker = SHADES[i % len(SHADES)], MARKERS[i // len(SHADES) % len(MARKERS)]
        axes[1].plot([], [], marker, color=shade, label=f"{row.name} (n = {row.gain.n})")
    figure.legend(loc="outside right upper", title="run (n: cases)")
    return captioned(
        figure,
        gains.finding + " Whiskers: 95% interval of the gain over the cases of a run, bootstrap, paired "
        "with the start model; they do not cover other training seeds.",
    )


def _finding(n_models: int, rho: Number | None) -> str:
    if n_models < CORRELATE_FROM:
        models = f"{n_models} model{'' if n_models == 1 else 's'}"
        return f"Descriptive only: {models}, too few for a correlation (from {CORRELATE_FROM} on); none is claimed."
    if rho is None:
        return f"{n_models} models, in all of which the gain or the Gini coefficient is the same: no correlation."
    bounds = f"[{rho.low:.2f}, {rho.high:.2f}]"
    return f"Spearman's rank correlation over {n_models} models: {rho.value:.2f}, 95% interval {bounds}."
