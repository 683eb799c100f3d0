"""Recall tasks, as the section `tasks` of a config lists them: questions about needles or facts, by length and
depth."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.builtin_files import BUILTIN, haystack, path_of
from retmask_jax.data.needles import Case, build_cases, can_write, draw_specs, question_case, read_needles
from retmask_jax.data.prompter import Prompter
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridCell(Number):
    """What is recalled of the cases of one length (tokens) and depth (0 to 1) of a grid; low and high may be None."""

    length: int
    depth: float


def task_cases(prompter: Prompter, task: Any, resolve: Callable[[str], Path] = path_of) -> list[Case]:
    """Returns the cases of a task.

    Args:
        task: A section of the config's `tasks`. Without lengths it asks the bare questions, to be answered from memory.
        resolve: Turns a file name of the config into a path.
    """
    needles = read_needles(resolve(task.needles))
    if not task.lengths:
        return [question_case(prompter, needle, prefix=task.prefix) for needle in needles]
    specs = draw_specs(
        needles, task.lengths, task.depths, per_length=task.per_length, distractors=task.distractors, seed=task.seed
    )
    sentences = haystack(task.haystack, task.lengths, resolve)
    options = {"shuffle": task.shuffle, "at_start": task.at_start, "prefix": task.prefix}
    return build_cases(prompter, sentences, needles, specs, **options)


def check_fits(name: str, task: Any, max_length: int, context: str = "the model's context") -> None:
    """Raises ValueError where the longest case of a task and its answer exceed a context of max_length tokens."""
    longest = max(task.lengths, default=0) + task.max_new_tokens
    if longest > max_length:
        raise ValueError(f"task {name!r} needs {longest} tokens, {context} is {max_length}: shorten its lengths")


def check_writable(tokenizer: Any, name: str) -> None:
    """Raises ValueError where a tokenizer has no tokens for the words of a built-in file of needles."""
    if (
        not name.startswith(BUILTIN)
        or tokenizer is None
        or can_write(tokenizer, needle := read_needles(path_of(name))[0])
    ):
        return
    raise ValueError(
        f"the model's tokenizer cannot write {name!r}, such as {needle.question!r}: it needs other texts (those of "
        "--config=tiny for the bundled model)"
    )


def by_cell(cases: Sequence[Case], outcomes: np.ndarray) -> list[GridCell]:
    """Returns recall by length, then depth."""
    cells: dict[tuple[int, float], list[bool]] = {}
    for case, outcome in zip(cases, outcomes, strict=True):
        cells.setdefault((case.spec.length, case.spec.depth), []).append(bool(outcome))
    return [
        GridCell.of(stats.proportion(np.array(hits)), length=length, depth=depth)
        for (length, depth), hits in sorted(cells.items())
    ]
