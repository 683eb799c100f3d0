"""What `retmask diff` finds, as sentences, tables and a page: changes of weights and scores, and what carries the gain."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from retmask_jax.heads.gain.difference import Difference
from retmask_jax.heads.gain.shares import PartShares
from retmask_jax.heads.gain.weights import WeightChanges
from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, fixed, interval, section, table
from retmask_jax.reports.plotting import Tips, drawn, head_map
from retmask_jax.utils.files import write_atomically
from retmask_jax.utils.numbers import Number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEST = 10
_HEADER = ["put into the start model", "taken out of the trained one", "interaction", "of recall, put in", "taken out"]
_WAYS = (  # attribute, name, colour, marker, how far above the middle of its row
    ("put_in", "put into the start model", plotting.SHADES[1], "o", 0.15),
    ("taken_out", "taken out of the trained one", plotting.SHADES[0], "s", -0.15),
)
_MEASURES = {"logprob": "log-probability of the right answer (nats)", "recall": "share of right answers"}
_NOTE = (
    "Share of the gain in log-probability that the start model has with this part of the trained one, and that the trained "
    "model loses with this part of the start model. Interaction: the first less the second, which is the share of the part "
    "plus that of all others together less 1; below 0 the part needs others, above 0 others can do without it. Draws: "
    "as many other heads as there are retrieval heads. 95% bootstrap intervals over cases."
)

_CARRIED = (
    "In brackets: how many heads a group has. Dotted: nothing, and the whole gain. Shares of groups need not add up to 1, "
    "since parts can do each other's work. 95% bootstrap intervals over cases."
)


def sentences(found: Difference) -> list[str]:
    """The gain in both measures, whether shares of it mean anything, and how many heads are retrieval heads."""
    lines = [
        f"{_MEASURES[name]}: {fixed(gain.start.value)} before, {fixed(gain.trained.value)} after, "
        f"{change(gain.gain)}, of {count(gain.gain.n, 'case')}"
        for name, gain in found.gains.items()
    ]
    if found.settings.needles:
        lines.append(f"The questions are those of {found.settings.needles}.")
    if _holds_zero(found.gains["logprob"].gain):
        lines.append("The interval of the gain holds 0: what shares of it are carried where is not known.")
    if found.copy_scores or found.settings.scores:
        lines.append(f"{count(len(found.retrieval), 'head')} score at least {found.settings.threshold:g}.")
    lines.append(f"{found.singly} of {found.heads} heads were measured one by one.")
    return lines


def groups(found: Difference) -> tuple[list[str], list[list[str]]]:
    """(header, a row per group of parts)."""
    rows = [[_name(part), *_cells(part)] for part in found.parts if part.kind == "group"]
    return ["part", *_HEADER], rows


def best_heads(found: Difference, n: int = _BEST) -> tuple[list[str], list[list[str]]]:
    """(header, a row per head) of the heads that carry most of the gain in log-probability, put in."""
    heads = _ranked(part for part in found.parts if part.kind == "head")[:n]
    retrieval = set(found.retrieval)
    rows = [
        [part.name + (", retrieval" if (part.layer, part.head) in retrieval else ""), *_cells(part)] for part in heads
    ]
    return [f"best {len(heads)} heads", *_HEADER], rows


def groups_figure(found: Difference, title: str, measure: str) -> "Figure":
    """What each group of parts carries of a gain, put in and taken out. measure: "logprob" or "recall"."""
    parts = [part for part in found.parts if part.kind == "group"]
    figure, ax = plotting.panel(title, 1.0 + 0.3 * len(parts))
    for share in (0, 1):
        ax.axvline(share, color="black", linewidth=0.7, linestyle=":")
    for way, label, shade, marker, above in _WAYS:
        for y, part in enumerate(parts):
            number = getattr(getattr(part, measure), way)
            if number.value is not None:
                plotting.interval(ax, number, y - above, shade, marker)
        ax.plot([], [], marker, color=shade, label=label)
    plotting.rows(ax, [_name(part) for part in parts], f"share of the gain (n = {found.gains[measure].gain.n})")
    figure.legend(loc="outside lower center")
    return figure


def write_difference(path: Path, found: Difference) -> None:
    """Write the page."""
    with plotting.style():
        sections = [_gain(found), _carried(found), _weights(found), _scores(found)]
    write_atomically(path, html.document(f"What changed from {found.start} to {found.trained}", sections))


def _gain(found: Difference) -> Markup:
    rows = [
        [_MEASURES[name], interval(gain.start), interval(gain.trained), change(gain.gain), gain.gain.n]
        for name, gain in found.gains.items()
    ]
    note = "An answer is right where each of its tokens is the most likely one. Gain: paired by case."
    titles = {"What carries the gain in log-probability": "logprob", "What carries the gain in recall": "recall"}
    return section(
        "The gain",
        sentences(found)[len(rows) :],
        table(["measure", "start", "trained", "gain", "n"], rows, note),
        drawn({title: groups_figure(found, title, name) for title, name in titles.items()}, _CARRIED),
        table(*groups(found), note=_NOTE),
    )


def _carried(found: Difference) -> Markup:
    panels, tips = {}, {}
    for measure_name, measure in (("log-probability", "logprob"), ("recall", "recall")):
        for way, title in (("put_in", "put into the start model"), ("taken_out", "taken out of the trained one")):
            numbers = {(p.layer, p.head): getattr(getattr(p, measure), way) for p in found.parts if p.kind == "head"}
            values_LH = _by_head(found, {head: number.estimate for head, number in numbers.items()}, np.nan)
            if np.isfinite(values_LH).any():
                name = f"Gain in {measure_name}, head {title}"
                panels[name] = head_map(name, values_LH, found.retrieval, "share", signed=True)
                shares = {head: f"share {change(number)}" for head, number in numbers.items()}
                tips[name] = Tips(_by_head(found, shares, "not measured").tolist())
    each = [part for part in found.parts if part.kind != "group"]
    every = table(["part", *_HEADER], [[part.name, *_cells(part)] for part in each])
    return section(
        "Which heads carry it",
        [],
        drawn(panels, f"Share of the gain that a head alone carries.{_unmeasured(found)}{_outlined(found)}", tips),
        table(*best_heads(found), note=_NOTE) if found.singly else Markup(),
        html.folded("Every head that was measured, and every MLP", every),
    )


def _weights(found: Difference) -> Markup:
    changes = found.changes
    panels = {f"Change of {name}": _change_map(name, changes, found) for name in ("q", "k", "v", "o")}
    tips = {
        f"Change of {name}": Tips(
            [[f"relative change {_small(value)}" for value in row] for row in _array(getattr(changes, name))],
            _across(name, found),
        )
        for name in ("q", "k", "v", "o")
    }
    layers = zip(_means(changes), changes.mlps, changes.norms, strict=True)
    rows = [[layer, *map(_small, [*means, mlp, norms])] for layer, (means, mlp, norms) in enumerate(layers)]
    return section(
        "Which weights changed",
        [
            "The size of a change is the Frobenius norm of the difference over that of the start model's weights.",
            f"{', '.join(f'{name}: {_small(value)}' for name, value in changes.ends.items())}.",
        ],
        drawn(panels, f"Relative change of each head's weights, biases included.{_outlined(found)}", tips),
        html.folded("Every layer", table(["layer", "q", "k", "v", "o", "MLP", "norms"], rows, "Heads: mean.")),
    )


def _scores(found: Difference) -> Markup:
    scores = found.copy_scores
    if scores is None:
        return Markup()
    moved_LH = np.subtract(scores.trained, scores.start)
    panels = {
        "Copy score before": head_map("Copy score before", scores.start, found.retrieval, "score"),
        "Copy score after": head_map("Copy score after", scores.trained, found.retrieval, "score"),
        "Change of the copy score": head_map("Change of the copy score", moved_LH, found.retrieval, "", signed=True),
    }
    texts = [
        [f"copy score {fixed(a)} before, {fixed(b)} after" for a, b in zip(before, after, strict=True)]
        for before, after in zip(scores.start, scores.trained, strict=True)
    ]
    counted = " and ".join(map(str, scores.counted))
    return section(
        "Copy scores",
        [f"{counted} of {found.settings.n} cases count."],
        drawn(panels, _outlined(found), dict.fromkeys(panels, Tips(texts))),
    )


def _change_map(name: str, changes: WeightChanges, found: Difference) -> "Figure":
    across = _across(name, found)
    heads: Sequence = found.retrieval if across == "head" else []
    return head_map(f"Change of {name}", _array(getattr(changes, name)), heads, "relative change", across=across)


def _across(name: str, found: Difference) -> str:
    """What the columns of a map of q, k, v or o are."""
    return "head" if len(getattr(found.changes, name)[0]) == len(found.changes.q[0]) else "KV head"


def _unmeasured(found: Difference) -> str:
    return " White: also heads that were not measured." if found.singly < found.heads else ""


def _outlined(found: Difference) -> str:
    return " Retrieval heads are outlined." if found.retrieval else ""


def _by_head(found: Difference, values: Mapping[Any, Any], otherwise: Any) -> np.ndarray:
    """[L,H] of values by (layer, head)."""
    shape = len(found.changes.q), len(found.changes.q[0])
    return np.array([[values.get((i, j), otherwise) for j in range(shape[1])] for i in range(shape[0])])


def _means(changes: WeightChanges) -> np.ndarray:
    """[L, 4]: the mean change of q, k, v and o over the heads of a layer."""
    return np.stack([_array(heads).mean(axis=1) for heads in (changes.q, changes.k, changes.v, changes.o)], axis=1)


def _array(changes: Any) -> np.ndarray:
    """With nan where a change is undefined."""
    return np.asarray(changes, float)


def _ranked(parts: Iterable[PartShares]) -> list[PartShares]:
    """The parts that carry most first; those whose share is undefined last."""
    return sorted(parts, key=lambda part: -np.nan_to_num(part.logprob.put_in.estimate, nan=-np.inf))


def _name(part: PartShares) -> str:
    return f"{part.name} ({part.heads})" if part.heads else part.name


def _cells(part: PartShares) -> list[str]:
    carried = part.logprob.put_in, part.logprob.taken_out, part.logprob.interaction
    return [change(number) for number in (*carried, part.recall.put_in, part.recall.taken_out)]


def _small(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.2g}"


def _holds_zero(number: Number) -> bool:
    return number.low is None or number.high is None or number.low <= 0 <= number.high
