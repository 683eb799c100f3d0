"""Preference pairs as tokens: encoded once, written to disk, and put into batches of a few shapes.

Rows are memory-mapped arrays and not records of a store (utils/store.py): a million pairs are gigabytes of integers
that training reads at random positions, and as JSON they would be several times larger and parsed at every access. They
are written in one piece and belong to one identity, which is checked in the same way.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.pair_formats import SIDES
from retmask_jax.data.prompter import Prompter
from retmask_jax.hf.end_tokens import Ends
from retmask_jax.utils.files import read_json, write_json
from retmask_jax.utils.hosts import first_alone
from retmask_jax.utils.store import check_identity

# Of a row or a prompt, and of an answer: widths are multiples of this, and how often it comes in a pair.
_STEPS, _COPIES = (64, 16), (1, len(SIDES))
# Limits of what is tokenized in one call: a tokenizer returns some hundred bytes for each token.
_RECORDS, _CHARACTERS = 1024, 2**22
_FILES = {"flat": np.int32, "bounds": np.int64, "ids": np.uint8, "id_ends": np.int64}


@dataclasses.dataclass(frozen=True)
class PairRows:
    """N pairs in one flat array of tokens. The arrays may be memory-mapped; then only what is used is read from disk.

    Attributes:
        ids: Id of each pair's record.
        flat: Tokens i32 of all pairs.
        bounds: i64[N,4], where prompt, chosen answer and rejected answer of a pair begin in `flat`, and where the pair
            ends.
        cut: How many answers were shortened.
        prompts_cut: How many prompts were shortened.
    """

    ids: Sequence[str]
    flat: np.ndarray
    bounds: np.ndarray
    cut: int = 0
    prompts_cut: int = 0

    def __len__(self) -> int:
        return len(self.bounds)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """i64[N,2]: tokens of the prompt, and of the longer answer."""
        prompt, chosen, rejected = np.diff(self.bounds, axis=1).T
        return np.stack([prompt, np.maximum(chosen, rejected)], axis=1)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """i64[N]: tokens of the prompt and the longer answer."""
        return self.sizes.sum(axis=1)

    def chosen(self, pairs: Sequence[int] | np.ndarray, widths: tuple[int, ...], pad_id: int) -> dict[str, np.ndarray]:
        """Returns prompts with their chosen answers, padded to the only one of `widths`.

        Keys are tokens i32[n,W], and counted bool[n,W], which is True at the tokens of the answers.
        """
        (width,) = widths
        tokens, counted = np.full((len(pairs), width), pad_id, np.int32), np.zeros((len(pairs), width), bool)
        for row, (start, chosen, rejected, _) in enumerate(self.bounds[pairs]):
            tokens[row, : rejected - start] = self.flat[start:rejected]
            counted[row, chosen - start : rejected - start] = True
        return {"tokens": tokens, "counted": counted}

    def forked(self, pairs: Sequence[int] | np.ndarray, widths: tuple[int, ...], pad_id: int) -> dict[str, np.ndarray]:
        """Returns prompts and both of their answers, apart and padded to the two widths P and A.

        Keys are prompts i32[n,P], their lengths i32[n], answers i32[n,2,A], the chosen one first, and counted bool[n,2,A],
        which is True at their tokens; also longest i32[n], a length that all N pairs fit in as rows, for models whose
        rotary frequencies depend on it.
        """
        width, own = widths
        n, longest = len(pairs), _rounded(int(self.lengths.max()), _STEPS[0])
        prompts, lengths = np.full((n, width), pad_id, np.int32), np.zeros(n, np.int32)
        answers, counted = np.full((n, len(SIDES), own), pad_id, np.int32), np.zeros((n, len(SIDES), own), bool)
        for row, bounds in enumerate(self.bounds[pairs]):
            lengths[row] = bounds[1] - bounds[0]
            prompts[row, : lengths[row]] = self.flat[bounds[0] : bounds[1]]
            for side, (first, last) in enumerate(itertools.pairwise(bounds[1:])):
                answers[row, side, : last - first] = self.flat[first:last]
                counted[row, side, : last - first] = True
        whole = np.full(n, longest, np.int32)
        return {"prompts": prompts, "lengths": lengths, "answers": answers, "counted": counted, "longest": whole}


@dataclasses.dataclass(frozen=True)
class Part:
    """Indices of pairs that pass through the model together, and the widths that their tokens are padded to."""

    pairs: np.ndarray
    widths: tuple[int, ...]


def encode_blocks(
    prompter: Prompter, records: Iterable[dict], *, ends: Ends, max_tokens: int, max_prompt_tokens: int
) -> Iterator[PairRows]:
    """Yields records {id, messages, chosen, rejected, ...} as token rows, in blocks while the records are read.

    One block of records is in memory at a time. A finished answer ends with the token that `ends` gives. An answer that
    was cut off, when it was sampled or here, gets no such token, so that a model is not taught to stop in mid-sentence.

    Args:
        max_tokens: Longest prompt with its answer; longer answers lose their end.
        max_prompt_tokens: Longest prompt; longer ones lose their beginning.

    Raises:
        ValueError: A prompt has no tokens.
    """
    for part in _blocks(records):
        prompts = prompter.encode_many([prompter.render_messages(record["messages"]) for record in part])
        answers = [_answers(prompter.tokenizer, part, side, ends) for side in SIDES]
        ids = [str(record["id"]) for record in part]
        part.clear()
        pieces, cut, prompts_cut = [], 0, 0
        for name, prompt, *sides in zip(ids, prompts, *answers, strict=True):
            if not prompt:
                raise ValueError(f"the prompt of pair {name} has no tokens: leave the pair out")
            kept = prompt[-max_prompt_tokens:]
            room = max_tokens - len(kept)
            prompts_cut += len(prompt) > max_prompt_tokens
            cut += sum(len(answer) > room for answer in sides)
            pieces += [np.array(piece, np.int32) for piece in (kept, *(answer[:room] for answer in sides))]
        del prompts, answers
        last_N3 = np.cumsum([len(piece) for piece in pieces]).reshape(-1, 3)
        bounds = np.concatenate([np.concatenate([[0], last_N3[:-1, 2]])[:, None], last_N3], axis=1)
        yield PairRows(ids, np.concatenate(pieces), bounds, cut, prompts_cut)


def kept_rows(folder: Path, identity: dict[str, Any], blocks: Callable[[], Iterable[PairRows]]) -> PairRows:
    """Returns the rows in a folder, memory-mapped; if there are none, writes those of blocks() there first.

    Only the first host encodes and writes. It appends each block to the files as it comes, and writes rows.json last,
    which marks them as complete.

    Args:
        identity: What the rows depend on, such as hashes of tokenizer, template and data.

    Raises:
        ValueError: The rows in the folder have another identity, or blocks() raises it on the first host; all hosts
            raise it.
    """
    about = folder / "rows.json"

    def write():
        if not about.exists():
            write_json(about, {"identity": identity} | _append(folder, blocks()))

    first_alone(write)
    facts = read_json(about)
    check_identity(folder, facts["identity"], identity)
    flat, bounds, id_bytes, id_ends = (
        _mapped(_file(folder, name), dtype, facts["sizes"][name]) for name, dtype in _FILES.items()
    )
    return PairRows(_Texts(id_bytes, id_ends), flat, bounds.reshape(-1, 4), facts["cut"], facts["prompts_cut"])


def _append(folder: Path, blocks: Iterable[PairRows]) -> dict[str, Any]:
    """Writes the blocks one after the other into the files of a folder; returns the facts for rows.json."""
    folder.mkdir(parents=True, exist_ok=True)
    cuts, sizes = np.zeros(2, int), dict.fromkeys(_FILES, 0)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(_file(folder, name), "wb")) for name in _FILES}
        for block in blocks:
            names = [text.encode() for text in block.ids]
            parts = (
                block.flat,
                block.bounds + sizes["flat"],
                b"".join(names),
                sizes["ids"] + np.cumsum([*map(len, names)]),
            )
            for (name, dtype), part in zip(_FILES.items(), parts, strict=True):
                array = np.frombuffer(part, dtype) if isinstance(part, bytes) else np.asarray(part, dtype)
                files[name].write(array.tobytes())
                sizes[name] += array.size
            cuts += block.cut, block.prompts_cut
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())  # before rows.json says that it is complete
    return {"cut": int(cuts[0]), "prompts_cut": int(cuts[1]), "sizes": sizes}


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _mapped(path: Path, dtype, size: int) -> np.ndarray:
    """A file of numbers, memory-mapped; ValueError if it does not hold `size` numbers."""
    held = path.stat().st_size if path.exists() else 0
    if held != size * np.dtype(dtype).itemsize:
        raise ValueError(
            f"{path} has {held} bytes, its rows.json says {size * np.dtype(dtype).itemsize}: delete {path.parent}"
        )
    return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)


@dataclasses.dataclass(frozen=True)
class _Texts(Sequence[str]):
    """Texts in one array of bytes u8, and where each of them ends, i64[N]."""

    data: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:  # pyrefly: ignore[bad-override]  (no slices are taken)
        end = int(self.ends[i])
        i %= len(self.ends)
        return self.data[int(self.ends[i - 1]) if i else 0 : end].tobytes().decode()


def batches(n: int, batch_size: int, seed: int) -> Any:
    """Returns an endless iterator over indices of pairs, i64[batch_size], with `get_state` and `set_state`.

    Each epoch is shuffled anew, and all hosts get the same batches.

    Raises:
        ValueError: There are fewer than batch_size pairs.
    """
    import grain

    if n < batch_size:
        raise ValueError(f"{n} pairs are fewer than a batch of {batch_size}: add prompts or lower train.batch_size")
    order = grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size)
    return iter(order.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def widths(sizes_NS: np.ndarray, n: int, most: int) -> tuple[list[int], ...]:
    """Returns for each of the S columns of sizes the widths that it is padded to, ascending and evenly spaced.

    Pairs are padded to at most n combinations of them, because each is a compiled program. Of all such grids, it is the one
    that pads the pairs least.

    Args:
        sizes_NS: `PairRows.lengths` as a column, of rows of a prompt and an answer, or `PairRows.sizes`.
        most: The largest width, which is the model's context.

    Raises:
        ValueError: A prompt with its answer is longer than that.
    """
    if (longest := int(sizes_NS.sum(axis=1).max())) > most:
        raise ValueError(f"a pair has {longest} tokens, the model's context is {most}: lower train.max_tokens")

    def evenly(s: int, k: int) -> list[int]:
        longest = _rounded(int(sizes_NS[:, s].max()), _STEPS[s])
        return sorted({min(_rounded(-(-longest * i // k), _STEPS[s]), most) for i in range(1, k + 1)})

    def tokens(grid: tuple[list[int], ...]) -> int:
        return int((_fitting(grid, sizes_NS) * _COPIES[: len(grid)]).sum())

    counts = itertools.product(range(1, n + 1), repeat=sizes_NS.shape[1])
    grids = [tuple(itertools.starmap(evenly, enumerate(each))) for each in counts if math.prod(each) <= n]
    return min(grids, key=lambda grid: (tokens(grid), math.prod(map(len, grid))))


def parts(sizes_NS: np.ndarray, pairs: np.ndarray, size: int, allowed: tuple[list[int], ...]) -> Iterator[Part]:
    """Yields pairs in parts of similar sizes, the largest first, each of the smallest allowed widths that fit.

    Args:
        sizes_NS: As of `widths`.
        pairs: Indices of the pairs to divide.
        size: Pairs of a part. The last part repeats its last pair where the number of pairs is no multiple of it.
        allowed: The result of `widths`.
    """
    sizes_NS = sizes_NS[pairs]
    widths_NS = _fitting(allowed, sizes_NS)
    order = np.lexsort((-sizes_NS.sum(axis=1), *-widths_NS.T[::-1]))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        part = np.concatenate([part, np.repeat(part[-1:], size - len(part))])
        yield Part(np.asarray(pairs)[part], tuple(widths_NS[part].max(axis=0).tolist()))


def one_of_each(sizes_NS: np.ndarray, allowed: tuple[list[int], ...]) -> list[Part]:
    """Returns a pair of each combination of widths that a pair alone would have; arguments as of `parts`."""
    found_XS, pairs = np.unique(_fitting(allowed, sizes_NS), axis=0, return_index=True)
    return [Part(np.array([pair]), tuple(found)) for found, pair in zip(found_XS.tolist(), pairs.tolist(), strict=True)]


def _blocks(records: Iterable[dict]) -> Iterator[list[dict]]:
    """The records in lists of at most _RECORDS, shorter where they hold more than _CHARACTERS."""
    block, size = [], 0
    for record in records:
        block.append(record)
        size += sum(len(turn["content"]) for turn in record["messages"]) + sum(len(record[side]) for side in SIDES)
        if len(block) >= _RECORDS or size >= _CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _answers(tokenizer, records, side: str, ends: Ends) -> list[list[int]]:
    ids = tokenizer([record[side] for record in records], add_special_tokens=False)["input_ids"]
    return [row + ends.after(record, side) for row, record in zip(ids, records, strict=True)]


def _fitting(grid: tuple[list[int], ...], sizes_NS: np.ndarray) -> np.ndarray:
    """i64[N,S]: the smallest width of its column that each size fits in."""
    return np.stack([np.take(grid[s], np.searchsorted(grid[s], sizes_NS[:, s])) for s in range(len(grid))], axis=1)


def _rounded(length: int, step: int) -> int:
    return -(-length // step) * step
