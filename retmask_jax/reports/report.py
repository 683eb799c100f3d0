"""Results of all stages -> one self-contained HTML page of words, figures and tables; never touches a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from retmask_jax.reports import html, plotting
from retmask_jax.reports.evaluation import evaluation_section
from retmask_jax.reports.heads import heads_section
from retmask_jax.reports.html import change, interval, section, table
from retmask_jax.reports.knockout import knockout_section, only_zero
from retmask_jax.reports.page import PageResult, write_page
from retmask_jax.reports.rope import rope_section
from retmask_jax.reports.training import pairs_section, training_section
from retmask_jax.reports.wording import measure
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.detect import DETECT, DetectResult
from retmask_jax.stages.eval import EVAL, EvalResult
from retmask_jax.stages.knockout import KNOCKOUT, KnockoutResult
from retmask_jax.stages.pairs import PAIRS
from retmask_jax.stages.rope import ROPE, RopeResult
from retmask_jax.stages.train import TRAIN
from retmask_jax.utils.files import write_atomically


def write_report(path: Path, results: Mapping[str, Any], model: str) -> None:
    """Write the page. results: the result of each stage in `REPORT.upstream`, by its name."""
    detect, knockout, rope, pairs, train, evaluation = (results[stage.name] for stage in REPORT.upstream)
    with plotting.style():
        sections = [
            html.lines(*provenance(results)),
            _headlines(detect, knockout, rope, evaluation),
            heads_section(detect),
            knockout_section(knockout, detect.heads),
            rope_section(rope),
            pairs_section(pairs),
            training_section(train),
            evaluation_section(evaluation),
            all_numbers(results),
            where_time_went(results),
        ]
    write_atomically(path, html.document(f"Retrieval heads of {model}", sections))


def all_numbers(results: Mapping[str, Result]) -> Markup:
    """A table of every number of every stage, folded."""
    rows = [
        [name, *(html.exact(x) for x in (number.value, number.low, number.high, number.n))]
        for result in results.values()
        for name, number in result.numbers.items()
    ]
    return section(
        "All numbers", [], html.folded(f"{len(rows)} of all stages", table(["name", "value", "low", "high", "n"], rows))
    )


def where_time_went(results: Mapping[str, Result]) -> Markup:
    """A table of how long each stage compiled, ran and waited, folded."""
    rows = [
        [stage, *(f"{x:.1f}" for x in (result.seconds, spent.compiling, spent.waiting)), spent.programs, spent.found]
        for stage, result in results.items()
        if (spent := result.spent).programs
    ]
    if not rows:  # of an older version
        return Markup()
    head = ["stage", "seconds", "of them compiling", "waiting for files and servers", "programs", "of them kept"]
    table_of_stages = table(head, rows, note="Kept: compiled in an earlier run and read from disk.")
    return section("Time", [], html.folded("how long each stage took, and for what", table_of_stages))


def provenance(results: Mapping[str, Result]) -> list[str]:
    """When, with which versions and on which weights the results were made."""
    known = [result.provenance for result in results.values() if result.provenance.created]
    if not known:
        return []
    first, last = (choose(known, key=lambda made: made.created) for choose in (min, max))
    begin, end = (made.created[:16].replace("T", " ") for made in (first, last))
    minutes = sum(result.seconds for result in results.values()) / 60
    return [
        f"Results of {begin} to {end} UTC, {minutes:.1f} minutes of work.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in last.versions.items()) + ".",
        f"Config {last.config}, weights {last.inputs['weights']}, seed {last.seed}.",
    ]


def _headlines(detect: DetectResult, knockout: KnockoutResult, rope: RopeResult, evaluation: EvalResult) -> Markup:
    rows = [
        (label, interval, detect.numbers[name])
        for label, name in (
            ("Detection cases counted", "detect/cases counted"),
            ("Retrieval heads", "detect/heads"),
            ("Gini coefficient of the head scores", "detect/gini"),
        )
        if name in detect.numbers
    ]
    rows += [
        (f"Masked heads, {mean.kind}: {measure(mean.task)}", interval, mean)
        for mean in only_zero(knockout.means)
        if mean.task == knockout.means[0].task
    ]
    for task in dict.fromkeys(mean.task for mean in rope.means):
        if (quarter := rope.quarter(task)) is not None:
            rows.append((f"Rotary pairs, highest minus lowest quarter: {measure(task)}", change, quarter))
    for arm, changes in list(evaluation.changes.items())[:1]:
        rows += [(f"Training, {arm}: change of {measure(task)}", change, number) for task, number in changes.items()]
    return table(
        ["", "value [95% interval]", "n"],
        [[label, write(number), number.n] for label, write, number in rows],
        note="n: independent cases (heads and Gini: the cases that the scores rest on; text loss: windows of text). Every "
        "other number is at the end of the page.",
    )


def _report_stage(context: Context, folder: Path) -> PageResult:
    return write_page(context, REPORT, write_report)


REPORT = Stage(
    name="report",
    work=_report_stage,
    result=PageResult,
    upstream=(DETECT, KNOCKOUT, ROPE, PAIRS, TRAIN, EVAL),
    needs_model=False,
)
