"""A task's answers under conditions, counted as right or wrong, for all stages that measure answers."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from retmask_jax.data.needles import Case
from retmask_jax.heads.conditions import Condition, answers, hits
from retmask_jax.runs.context import Context

FROM_MEMORY = ": from memory"  # what the name of a task ends with where answers from the model's memory are counted


def check_choices(name: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError unless the choices begin with the first known one and all of them are known."""
    if not chosen or chosen[0] != known[0] or not set(chosen) <= set(known):
        raise ValueError(
            f"{name} is {tuple(chosen)}; it must begin with {known[0]}, and may have {', '.join(known[1:])}"
        )


def task_outcomes(
    context: Context, tasks: Sequence[str], conditions: Sequence[Condition]
) -> tuple[dict[str, Bool[np.ndarray, "conditions cases"]], dict[str, list[Case]]]:
    """(right or wrong by task, cases by task). Where all needles of a task say what the model remembers instead, answers
    from memory are counted as another task."""
    outcomes, all_cases = {}, {}
    for task in tasks:
        cases = all_cases[task] = context.cases(task)
        texts = task_answers(context, task, cases, conditions)
        outcomes[task] = np.stack([hits(text, cases) for text in texts])
        if all(case.needle.memory for case in cases):
            outcomes[task + FROM_MEMORY] = np.stack([hits(text, cases, "memory") for text in texts])
    return outcomes, all_cases


def task_answers(
    context: Context, task: str, cases: Sequence[Case], conditions: Sequence[Condition]
) -> list[list[str]]:
    """The model's answers [condition][case] to the cases of a task."""
    return answers(
        context.lm,
        cases,
        [c.interventions for c in conditions],
        max_new_tokens=context.config.tasks[task].max_new_tokens,
        batch_size=context.config.batch_size,
        what=task,
    )


def mask_name(kind: str, how: str) -> str:
    """The name of a kind of mask, with how its heads are ablated unless they write zero."""
    return kind if how == "zero" else f"{kind}, {how}"
