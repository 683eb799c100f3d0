"""Start against trained models on the same cases: per run, and pooled over the seeds of an arm."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retmask_jax.utils import stats

START = "start"

Place = tuple[str, str]  # (task, arm)


def run_rows(samples: Mapping[str, Mapping[str, np.ndarray]], runs: Mapping[str, tuple[str, int]]) -> list[dict]:
    """One row per model and task: its mean and its paired change against the start model, each with an interval, and
    McNemar's exact test where samples are right or wrong.

    samples: model -> task -> one value per case. runs: model -> (arm, seed), without the start model.
    """
    return [
        {
            "model": name,
            "arm": arm,
            "seed": seed,
            "task": task,
            **_mean(samples, [name], task),
            "change": _change(samples, [name], task),
            "mcnemar": _test(samples, name, task),
        }
        for name in samples
        for arm, seed in [runs.get(name, (START, 0))]
        for task in samples[name]
    ]


def arm_numbers(samples: Mapping[str, Mapping[str, np.ndarray]], arms: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """Means and changes under the names of `number_names`, pooled over the arm's models; intervals are over cases."""
    pooled = {START: [START]} | dict(arms)
    means, changes = number_names(list(samples[START]), list(pooled))
    numbers = {}
    for (task, arm), name in means.items():
        numbers[name] = _mean(samples, pooled[arm], task)
        if (task, arm) in changes:
            numbers[changes[task, arm]] = _change(samples, pooled[arm], task)
    return numbers


def number_names(tasks: Sequence[str], arms: Sequence[str]) -> tuple[dict[Place, str], dict[Place, str]]:
    """Names of the means, "eval/TASK/ARM", and of the changes, "eval/TASK/ARM minus start", each by (task, arm).

    Names are put together from tasks and arms and never taken apart, because both may hold any text: a task of a suite
    or a model of the hub has a "/". Where a name would be that of another number already, its arm stands in quotes.

    Args:
        tasks: In the order of the results.
        arms: In the order of the results, the start model first.
    """
    means: dict[Place, str] = {}
    changes: dict[Place, str] = {}
    taken: set[str] = set()
    for place in ((task, arm) for arm in arms for task in tasks):
        means[place] = _new_name(*place, "", taken)
        if place[1] != START:
            changes[place] = _new_name(*place, f" minus {START}", taken)
    return means, changes


def numbers_by_task(result: Mapping[str, Any]) -> tuple[dict[str, dict], dict[str, dict]]:
    """({task: {arm: mean}}, {arm: {task: change}}) of the result of an evaluation, with its "rows" and "numbers"."""
    tasks, arms = (list(dict.fromkeys(row[key] for row in result["rows"])) for key in ("task", "arm"))
    names_of_means, names_of_changes = number_names(tasks, arms)
    means: dict[str, dict] = {task: {} for task in tasks}
    changes: dict[str, dict] = {arm: {} for arm in arms if arm != START}
    for (task, arm), name in names_of_means.items():
        means[task][arm] = result["numbers"][name]
    for (task, arm), name in names_of_changes.items():
        changes[arm][task] = result["numbers"][name]
    return means, changes


def _new_name(task: str, arm: str, suffix: str, taken: set[str]) -> str:
    """The name of a number, which is added to those that are taken."""
    while (name := f"eval/{task}/{arm}{suffix}") in taken:
        arm = f'"{arm}"'
    taken.add(name)
    return name


def _test(samples, name, task) -> dict[str, Any] | None:
    ours, start = samples[name][task], samples[START][task]
    return stats.mcnemar(start, ours) if ours.dtype == start.dtype == bool else None


def _mean(samples, names, task) -> dict[str, Any]:
    values = np.stack([samples[name][task] for name in names])
    return stats.proportion(values[0]) if len(names) == 1 and values.dtype == bool else stats.bootstrap_mean(values)


def _change(samples, names, task) -> dict[str, Any]:
    values = np.stack([samples[name][task] for name in names])
    return stats.paired_bootstrap(values, samples[START][task][None])
