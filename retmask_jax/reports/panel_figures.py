"""Pictures of the findings of several studies: each function draws one panel and returns a Figure."""

from collections.abc import Mapping, Sequence

from retmask_jax.reports.findings import groups
from retmask_jax.reports.html import fixed, signed
from retmask_jax.reports.plotting import DASHES, MARKERS, SHADES, note, panel, rows


def by_model(title: str, found: Sequence[Mapping], xlabel: str, zero: bool = True):
    """A number per model with its interval; open where it does not hold. zero: a line at 0, and signs."""
    looks = _looks([row["model"] for row in found])
    figure, ax = panel(title, 1.1 + 0.24 * len(found))
    if zero:
        ax.axvline(0, color="black", linewidth=0.9, zorder=0)
    for y, row in enumerate(found):
        shade, marker, _ = looks[row["model"]]
        ax.plot([row["low"], row["high"]], [y, y], color=shade, linewidth=1.2)
        ax.plot(row["value"], y, marker, color=shade, markerfacecolor=shade if row["holds"] else "white", zorder=3)
        note(ax, y, signed(row["value"]) if zero else fixed(row["value"]))
    rows(
        ax,
        [row["model"] for row in found],
        f"difference (n = {_ns(found)} cases)\n{xlabel}"
        if zero
        else f"place in the spectrum (n = {_ns(found)} cases)\n{xlabel}",
    )
    return figure


def over_training(title: str, by_model_rows: Mapping[str, Sequence[Mapping]], key: str):
    """A number of `dynamics` at every checkpoint, a line per model."""
    looks = _looks(list(by_model_rows))
    figure, ax = panel(title, 2.5 + 0.2 * -(-len(by_model_rows) // 2))
    for name, checkpoints in by_model_rows.items():
        shade, marker, dash = looks[name]
        shown = [row for row in checkpoints if row[key] is not None]
        ax.plot(
            [row["step"] for row in shown], [row[key] for row in shown], marker, linestyle=dash, color=shade, label=name
        )
    ax.set(xlabel="training step", ylabel="score", ylim=(-0.03, 1.05))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Name -> (shade of its group, marker, dash)."""
    return {
        name: (SHADES[i % len(SHADES)], MARKERS[j % len(MARKERS)], DASHES[j % len(DASHES)])
        for i, members in enumerate(groups(names).values())
        for j, name in enumerate(members)
    }


def _ns(found: Sequence[Mapping]) -> str:
    ns = sorted({row["n"] for row in found})
    return str(ns[0]) if len(ns) == 1 else f"{ns[0]} to {ns[-1]}"
