"""What every detector returns: a score for each head and counted case, and why the other cases do not count."""

import collections
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from retmask_jax.heads.scores import HeadScores
from retmask_jax.utils import stats

log = logging.getLogger(__name__)
COUNTED = "counted"


class NoCaseCounts(ValueError):
    """No detection case counts, so no head has a score. `outcomes` says why not, for each case."""

    def __init__(self, message: str, outcomes: Sequence[str]) -> None:
        super().__init__(message)
        self.outcomes = list(outcomes)


@dataclasses.dataclass(frozen=True)
class Detection:
    """The scores of a detector, and what became of each case.

    Attributes:
        scores: Of the counted cases.
        answers: For each case the model's answer, or the gold answer where the detector reads that instead; empty where it
            reads neither.
        outcomes: For each case "counted", or why it does not count.
    """

    scores: HeadScores
    answers: list[str]
    outcomes: list[str]

    @property
    def reasons(self) -> dict[str, int]:
        """Number of cases per outcome."""
        return dict(collections.Counter(self.outcomes))


@dataclasses.dataclass(frozen=True)
class Settled:
    """The head set found on the first cases: how many cases, how many heads, and its Jaccard index with the final set."""

    cases: int
    heads: int
    jaccard: float


def collect(per_case: Sequence[Float[np.ndarray, "L H"]], answers: list[str], outcomes: list[str]) -> Detection:
    """Returns the Detection of cases that have been scored.

    Args:
        per_case: Scores of the counted cases, in the order of the cases.
        answers: Of all cases.
        outcomes: Of all cases.

    Raises:
        NoCaseCounts: No outcome is "counted".
    """
    reasons = dict(collections.Counter(outcomes))
    if not per_case:
        raise NoCaseCounts(
            f"none of {len(outcomes)} detection cases counts: {reasons}; "
            "check the chat template and the lengths, or give max_new_tokens room",
            outcomes,
        )
    log.info("%d of %d cases counted: %s", len(per_case), len(outcomes), reasons)
    return Detection(HeadScores(np.stack(per_case, axis=-1)), answers, outcomes)


def stability(scores: HeadScores, steps: int = 10, **selection: Any) -> list[Settled]:
    """Compares the heads found in the first cases with those found in all, for growing numbers of cases.

    Args:
        scores: Of all cases.
        steps: At how many numbers of cases to look, evenly spread.
        **selection: threshold or top_k, as in `HeadScores.heads`.
    """
    total = int(scores.counts.max())
    final = scores.heads(**selection)
    rows = []
    for n in sorted({max(1, round(total * (i + 1) / steps)) for i in range(steps)}):
        first = HeadScores([[cases[:n] for cases in row] for row in scores.per_case])
        heads = first.heads(**selection)
        rows.append(Settled(n, len(heads), stats.jaccard(heads, final)))
    return rows
