"""What several models have in common: the findings of finished studies side by side, each with its interval and p-value."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from retmask_jax.heads.conditions import Contrast
from retmask_jax.heads.detectors import Agreement
from retmask_jax.reports.panel.records import Record
from retmask_jax.reports.wording import direction
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import Number

# a finding holds for a model if its interval lies on the expected side of 0 and its adjusted p is below this
ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim about every model.

    Attributes:
        measure: The effect in a model; None where its record does not have it.
        expected: On which side of 0 it should lie: "above", "below", or "on", where the interval should contain 0.
    """

    name: str
    measure: Callable[[Record], Contrast | None]
    expected: str = "above"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FindingRow(Number):
    """An effect in one model. q: p adjusted for the false discovery rate over the models (Benjamini-Hochberg)."""

    model: str
    p: float
    q: float
    holds: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A finding in all models that measured it: it `holds` in so many `of` them."""

    name: str
    expected: str
    rows: list[FindingRow]
    holds: int
    of: int


@dataclasses.dataclass(frozen=True)
class Spread:
    """A number over models: its mean, lowest and highest value."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class MeanAgreement:
    """How far detectors a and b agree over the n models that have both; None where it is undefined in all of them."""

    a: str
    b: str
    n_models: int
    jaccard: Spread | None
    spearman: Spread | None


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """What a model is.

    Attributes:
        theta: RoPE base; None where it is not known.
        heads: Number of retrieval heads, of so many in all.
        cases_counted: Share of the detection cases; None where scores were given.
        recall: Of the untouched model, None where it was not measured; masked: with the retrieval heads masked.
    """

    model: str
    theta: float | None
    heads: int
    of: int
    top_score: float | None
    gini: float | None
    cases_counted: Number | None
    recall: Number | None
    masked: Number | None


@dataclasses.dataclass(frozen=True)
class Panel:
    """Several models side by side.

    Attributes:
        task: On which recall was measured; closed_book: without context, None where no such task is named.
        centres: By model, the centre of the harm in the rotary spectrum; without models that no window harms.
        lacking: What is not shown of some models because it was not measured or is not in their records, with their names.
    """

    task: str
    closed_book: str | None
    models: list[ModelRow]
    findings: list[Verdict]
    agreement: list[MeanAgreement]
    centres: dict[str, Number]
    lacking: dict[str, list[str]]


def panel(records: Sequence[Record], task: str, closed_book: str | None) -> Panel:
    """Compares models.

    Args:
        records: Of finished studies.
        task: A recall task of all knock-out and rope stages.
        closed_book: A knock-out task without context, or None.

    Raises:
        ValueError: A study lacks a task.
    """
    for record in records:
        _check(record, task, closed_book)
    found = findings(records, task, closed_book)
    return Panel(
        task=task,
        closed_book=closed_book,
        models=[_row(record, task) for record in records],
        findings=[evaluate(finding, records) for finding in found],
        agreement=agreement(records),
        centres={
            record.model: centre
            for record in records
            if (centre := record.numbers.get(f"rope/{task}/centre of mass of the windows")) is not None
            and centre.value is not None
        },
        lacking=_lacking(records, found, task),
    )


def findings(records: Sequence[Record], task: str, closed_book: str | None) -> list[Finding]:
    """The claims of arXiv 2606.21249 and the controls that it lacks, as far as the studies have measured them."""
    found = [Finding("masking the retrieval heads lowers recall", lambda r: _masked(r, task, -1))]
    for kind in ("any layer", "layer-matched", "activity-matched", "lowest-scoring"):
        of_kind = f"knockout/{task}/{kind} minus retrieval"
        found.append(Finding(f"more than masking others, {kind}", lambda r, name=of_kind: _tested(r, name, name)))
    if closed_book:
        found.append(Finding("closed-book recall stays", lambda r: _masked(r, closed_book, 1), "on"))
    for kind, words in (
        ("highest", "a quarter of the pairs: highest leave more recall than lowest"),
        ("random", "and random more than lowest"),
    ):
        of_pairs = f"rope/{task}/{kind} minus lowest quarter"
        found.append(Finding(words, lambda r, name=of_pairs: _tested(r, name, name)))
    return [finding for finding in found if any(finding.measure(record) for record in records)]


def evaluate(finding: Finding, records: Sequence[Record]) -> Verdict:
    """Measures a finding in every model and adjusts its p-values for their number."""
    measured = [(record.model, found) for record in records if (found := finding.measure(record))]
    adjusted = stats.benjamini_hochberg([found.p_value for _, found in measured]).tolist()
    rows = [
        FindingRow.of(found.change, model=name, p=found.p_value, q=q, holds=_holds(finding.expected, found.change, q))
        for (name, found), q in zip(measured, adjusted, strict=True)
    ]
    return Verdict(finding.name, finding.expected, rows, sum(row.holds for row in rows), len(rows))


def agreement(records: Sequence[Record]) -> list[MeanAgreement]:
    """Summarises how far each two detectors agree, over the models that have both."""
    by_pair: dict[tuple[str, str], list[Agreement]] = {}
    for record in records:
        for row in record.agreement:
            by_pair.setdefault((row.a, row.b), []).append(row)
    return [
        MeanAgreement(a, b, len(rows), _spread([row.jaccard for row in rows]), _spread([row.spearman for row in rows]))
        for (a, b), rows in by_pair.items()
    ]


def groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Groups models by what their names have before a last "-number": llama-0 and llama-1 are two seeds of llama."""

    def stem(name: str) -> str:
        head, dash, tail = name.rpartition("-")
        return head if dash and tail.isdigit() else name

    return {key: list(some) for key, some in itertools.groupby(sorted(names, key=stem), key=stem)}


def _row(record: Record, task: str) -> ModelRow:
    numbers = record.numbers
    top = numbers.get("detect/top score")
    return ModelRow(
        model=record.model,
        theta=record.theta,
        heads=round(numbers["detect/heads"].estimate),
        of=record.total_heads,
        top_score=None if top is None else top.value,
        gini=numbers["detect/gini"].value,
        cases_counted=numbers.get("detect/cases counted"),
        recall=numbers.get(f"knockout/{task}/none"),
        masked=numbers.get(f"knockout/{task}/retrieval"),
    )


def _masked(record: Record, task: str, sign: int) -> Contrast | None:
    """The change of recall with the retrieval heads masked, times sign."""
    found = _tested(record, f"knockout/{task}/retrieval minus none", f"knockout/{task}/retrieval")
    return found and Contrast(change=_times(found.change, sign), p_value=found.p_value)


def _tested(record: Record, change: str, test: str) -> Contrast | None:
    """A paired difference with its p-value, by their names; None where the record lacks one of them."""
    found, p_value = record.numbers.get(change), record.p_values.get(test)
    return None if found is None or p_value is None else Contrast(change=found, p_value=p_value)


def _lacking(records: Sequence[Record], found: Sequence[Finding], task: str) -> dict[str, list[str]]:
    """What is shown of some models, and the models of which it is not."""
    shown: dict[str, Callable[[Record], Any]] = {
        f"recall on {task}": lambda r: r.numbers.get(f"knockout/{task}/retrieval"),
        "RoPE base": lambda r: r.theta,
        "agreement of detectors": lambda r: r.agreement,
        **{finding.name: finding.measure for finding in found},
    }
    absent = {what: [r.model for r in records if not measure(r)] for what, measure in shown.items()}
    return {what: models for what, models in absent.items() if models}


def _holds(expected: str, change: Number, q: float) -> bool:
    side = direction(change)
    if expected == "on":
        return not side
    return side == {"above": "raises", "below": "lowers"}[expected] and q < ALPHA


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(math.fsum(known) / len(known), min(known), max(known)) if known else None


def _times(change: Number, sign: int) -> Number:
    value, *ends = (end if end is None else sign * end for end in (change.value, change.low, change.high))
    low, high = ends[::sign]
    return Number(value, low, high, change.n)


def _check(record: Record, task: str, closed_book: str | None) -> None:
    for stage, wanted in (("knockout", task), ("rope", task), ("knockout", closed_book)):
        names = [match[1] for name in record.numbers if (match := re.fullmatch(rf"{stage}/(.+)/none", name))]
        known = [name for name in names if name != "text loss"]
        if wanted and known and wanted not in known:
            raise ValueError(f"{record.model}: {stage} has no task {wanted!r}; it has {', '.join(known)}")
