"""Results of all stages -> one self-contained HTML page of words, figures and tables; never touches a model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retmask_jax.evals.compare import numbers_by_task
from retmask_jax.reports import figures, html
from retmask_jax.reports.evaluation import evaluation_section
from retmask_jax.reports.figures import drawn as _figure
from retmask_jax.reports.heads import heads_section
from retmask_jax.reports.html import change, interval, table
from retmask_jax.reports.html import count as _n
from retmask_jax.reports.html import section as _section
from retmask_jax.reports.knockout import knockout_section, only_zero
from retmask_jax.reports.page import PageResult, write_page
from retmask_jax.reports.rope import rope_section
from retmask_jax.reports.wording import measure
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
            knockout_section(results["knockout"], results["detect"].heads),
            rope_section(results["rope"]),
            _pairs(results["pairs"]),
            _training(results["train"]["runs"]),
            evaluation_section(results["eval"]),
            all_numbers(results),
        ]
    write_atomically(path, html.document(f"Retrieval heads of {model}", sections))


# --- sections ---


def _header(results) -> str:
    detect, knockout, rope = (results[stage] for stage in ("detect", "knockout", "rope"))
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
    _, by_arm = numbers_by_task(results["eval"])
    for arm, changes in list(by_arm.items())[:1]:
        rows += [(f"Training, {arm}: change of {measure(task)}", change, number) for task, number in changes.items()]
    return html.lines(*provenance(results)) + table(
        ["", "value [95% interval]", "n"],
        [[label, write(number), number["n"]] for label, write, number in rows],
        note="n: independent cases (heads and Gini: the cases behind the scores; text loss: windows of text). Every other "
        "number is at the end of the page.",
    )


def _pairs(result) -> str:
    counts, prompts = result["counts"], result["prompts"]
    if not counts:
        return _section("Preference pairs", ["No arm is trained."])
    shares = [round(100 * parts["kept"] / prompts) for parts in counts.values()]
    kept = f"{min(shares)}%" if min(shares) == max(shares) else f"{min(shares)} to {max(shares)}%"
    return _section(
        "Preference pairs",
        [
            f"Each run answers {_n(prompts, 'prompt')}; {kept} of them become training examples.",
            "A pair is dropped where both answers are the same or one is empty.",
            *_left_out(result),
        ],
        _figure(
            {"Pairs kept": figures.stacked_counts(f"Prompts by outcome (n = {prompts})", counts)},
            "Runs are named arm-seed. sft_unfiltered and contrast need one answer, so none can be identical.",
        ),
        table(
            ["answers of", "cut off at the largest number of tokens", "of"],
            [[name, n, prompts] for name, n in result["answers_cut"].items()],
        ),
    )


def _left_out(result) -> list[str]:
    """What was not asked at all, if anything."""
    left = [f"{n} {why}" for why, n in result["left_out"].items() if n]
    return [f"Of the prompts that were read, some were left out: {', '.join(left)}."] if left else []


def _training(runs: Mapping[str, Mapping]) -> str:
    preference = [run for run in runs.values() if "margin" in run["steps"][0]]
    contrast = [run for run in runs.values() if run["arm"] == "contrast"]
    supervised = [run for run in runs.values() if run["arm"].startswith("sft")]
    panels, rows, lower = {}, [], 0
    groups = (
        ("preference", preference, "nats"),
        ("supervised", supervised, "nats per token"),
        ("contrast", contrast, "nats per token"),
    )
    for what, group, unit in groups:
        if group:
            panels[f"Loss, {what}"] = figures.curves(f"Loss, {what}", group, "loss", unit, rate=True)
    if preference:
        panels["Margin"] = figures.curves("Reward margin", preference, "margin", "chosen minus rejected")
        panels["Accuracy"] = figures.curves("Accuracy", preference, "accuracy", "share ranked right")
    for name, run in runs.items():
        first, last = _ends([step["loss"] for step in run["steps"]])
        lower += last < first
        cut = run["prompts_cut"], run["answers_cut"]
        rows.append([name, run["examples"], *cut, len(run["steps"]), f"{first:.3f}", f"{last:.3f}"])
    return _section(
        "Training",
        [
            f"The loss of {lower} of {_n(len(runs), 'run')} is lower in the last tenth of the steps than in the first.",
            "Only runs on preferences have rewards; others show a loss alone." if supervised or contrast else "",
        ],
        _figure(
            panels,
            "One line a run, coloured by arm: a moving average over a twentieth of the steps, the raw values in "
            "pale. The dashed grey line is the learning rate (right axis).",
        ),
        table(
            ["run", "examples", "prompts cut", "answers cut", "steps", "loss, first tenth", "loss, last tenth"], rows
        ),
    )


def all_numbers(results) -> str:
    """A table of every number of every stage, folded."""
    rows = [
        [name, *(html.exact(number[key]) for key in ("value", "low", "high", "n"))]
        for result in results.values()
        for name, number in result["numbers"].items()
    ]
    return _section(
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


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and the last tenth."""
    n = math.ceil(len(values) / 10)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def _report_stage(context: Context, folder: Path) -> PageResult:
    return write_page(context, REPORT, write_report)


REPORT = Stage(
    name="report",
    work=_report_stage,
    result=PageResult,
    upstream=(DETECT, KNOCKOUT, ROPE, PAIRS, TRAIN, EVAL),
    needs_model=False,
)
