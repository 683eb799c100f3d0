"""The findings of several studies as a table, as a sentence each, and as one self-contained HTML page."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from retmask_jax.heads.detectors import Agreement
from retmask_jax.heads.profile import ProfileRow, Scored
from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import change, count, fixed, interval, p_value, section, signed, table
from retmask_jax.reports.panel.findings import ALPHA, Panel, Spread, Verdict, groups
from retmask_jax.reports.panel.gains import Gains, sparsity
from retmask_jax.reports.panel.profiles import profiles
from retmask_jax.reports.panel.records import Record
from retmask_jax.reports.plotting import DASHES, MARKERS, SHADES, drawn
from retmask_jax.reports.study.detectors import agreement_matrix
from retmask_jax.utils.files import write_atomically
from retmask_jax.utils.numbers import Number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LIMITS = {"above": "should lie above 0", "below": "should lie below 0", "on": "should contain 0"}


def summary(found: Panel) -> tuple[list[str], list[list[str]]]:
    """(header, a row per model) of what the models are."""
    header = ["model", "RoPE base", "heads", "best score", "Gini", "recall", "recall, retrieval heads masked", "n"]
    rows = [
        [
            row.model,
            "–" if row.theta is None else f"{row.theta:,.0f}",
            f"{row.heads} of {row.of}",
            fixed(row.top_score),
            fixed(row.gini),
            "–" if row.recall is None else interval(row.recall),
            "–" if row.masked is None else interval(row.masked),
            "–" if row.recall is None else str(row.recall.n),
        ]
        for row in found.models
    ]
    return header, rows


def sentence(finding: Verdict) -> str:
    """A finding in a sentence: in how many models it holds, and in which it does not."""
    exceptions = [f"{row.model} ({change(row)}, q {p_value(row.q)})" for row in finding.rows if not row.holds]
    text = f"{finding.name[0].upper()}{finding.name[1:]}: in {finding.holds} of {count(finding.of, 'model')}"
    return f"{text}; not in {', '.join(exceptions)}." if exceptions else f"{text}."


def left_out(found: Panel) -> list[str]:
    """A sentence on each thing that some models lack."""
    return [f"Without {', '.join(models)}: {what}." for what, models in found.lacking.items()]


def write_panel(
    path: Path,
    found: Panel,
    records: Sequence[Record],
    scored: Sequence[Scored],
    rows: Sequence[ProfileRow],
    gain: str | None,
    gains: Gains | None,
) -> None:
    """Write the page.

    Args:
        path: Of the page.
        found: What the studies have in common.
        records: Of the studies.
        scored: Head scores of those models that have them: a record has none.
        rows: Profiles of these.
        gain: The name of the number in `gains`.
        gains: What training gained; None for none.
    """
    with plotting.style():
        sections = [
            _models(found, scored, rows),
            _findings(found),
            _spectrum(found),
            _agreement(found),
            _emergence(records),
            _sparsity(gain, gains),
        ]
    write_atomically(path, html.document("Retrieval heads over several models", sections))


def _models(found: Panel, scored: Sequence[Scored], rows: Sequence[ProfileRow]) -> Markup:
    kinds = groups([row.model for row in found.models])
    unscored = [row.model for row in found.models if row.model not in {model.name for model in scored}]
    lacking = left_out(found) + ([f"Without {', '.join(unscored)}: scores of all heads."] if unscored else [])
    return section(
        "Models",
        [
            f"{count(len(found.models), 'model')}, in {count(len(kinds), 'group')} by name "
            f"({', '.join(f'{key}: {len(some)}' for key, some in kinds.items())}); recall is measured on {found.task}.",
            *(
                [f"Not shown, because it was not measured or is not in a record: {' '.join(lacking)}"]
                if lacking
                else []
            ),
        ],
        table(*summary(found), note="95% interval: Wilson, over cases; n: cases."),
        drawn({"Head scores of every model": profiles(scored, rows)} if scored else {}, ""),
    )


def _findings(found: Panel) -> Markup:
    panels = {row.name: _effects(row) for row in found.findings}
    cells = [
        [finding.name, row.model, change(row), row.n, p_value(row.p), p_value(row.q), "yes" if row.holds else "no"]
        for finding in found.findings
        for row in finding.rows
    ]
    return section(
        "Findings",
        [sentence(row) for row in found.findings],
        drawn(
            panels,
            "Differences of recall, paired by case, with 95% bootstrap intervals over cases; random masks are "
            "averaged over draws, which are held fixed. Filled: the finding holds in that model.",
        ),
        table(
            ["finding", "model", "difference", "n", "p", "q", "holds"],
            cells,
            note="p: McNemar's exact test, median over draws; q: adjusted over models (Benjamini and Hochberg). Holds: "
            f"interval above 0 and q < {ALPHA:g}, or, where nothing should change, interval contains 0. An interval that "
            "contains 0 does not prove that nothing changes. Seeds of one architecture are not independent architectures.",
        ),
    )


def _spectrum(found: Panel) -> Markup:
    if not found.centres:
        return Markup()
    caption = (
        "Centre of mass of the drop of recall over windows of rotary pairs; 95% bootstrap interval over cases. Models "
        "whose recall no window lowers are left out."
    )
    return section("Spectrum", [], drawn({"Centre of mass": _centres(found.centres)}, caption))


def _agreement(found: Panel) -> Markup:
    if not found.agreement:
        return Markup()
    rows = [[row.a, row.b, row.n_models, _range(row.jaccard), _range(row.spearman)] for row in found.agreement]
    names = list(dict.fromkeys(name for row in found.agreement for name in (row.a, row.b)))
    means = [
        Agreement(row.a, row.b, row.jaccard.mean, None if row.spearman is None else row.spearman.mean)
        for row in found.agreement
        if row.jaccard is not None
    ]
    matrix = agreement_matrix("Agreement of detectors, mean over models", names, means)
    header = ["detector", "and", "models", "Jaccard: mean [lowest, highest]", "Spearman: mean [lowest, highest]"]
    caption = "Jaccard of as many best heads as the stage detect found; Spearman's rank correlation over all heads."
    return section(
        "Detectors",
        [],
        drawn({"Agreement of detectors": matrix}, caption),
        html.folded("Every two detectors", table(header, rows)),
    )


def _emergence(records: Sequence[Record]) -> Markup:
    lines = {
        "best head's score": {record.model: _by_step(record, "top score") for record in records},
        "mean score of the final heads": {
            record.model: _by_step(record, "mean score of the final heads") for record in records
        },
    }
    shown = {title: {name: points for name, points in runs.items() if points} for title, runs in lines.items()}
    panels = {f"Training dynamics: {title}": _over_training(title, runs) for title, runs in shown.items() if runs}
    if not panels:
        return Markup()
    return section(
        "Training dynamics", [], drawn(panels, "The same detection at every checkpoint, with a line for each model.")
    )


def _by_step(record: Record, measure: str) -> list[tuple[int, float | None]]:
    """(step, value) of a number of the stage dynamics, in the order of training."""
    found = {
        int(match[1]): number.value
        for name, number in record.numbers.items()
        if (match := re.fullmatch(rf"dynamics/step (\d+)/{measure}", name))
    }
    return sorted(found.items())


def _sparsity(gain: str | None, gains: Gains | None) -> Markup:
    if gain is None or gains is None:
        return Markup()
    picture = drawn({"Gain against sparsity": sparsity(gains, gain)}, "")
    return section("Gain against sparsity", [gains.finding], picture)


def _range(found: Spread | None) -> str:
    return "–" if found is None else f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


# --- figures ---


def _effects(finding: Verdict) -> "Figure":
    """The effect in each model with its interval; open where the finding does not hold."""
    figure, ax = plotting.panel(finding.name, 1.1 + 0.24 * len(finding.rows))
    ax.axvline(0, color="black", linewidth=0.9, zorder=0)
    _by_model(ax, {row.model: row for row in finding.rows}, {row.model for row in finding.rows if row.holds})
    for y, row in enumerate(finding.rows):
        plotting.note(ax, y, signed(row.estimate))
    ax.set_xlabel(f"difference (n = {_ns(finding.rows)} cases)\n{_LIMITS[finding.expected]}")
    return figure


def _centres(centres: Mapping[str, Number]) -> "Figure":
    """Where in the spectrum the harm lies in each model, with its interval."""
    figure, ax = plotting.panel("Where the harm lies in the spectrum", 1.1 + 0.24 * len(centres))
    _by_model(ax, centres, set(centres))
    for y, number in enumerate(centres.values()):
        plotting.note(ax, y, fixed(number.value))
    ns = _ns(list(centres.values()))
    ax.set_xlabel(f"place in the spectrum (n = {ns} cases)\n0: lowest frequencies, 1: highest")
    return figure


def _by_model(ax: "Axes", numbers: Mapping[str, Number], filled: set[str]) -> None:
    """Draw a row for each model: a number with its interval."""
    looks = _looks(list(numbers))
    for y, (model, number) in enumerate(numbers.items()):
        shade, marker, _ = looks[model]
        plotting.interval(ax, number, y, shade, marker)
        if model not in filled:
            ax.plot(number.estimate, y, marker, color=shade, markerfacecolor="white", zorder=3)
    plotting.rows(ax, list(numbers), "")


def _over_training(title: str, by_model: Mapping[str, Sequence[tuple[int, float | None]]]) -> "Figure":
    """A number at every checkpoint, a line per model."""
    looks = _looks(list(by_model))
    figure, ax = plotting.panel(title, 2.5 + 0.2 * -(-len(by_model) // 2))
    for name, points in by_model.items():
        shade, marker, dash = looks[name]
        shown = [(step, value) for step, value in points if value is not None]
        steps, values = [step for step, _ in shown], [value for _, value in shown]
        ax.plot(steps, values, marker, linestyle=dash, color=shade, label=name)
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


def _ns(found: Sequence[Number]) -> str:
    ns = sorted({number.n for number in found})
    return str(ns[0]) if len(ns) == 1 else f"{ns[0]} to {ns[-1]}"
