"""Scores of attention heads, in memory and in the JSON format RetMask publishes (arXiv 2601.11020).

scores = HeadScores.load("Llama-3.1-8B-Instruct.json")
scores.heads(threshold=0.1)  # [(15, 30), ...] best first
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Num
from numpy.typing import ArrayLike

from retmask_jax.model.interventions import Head
from retmask_jax.utils.files import write_atomically

_KEY = re.compile(r"(0|[1-9][0-9]*)-(0|[1-9][0-9]*)")
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class HeadScores:
    """One score per head and counted case. Two HeadScores are equal if all scores are. The arrays are read-only.

    Attributes:
        per_case: f32[L, H, cases]; where heads counted different numbers of cases, object[L, H] of f32[cases]. In both
            forms `per_case[layer, head]` is f32[cases].
        mean: 0 for a head without a counted case.
        counts: Number of counted cases.

    Raises:
        ValueError: per_case has another shape, or values that are not finite.

    >>> import retmask_jax as rm
    >>> scores = rm.HeadScores([[[0.5, 1.0], [0.0, 0.25]], [[0.75], []]])  # 2 layers of 2 heads
    >>> print(scores.mean, scores.counts)
    [[0.75  0.125]
     [0.75  0.   ]] [[2 2]
     [1 0]]
    """

    per_case: np.ndarray
    mean: Float32[np.ndarray, "L H"] = dataclasses.field(repr=False)
    counts: Int32[np.ndarray, "L H"] = dataclasses.field(repr=False)

    def __init__(self, per_case: ArrayLike) -> None:
        """Takes an array in one of the two forms of `per_case`, or nested lists of [L][H][cases]."""
        per_case = _pack(per_case)
        counts, totals = _count_and_sum(per_case)
        mean = (totals / np.maximum(counts, 1)).astype(np.float32)
        for name, array in (("per_case", per_case), ("mean", mean), ("counts", counts)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadScores):
            return NotImplemented
        if not np.array_equal(self.counts, other.counts):
            return False
        indices = np.ndindex(self.counts.shape)
        return all(np.array_equal(self.per_case[i], other.per_case[i]) for i in indices)

    @classmethod
    def from_array(cls, mean_LH: Num[Any, "L H"] | Sequence[Sequence[float]]) -> "HeadScores":
        """Makes HeadScores of scores of which only one number per head is known: each head counts one case.

        >>> import retmask_jax as rm
        >>> rm.HeadScores.from_array([[0.0, 0.5], [0.25, 0.0]]).per_case.shape
        (2, 2, 1)
        """
        mean_LH = np.asarray(mean_LH)
        if mean_LH.ndim != 2:
            raise ValueError(f"from_array needs scores [L, H], got shape {mean_LH.shape}")
        return cls(mean_LH[..., None])

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadScores":
        """Reads RetMask's JSON, {"layer-head": [score of each counted case, ...]}. The names give L and H.

        Raises:
            ValueError: The file is missing or not such JSON, a name is malformed, missing or repeated, or a score is
                not a finite number. The message is one line with the path, the name and what to do.

        >>> import pathlib, retmask_jax as rm
        >>> pathlib.Path("scores.json").write_text('{"0-0": [0.5, 1.0], "0-1": []}')
        30
        >>> rm.HeadScores.load("scores.json").heads(threshold=0.1)
        [(0, 0)]
        """
        return from_pairs(path, _read_pairs(path))

    def save(self, path: str | os.PathLike) -> None:
        """Writes RetMask's JSON. A process that is killed leaves the old file or the new one, never a part.

        >>> import pathlib, retmask_jax as rm
        >>> rm.HeadScores([[[0.5, 1.0], []]]).save("scores.json")
        >>> pathlib.Path("scores.json").read_text()
        '{"0-0": [0.5, 1.0], "0-1": []}\\n'
        """
        write_atomically(Path(path), json.dumps(to_pairs(self)) + "\n")

    def heads(self, threshold: float | None = None, top_k: int | None = None) -> list[tuple[int, int]]:
        """Returns the best heads, [(layer, head), ...], best first; equal means are ordered by layer and head.

        Args:
            threshold: Keep the heads with mean >= threshold, compared in f32, so that a mean of 0.1 reaches 0.1.
            top_k: Keep the k best heads. Give either this or threshold.

        Raises:
            ValueError: Both or neither are given, threshold is not finite, or top_k is beyond the number of heads.

        >>> import retmask_jax as rm
        >>> scores = rm.HeadScores.from_array([[0.0, 0.5, 0.1], [0.9, 0.0, 0.0]])
        >>> scores.heads(threshold=0.1), scores.heads(top_k=2)
        ([(1, 0), (0, 1), (0, 2)], [(1, 0), (0, 1)])
        """
        scores = self.mean.ravel()
        if threshold is not None and top_k is None:
            n = _count_reaching(scores, threshold)
        elif top_k is not None and threshold is None:
            n = _checked_top_k(top_k, scores.size)
        else:
            raise ValueError(f"heads() needs either threshold or top_k, got {threshold=}, {top_k=}")
        best = np.argsort(-scores, kind="stable")[:n]
        return [divmod(int(i), self.mean.shape[1]) for i in best]


def from_pairs(path: str | os.PathLike, pairs: Any) -> HeadScores:
    """Makes HeadScores of {"layer-head": [score of each counted case, ...]}, the content of a file; errors as of
    `HeadScores.load`."""
    if type(pairs) is not dict or not pairs:
        raise ValueError(f'{path}: no head scores: needs an object {{"layer-head": [score, ...]}}')
    cases = {parse_name(path, name): _parse_scores(path, name, pairs[name]) for name in pairs}
    n_layers, n_heads = (1 + max(index[axis] for index in cases) for axis in (0, 1))
    if len(cases) != n_layers * n_heads:
        grid = ((i, j) for i in range(n_layers) for j in range(n_heads))
        layer, head = next(index for index in grid if index not in cases)
        raise ValueError(
            f"{path}: head '{layer}-{head}' is missing from {n_layers} layers x {n_heads} "
            "heads: add it ([] if no case counted) or export the file again"
        )
    return HeadScores([[cases[i, j] for j in range(n_heads)] for i in range(n_layers)])


def to_pairs(scores: HeadScores) -> dict[str, list[float]]:
    """Returns scores as {"layer-head": [score of each counted case, ...]}, layer by layer."""
    return {f"{i}-{j}": scores.per_case[i, j].tolist() for i, j in np.ndindex(scores.counts.shape)}


def parse_name(path: str | os.PathLike, name: str) -> Head:
    """Returns the head that a file calls "layer-head"; ValueError for any other text."""
    match = _KEY.fullmatch(name)
    if match is None:
        raise ValueError(f"{path}: {name!r} names no head: write 'layer-head', such as '15-30'")
    return int(match[1]), int(match[2])


def unique_names(path: str | os.PathLike, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs as an object; ValueError where a name is repeated, of which json.loads would drop the first value."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"{path}: head {key!r} appears twice: keep one of the two")
        seen[key] = value
    return seen


def _count_reaching(scores: Float32[np.ndarray, " heads"], threshold: float) -> int:
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold}")
    return int((scores >= np.float32(threshold)).sum())


def _checked_top_k(top_k: float, n_heads: int) -> int:
    if not 0 <= top_k <= n_heads or top_k != int(top_k):
        raise ValueError(f"top_k={top_k} must be a whole number up to {n_heads} heads")
    return int(top_k)


def _pack(per_case: Any) -> np.ndarray:
    """Returns f32[L, H, cases], or object[L, H] of f32[cases] where counts differ."""
    if hasattr(per_case, "__array__"):
        per_case = np.asarray(per_case)  # copies an array from its device at once, not head by head
        if per_case.ndim != (2 if per_case.dtype == object else 3):
            raise ValueError(f"needs scores [L, H, cases], got shape {per_case.shape}")
    rows = [[_cases(cases, i, j) for j, cases in enumerate(row)] for i, row in enumerate(per_case)]
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1 or widths == [0]:
        raise ValueError(f"needs layers with as many heads in each, got widths {widths}")
    if len({cases.size for row in rows for cases in row}) == 1:
        return np.array(rows)
    ragged = np.empty((len(rows), widths[0]), dtype=object)
    for i, j in np.ndindex(ragged.shape):
        ragged[i, j] = rows[i][j]
        ragged[i, j].setflags(write=False)
    return ragged


def _cases(values: Any, layer: int, head: int) -> Float32[np.ndarray, " cases"]:
    with np.errstate(over="ignore"):  # values beyond f32 become infinite, and are refused below
        cases = np.array(values, dtype=np.float32)
    if cases.ndim != 1 or not np.isfinite(cases).all():
        raise ValueError(f"head {layer}-{head} needs finite scores [cases], got {cases}")
    return cases


def _count_and_sum(per_case: np.ndarray) -> tuple[Int32[np.ndarray, "L H"], Float64[np.ndarray, "L H"]]:
    """Returns the number of cases and the sum of scores; in f32 a long sum could miss a threshold that it reaches."""
    if per_case.dtype == object:
        counts = np.vectorize(len, otypes=[np.int32])(per_case)
        return counts, np.vectorize(math.fsum, otypes=[np.float64])(per_case)
    counts = np.full(per_case.shape[:2], per_case.shape[2], dtype=np.int32)
    return counts, per_case.sum(axis=-1, dtype=np.float64)


def _read_pairs(path: str | os.PathLike) -> Any:
    """Returns the JSON value of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=lambda pairs: unique_names(path, pairs))
    except OSError as error:
        raise ValueError(f"{path}: no head scores ({error.strerror}): check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}): export the head scores again") from error


def _parse_scores(path: str | os.PathLike, key: str, values: Any) -> list[float]:
    if type(values) is not list:
        raise ValueError(f"{path}: head '{key}' needs a list, a score per case, not {values!r:.40}")
    for value in values:
        # isinstance would take a bool as an int; a score beyond f32 would become infinite.
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            raise ValueError(f"{path}: head '{key}': put a finite number in place of {value!r:.40}")
    return values
