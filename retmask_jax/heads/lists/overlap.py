"""How many heads lists have in common, beside what chance gives."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from retmask_jax.model.interventions import Head
from retmask_jax.utils import stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """The heads that lists a and b have in common.

    Attributes:
        shared: How many.
        jaccard: Of all heads that are in one of them, the share that is in both.
        expected: How many random lists of these lengths share on average.
        p_value: The chance that random lists share at least so many (hypergeometric).
    """

    a: str
    b: str
    shared: int
    jaccard: float
    expected: float
    p_value: float


def overlaps(lists: Mapping[str, Sequence[Head]], total: int) -> list[Overlap]:
    """Compares each two lists of a model with `total` heads.

    >>> (pair,) = overlaps({"a": [(0, 0), (0, 1)], "b": [(0, 1), (1, 0)]}, total=8)
    >>> pair.shared, pair.jaccard, pair.expected
    (1, 0.3333333333333333, 0.5)
    """
    return [
        _overlap(a, b, set(first), set(second), total)
        for (a, first), (b, second) in itertools.combinations(lists.items(), 2)
    ]


def _overlap(a: str, b: str, first: set[Head], second: set[Head], total: int) -> Overlap:
    from scipy.stats import hypergeom

    shared = len(first & second)
    return Overlap(
        a=a,
        b=b,
        shared=shared,
        jaccard=stats.jaccard(first, second),
        expected=len(first) * len(second) / total,
        p_value=float(hypergeom.sf(shared - 1, total, len(first), len(second))),
    )
