"""Needle in a haystack over length and depth: the numbers of the usual heat map."""

import collections
from collections.abc import Sequence

import numpy as np

from retmask_jax.data.answers import rouge1_recall
from retmask_jax.data.needles import Case, Needle, Spec, build_cases, draw_specs
from retmask_jax.data.prompter import Prompter
from retmask_jax.evals.measured import Measured
from retmask_jax.evals.scoring import answers
from retmask_jax.evals.suites.samples import check_lengths
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.conditions import hits
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.store import Store


def even_grid(shortest: int, longest: int, n_lengths: int = 40, n_depths: int = 10) -> tuple[list[int], list[float]]:
    """(lengths in tokens, depths from 0 to 1), evenly spaced; 40 x 10 is usual.

    Raises ValueError where they would not all differ.
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
    """per_cell cases for each length and depth, with needles in turn. Errors as in `needles.build_cases`."""
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
    kept: Store | None = None,
) -> list[Measured]:
    """Two Measured for each length: "rouge", ROUGE-1 recall (0 to 1) of the answer against the needle's answer part, and
    "exact", whether its words occur in the answer as they stand. `heat_map` sorts them by depth.

    Raises ValueError where a case exceeds the model's context.
    """
    check_lengths(lm, [case.spec.length + max_new_tokens for case in cases], "needle in a haystack")
    said = answers(
        lm,
        [case.tokens for case in cases],
        interventions,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
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


def heat_map(measured: Sequence[Measured], task: str = "rouge") -> list[dict]:
    """The mean of each cell of `run_niah`: [{"length", "depth", "value", "n"}, ...], by length, then depth."""
    cells = []
    for one in sorted((one for one in measured if one.task == task), key=lambda one: one.length):
        by_depth = collections.defaultdict(list)
        for name, value in zip(one.ids, one.values, strict=True):
            by_depth[float(name.split("/")[0])].append(float(value))
        cells += [
            {"length": one.length, "depth": depth, "value": float(np.mean(values)), "n": len(values)}
            for depth, values in sorted(by_depth.items())
        ]
    return cells


def _ids(cases: Sequence[Case]) -> list[str]:
    """ "depth/number of the case in its cell" for each case."""
    seen: collections.Counter = collections.Counter()
    ids = []
    for case in cases:
        cell = case.spec.length, case.spec.depth
        ids.append(f"{case.spec.depth:g}/{seen[cell]}")
        seen[cell] += 1
    return ids
