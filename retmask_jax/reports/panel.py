"""The findings of several studies -> a table, a sentence each, and one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.reports import figures, html, model_figures, panel_figures, study_figures
from retmask_jax.reports.figures import drawn
from retmask_jax.reports.findings import ALPHA, Member, groups
from retmask_jax.reports.html import change, count, fixed, interval, p_value, section, table
from retmask_jax.utils.files import write_atomically

_SIDES = {
    "above": "interval above 0 and q < {alpha:g}",
    "below": "interval below 0 and q < {alpha:g}",
    "on": "interval contains 0",
}


def summary(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, a row per model) of what the models are."""
    header = ["model", "RoPE base", "heads", "best score", "Gini", "recall", "recall, retrieval heads masked", "n"]
    rows = [
        [
            row["model"],
            "–" if row["theta"] is None else f"{row['theta']:,.0f}",
            f"{row['heads']} of {row['of']}",
            fixed(row["top_score"]),
            fixed(row["gini"]),
            interval(row["recall"]),
            interval(row["masked"]),
            str(row["recall"]["n"]),
        ]
        for row in found["models"]
    ]
    return header, rows


def verdict(finding: Mapping[str, Any]) -> str:
    """A finding in a sentence: in how many models it holds, in which it does not."""
    exceptions = [
        f"{row['model']} ({change(row)}, q {p_value(row['q'])})" for row in finding["rows"] if not row["holds"]
    ]
    text = (
        f"{finding['name'][0].upper()}{finding['name'][1:]}: in {finding['holds']} of {count(finding['of'], 'model')}"
    )
    return f"{text}; not in {', '.join(exceptions)}." if exceptions else f"{text}."


def write_panel(
    path: Path,
    found: Mapping[str, Any],
    members: Sequence[Member],
    scored,
    profiles,
    gain: str | None,
    gains: Mapping[str, Any] | None,
) -> None:
    """Write the page.

    found: of `findings.panel`; scored, profiles: of `heads.profile`; gain, gains: of a gain against sparsity.
    """
    with figures.style():
        sections = [
            _models(found, scored, profiles),
            _findings(found),
            _spectrum(found),
            _agreement(found),
            _emergence(members),
            _sparsity(gain, gains),
        ]
    write_atomically(path, html.document("Retrieval heads over several models", sections))


def _models(found, scored, profiles) -> str:
    kinds = groups([row["model"] for row in found["models"]])
    return section(
        "Models",
        [
            f"{count(len(found['models']), 'model')}, in {count(len(kinds), 'group')} by name "
            f"({', '.join(f'{key}: {len(some)}' for key, some in kinds.items())}); recall is that of {found['task']}."
        ],
        table(*summary(found), note="95% interval: Wilson, over cases; n: cases."),
        drawn({"Head scores of every model": model_figures.profiles(scored, profiles)}, ""),
    )


def _findings(found) -> str:
    limits = {"above": "should lie above 0", "below": "should lie below 0", "on": "should contain 0"}
    panels = {
        row["name"]: panel_figures.by_model(row["name"], row["rows"], limits[row["expected"]])
        for row in found["findings"]
    }
    cells = [
        [
            row["name"],
            one["model"],
            change(one),
            one["n"],
            p_value(one["p"]),
            p_value(one["q"]),
            "yes" if one["holds"] else "no",
        ]
        for row in found["findings"]
        for one in row["rows"]
    ]
    sides = ", or, where nothing should change, ".join(_SIDES[side].format(alpha=ALPHA) for side in ("above", "on"))
    return section(
        "Findings",
        [verdict(row) for row in found["findings"]],
        drawn(
            panels,
            "Differences of recall, paired by case, with 95% bootstrap intervals over cases; random masks are "
            "averaged over draws, which are held fixed. Filled: the finding holds in that model.",
        ),
        table(
            ["finding", "model", "difference", "n", "p", "q", "holds"],
            cells,
            note="p: McNemar's exact test, median over draws; q: adjusted over models (Benjamini and Hochberg). Holds: "
            f"{sides}. An interval that contains 0 is no proof that nothing changes. Seeds of one architecture are no "
            "independent architectures.",
        ),
    )


def _spectrum(found) -> str:
    if not found["centres"]:
        return ""
    rows = [{"model": name, "holds": True, **number} for name, number in found["centres"].items()]
    place = panel_figures.by_model(
        "Where the harm lies in the spectrum", rows, "0: lowest frequencies, 1: highest", zero=False
    )
    caption = (
        "Centre of mass of the drop of recall over windows of rotary pairs; 95% bootstrap interval over cases. Models of "
        "which no window lowers recall are left out."
    )
    return section("Spectrum", [], drawn({"Centre of mass": place}, caption))


def _agreement(found) -> str:
    rows = [
        [row["a"], row["b"], row["n_models"], *(_spread(row[name]) for name in ("jaccard", "spearman"))]
        for row in found["agreement"]
    ]
    names = list(dict.fromkeys(name for row in found["agreement"] for name in (row["a"], row["b"])))
    means = [
        {"a": row["a"], "b": row["b"], **{name: row[name] and row[name]["mean"] for name in ("jaccard", "spearman")}}
        for row in found["agreement"]
    ]
    matrix = study_figures.agreement_matrix("Agreement of detectors, mean over models", names, means)
    header = ["detector", "and", "models", "Jaccard: mean [lowest, highest]", "Spearman: mean [lowest, highest]"]
    caption = "Jaccard of as many best heads as the stage detect found; Spearman's rank correlation over all heads."
    return section(
        "Detectors",
        [],
        drawn({"Agreement of detectors": matrix}, caption),
        html.folded("Every two detectors", table(header, rows)),
    )


def _emergence(members: Sequence[Member]) -> str:
    told = {m.name: m.results["dynamics"]["rows"] for m in members if m.results.get("dynamics", {}).get("rows")}
    if not told:
        return ""
    panels = {
        f"Training dynamics: {title}": panel_figures.over_training(title, told, key)
        for key, title in (("top", "best head's score"), ("emergence", "mean score of the final heads"))
    }
    return section("Training dynamics", [], drawn(panels, "The same detection at every checkpoint; a line a model."))


def _sparsity(gain: str | None, gains: Mapping | None) -> str:
    if gains is None:
        return ""
    picture = model_figures.sparsity(gains, gain)
    return section("Gain against sparsity", [gains["finding"]], drawn({"Gain against sparsity": picture}, ""))


def _spread(found: Mapping | None) -> str:
    return "–" if found is None else f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
