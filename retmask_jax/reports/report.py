"""Results of all stages -> one self-contained HTML page of words, figures and tables; never touches a model."""

from collections.abc import Mapping
from pathlib import Path

from retmask_jax.reports import figures, html
from retmask_jax.reports.causal_report import knockout_section, only_zero, rope_section
from retmask_jax.reports.evaluation import evaluation_section
from retmask_jax.reports.heads import heads_section
from retmask_jax.reports.html import change, interval, section, table
from retmask_jax.reports.page import PageResult, write_page
from retmask_jax.reports.training import pairs_section, training_section
from retmask_jax.reports.wording import measure, tree_of
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.runs.workdir import Result, _Plain
from retmask_jax.stages.detect import DETECT
from retmask_jax.stages.eval import EVAL
from retmask_jax.stages.knockout import KNOCKOUT
from retmask_jax.stages.pairs import PAIRS
from retmask_jax.stages.rope import ROPE
from retmask_jax.stages.train import TRAIN
from retmask_jax.utils.files import write_atomically


def write_report(path: Path, results: Mapping[str, Mapping], model: str) -> None:
    """Write the page. results: stage -> what its function in `stages` returned, with or without "provenance"."""
    with figures.style():
        sections = [
            _header(results),
            heads_section(results["detect"]),
            knockout_section(results["knockout"], results["detect"]["heads"]),
            rope_section(results["rope"]),
            pairs_section(results["pairs"]),
            training_section(results["train"]),
            evaluation_section(results["eval"]),
            all_numbers(results),
        ]
    write_atomically(path, html.document(f"Retrieval heads of {model}", sections))


# --- sections ---


def _header(results) -> str:
    detect, knockout, rope = (results[stage]["numbers"] for stage in ("detect", "knockout", "rope"))
    rows = [
        (label, interval, detect[name])
        for label, name in (
            ("Detection cases counted", "detect/cases counted"),
            ("Retrieval heads", "detect/heads"),
            ("Gini coefficient of the head scores", "detect/gini"),
        )
        if name in detect
    ]
    for task, by_kind in list(tree_of(knockout).items())[:1]:
        by_kind = only_zero(by_kind, results["knockout"]["rows"])
        rows += [(f"Masked heads, {kind}: {measure(task)}", interval, number) for kind, number in by_kind.items()]
    for task, by_name in tree_of(rope).items():
        rows += [
            (f"Rotary pairs, {name}: {measure(task)}", change, number)
            for name, number in by_name.items()
            if name == "highest minus lowest quarter"
        ]
    for arm, changes in list(results["eval"].changes.items())[:1]:
        rows += [(f"Training, {arm}: change of {measure(task)}", change, number) for task, number in changes.items()]
    return html.lines(*provenance(results)) + table(
        ["", "value [95% interval]", "n"],
        [[label, write(number), number["n"]] for label, write, number in rows],
        note="n: independent cases (heads and Gini: the cases behind the scores; text loss: windows of text). Every other "
        "number is at the end of the page.",
    )


def all_numbers(results) -> str:
    """A table of every number of every stage, folded."""
    rows = [
        [name, *(html.exact(number[key]) for key in ("value", "low", "high", "n"))]
        for result in results.values()
        for name, number in result["numbers"].items()
    ]
    return section(
        "All numbers", [], html.folded(f"{len(rows)} of all stages", table(["name", "value", "low", "high", "n"], rows))
    )


# --- sentences and cells ---


def provenance(results: Mapping[str, Result]) -> list[str]:
    """When, with which versions and on which weights the results were made."""
    results = {name: result if isinstance(result, Result) else _Plain(result) for name, result in results.items()}
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


def _report_stage(context: Context, folder: Path) -> PageResult:
    return write_page(context, REPORT, write_report)


REPORT = Stage(
    name="report",
    work=_report_stage,
    result=PageResult,
    upstream=(DETECT, KNOCKOUT, ROPE, PAIRS, TRAIN, EVAL),
    needs_model=False,
)
