"""The pictures of the causal study: each function draws one panel, as wide as a phone, and returns a Figure."""

from collections.abc import Mapping, Sequence

import numpy as np

from retmask_jax.reports.figures import colour
from retmask_jax.reports.html import signed
from retmask_jax.reports.plotting import DASHES, MARKERS, SHADES, colormap, interval, note, panel, rows

_SHADES = (*SHADES, "#000000")  # there are eight detectors
_LOG_FROM = 30  # ratio of the last to the first step from which a logarithmic axis shows more


# --- detectors ---


def agreement_matrix(title: str, names: Sequence[str], pairs: Sequence[Mapping]):
    """How far each two detectors agree: Jaccard of their best heads above the diagonal, Spearman of all scores below."""
    values = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        a, b = sorted((names.index(pair["a"]), names.index(pair["b"])))
        values[a, b] = pair["jaccard"]
        values[b, a] = np.nan if pair["spearman"] is None else pair["spearman"]
    figure, ax = panel(title, 1.7 + 0.26 * len(names))
    image = ax.imshow(
        values, cmap=colormap(), vmin=min(0, np.nanmin(values, initial=0)), vmax=1, aspect="auto", interpolation="none"
    )
    middle = np.mean(image.get_clim())
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            ax.text(
                x,
                y,
                signed(value, 2).removeprefix("+"),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if value < middle else "black",
            )
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    figure.supxlabel("above the diagonal: Jaccard; below: Spearman", fontsize=8)
    return figure


def masked_recall(title: str, masked: Sequence[Mapping]):
    """Recall with the best heads of each detector masked, and untouched (dotted).

    masked: numbers with "kind", a detector or "none".
    """
    none = next(row for row in masked if row["kind"] == "none")
    shown = [row for row in masked if row["kind"] != "none"]
    figure, ax = panel(title, 1.2 + 0.26 * len(shown))
    ax.axvline(none["value"], color=colour("none"), linestyle=":", label="nothing masked")
    for y, row in enumerate(shown):
        interval(ax, row, y, colour("retrieval"))
        note(ax, y, f"{row['value']:.2f}")
    rows(ax, [row["kind"] for row in shown], f"recall (n = {none['n']})")
    ax.set_xlim(-0.03, 1.03)
    figure.legend(loc="outside lower center")
    return figure


def costs(title: str, detectors: Sequence[Mapping]):
    """Seconds of each detector, compiling included; hatched: those of the whole stage `detect`."""
    figure, ax = panel(title, 1.0 + 0.26 * len(detectors))
    for y, row in enumerate(detectors):
        ax.barh(
            y,
            row["seconds"],
            0.62,
            color="#bbbbbb",
            edgecolor="#444444",
            linewidth=0.6,
            hatch="////" if row["reused"] else "",
        )
        note(ax, y, f"{row['cases_per_second']:.2g}")
    rows(ax, [row["name"] for row in detectors], "seconds (right: cases per second)")
    return figure


def settling(title: str, by_detector: Mapping[str, Sequence[Mapping]]):
    """Overlap of each detector's best heads on the first cases with those on all, as cases are added."""
    figure, ax = panel(title, 2.4 + 0.19 * -(-len(by_detector) // 2))
    # Thick lines first, thinner ones on top: those that coincide can all be seen.
    widths = np.linspace(5, 1, len(by_detector))
    for i, (name, steps) in enumerate(by_detector.items()):
        ax.plot(
            [row["cases"] for row in steps],
            [row["jaccard"] for row in steps],
            MARKERS[i % len(MARKERS)],
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


# --- query norms ---


def norms_by_layer(title: str, norms_LH, heads: Sequence[Sequence[int]]):
    """Norm of every head's query projection, a dot each, by layer."""
    norms_LH = np.asarray(norms_LH, float)
    chosen_LH = np.zeros(norms_LH.shape, bool)
    for layer, head in heads:
        chosen_LH[layer, head] = True
    figure, ax = panel(title, 2.9)
    aside_LH = np.arange(len(norms_LH))[:, None] + np.linspace(-0.25, 0.25, norms_LH.shape[1])
    for mask_LH, name, mark, size in ((~chosen_LH, "none", ".", 4), (chosen_LH, "retrieval", "o", 5)):
        label = f"{'retrieval' if name == 'retrieval' else 'other'} heads (n = {mask_LH.sum()})"
        ax.plot(aside_LH[mask_LH], norms_LH[mask_LH], mark, color=colour(name), markersize=size, label=label)
    _whole_numbers(ax.xaxis)
    ax.set(xlabel="layer", ylabel="mean L1 norm of a query row")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def pair_differences(title: str, cohens_d, adjusted_p, wavelengths, max_length: int):
    """Standardised difference of the query norms by wavelength of the rotary pair; filled: adjusted p below 0.05."""
    points = [(w, d, p) for w, d, p in zip(wavelengths, cohens_d, adjusted_p, strict=True) if d is not None]
    figure, ax = panel(title, 3.0)
    ax.axhline(0, color="black", linewidth=0.9)
    ax.plot([w for w, _, _ in points], [d for _, d, _ in points], color="#bbbbbb", linewidth=0.9, zorder=1)
    for clear, label in ((True, "adjusted p < 0.05"), (False, "not clear")):
        some = [(w, d) for w, d, p in points if (p < 0.05) == clear]
        if some:
            ax.plot(
                *zip(*some, strict=True),
                "o",
                color=colour("retrieval"),
                markerfacecolor=colour("retrieval") if clear else "white",
                label=label,
            )
    if min(wavelengths) < max_length < max(wavelengths):
        ax.axvline(
            max_length, color=colour("none"), linestyle="--", linewidth=0.9, label=f"context, {max_length:,} tokens"
        )
    ax.set(xscale="log", xlabel="wavelength of the rotary pair (tokens)", ylabel="Cohen's d, retrieval − other")
    ax.xaxis.set_major_formatter("{x:,g}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


# --- RoPE base ---


def recall_by_base(title: str, rows_of_task: Sequence[Mapping], base: float):
    """Recall at each RoPE base, the weights as they are."""
    figure, ax = panel(title, 2.6)
    ordered = sorted(rows_of_task, key=lambda row: row["theta"])
    for row in ordered:
        interval(ax, row, row["theta"], colour("retrieval"), vertical=True)
    ax.plot([row["theta"] for row in ordered], [row["value"] for row in ordered], color=colour("retrieval"))
    ax.set(ylabel=f"recall (n = {ordered[0]['n']})", ylim=(-0.03, 1.03))
    _bases(figure, ax, ordered, base)
    return figure


def heads_by_base(title: str, counts: Sequence[Mapping], base: float):
    """Heads at the detection threshold at each RoPE base, and how many of them are those of the model's own base."""
    figure, ax = panel(title, 2.8)
    ordered = sorted(counts, key=lambda count: count["theta"])
    own = {tuple(head) for count in counts if count["factor"] == 1 for head in count["heads"]}
    thetas = [count["theta"] for count in ordered]
    ax.plot(
        thetas,
        [len(count["heads"]) for count in ordered],
        "o-",
        color=colour("retrieval"),
        linewidth=3,
        markersize=8,
        label="heads",
    )
    ax.plot(
        thetas,
        [len(own & set(map(tuple, count["heads"]))) for count in ordered],
        "s--",
        color=colour("layer matched"),
        label="of them found at the model's own base",
    )
    ax.set(ylabel="heads")
    ax.set_ylim(bottom=0)
    _whole_numbers(ax.yaxis)
    _bases(figure, ax, ordered, base)
    return figure


def _bases(figure, ax, ordered: Sequence[Mapping], base: float) -> None:
    """The axis of bases, with the model's own marked."""
    ax.axvline(base, color=colour("none"), linestyle=":", label="the model's own base")
    ax.set_xscale("log")
    ax.set_xticks([row["theta"] for row in ordered], [f"{row['theta']:,.0f}" for row in ordered], rotation=30)
    ax.minorticks_off()
    ax.set_xlabel("RoPE base")
    figure.legend(loc="outside lower center", ncols=2 if len(ax.get_legend_handles_labels()[0]) < 3 else 1)


# --- training dynamics ---


def emergence(title: str, checkpoints: Sequence[Mapping]):
    """Best score, mean score of the final heads, Gini and overlap with the final heads, by training step."""
    lines = {
        "top": "best head's score",
        "emergence": "mean score of the final heads",
        "gini": "Gini of all scores",
        "jaccard": "Jaccard with the final heads",
    }
    figure, ax = panel(title, 3.3)
    for i, (key, label) in enumerate(lines.items()):
        shown = [row for row in checkpoints if row[key] is not None]
        ax.plot(
            [row["step"] for row in shown],
            [row[key] for row in shown],
            MARKERS[i],
            linestyle=DASHES[i],
            color=_SHADES[i],
            label=label,
        )
    ax.set(ylim=(-0.04, 1.06), ylabel="score or share")
    _steps(ax, checkpoints)
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def heads_by_step(title: str, checkpoints: Sequence[Mapping]):
    """Heads at the threshold by training step."""
    figure, ax = panel(title)
    ax.plot(
        [row["step"] for row in checkpoints],
        [len(row["heads"]) for row in checkpoints],
        "o-",
        color=colour("retrieval"),
    )
    ax.set(ylabel="heads")
    ax.set_ylim(bottom=0)
    _whole_numbers(ax.yaxis)
    _steps(ax, checkpoints)
    return figure


def recall_by_step(title: str, checkpoints: Sequence[Mapping]):
    """Recall by training step, untouched and with the checkpoint's own best heads masked."""
    figure, ax = panel(title, 2.9)
    looks = (
        ("none", "untouched", colour("layer matched"), "o", "-"),
        ("masked", "own best heads masked", colour("retrieval"), "s", "--"),
    )
    for name, label, shade, mark, dash in looks:
        numbers = [row["recall"][name] for row in checkpoints]
        for row, number in zip(checkpoints, numbers, strict=True):
            interval(ax, number, row["step"], shade, marker=mark, vertical=True)
        ax.plot(
            [row["step"] for row in checkpoints],
            [number["value"] for number in numbers],
            color=shade,
            linestyle=dash,
            marker=mark,
            label=label,
        )
    ax.set(ylabel=f"recall (n = {numbers[0]['n']})", ylim=(-0.03, 1.03))
    _steps(ax, checkpoints)
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def loss_by_step(title: str, checkpoints: Sequence[Mapping]):
    """Loss on plain text by training step."""
    figure, ax = panel(title)
    shown = [row for row in checkpoints if row["text_loss"]]
    for row in shown:
        interval(ax, row["text_loss"], row["step"], colour("layer matched"), vertical=True)
    ax.plot([row["step"] for row in shown], [row["text_loss"]["value"] for row in shown], color=colour("layer matched"))
    ax.set(ylabel="nats per token")
    _steps(ax, checkpoints)
    return figure


def _steps(ax, checkpoints: Sequence[Mapping]) -> None:
    """The axis of training steps."""
    steps = [row["step"] for row in checkpoints]
    if min(steps) > 0 and max(steps) > _LOG_FROM * min(steps):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:,g}")
    else:
        _whole_numbers(ax.xaxis)
    ax.set_xlabel("step of the checkpoint")


def _whole_numbers(axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
