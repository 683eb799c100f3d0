"""What several models have in common: the findings of finished studies side by side, each with its interval and p-value."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from retmask_jax.heads.conditions import Contrast
from retmask_jax.heads.detectors import Agreement
from retmask_jax.reports.wording import direction
from retmask_jax.stages.detect import DetectResult
from retmask_jax.stages.knockout import KnockoutResult
from retmask_jax.stages.rope import RopeResult
from retmask_jax.stages.study.detectors import DetectorsResult
from retmask_jax.stages.study.dynamics import DynamicsResult
from retmask_jax.stages.study.theta import ThetaResult
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import Number

# a finding holds for a model if its interval lies on the expected side of 0 and its adjusted p is below this
ALPHA = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A finished study: its name, and the results that findings rest on, each under its stage's name."""

    name: str
    detect: DetectResult
    detectors: DetectorsResult
    knockout: KnockoutResult
    rope: RopeResult
    theta: ThetaResult | None = None
    dynamics: DynamicsResult | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim about every model.

    Attributes:
        measure: The effect in a study; None where the study has not measured it.
        expected: On which side of 0 it should lie: "above", "below", or "on", where the interval should contain 0.
    """

    name: str
    measure: Callable[[Member], Contrast | None]
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
        theta: RoPE base; None where the stage theta has not run.
        heads: Number of retrieval heads, of so many in all.
        cases_counted: Share of the detection cases; None where scores were given.
        recall: Of the untouched model; masked: with the retrieval heads masked.
    """

    model: str
    theta: float | None
    heads: int
    of: int
    top_score: float
    gini: float | None
    cases_counted: Number | None
    recall: Number
    masked: Number


@dataclasses.dataclass(frozen=True)
class Panel:
    """Several models side by side.

    Attributes:
        task: On which recall was measured; closed_book: without context, None where no such task is named.
        centres: By model, the centre of the harm in the rotary spectrum; without models that no window harms.
    """

    task: str
    closed_book: str | None
    models: list[ModelRow]
    findings: list[Verdict]
    agreement: list[MeanAgreement]
    centres: dict[str, Number]


def panel(members: Sequence[Member], task: str, closed_book: str | None) -> Panel:
    """Compares finished studies.

    Args:
        members: The studies.
        task: A recall task of all knock-out and rope stages.
        closed_book: A knock-out task without context, or None.

    Raises:
        ValueError: A study lacks a task.
    """
    for member in members:
        _check(member, task, closed_book)
    return Panel(
        task=task,
        closed_book=closed_book,
        models=[_row(member, task) for member in members],
        findings=[evaluate(finding, members) for finding in findings(members, task, closed_book)],
        agreement=agreement(members),
        centres=_centres(members, task),
    )


def findings(members: Sequence[Member], task: str, closed_book: str | None) -> list[Finding]:
    """The claims of arXiv 2606.21249 and the controls that it lacks, as far as the studies have measured them."""
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


def evaluate(finding: Finding, members: Sequence[Member]) -> Verdict:
    """Measures a finding in every model and adjusts its p-values for their number."""
    measured = [(member.name, found) for member in members if (found := finding.measure(member))]
    adjusted = stats.benjamini_hochberg([found.p_value for _, found in measured]).tolist()
    rows = [
        FindingRow.of(found.change, model=name, p=found.p_value, q=q, holds=_holds(finding.expected, found.change, q))
        for (name, found), q in zip(measured, adjusted, strict=True)
    ]
    return Verdict(finding.name, finding.expected, rows, sum(row.holds for row in rows), len(rows))


def agreement(members: Sequence[Member]) -> list[MeanAgreement]:
    """Summarises how far each two detectors agree, over the models that have both."""
    by_pair: dict[tuple[str, str], list[Agreement]] = {}
    for member in members:
        for row in member.detectors.agreement:
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


def _row(member: Member, task: str) -> ModelRow:
    detect, numbers = member.detect, member.knockout.numbers
    return ModelRow(
        model=member.name,
        theta=None if member.theta is None else member.theta.theta,
        heads=len(detect.heads),
        of=np.size(detect.mean),
        top_score=max(detect.scores),
        gini=detect.numbers["detect/gini"].value,
        cases_counted=detect.numbers.get("detect/cases counted"),
        recall=numbers[f"knockout/{task}/none"],
        masked=numbers[f"knockout/{task}/retrieval"],
    )


def _masked(member: Member, task: str, sign: int) -> Contrast | None:
    """The change of recall with the retrieval heads masked, times sign."""
    for row in member.knockout.rows:
        if (row.task, row.kind, row.experiment) == (task, "retrieval", "zero"):
            return Contrast(change=_times(row.change, sign), p_value=row.mcnemar.p_value)
    return None


def _control(member: Member, task: str, kind: str) -> Contrast | None:
    """How much more recall masking other heads leaves."""
    wanted, rows = (task, kind, "zero"), member.knockout.contrasts
    return next((row for row in rows if (row.task, row.kind, row.experiment) == wanted), None)


def _pairs(member: Member, task: str, kind: str) -> Contrast | None:
    """How much more recall ablating a quarter of the pairs, of a kind, leaves than ablating the lowest."""
    wanted, rows = (task, "rotary", member.rope.n_pairs // 4, kind), member.rope.contrasts
    return next((row for row in rows if (row.task, row.site, row.k, row.kind) == wanted), None)


def _centres(members: Sequence[Member], task: str) -> dict[str, Number]:
    return {
        member.name: spectrum.centre
        for member in members
        for spectrum in member.rope.spectra
        if spectrum.task == task and spectrum.centre is not None
    }


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


def _check(member: Member, task: str, closed_book: str | None) -> None:
    for result, stage, wanted in (
        (member.knockout, "knockout", task),
        (member.rope, "rope", task),
        (member.knockout, "knockout", closed_book),
    ):
        known = dict.fromkeys(row.task for row in result.rows)
        if wanted and wanted not in known:
            raise ValueError(f"{member.name}: {stage} has no task {wanted!r}; it has {', '.join(known)}")
