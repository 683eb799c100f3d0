"""What every picture is made of: a panel as wide as a phone, rows with names, numbers with their intervals."""

import textwrap
from collections.abc import Mapping, Sequence

WIDTH = 3.6  # inches

# Of series without a colour of their own: Okabe-Ito, with grey in place of its yellow, too pale for a line, and of its
# black, which is for marks. Dashes and markers tell apart what shares a shade.
SHADES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^DvPX*"


def panel(title: str, height: float = 2.6, width: float = WIDTH):
    """(figure, axes) under a title; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)  # inches; a row's name may be a little wider than measured
    ax = figure.subplots()
    figure.suptitle(textwrap.fill(title, round(11 * width)), x=0.02, ha="left")
    return figure, ax


def colormap():
    """Perceptually uniform, and read alike with any colour vision."""
    import matplotlib

    return matplotlib.colormaps["cividis"]


def interval(ax, number: Mapping, at: float, shade: str, marker: str = "o", vertical: bool = False) -> None:
    """A number at a place of the other axis, with a whisker from low to high where it has one."""
    (point,) = ax.plot(*_xy([number["value"]], [at], vertical), marker, color=shade)
    point.set_zorder(3)
    if number["low"] is not None:
        ax.plot(*_xy([number["low"], number["high"]], [at, at], vertical), color=shade, linewidth=1.2)


def _xy(values, places, vertical: bool):
    return (places, values) if vertical else (values, places)


def note(ax, y: float, text: str) -> None:
    """A value in the right margin."""
    ax.annotate(
        text, (1, y), (4, 0), ax.get_yaxis_transform(), "offset points", va="center", fontsize=8, annotation_clip=False
    )


def rows(ax, labels: Sequence[str], xlabel: str) -> None:
    """Names of the rows, first on top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(xlabel)
