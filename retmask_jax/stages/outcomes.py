"""What the stages that measure answers share: a task's answers under conditions, counted as right or wrong."""

from collections.abc import Sequence

import numpy as np

from retmask_jax.heads import conditions as causal
from retmask_jax.heads.conditions import Condition
from retmask_jax.runs.context import Context


def check_choices(name: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError unless the choices begin with the first that is known, and all are."""
    if not chosen or chosen[0] != known[0] or not set(chosen) <= set(known):
        raise ValueError(
            f"{name} is {tuple(chosen)}; it must begin with {known[0]}, and may have {', '.join(known[1:])}"
        )


def task_outcomes(context: Context, tasks: Sequence[str], conditions: Sequence[Condition]):
    """({task: bool[conditions, cases]}, {task: cases}); tasks with a known memory also count answers from it."""
    outcomes, all_cases = {}, {}
    for task in tasks:
        cases = all_cases[task] = context.cases(task)
        texts = task_answers(context, task, cases, conditions)
        outcomes[task] = np.stack([causal.hits(text, cases) for text in texts])
        if all(case.needle.memory for case in cases):
            outcomes[f"{task}: from memory"] = np.stack([causal.hits(text, cases, "memory") for text in texts])
    return outcomes, all_cases


def task_answers(context: Context, task: str, cases, conditions: Sequence[Condition]) -> list[list[str]]:
    return causal.answers(
        context.lm,
        cases,
        [c.interventions for c in conditions],
        max_new_tokens=context.config.tasks[task].max_new_tokens,
        batch_size=context.config.batch_size,
        what=task,
    )


def mask_name(kind: str, how: str) -> str:
    """A kind of mask; with how its heads were taken out, where they do not write zero."""
    return kind if how == "zero" else f"{kind}, {how}"
