"""Start against trained models on the same cases: per run, and pooled over the seeds of an arm."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retmask_jax import stats

START = "start"


def run_rows(samples: Mapping[str, Mapping[str, np.ndarray]], runs: Mapping[str, tuple[str, int]]) -> list[dict]:
    """One row per model and task: its mean and its paired change against the start model, each with an interval.

    samples: model -> task -> one value per case. runs: model -> (arm, seed), without the start model.
    """
    return [
        {"model": name, "arm": arm, "seed": seed, "task": task, **_mean(samples, [name], task),
         "change": _change(samples, [name], task)}
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


def _mean(samples, names, task) -> dict[str, Any]:
    values = np.stack([samples[name][task] for name in names])
    return stats.proportion(values[0]) if len(names) == 1 and values.dtype == bool else stats.bootstrap_mean(values)


def _change(samples, names, task) -> dict[str, Any]:
    values = np.stack([samples[name][task] for name in names])
    return stats.paired_bootstrap(values, samples[START][task][None])
