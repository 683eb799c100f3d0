"""Needle in a haystack by length and depth: the numbers of the usual heat map."""

import collections
from collections.abc import Sequence

import numpy as np

from retmask_jax.data.answers import rouge1_recall
from retmask_jax.data.needles import Case, Needle, Spec, build_cases, draw_specs
from retmask_jax.data.prompter import Prompter
from retmask_jax.data.tasks import GridCell
from retmask_jax.evals.measured import Measured
from retmask_jax.evals.scoring import answers
from retmask_jax.evals.suites.samples import check_lengths
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.heads.conditions import hits
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils import stats
from retmask_jax.utils.store import Store


def even_grid(shortest: int, longest: int, n_lengths: int = 40, n_depths: int = 10) -> tuple[list[int], list[float]]:
    """Returns evenly spaced lengths in tokens and depths from 0 to 1; 40 x 10 is usual.

    Raises:
        ValueError: The lengths would not all differ, or there is no depth.
    """
    if not 1 <= n_lengths <= longest - shortest + 1 or n_depths < 1:
        raise ValueError(
            f"{n_lengths} lengths from {shortest} to {longest} and {n_depths} depths make no grid: "
            "take fewer lengths, a longer range and at least one depth"
        )
    lengths = np.linspace(shortest, longest, n_lengths).round().astype(int)
    return lengths.tolist(), np.linspace(0, 1, n_depths).round(4).tolist()


def niah_cases(
    prompter: Prompter,
    sentences: Sequence[str],
    needles: Sequence[Needle],
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    per_cell: int = 1,
    distractors: int = 0,
    seed: int = 0,
) -> list[Case]:
    """Builds per_cell cases for each length and depth, with needles in turn; errors as of `needles.build_cases`."""
    specs: list[Spec] = []
    for length in lengths:
        specs += draw_specs(
            needles, [length], depths, per_length=per_cell * len(depths), distractors=distractors, seed=seed + length
        )
    return build_cases(prompter, sentences, needles, specs)


def run_niah(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 1,
    interventions: Interventions | None = None,
    contrast: ContrastDecoding | None = None,
    kept: Store | None = None,
) -> list[Measured]:
    """Measures two tasks at each length; options as of `scoring.answered`.

    "rouge" is the ROUGE-1 recall (0 to 1) of the answer against the needle's answer part. "exact" is whether the words
    of the answer part are in the answer, one after another. `heat_map` sorts either by depth.

    Raises:
        ValueError: A case exceeds the model's context.
    """
    check_lengths(lm.config.max_length, [case.spec.length + max_new_tokens for case in cases], "needle in a haystack")
    said = answers(
        lm,
        [case.tokens for case in cases],
        interventions,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        contrast=contrast,
        kept=kept,
        what="niah",
    )
    recall = np.array([rouge1_recall(text, case.needle.answer) for text, case in zip(said, cases, strict=True)])
    exact, ids = hits(said, cases).astype(float), _ids(cases)
    measured = []
    for length in sorted({case.spec.length for case in cases}):
        rows = [i for i, case in enumerate(cases) if case.spec.length == length]
        names = tuple(ids[i] for i in rows)
        measured.append(Measured("niah", "rouge", "ROUGE-1 recall", names, recall[rows], False, length))
        measured.append(Measured("niah", "exact", "exact match", names, exact[rows], True, length))
    return measured


def heat_map(measured: Sequence[Measured], task: str = "rouge") -> list[GridCell]:
    """Returns the mean of each cell of `run_niah`, without an interval, by length, then depth."""
    cells = []
    for at_length in sorted((each for each in measured if each.task == task), key=lambda each: each.length or 0):
        by_depth = collections.defaultdict(list)
        for name, value in zip(at_length.ids, at_length.values, strict=True):
            by_depth[float(name.split("/")[0])].append(float(value))
        cells += [
            GridCell.of(stats.exact(float(np.mean(values)), len(values)), length=at_length.length or 0, depth=depth)
            for depth, values in sorted(by_depth.items())
        ]
    return cells


def _ids(cases: Sequence[Case]) -> list[str]:
    """Returns "depth/number of the case in its cell" for each case."""
    seen: collections.Counter = collections.Counter()
    ids = []
    for case in cases:
        cell = case.spec.length, case.spec.depth
        ids.append(f"{case.spec.depth:g}/{seen[cell]}")
        seen[cell] += 1
    return ids
