"""Any models side by side: the page of `eval --compare`, and lines of a table for a terminal."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.evals.compare import START, ModelRow
from retmask_jax.reports import html, plotting
from retmask_jax.reports.evaluation import evaluation_section
from retmask_jax.reports.html import change, interval, p_value
from retmask_jax.reports.page import PageResult, write_page
from retmask_jax.reports.report import all_numbers, provenance, where_time_went
from retmask_jax.reports.wording import TEXT_LOSS, axis
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.stages.compare import COMPARE
from retmask_jax.utils.files import write_atomically


def write_comparison(path: Path, results: Mapping[str, Any], model: str) -> None:
    """Write the page of `retmask eval --compare`. results: {"compare": that stage's `EvalResult`}."""
    with plotting.style():
        sections = [
            html.lines(*provenance(results)),
            evaluation_section(results[COMPARE.name], trained=False),
            all_numbers(results),
            where_time_went(results),
        ]
    write_atomically(path, html.document(f"{model} against other models", sections))


def table(rows: Sequence[ModelRow], metrics: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """(header, a row per task): every model's mean, and what it changes against the start model; dashes where it lacks a task.

    Args:
        rows: As of `evals.compare.model_rows`.
        metrics: Task of a suite -> what its values are.
    """
    models = list(dict.fromkeys(row.model for row in rows if row.model != START))
    by_task: dict[str, dict[str, ModelRow]] = {}
    for row in rows:
        by_task.setdefault(row.task, {})[row.model] = row
    header = ["task", "measure", "n", START, *(cell for model in models for cell in (model, "change", "p"))]
    return header, [
        [
            task,
            metrics.get(task) or axis(task),
            str(by_model[START].n),
            interval(by_model[START]),
            *(cell for model in models for cell in _cells(by_model.get(model))),
        ]
        for task, by_model in by_task.items()
    ]


def perplexities(rows: Sequence[ModelRow]) -> str:
    """The perplexity of each model on the text whose loss was measured, in a line; empty where none was measured."""
    losses = {row.model: row.value for row in rows if row.task == TEXT_LOSS and row.value is not None}
    listed = ", ".join(f"{name} {math.exp(loss):.3f}" for name, loss in losses.items())
    return f"perplexity (the exponential of the text loss): {listed}" if listed else ""


def _cells(row: ModelRow | None) -> list[str]:
    if row is None:
        return ["–"] * 3
    p = "–" if row.mcnemar is None else p_value(row.mcnemar.p_value)
    return [interval(row), change(row.change), p]


def _comparison_stage(context: Context, folder: Path) -> PageResult:
    return write_page(context, COMPARISON, write_comparison)


COMPARISON = Stage(name="comparison", work=_comparison_stage, result=PageResult, upstream=(COMPARE,), needs_model=False)
