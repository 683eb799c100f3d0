"""Start against trained models on the same cases: per run, and pooled over the seeds of an arm."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retmask_jax import stats
from retmask_jax.page import change, interval, p_value
from retmask_jax.wording import TEXT_LOSS, axis

START = "start"


def run_rows(samples: Mapping[str, Mapping[str, np.ndarray]], runs: Mapping[str, tuple[str, int]]) -> list[dict]:
    """One row per model and task: its mean and its paired change against the start model, each with an interval, and
    McNemar's exact test where samples are right or wrong.

    samples: model -> task -> one value per case. runs: model -> (arm, seed), without the start model.
    """
    return [
        {"model": name, "arm": arm, "seed": seed, "task": task, **_mean(samples, [name], task),
         "change": _change(samples, [name], task), "mcnemar": _test(samples, name, task)}
        for name in samples
        for arm, seed in [runs.get(name, (START, 0))]
        for task in samples[name]
    ]  # fmt: skip


def arm_numbers(samples: Mapping[str, Mapping[str, np.ndarray]], arms: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """ "eval/TASK/ARM" and "eval/TASK/ARM minus start", pooled over the arm's models; intervals are over cases."""
    numbers = {}
    for arm, names in ({START: [START]} | dict(arms)).items():
        for task in samples[START]:
            numbers[f"eval/{task}/{arm}"] = _mean(samples, names, task)
            if arm != START:
                numbers[f"eval/{task}/{arm} minus start"] = _change(samples, names, task)
    return numbers


def table(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """(header, a row per task) of `run_rows`: every model's mean, and what it changes against the start model.

    metrics: task of a suite -> what its values are.
    """
    models = list(dict.fromkeys(row["model"] for row in rows if row["model"] != START))
    by_task: dict[str, dict[str, Mapping]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {})[row["model"]] = row
    header = ["task", "measure", "n", START, *(cell for model in models for cell in (model, "change", "p"))]
    return header, [
        [task, metrics.get(task) or axis(task), str(found[START]["n"]), interval(found[START]),
         *(cell for model in models for cell in _cells(found[model]))] for task, found in by_task.items()
    ]  # fmt: skip


def perplexities(rows: Sequence[Mapping[str, Any]]) -> str:
    """The perplexity of each model on the text whose loss was measured, in a line; nothing where none was."""
    losses = {row["model"]: row["value"] for row in rows if row["task"] == TEXT_LOSS}
    said = ", ".join(f"{name} {math.exp(loss):.3f}" for name, loss in losses.items())
    return f"perplexity (the exponential of the text loss): {said}" if said else ""


def _cells(row: Mapping[str, Any]) -> list[str]:
    p = "–" if row["mcnemar"] is None else p_value(row["mcnemar"]["p_value"])
    return [interval(row), change(row["change"]), p]


def _test(samples, name, task) -> dict[str, Any] | None:
    ours, start = samples[name][task], samples[START][task]
    return stats.mcnemar(start, ours) if ours.dtype == start.dtype == bool else None


def _mean(samples, names, task) -> dict[str, Any]:
    values = np.stack([samples[name][task] for name in names])
    return stats.proportion(values[0]) if len(names) == 1 and values.dtype == bool else stats.bootstrap_mean(values)


def _change(samples, names, task) -> dict[str, Any]:
    values = np.stack([samples[name][task] for name in names])
    return stats.paired_bootstrap(values, samples[START][task][None])
