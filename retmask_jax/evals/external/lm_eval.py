"""Tasks of lm-evaluation-harness on a model of this package, with or without a mask."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.builtin_files import BUILTIN, path_of
from retmask_jax.evals.measured import Measured
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.store import Store

SUITE = "lm_eval"
_NO_FILTER = "none"
COMMON_KNOWLEDGE = "common_knowledge"  # the one task of this package, on `builtin:common_knowledge`


@dataclasses.dataclass(frozen=True)
class HarnessRun:
    """The result of a run of lm-evaluation-harness.

    Attributes:
        measured: Every metric that is a number for each sample, in the harness's order.
        reported: {task or group: {"metric,filter": value}}, the harness's tables, including those of groups and metrics
            of a whole corpus.
        shortened: For each kind of request, how many lost their beginning because they exceed the context.
    """

    measured: list[Measured]
    reported: dict[str, dict[str, float]]
    shortened: dict[str, int]


def run_lm_eval(
    lm: LanguageModel,
    tasks: Sequence[str],
    *,
    interventions: Interventions | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int,
    apply_chat_template: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    kept: Store | None = None,
) -> HarnessRun:
    """Runs tasks or groups by name: those of the harness, of a folder, and `common_knowledge`, which comes with this package.

    Args:
        limit: Samples of each task; None for all.
        num_fewshot: None as each task has it.
        include_path: A folder of further tasks (YAML).
        template_kwargs: For the chat template, such as enable_thinking=False.
        kept: Results of this model under these interventions; only missing ones are computed, and added.

    Raises:
        ValueError: lm-eval is not installed, a task is not known, or a task wants something the model cannot do. The
            message has one line.
    """
    _require_lm_eval()
    from lm_eval import simple_evaluate

    from retmask_jax.evals.external.lm_eval_model import HarnessModel

    if not tasks:
        raise ValueError("no tasks for lm_eval: name some, such as arc_easy")
    manager = _task_manager(tasks, include_path)
    model = HarnessModel(lm, interventions, batch_size=batch_size, template_kwargs=template_kwargs, kept=kept)
    found = simple_evaluate(
        model=model,
        tasks=[_common_knowledge() if name == COMMON_KNOWLEDGE else name for name in tasks],
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        log_samples=True,
        fewshot_as_multiturn=apply_chat_template,
        torch_random_seed=None,
    )
    measured = [metric for task, samples in found["samples"].items() for metric in _measured(task, samples)]
    tables = found["results"] | found.get("groups", {})
    return HarnessRun(measured, {name: _numbers(table) for name, table in tables.items()}, model.shortened)


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f"lm-eval cannot be used ({error}): pip install 'retmask_jax[eval]'") from error


def _task_manager(tasks: Sequence[str], include_path: str | Path | None):
    """Returns the harness's index of tasks, with those of a folder; raises ValueError for tasks that are in neither."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path {include_path} is no folder: give the one that holds the tasks' YAML files")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = sorted(set(tasks) - {COMMON_KNOWLEDGE, *manager.all_tasks})
    if unknown:
        raise ValueError(f"lm_eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them all")
    return manager


def _common_knowledge() -> dict[str, Any]:
    """The task as the harness takes it: each choice is scored by the log-likelihood of its text after the question."""
    return {
        "task": COMMON_KNOWLEDGE,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path_of(BUILTIN + COMMON_KNOWLEDGE))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def _measured(task: str, samples: Iterable[Mapping[str, Any]]) -> list[Measured]:
    """Returns a Measured for each metric and filter; if there are several, the metric is part of the task's name."""
    columns: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            columns.setdefault((metric, sample["filter"]), []).append(sample)
    columns = {key: rows for key, rows in columns.items() if any(_is_number(row[key[0]]) for row in rows)}
    return [
        _column(task if len(columns) == 1 else f"{task} {_label(*key)}", *key, rows) for key, rows in columns.items()
    ]


def _column(name: str, metric: str, filtered: str, rows: Sequence[Mapping[str, Any]]) -> Measured:
    scored = [row for row in rows if _is_number(row[metric])]
    values = np.array([float(row[metric]) for row in scored])
    left = len(rows) - len(scored)
    return Measured(
        SUITE,
        name,
        _label(metric, filtered),
        tuple(str(row["doc_id"]) for row in scored),
        values,
        binary=bool(np.isin(values, (0, 1)).all()),
        missing={"no number from the harness": left} if left else {},
    )


def _label(metric: str, filtered: str) -> str:
    return metric if filtered == _NO_FILTER else f"{metric} ({filtered})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)) and math.isfinite(value)


def _numbers(table: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in table.items() if _is_number(value)}
