"""The pictures of the report: each function draws one panel from parts of a stage's result and returns a Figure.

A panel is as wide as a phone, so that a page can set several side by side or below each other. `numbers` are dicts
{"value", "low", "high", "n"}; where low and high are None no interval is drawn.
"""

import base64
import contextlib
import html as escapes
import io
import re
from collections.abc import Mapping, Sequence

import numpy as np

from retmask_jax.reports import html
from retmask_jax.reports.plotting import MARKERS, SHADES
from retmask_jax.reports.plotting import colormap as _colormap
from retmask_jax.reports.plotting import interval as _interval
from retmask_jax.reports.plotting import note as _note
from retmask_jax.reports.plotting import panel as _panel
from retmask_jax.reports.plotting import rows as _rows

LARGE = 60_000  # characters of SVG above which a PNG is tried

# Okabe-Ito. A kind of mask and the arm whose rejected answers come from it share a colour.
_COLOURS = {
    "none": "#666666",
    "start": "#666666",
    "retrieval": "#D55E00",
    "retmask": "#D55E00",
    "any layer": "#56B4E9",
    "layer matched": "#0072B2",
    "activity matched": "#009E73",
    "no fact": "#CC79A7",
    "sft filtered": "#E69F00",
    "sft unfiltered": "#000000",
    "lowest": "#E69F00",
    "highest": "#CC79A7",
    "random": "#56B4E9",
    "control heads, lowest": "#0072B2",
    "matched": "#009E73",
    "low utility": "#999999",
    "high utility": "#000000",
    "lowest scoring": "#CC79A7",
}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}


def colour(name: str, other: int | None = None) -> str:
    """The colour of a kind of mask or an arm, the same in every figure; of the models of a user by their number."""
    name = re.sub("[-_]", " ", name)
    unknown = "#000000" if other is None else SHADES[other % len(SHADES)]
    return _COLOURS.get(name) or _COLOURS.get(name.split(", ")[0], unknown)


@contextlib.contextmanager
def style():
    """Fonts and line widths of the report, for the figures made and written inside."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def use_style() -> None:
    """The same for all figures from here on, as in a notebook."""
    import matplotlib

    matplotlib.rcParams.update(_STYLE)


def inline(figure, alt: str) -> str:
    """A figure as HTML text without links: <svg>, or <img> with a PNG where an SVG would be large and larger."""
    import matplotlib

    stream, png = io.StringIO(), io.BytesIO()
    # The salt keeps the ids of one figure apart from those of the others on a page.
    with matplotlib.rc_context({"svg.hashsalt": alt}):
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :], count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("<svg", f'<svg role="img" aria-label="{escapes.escape(alt)}"', 1)
    if len(svg) < LARGE:
        return svg
    figure.savefig(png, format="png", dpi=200)
    data = base64.b64encode(png.getvalue()).decode()
    width = round(96 * figure.get_figwidth())
    image = f'<img width="{width}" alt="{escapes.escape(alt)}" src="data:image/png;base64,{data}">'
    return min(svg, image, key=len)


def drawn(panels: Mapping[str, object], caption: str) -> str:
    """Figures side by side over a caption, as HTML; nothing where there are none.

    panels: name, for who cannot see it, to figure.
    """
    return html.figure([inline(figure, name) for name, figure in panels.items()], caption) if panels else ""


# --- heads ---


def head_map(title: str, values_LH, heads: Sequence[Sequence[int]], label: str, log: bool = False):
    """Heat map of a number per head, layer by head, the chosen heads outlined."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    values_LH = np.asarray(values_LH, float)
    n_layers, n_heads = values_LH.shape
    cell = min(0.3, 2.6 / n_heads)
    figure, ax = _panel(title, float(np.clip(cell * n_layers, 1.0, 4.2)) + 0.9)
    top = values_LH.max()
    norm = LogNorm(max(values_LH[values_LH > 0].min(), 1e-4 * top), top) if log and top > 0 else None
    colours = _colormap().with_extremes(bad=_colormap()(0.0))
    image = ax.imshow(
        values_LH, cmap=colours, norm=norm, aspect="auto", interpolation="none", **({} if norm else {"vmin": 0})
    )
    for layer, head in heads:
        ax.add_patch(
            Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=colour("retrieval"), linewidth=1.3)
        )
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
    ax.set(xlabel="head", ylabel="layer")
    bar = figure.colorbar(image, ax=ax, label=label, pad=0.02, fraction=0.06)
    if norm:
        bar.set_ticks(LogLocator(subs=(1, 2, 5)), minor=False)
        bar.formatter = StrMethodFormatter("{x:g}")
        bar.minorticks_off()
    return figure


# --- knock-out and rotary pairs ---


def kinds(title: str, rows: Sequence[Mapping], pooled: Mapping[str, Mapping], xlabel: str, share: bool = True):
    """One task under each kind of mask: every draw a dot, their mean a bar (a point where `share` is False).

    rows: numbers with "kind", one per draw; pooled: kind -> number of the mean over draws. A kind of one draw shows
    that draw's own interval.
    """
    figure, ax = _panel(title, 0.9 + 0.3 * len(pooled))
    for y, (kind, mean) in enumerate(pooled.items()):
        draws = [row for row in rows if row["kind"] == kind]
        number = draws[0] if len(draws) == 1 else mean
        if share:
            ax.barh(y, number["value"], 0.62, color=colour(kind), alpha=0.55)
        if len(draws) > 1:
            spread = np.linspace(-0.2, 0.2, len(draws))
            ax.plot([row["value"] for row in draws], y + spread, ".", color=colour(kind), markersize=4, alpha=0.8)
        _interval(ax, number, y, "black" if share else colour(kind), marker="" if share else "o")
        _note(ax, y, f"{number['value']:.2f}" if share else f"{number['value']:.3f}")
    if share:
        ax.set_xlim(0, 1)
    _rows(ax, list(pooled), xlabel)
    return figure


def dose_response(
    title: str,
    rows: Sequence[Mapping],
    pooled: Mapping[tuple[str, int], Mapping],
    none: Mapping,
    ks: Sequence[int],
    n_pairs: int,
):
    """Recall against the number of rotary pairs taken out, a line per kind; several draws are dots around their mean.

    pooled: (kind, k) -> number of the mean over draws.
    """
    figure, ax = _panel(title, 3.2)
    ax.axhline(none["value"], color=colour("none"), linestyle=":", label="none")
    names = list(dict.fromkeys(kind for kind, _ in pooled))
    for i, kind in enumerate(names):
        shift = 0.09 * (i - (len(names) - 1) / 2)
        for x, k in enumerate(ks):
            draws = [row for row in rows if row["kind"] == kind and row["k"] == k]
            number = draws[0] if len(draws) == 1 else pooled[kind, k]
            _interval(ax, number, x + shift, colour(kind), marker="", vertical=True)
            if len(draws) > 1:
                ax.plot(
                    [x + shift + 0.05] * len(draws), [row["value"] for row in draws], ".", color=colour(kind), alpha=0.5
                )
        values = [pooled[kind, k]["value"] for k in ks]
        ax.plot(np.arange(len(ks)) + shift, values, color=colour(kind), marker=MARKERS[i % 5], label=kind)
    ax.set_xticks(range(len(ks)), [str(k) for k in ks])
    ax.set(
        xlim=(-0.4, len(ks) - 0.6),
        ylim=(-0.03, 1.03),
        xlabel=f"rotary pairs taken out, of {n_pairs}",
        ylabel=f"recall (n = {none['n']})",
    )
    figure.legend(loc="outside lower center", ncols=2)
    return figure
