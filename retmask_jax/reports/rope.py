"""The section on ablated rotary pairs, from the result of `rope`: sentences, tables and pictures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from retmask_jax.heads.rotary import SPECIFIC
from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, interval, p_value, section, table
from retmask_jax.reports.plotting import MARKERS, colour, drawn
from retmask_jax.reports.wording import direction
from retmask_jax.stages.rope import CostRow, DoseMean, RopeResult, RopeRow, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOSES = ("lowest", "highest", "random", "control heads, lowest")
_CONTROLS = ("lowest", "matched", "low utility", "high utility")


def rope_section(result: RopeResult) -> Markup:
    """The effect of ablated rotary pairs."""
    k = result.pairs[len(result.pairs) // 2]
    waves = [[k, *(_wavelengths(result, kind, k) for kind in ("lowest", "highest"))] for k in result.pairs]
    return section(
        "Rotary dose-response",
        [sentence for task in _tasks(result) for sentence in _doses(result, task, k)],
        drawn(
            dose_figures(result),
            "Pairs of the queries of the retrieval heads are ablated, lowest or highest frequency first, or at random; "
            "as a control, the lowest pairs of other heads of the same layers. Pale dots: random draws; line: "
            "their mean. 95% interval: Wilson for a single choice, bootstrap over cases for a mean over draws."
            + _legend(result.rows),
        ),
        table(["pairs ablated", "wavelengths of the lowest (tokens)", "of the highest (tokens)"], waves),
        _spectra(result),
        _variance(result),
        _single_heads(result),
        _costs(result.costs),
    )


def dose_figures(result: RopeResult) -> "dict[str, Figure]":
    """Recall by the number of rotary pairs ablated: figures by name."""
    panels = {}
    for task in _tasks(result):
        for title, kinds, site in (
            (task, _DOSES, "rotary"),
            (f"{task}: controls", _CONTROLS, "rotary"),
            (f"{task}: zeroed in the projections", (*_DOSES, *_CONTROLS[2:]), "projection"),
        ):
            means = _dose_means(result, task, kinds, site)
            if len({mean.kind for mean in means}) > 1:
                panels[f"Rotary pairs: {title}"] = _dose_figure(title, result, means, _untouched(result, task))
    return panels


def spectrum_figures(result: RopeResult) -> "dict[str, Figure]":
    """Recall without each part of the spectrum: figures by name."""
    panels = {}
    for task in _tasks(result):
        windows = _rows(result, task, "windows")
        if windows:
            panels[f"Parts of the spectrum: {task}"] = _spectrum_figure(
                f"{task}: a part of the spectrum ablated", result, windows, _untouched(result, task)
            )
    return panels


# --- doses ---


def _doses(result: RopeResult, task: str, k: int) -> list[str]:
    means = [mean for mean in _dose_means(result, task, _DOSES, "rotary") if mean.k == k]
    values = ", ".join(f"{mean.value:.3f} ({mean.kind})" for mean in means)
    sentences = [
        f"With {k} of {result.n_pairs} pairs ablated, recall on {task} is {values}; in the untouched model "
        f"it is {_untouched(result, task).value:.3f}."
    ]
    if (gap := result.quarter(task)) is not None:
        words = {"raises": "higher than", "lowers": "lower than", "": "not clearly different from that"}[direction(gap)]
        sentences.append(f"Without the highest quarter of the pairs it is {words} without the lowest: {change(gap)}.")
    return [*sentences, *_unmatched(result, task)]


def _unmatched(result: RopeResult, task: str) -> list[str]:
    """Says where no other pairs carry about as much of the variance as the lowest, within a fifth of it."""
    shares = {
        k: [
            [
                row.variance
                for row in _rows(result, task, experiment)
                if (row.kind, row.k) == (kind, k) and row.variance is not None
            ]
            for experiment, kind in (("dose", "lowest"), ("matched", "matched"))
        ]
        for k in result.pairs
    }
    far = {
        k: (np.mean(matched), lowest[0])
        for k, (lowest, matched) in shares.items()
        if lowest and matched and abs(np.mean(matched) - lowest[0]) > 0.2 * abs(lowest[0])
    }
    if not far:
        return []
    listed = ", ".join(f"{found:.3f} of {wanted:.3f} ({k} pairs)" for k, (found, wanted) in far.items())
    return [
        f"No other pairs carry as much of the variance of q.k as the lowest: the nearest sets carry {listed}. So they are no "
        "control for it here."
    ]


def _dose_figure(title: str, result: RopeResult, means: Sequence[DoseMean], none: DoseMean) -> "Figure":
    """Recall against the number of rotary pairs ablated, a line per kind; several draws are dots around their mean."""
    figure, ax = plotting.panel(title, 3.2)
    ax.axhline(none.value, color=colour("none"), linestyle=":", label="none")
    kinds, ks = list(dict.fromkeys(mean.kind for mean in means)), result.pairs
    for i, kind in enumerate(kinds):
        shift = 0.09 * (i - (len(kinds) - 1) / 2)
        of_kind = {mean.k: mean for mean in means if mean.kind == kind}
        places = [x + shift for x, k in enumerate(ks) if k in of_kind]
        for x, mean in zip(places, of_kind.values(), strict=True):
            draws = _draws(result, mean)
            plotting.interval(ax, draws[0] if len(draws) == 1 else mean, x, colour(kind), marker="", vertical=True)
            if len(draws) > 1:
                ax.plot([x + 0.05] * len(draws), [row.value for row in draws], ".", color=colour(kind), alpha=0.5)
        values = [mean.value for mean in of_kind.values()]
        ax.plot(places, values, color=colour(kind), marker=MARKERS[i % 5], label=kind)
    ax.set_xticks(range(len(ks)), [str(k) for k in ks])
    ax.set(xlim=(-0.4, len(ks) - 0.6), xlabel=f"rotary pairs ablated, of {result.n_pairs}")
    _recall_axis(figure, ax, none)
    return figure


def _legend(rows: Sequence[RopeRow]) -> str:
    """What the names in the pictures stand for."""
    kinds, sites = {row.kind for row in rows}, {row.site for row in rows}
    legend = ""
    if "matched" in kinds:
        legend += (
            " Matched: other pairs, of any number, whose share of the variance of q.k is nearest to that of the lowest."
        )
    if "low utility" in kinds:
        legend += " Utility: each head loses the pairs that its query projection writes least (low) or most (high)."
    if "projection" in sites:
        legend += (
            " In the projections: zeroed in the outputs of q_proj and k_proj before any norm, which changes every "
            "query head of a group, as in arXiv 2606.21249."
        )
    return legend


def _wavelengths(result: RopeResult, kind: str, k: int) -> str:
    """Shortest and longest wavelength of the pairs ablated."""
    doses = [row for row in result.rows if row.experiment == "dose"]
    pairs = next((row.pairs for row in doses if (row.kind, row.k) == (kind, k)), [])
    waves = [result.wavelengths[pair] for pair in pairs]
    ends = dict.fromkeys(f"{choose(waves):,.0f}" for choose in (min, max)) if waves else ["–"]
    return " to ".join(ends)


# --- parts of the spectrum ---


def _spectra(result: RopeResult) -> Markup:
    """Recall without each part of the spectrum."""
    caption = (
        "The rotary pairs in windows of equal size, ablated in turn; a window is placed at the geometric mean of its "
        "wavelengths, 2 pi over the frequency after scaling. 95% interval: Wilson."
    )
    return html.lines(*map(_centre, result.spectra)) + drawn(spectrum_figures(result), caption)


def _centre(spectrum: Spectrum) -> str:
    task, centre, width = spectrum.task, spectrum.centre, spectrum.width
    if centre is None or width is None:
        return f"No window lowers recall on {task}."
    return (
        f"The harm to recall on {task} centres at {interval(centre)} of the spectrum (0: lowest frequency, 1: highest; "
        f"bootstrap over {centre.n} cases), with a width of {interval(width)}."
    )


def _spectrum_figure(title: str, result: RopeResult, windows: Sequence[RopeRow], none: DoseMean) -> "Figure":
    """Recall without each window, against the wavelengths of its pairs; the length of the context is marked."""
    figure, ax = plotting.panel(title, 3.0)
    ax.axhline(none.value, color=colour("none"), linestyle=":", label="nothing ablated")
    for kind, label, name, look in (
        ("window", "retrieval heads", "retrieval", "o-"),
        ("control heads, window", "layer-matched heads", "layer matched", "s-"),
    ):
        placed = sorted(
            ((_wave(row, result.wavelengths), row) for row in windows if row.kind == kind), key=lambda pair: pair[0]
        )
        for place, row in placed:
            plotting.interval(ax, row, place, colour(name), "", vertical=True)
        ax.plot([place for place, _ in placed], [row.value for _, row in placed], look, color=colour(name), label=label)
    if ax.get_xlim()[0] < result.context < 10 * ax.get_xlim()[1]:
        label = f"context: {result.context} tokens"
        ax.axvline(result.context, color="black", linestyle="--", linewidth=0.9, label=label)
    ax.set(xscale="log", xlabel="mean wavelength of the window (tokens)")
    ax.xaxis.set_major_formatter("{x:,g}")
    _recall_axis(figure, ax, none)
    return figure


def _wave(row: RopeRow, wavelengths: Sequence[float]) -> float:
    """Geometric mean of the wavelengths of a row's pairs."""
    return float(np.exp(np.mean([np.log(wavelengths[pair]) for pair in row.pairs])))


# --- variance ---


def _variance(result: RopeResult) -> Markup:
    """Recall against the share of the variance of q.k that is removed with the pairs."""
    panels, cells = {}, []
    for task in _tasks(result):
        rows = [
            row
            for row in _rows(result, task, "dose", "matched")
            if row.variance is not None and not row.kind.startswith("control")
        ]
        if rows:
            title = f"{task}: harm by the variance removed"
            panels[f"Variance removed: {task}"] = _variance_figure(title, rows, _untouched(result, task))
            cells += [
                [task, row.kind, row.k, len(row.pairs) or row.k, f"{row.variance:.3f}", interval(row), p_value(row.q)]
                for row in rows
            ]
    if not panels:
        return Markup()
    caption = (
        "The share of the variance of q.k over the keys of a plain text that is removed with the pairs, mean over the heads; "
        "below 0 where the pairs had cancelled others. Pairs that matter only because they carry much variance lie on "
        "one falling curve, whatever their kind. 95% interval: Wilson."
    )
    head = ["task", "ablated", "for k", "pairs", "share of variance", "recall", "q"]
    return drawn(panels, caption) + html.folded(f"Share of variance of {len(cells)} conditions", table(head, cells))


def _variance_figure(title: str, rows: Sequence[RopeRow], none: DoseMean) -> "Figure":
    """Recall against the share of the variance removed; a mark per condition."""
    figure, ax = plotting.panel(title, 3.2)
    ax.axhline(none.value, color=colour("none"), linestyle=":", label="nothing ablated")
    for i, kind in enumerate(dict.fromkeys(row.kind for row in rows)):
        of_kind = [row for row in rows if row.kind == kind]
        places = np.array([row.variance for row in of_kind], float)
        for row, place in zip(of_kind, places.tolist(), strict=True):
            plotting.interval(ax, row, place, colour(kind), "", vertical=True)
        ax.plot(places, [row.value for row in of_kind], MARKERS[i % len(MARKERS)], color=colour(kind), label=kind)
    ax.set(xlabel="share of the variance of q.k removed")
    _recall_axis(figure, ax, none)
    return figure


# --- single heads ---


def _single_heads(result: RopeResult) -> Markup:
    """The same number of pairs of more and more heads, and of one head at a time."""
    panels = {}
    for task in _tasks(result):
        none = _untouched(result, task)
        if covered := _rows(result, task, "coverage"):
            panels[f"Coverage: {task}"] = _coverage_figure(f"{task}: more and more heads", covered, none)
        if patched := _rows(result, task, "patches"):
            panels[f"Single heads: {task}"] = _patches_figure(f"{task}: one head at a time", patched, none)
    return drawn(panels, f"{count(result.patch_pairs, 'pair')} ablated in each of these heads. 95% interval: Wilson.")


def _coverage_figure(title: str, covered: Sequence[RopeRow], none: DoseMean) -> "Figure":
    """Recall against the number of retrieval heads that lose their lowest pairs, the best heads first."""
    figure, ax = plotting.panel(title)
    ax.axhline(none.value, color=colour("none"), linestyle=":", label="no head")
    numbers = [len(row.heads) for row in covered]
    for row, n in zip(covered, numbers, strict=True):
        plotting.interval(ax, row, n, colour("lowest"), "", vertical=True)
    ax.plot(numbers, [row.value for row in covered], "o-", color=colour("lowest"), label="lowest pairs ablated")
    ax.set(ylim=(-0.03, 1.03), xlabel="retrieval heads, best first", ylabel=f"recall (n = {none.n})")
    ax.set_xticks(numbers)
    ax.legend(loc="lower left")
    return figure


def _patches_figure(title: str, patched: Sequence[RopeRow], none: DoseMean) -> "Figure":
    """Recall with the lowest, or the highest, pairs of one head alone ablated."""
    heads = list(dict.fromkeys(row.heads[0] for row in patched))
    figure, ax = plotting.panel(title, 1.3 + 0.3 * len(heads))
    ax.axvline(none.value, color=colour("none"), linestyle=":", label="nothing ablated")
    for kind, shift, marker in (("lowest", -0.13, "o"), ("highest", 0.13, "s")):
        for y, head in enumerate(heads):
            row = next(row for row in patched if (row.kind, row.heads[0]) == (kind, head))
            plotting.interval(ax, row, y + shift, colour(kind), marker)
            if kind == "lowest":
                plotting.note(ax, y, f"{row.value:.2f}")
        ax.plot([], [], marker, color=colour(kind), label=f"{kind} pairs")
    labels = [f"head {layer}-{head}" for layer, head in heads]
    plotting.rows(ax, labels, f"recall (n = {none.n}; right: lowest)")
    ax.set_xlim(-0.03, 1.03)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


# --- costs ---


def _costs(costs: Sequence[CostRow]) -> Markup:
    """What ablating pairs costs plain text, against what it costs recall."""
    if not costs:
        return Markup()
    rows = [
        [
            row.task,
            row.kind,
            row.k,
            "–" if row.perplexity_increase is None else change(row.perplexity_increase),
            "–" if row.recall_drop is None else change(row.recall_drop),
            "–" if row.ratio is None else interval(row.ratio).replace("-", "−"),
        ]
        for row in costs
    ]
    return table(
        ["task", "pairs", "k", "perplexity, relative increase", "recall, relative drop", "ratio"],
        rows,
        note=f"What ablating pairs costs plain text, against what it costs recall; a ratio below {SPECIFIC} is called specific "
        "to retrieval in arXiv 2606.21249. 95% interval: bootstrap, texts and cases drawn independently.",
    )


# --- parts of a result ---


def _tasks(result: RopeResult) -> list[str]:
    return list(dict.fromkeys(mean.task for mean in result.means))


def _rows(result: RopeResult, task: str, *experiments: str) -> list[RopeRow]:
    return [row for row in result.rows if row.task == task and row.experiment in experiments]


def _untouched(result: RopeResult, task: str) -> DoseMean:
    return next(mean for mean in result.means if mean.task == task and mean.kind == "none")


def _dose_means(result: RopeResult, task: str, kinds: Sequence[str], site: str) -> list[DoseMean]:
    return [mean for mean in result.means if mean.task == task and mean.kind in kinds and mean.site == site]


def _draws(result: RopeResult, mean: DoseMean) -> list[RopeRow]:
    """The rows that a mean is over."""
    wanted = mean.kind, mean.k, mean.site
    rows = _rows(result, mean.task, "dose", "matched")
    return [row for row in rows if (row.kind, row.k, row.site) == wanted]


def _recall_axis(figure: "Figure", ax: "Axes", none: DoseMean) -> None:
    """Recall from 0 to 1 with the number of cases, and the legend below."""
    ax.set(ylim=(-0.03, 1.03), ylabel=f"recall (n = {none.n})")
    figure.legend(loc="outside lower center", ncols=2)
