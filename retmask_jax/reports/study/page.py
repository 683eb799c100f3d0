"""The page of the causal study, `study.html`, from the results of its stages; never touches a model."""

import dataclasses
from pathlib import Path

from markupsafe import Markup

from retmask_jax.reports import html, plotting
from retmask_jax.reports.heads import heads_section
from retmask_jax.reports.html import interval, table
from retmask_jax.reports.knockout import knockout_section
from retmask_jax.reports.page import PageResult, write_page
from retmask_jax.reports.report import all_numbers, provenance, where_time_went
from retmask_jax.reports.rope import rope_section
from retmask_jax.reports.study.detectors import detectors_section
from retmask_jax.reports.study.dynamics import dynamics_section
from retmask_jax.reports.study.per_step import per_step_section
from retmask_jax.reports.study.theta import base_section
from retmask_jax.reports.study.utility import norms_section
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.stages.detect import DETECT, DetectResult
from retmask_jax.stages.knockout import KNOCKOUT, KnockoutResult
from retmask_jax.stages.rope import ROPE, RopeResult
from retmask_jax.stages.study.detectors import DETECTORS_STAGE, DetectorsResult
from retmask_jax.stages.study.dynamics import DYNAMICS, DynamicsResult
from retmask_jax.stages.study.per_step import PER_STEP, PerStepResult
from retmask_jax.stages.study.theta import THETA, ThetaResult
from retmask_jax.stages.study.utility import UTILITY, UtilityResult
from retmask_jax.utils.files import write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyResults:
    """The results of the stages of a study, each under the stage's name."""

    detect: DetectResult
    detectors: DetectorsResult
    knockout: KnockoutResult
    rope: RopeResult
    utility: UtilityResult
    theta: ThetaResult
    per_step: PerStepResult
    dynamics: DynamicsResult


def write_study(path: Path, results: StudyResults, model: str) -> None:
    """Write the page on the study of a model."""
    with plotting.style():
        sections = [
            _header(results),
            heads_section(results.detect),
            detectors_section(results.detectors),
            knockout_section(results.knockout, results.detect.heads),
            rope_section(results.rope),
            norms_section(results.utility),
            base_section(results.theta),
            per_step_section(results.per_step),
            dynamics_section(results.dynamics),
            all_numbers(vars(results)),
            where_time_went(vars(results)),
        ]
    write_atomically(path, html.document(f"Causal study of the retrieval heads of {model}", sections))


def _header(results: StudyResults) -> Markup:
    """When and on what the results were made, and the numbers to look at first."""
    numbers = {name: number for result in vars(results).values() for name, number in result.numbers.items()}
    task = next((row.task for row in results.detectors.masked), None)
    wanted = {
        "Retrieval heads": "detect/heads",
        "Gini coefficient of the head scores": "detect/gini",
        f"Recall on {task}, untouched": f"knockout/{task}/none",
        f"Recall on {task}, retrieval heads masked": f"knockout/{task}/retrieval",
        f"Recall on {task}, layer-matched heads masked": f"knockout/{task}/layer-matched",
        "Query norms of retrieval heads against others: Cohen's d": "utility/Cohen's d",
    }
    rows = [[label, interval(numbers[name]), numbers[name].n] for label, name in wanted.items() if name in numbers]
    return html.lines(*provenance(vars(results))) + table(
        ["", "value [95% interval]", "n"],
        rows,
        note="n: how many independent cases (for heads and Gini: those that were scored; for Cohen's d: retrieval heads). All "
        "other numbers are at the end of the page.",
    )


def _study_stage(context: Context, folder: Path) -> PageResult:
    return write_page(context, STUDY, lambda path, results, model: write_study(path, StudyResults(**results), model))


STUDY = Stage(
    name="study",
    work=_study_stage,
    result=PageResult,
    upstream=(DETECT, DETECTORS_STAGE, KNOCKOUT, ROPE, UTILITY, THETA, PER_STEP, DYNAMICS),
    needs_model=False,
)
