"""What every picture is made of: style and colours, a panel as wide as a phone, rows, numbers with their intervals.

A function that draws a panel returns a Figure; `drawn` puts figures on a page. `numbers` are `Number`s; where low
and high are None no interval is drawn.
"""

import base64
import contextlib
import io
import re
import textwrap
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from retmask_jax.model.interventions import Head
from retmask_jax.reports import html
from retmask_jax.stages.arms import ARMS
from retmask_jax.utils.numbers import Number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

WIDTH = 3.6  # inches

# For series that have no colour in _COLOURS: Okabe-Ito, with grey in place of its yellow (too pale for a line) and without
# its black (which is for marks). Dashes and markers tell apart series that share a shade.
SHADES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^DvPX*"
LARGE = 60_000  # characters of SVG above which a PNG is tried

# Okabe-Ito: a kind of mask and the arm whose rejected answers come from it share a colour.
_COLOURS = {
    "none": "#666666",
    "start": "#666666",
    "retrieval": ARMS["retmask"].colour,
    "any layer": ARMS["any_layer"].colour,
    "layer matched": ARMS["layer_matched"].colour,
    "activity matched": ARMS["activity_matched"].colour,
    "lowest": "#E69F00",
    "highest": "#CC79A7",
    "random": "#56B4E9",
    "control heads, lowest": "#0072B2",
    "matched": "#009E73",
    "low utility": "#999999",
    "high utility": "#000000",
    "lowest scoring": "#CC79A7",
    "contrast decoding": "#661100",
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
    """The colour of a kind of mask or an arm, the same in every figure; the models of a user are coloured by their
    number `other`."""
    if name in ARMS:
        return ARMS[name].colour
    name = re.sub("[-_]", " ", name)
    unknown = "#000000" if other is None else SHADES[other % len(SHADES)]
    return _COLOURS.get(name) or _COLOURS.get(name.split(", ")[0], unknown)


@contextlib.contextmanager
def style() -> Generator[None]:
    """Fonts and line widths of the report, for the figures made and written inside."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def use_style() -> None:
    """Fonts and line widths of the report for all figures from here on, as in a notebook."""
    import matplotlib

    matplotlib.rcParams.update(_STYLE)


def inline(figure: "Figure", alt: str) -> Markup:
    """A figure as HTML without links: <svg>, or <img> with a PNG where an SVG would be both large and larger than that."""
    import matplotlib

    stream, png = io.StringIO(), io.BytesIO()
    # The salt keeps the ids of one figure apart from those of the others on a page.
    with matplotlib.rc_context({"svg.hashsalt": alt}):
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :], count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).removeprefix("<svg")
    drawing = Markup('<svg role="img" aria-label="{}"').format(alt) + Markup(svg)
    if len(drawing) < LARGE:
        return drawing
    figure.savefig(png, format="png", dpi=200)
    data = base64.b64encode(png.getvalue()).decode()
    width = round(96 * figure.get_figwidth())
    image = Markup('<img width="{}" alt="{}" src="data:image/png;base64,{}">').format(width, alt, data)
    return min(drawing, image, key=len)


class Tips(NamedTuple):
    """What the tooltips of a head map say: the number of each head, [L][H], in words. across: what the columns are."""

    texts: Sequence[Sequence[str]]
    across: str = "head"


def drawn(panels: Mapping[str, "Figure"], caption: str, tips: Mapping[str, Tips] | None = None) -> Markup:
    """Figures side by side over a caption; nothing where there are none.

    panels: figures by name; the name is read out to those who cannot see the figure. tips: of the head maps among them.
    """
    tips, drawings = tips or {}, []
    for name, figure in panels.items():
        drawing = inline(figure, name)
        if name in tips:
            cells = figure.axes[0].get_position()  # of the figure's width and height, from below
            sides = {"left": cells.x0, "top": 1 - cells.y1, "width": cells.width, "height": cells.height}
            place = ";".join(f"{side}:{100 * share:.2f}%" for side, share in sides.items())
            drawing = html.render("heads", drawing=drawing, label=name, place=place, **tips[name]._asdict())
        drawings.append(drawing)
    return html.figure(drawings, caption) if panels else Markup()


# --- parts of a panel ---


def panel(title: str, height: float = 2.6, width: float = WIDTH) -> "tuple[Figure, Axes]":
    """(figure, axes) under a title; sizes in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.08)  # inches; a row's name may be a little wider than measured
    figure = Figure((width, height), layout=engine)
    ax = figure.subplots()
    figure.suptitle(textwrap.fill(title, round(11 * width)), x=0.02, ha="left")
    return figure, ax


def colormap() -> "Colormap":
    """A perceptually uniform map that reads the same with any colour vision."""
    import matplotlib

    return matplotlib.colormaps["cividis"]


def interval(ax: "Axes", number: Number, at: float, shade: str, marker: str = "o", vertical: bool = False) -> None:
    """Mark a number at a place of the other axis, with a whisker from low to high where it has an interval."""
    (point,) = ax.plot(*_xy([number.value], [at], vertical), marker, color=shade)
    point.set_zorder(3)
    if number.low is not None:
        ax.plot(*_xy([number.low, number.high], [at, at], vertical), color=shade, linewidth=1.2)


def note(ax: "Axes", y: float, text: str) -> None:
    """Write a value in the right margin."""
    ax.annotate(
        text, (1, y), (4, 0), ax.get_yaxis_transform(), "offset points", va="center", fontsize=8, annotation_clip=False
    )


def rows(ax: "Axes", labels: Sequence[str], xlabel: str) -> None:
    """Write the names of the rows, the first on top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(xlabel)


def whole_numbers(axis: "Axis") -> None:
    """Mark an axis at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


# --- heads ---


def head_map(
    title: str,
    values_LH: ArrayLike,
    heads: Iterable[Head],
    label: str,
    log: bool = False,
    signed: bool = False,
    across: str = "head",
) -> "Figure":
    """Heat map of a number per head, layer by head, the chosen heads outlined.

    log: on a logarithmic scale. signed: with white at 0 and two colours. across: what the columns are.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    values_LH = np.asarray(values_LH, float)
    n_layers, n_heads = values_LH.shape
    cell = min(0.3, 2.6 / n_heads)
    figure, ax = panel(title, float(np.clip(cell * n_layers, 1.0, 4.2)) + 0.9)
    top = (np.nanmax(np.abs(values_LH)) or 1.0) if signed else values_LH.max()
    norm = LogNorm(max(values_LH[values_LH > 0].min(), 1e-4 * top), top) if log and top > 0 else None
    colours = matplotlib.colormaps["PRGn"] if signed else colormap()
    low, high = (-top, top) if signed else (None if norm else 0, None)
    colours = colours.with_extremes(bad=colours(0.5 if signed else 0.0))
    image = ax.imshow(values_LH, cmap=colours, norm=norm, vmin=low, vmax=high, aspect="auto", interpolation="none")
    for layer, head in heads:
        ax.add_patch(
            Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=colour("retrieval"), linewidth=1.3)
        )
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
    ax.set(xlabel=across, ylabel="layer")
    bar = figure.colorbar(image, ax=ax, label=label, pad=0.02, fraction=0.06)
    if norm:
        bar.set_ticks(LogLocator(subs=(1, 2, 5)), minor=False)
        bar.formatter = StrMethodFormatter("{x:g}")
        bar.minorticks_off()
    return figure


def _xy(values, places, vertical: bool):
    return (places, values) if vertical else (values, places)
