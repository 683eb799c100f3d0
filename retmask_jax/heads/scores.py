"""Scores of attention heads, in memory and in the JSON format RetMask publishes (arXiv 2601.11020).

scores = HeadScores.load("Llama-3.1-8B-Instruct.json")
scores.heads(threshold=0.1)  # [(15, 30), ...] best first

and sets of heads in the YAML that QRHead publishes (arXiv 2506.09944), see `read_head_set`.
"""

import dataclasses
import json
import math
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Num

_KEY = re.compile(r"(0|[1-9][0-9]*)-(0|[1-9][0-9]*)")
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, eq=False)
class HeadScores:
    """One score per head and counted case; equal when all of them are. The arrays are read-only.

    per_case: f32[L, H, cases], or, where heads counted different numbers of cases, object[L, H] of
        f32[cases]; built from either, or from nested lists. `per_case[layer, head]` is f32[cases]
        in both forms.
    mean: f32[L, H], 0 for a head without a counted case.
    counts: i32[L, H], the number of counted cases.
    Wrong shapes and values that are not finite raise ValueError.

    >>> import retmask_jax as rm
    >>> scores = rm.HeadScores([[[0.5, 1.0], [0.0, 0.25]], [[0.75], []]])  # 2 layers of 2 heads
    >>> print(scores.mean, scores.counts)
    [[0.75  0.125]
     [0.75  0.   ]] [[2 2]
     [1 0]]
    """

    per_case: np.ndarray
    mean: Float32[np.ndarray, "L H"] = dataclasses.field(init=False, repr=False)
    counts: Int32[np.ndarray, "L H"] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        per_case = _pack(self.per_case)
        counts, totals = _count_and_sum(per_case)
        mean = (totals / np.maximum(counts, 1)).astype(np.float32)
        for name, array in (("per_case", per_case), ("mean", mean), ("counts", counts)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __eq__(self, other):
        if not isinstance(other, HeadScores):
            return NotImplemented
        if not np.array_equal(self.counts, other.counts):
            return False
        indices = np.ndindex(self.counts.shape)
        return all(np.array_equal(self.per_case[i], other.per_case[i]) for i in indices)

    @classmethod
    def from_array(cls, mean_LH: Num[Any, "L H"] | Sequence[Sequence[float]]) -> "HeadScores":
        """Scores known only as one number per head, [L, H]: each head counts one case.

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
        """Reads {"layer-head": [score of each counted case, ...]}; the names tell L and H.

        Raises ValueError, in one line with the path, the name and a remedy, for a file that is
        missing or no such JSON, names that are malformed, missing or repeated, and scores that are
        not finite numbers.

        >>> import pathlib, retmask_jax as rm
        >>> pathlib.Path("scores.json").write_text('{"0-0": [0.5, 1.0], "0-1": []}')
        30
        >>> rm.HeadScores.load("scores.json").heads(threshold=0.1)
        [(0, 0)]
        """
        pairs = _read_pairs(path)
        cases = {_parse_key(path, key): _parse_scores(path, key, pairs[key]) for key in pairs}
        n_layers, n_heads = (1 + max(index[axis] for index in cases) for axis in (0, 1))
        if len(cases) != n_layers * n_heads:
            grid = ((i, j) for i in range(n_layers) for j in range(n_heads))
            layer, head = next(index for index in grid if index not in cases)
            raise ValueError(
                f"{path}: head '{layer}-{head}' is missing from {n_layers} layers x {n_heads} "
                "heads: add it ([] if no case counted) or export the file again"
            )
        return cls([[cases[i, j] for j in range(n_heads)] for i in range(n_layers)])

    def save(self, path: str | os.PathLike) -> None:
        """Writes RetMask's JSON and nothing else, under a temporary name that is then renamed.

        >>> import pathlib, retmask_jax as rm
        >>> rm.HeadScores([[[0.5, 1.0], []]]).save("scores.json")
        >>> pathlib.Path("scores.json").read_text()
        '{"0-0": [0.5, 1.0], "0-1": []}\\n'
        """
        path = Path(path)
        indices = np.ndindex(self.counts.shape)
        text = json.dumps({f"{i}-{j}": self.per_case[i, j].tolist() for i, j in indices})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def heads(self, threshold: float | None = None, top_k: int | None = None) -> list[tuple[int, int]]:
        """[(layer, head), ...], best first, ties by layer and head.

        Give one of the two: `threshold` keeps every mean >= threshold, compared in f32, so that a
        mean of 0.1 reaches 0.1; `top_k` keeps the k best. Raises ValueError for both or neither, a
        threshold that is not finite, and a top_k beyond the number of heads.

        >>> import retmask_jax as rm
        >>> scores = rm.HeadScores.from_array([[0.0, 0.5, 0.1], [0.9, 0.0, 0.0]])
        >>> scores.heads(threshold=0.1), scores.heads(top_k=2)
        ([(1, 0), (0, 1), (0, 2)], [(1, 0), (0, 1)])
        """
        if (threshold is None) == (top_k is None):
            raise ValueError(f"heads() needs either threshold or top_k, got {threshold=}, {top_k=}")
        scores = self.mean.ravel()
        n = _count_reaching(scores, threshold) if top_k is None else _checked_top_k(top_k, scores.size)
        best = np.argsort(-scores, kind="stable")[:n]
        return [divmod(int(i), self.mean.shape[1]) for i in best]


@dataclasses.dataclass(frozen=True)
class HeadSet:
    """heads: [(layer, head), ...] best first; model: whose they are, None where the file does not say."""

    heads: list[tuple[int, int]]
    model: str | None = None


def read_head_set(path) -> HeadSet:
    """The heads of a QRHead YAML file: attn_head_set: "16-19,13-3", and model_name_or_path.

    Raises ValueError, in one line with the path, for a file that is missing or no such YAML, a head that is malformed
    or repeated, and "full_heads", which names none.
    """
    import yaml

    try:
        record = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: no head set ({error.strerror}): check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{path}: not YAML ({why}): fetch the file again") from error
    listed = record.get("attn_head_set") if isinstance(record, dict) else None
    if not isinstance(listed, str) or not listed.strip():
        raise ValueError(f'{path}: no head set: needs attn_head_set: "layer-head,layer-head,...", not {listed!r:.40}')
    names = [name.strip() for name in listed.split(",")]
    heads = list(_unique(path, [(name, _parse_key(path, name)) for name in names]).values())
    return HeadSet(heads, record.get("model_name_or_path"))


def _count_reaching(scores, threshold):
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold}")
    return int((scores >= np.float32(threshold)).sum())


def _checked_top_k(top_k, n_heads):
    if not 0 <= top_k <= n_heads or top_k != int(top_k):
        raise ValueError(f"top_k={top_k} must be a whole number up to {n_heads} heads")
    return int(top_k)


def _pack(per_case):
    """Per-case scores as f32[L, H, cases], or object[L, H] of f32[cases] where counts differ."""
    if hasattr(per_case, "__array__"):
        per_case = np.asarray(per_case)  # a device array comes over once, not head by head
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


def _cases(values, layer, head):
    with np.errstate(over="ignore"):  # what f32 cannot hold turns infinite and is named below
        cases = np.array(values, dtype=np.float32)
    if cases.ndim != 1 or not np.isfinite(cases).all():
        raise ValueError(f"head {layer}-{head} needs finite scores [cases], got {cases}")
    return cases


def _count_and_sum(per_case):
    """i32[L, H] cases and f64[L, H] sums: in f32 a long sum could miss a threshold it reaches."""
    if per_case.dtype == object:
        counts = np.vectorize(len, otypes=[np.int32])(per_case)
        return counts, np.vectorize(math.fsum, otypes=[np.float64])(per_case)
    counts = np.full(per_case.shape[:2], per_case.shape[2], dtype=np.int32)
    return counts, per_case.sum(axis=-1, dtype=np.float64)


def _read_pairs(path):
    """The file's object as {name: value}; a repeated name raises instead of hiding the earlier."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        pairs = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except OSError as error:
        raise ValueError(f"{path}: no head scores ({error.strerror}): check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}): export the head scores again") from error
    if type(pairs) is not dict or not pairs:
        raise ValueError(f'{path}: no head scores: needs an object {{"layer-head": [score, ...]}}')
    return pairs


def _unique(path, pairs):
    seen = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"{path}: head {key!r} appears twice: keep one of the two")
        seen[key] = value
    return seen


def _parse_key(path, key):
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{path}: {key!r} names no head: write 'layer-head', such as '15-30'")
    return int(match[1]), int(match[2])


def _parse_scores(path, key, values):
    if type(values) is not list:
        raise ValueError(f"{path}: head '{key}' needs a list, a score per case, not {values!r:.40}")
    for value in values:
        # bool counts as int in Python; a score beyond f32 would turn into infinity.
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            raise ValueError(f"{path}: head '{key}': put a finite number in place of {value!r:.40}")
    return values
