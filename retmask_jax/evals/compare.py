"""Models against the start model on the same cases: each by itself, and pooled over the seeds of an arm."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from retmask_jax.utils import stats
from retmask_jax.utils.numbers import McNemar, Number

START = "start"
RETMASK = "retmask"

Samples = Mapping[str, Mapping[str, np.ndarray]]  # model -> task -> one value per case


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRow(Number):
    """The mean of a model on a task, with its paired change against the start model.

    mcnemar: the exact test against the start model; None where samples are not right or wrong.
    """

    model: str
    arm: str
    seed: int
    task: str
    change: Number
    mcnemar: McNemar | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRow:
    """The mean of all models of an arm on a task, with its change against the start model (None for that model)."""

    arm: str
    task: str
    mean: Number
    change: Number | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmContrast:
    """By how much more the arm retmask does on a task than another arm, paired by case.

    mcnemar: The exact test, where each arm is one model and samples are right or wrong.
    """

    other: str
    task: str
    change: Number
    mcnemar: McNemar | None = None


def model_rows(samples: Samples, runs: Mapping[str, tuple[str, int]]) -> list[ModelRow]:
    """One row per model and task; intervals are over cases.

    Args:
        samples: Of all models, in the order of the rows; a model may lack a task.
        runs: Arm and seed of each model but the start model.
    """
    return [_model_row(samples, name, *runs.get(name, (START, 0)), task) for name in samples for task in samples[name]]


def arm_rows(samples: Samples, arms: Mapping[str, Sequence[str]]) -> list[ArmRow]:
    """One row per arm and task, pooled over the arm's models, the start model first; intervals are over cases.

    Args:
        samples: Of all models; an arm has no row of a task that one of its models lacks.
        arms: Names of the models of each arm but the start model.
    """
    pooled = {START: [START]} | dict(arms)
    return [
        ArmRow(
            arm=arm,
            task=task,
            mean=_mean(samples, models, task),
            change=None if arm == START else _change(samples, models, task),
        )
        for arm, models in pooled.items()
        for task in samples[START]
        if all(task in samples[name] for name in models)
    ]


def arm_contrasts(samples: Samples, arms: Mapping[str, Sequence[str]]) -> list[ArmContrast]:
    """The arm retmask against every other arm, its controls, on every task that all their models have.

    Args:
        samples: Of all models.
        arms: Names of the models of each arm but the start model.
    """
    ours = arms.get(RETMASK, ())
    return [
        ArmContrast(
            other=other,
            task=task,
            change=_change(samples, ours, task, theirs),
            mcnemar=_test(samples, ours[0], task, theirs[0]) if len(ours) == len(theirs) == 1 else None,
        )
        for other, theirs in arms.items()
        if ours and other != RETMASK
        for task in samples[START]
        if all(task in samples[name] for name in (*ours, *theirs))
    ]


def headlines(rows: Iterable[ArmRow]) -> dict[str, Number]:
    """The means as "eval/TASK/ARM", the changes as "eval/TASK/ARM minus start".

    Names are put together from tasks and arms and never taken apart, because both may hold any text: a task of a suite
    or a model of the hub has a "/". Where a name would be that of another number already, its arm stands in quotes.
    """
    numbers: dict[str, Number] = {}
    for row in rows:
        numbers[_new_name(row, "", numbers)] = row.mean
        if row.change is not None:
            numbers[_new_name(row, f" minus {START}", numbers)] = row.change
    return numbers


def _new_name(row: ArmRow, suffix: str, taken: Mapping[str, Number]) -> str:
    arm = row.arm
    while (name := f"eval/{row.task}/{arm}{suffix}") in taken:
        arm = f'"{arm}"'
    return name


def _model_row(samples: Samples, name: str, arm: str, seed: int, task: str) -> ModelRow:
    mean, change = _mean(samples, [name], task), _change(samples, [name], task)
    test = _test(samples, name, task)
    return ModelRow.of(mean, model=name, arm=arm, seed=seed, task=task, change=change, mcnemar=test)


def _test(samples: Samples, name: str, task: str, other: str = START) -> McNemar | None:
    ours, theirs = samples[name][task], samples[other][task]
    return stats.mcnemar(theirs, ours) if ours.dtype == theirs.dtype == bool else None


def _mean(samples: Samples, names: Sequence[str], task: str) -> Number:
    values = np.stack([samples[name][task] for name in names])
    return stats.proportion(values[0]) if len(names) == 1 and values.dtype == bool else stats.bootstrap_mean(values)


def _change(samples: Samples, names: Sequence[str], task: str, others: Sequence[str] = (START,)) -> Number:
    ours_MN, theirs_MN = (np.stack([samples[name][task] for name in models]) for models in (names, others))
    return stats.paired_bootstrap(ours_MN, theirs_MN)
