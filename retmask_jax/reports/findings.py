"""What several models have in common: the findings of finished studies side by side, each with its interval and p-value."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from retmask_jax.utils import stats

# a finding holds for a model if its interval lies on the expected side of 0 and its adjusted p is below this
ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Member:
    """A finished study: its name, and stage -> result."""

    name: str
    results: Mapping[str, Mapping]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim about every model: what is measured, and on which side of 0 it should lie ("above", "below" or "on", where
    the interval should contain 0)."""

    name: str
    measure: Callable[[Member], Mapping | None]
    expected: str = "above"


def panel(members: Sequence[Member], task: str, closed_book: str | None) -> dict[str, Any]:
    """{"models": a row each, "findings": of `findings`, "agreement": of the detectors, "centres": of the spectrum}.

    task: a recall task of all knock-out and rope stages; closed_book: a knock-out task without context, or None. Raises
    ValueError for a study that lacks a task or a stage.
    """
    for member in members:
        _check(member, task, closed_book)
    return {
        "task": task,
        "closed_book": closed_book,
        "models": [_row(member, task) for member in members],
        "findings": [evaluate(finding, members) for finding in findings(members, task, closed_book)],
        "agreement": agreement(members),
        "centres": _centres(members, task),
    }


def findings(members: Sequence[Member], task: str, closed_book: str | None) -> list[Finding]:
    """The claims of arXiv 2606.21249 and the controls it lacks, as far as the studies have measured them."""
    found = [Finding("masking the retrieval heads lowers recall", lambda m: _masked(m, task, -1))]
    for kind in ("any layer", "layer-matched", "activity-matched", "lowest-scoring"):
        found.append(Finding(f"more than masking others, {kind}", lambda m, kind=kind: _control(m, task, kind)))
    if closed_book:
        found.append(Finding("closed-book recall stays", lambda m: _masked(m, closed_book, 1), "on"))
    found.append(
        Finding("a quarter of the pairs: highest leave more recall than lowest", lambda m: _pairs(m, task, "highest"))
    )
    found.append(Finding("and random more than lowest", lambda m: _pairs(m, task, "random")))
    return [finding for finding in found if any(finding.measure(member) for member in members)]


def evaluate(finding: Finding, members: Sequence[Member]) -> dict[str, Any]:
    """{"name", "expected", "rows": per model {"model", "value", "low", "high", "n", "p", "q", "holds"}, "holds": how many,
    "of"}. q: adjusted for the false discovery rate over the models (Benjamini-Hochberg)."""
    measured = [(member.name, found) for member in members if (found := finding.measure(member))]
    adjusted = stats.benjamini_hochberg([found["p_value"] for _, found in measured]).tolist()
    rows = [
        {
            "model": name,
            **found["change"],
            "p": found["p_value"],
            "q": q,
            "holds": _holds(finding.expected, found["change"], q),
        }
        for (name, found), q in zip(measured, adjusted, strict=True)
    ]
    return {
        "name": finding.name,
        "expected": finding.expected,
        "rows": rows,
        "holds": sum(row["holds"] for row in rows),
        "of": len(rows),
    }


def agreement(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Mean, lowest and highest Jaccard and Spearman of each two detectors over the models that have both."""
    by_pair: dict[tuple[str, str], list[Mapping]] = {}
    for member in members:
        for row in member.results["detectors"]["agreement"]:
            by_pair.setdefault((row["a"], row["b"]), []).append(row)
    return [
        {"a": a, "b": b, "n_models": len(rows), **{name: _spread(rows, name) for name in ("jaccard", "spearman")}}
        for (a, b), rows in by_pair.items()
    ]


def groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Models by what their names have before a last "-number": llama-0 and llama-1 are two seeds of llama."""

    def stem(name: str) -> str:
        head, dash, tail = name.rpartition("-")
        return head if dash and tail.isdigit() else name

    return {key: list(some) for key, some in itertools.groupby(sorted(names, key=stem), key=stem)}


def _row(member: Member, task: str) -> dict[str, Any]:
    detect, numbers = member.results["detect"], member.results["knockout"]["numbers"]
    return {
        "model": member.name,
        "theta": member.results.get("theta", {}).get("theta"),
        "heads": len(detect["heads"]),
        "of": int(np.size(detect["mean"])),
        "top_score": max(detect["scores"]),
        "gini": detect["numbers"]["detect/gini"]["value"],
        "cases_counted": detect["numbers"].get("detect/cases counted"),
        "recall": numbers[f"knockout/{task}/none"],
        "masked": numbers[f"knockout/{task}/retrieval"],
    }


def _masked(member: Member, task: str, sign: int) -> dict[str, Any] | None:
    """The change of a task with the retrieval heads masked, times sign."""
    rows = [
        row
        for row in member.results["knockout"]["rows"]
        if (row["task"], row["kind"], row["experiment"]) == (task, "retrieval", "zero")
    ]
    return {"change": _times(rows[0]["change"], sign), "p_value": rows[0]["mcnemar"]["p_value"]} if rows else None


def _control(member: Member, task: str, kind: str) -> Mapping | None:
    """What masking others leaves more."""
    return next(
        (
            row
            for row in member.results["knockout"]["contrasts"]
            if (row["task"], row["kind"], row["experiment"]) == (task, kind, "zero")
        ),
        None,
    )


def _pairs(member: Member, task: str, kind: str) -> Mapping | None:
    """What taking a quarter of the pairs out, of a kind, leaves more than taking the lowest out."""
    result = member.results["rope"]
    wanted = task, "rotary", result["n_pairs"] // 4, kind
    return next(
        (row for row in result["contrasts"] if (row["task"], row["site"], row["k"], row["kind"]) == wanted), None
    )


def _centres(members: Sequence[Member], task: str) -> dict[str, Mapping]:
    name = f"rope/{task}/centre of mass of the windows"
    return {m.name: m.results["rope"]["numbers"][name] for m in members if name in m.results["rope"]["numbers"]}


def _holds(expected: str, change: Mapping, q: float) -> bool:
    match expected:
        case "above":
            return change["low"] > 0 and q < ALPHA
        case "below":
            return change["high"] < 0 and q < ALPHA
    return change["low"] <= 0 <= change["high"]


def _spread(rows: Sequence[Mapping], name: str) -> dict[str, float] | None:
    values = [row[name] for row in rows if row[name] is not None]
    return {"mean": math.fsum(values) / len(values), "low": min(values), "high": max(values)} if values else None


def _times(change: Mapping, sign: int) -> dict[str, Any]:
    ends = sorted(sign * change[name] for name in ("low", "high"))
    return {"value": sign * change["value"], "low": ends[0], "high": ends[1], "n": change["n"]}


def _check(member: Member, task: str, closed_book: str | None) -> None:
    for stage in ("detect", "detectors", "knockout", "rope"):
        if stage not in member.results:
            raise ValueError(f"{member.name} has no result of {stage}: run `retmask study` there first")
    for stage, wanted in (("knockout", task), ("rope", task), ("knockout", closed_book)):
        if wanted and f"{stage}/{wanted}/none" not in member.results[stage]["numbers"]:
            known = dict.fromkeys(row["task"] for row in member.results[stage]["rows"])
            raise ValueError(f"{member.name}: {stage} has no task {wanted!r}; it has {', '.join(known)}")
