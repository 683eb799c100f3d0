"""Preference pairs as token rows: encoded once, kept on disk, and put into batches of a few widths."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.prompter import Prompter
from retmask_jax.hf.end_tokens import Ends
from retmask_jax.utils.files import read_json, write_json
from retmask_jax.utils.hosts import first_alone
from retmask_jax.utils.store import check_identity

SIDES = ("chosen", "rejected")
_WIDTH_STEP = 64
# What is tokenized together: a tokenizer returns some hundred bytes for each token.
_RECORDS, _CHARACTERS = 1024, 2**22
_FILES = {"flat": np.int32, "bounds": np.int64, "ids": np.uint8, "id_ends": np.int64}


@dataclasses.dataclass(frozen=True)
class PairRows:
    """N pairs in one flat array: pair i is prompt, chosen and rejected answer between its bounds i64[N,4].

    ids: of the records. cut, prompts_cut: how many answers and prompts were shortened. Arrays may be memory-mapped:
    of a file on disk only what is asked for is read.
    """

    ids: Sequence[str]
    flat: np.ndarray
    bounds: np.ndarray
    cut: int = 0
    prompts_cut: int = 0

    def __len__(self) -> int:
        return len(self.bounds)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """i64[N]: tokens of the prompt and the longer answer."""
        prompt, chosen, rejected = np.diff(self.bounds, axis=1).T
        return prompt + np.maximum(chosen, rejected)

    def padded(self, pairs: Sequence[int] | np.ndarray, width: int, pad_id: int) -> dict[str, np.ndarray]:
        """{"chosen", "rejected": i32[n,width], "chosen_mask", "rejected_mask": bool[n,width], the answers' tokens}."""
        out = {side: np.full((len(pairs), width), pad_id, np.int32) for side in SIDES}
        out |= {f"{side}_mask": np.zeros((len(pairs), width), bool) for side in SIDES}
        for row, pair in enumerate(pairs):
            start, chosen, rejected, end = self.bounds[pair]
            prompt = chosen - start
            for side, first, last in (("chosen", chosen, rejected), ("rejected", rejected, end)):
                out[side][row, :prompt] = self.flat[start:chosen]
                out[side][row, prompt : prompt + last - first] = self.flat[first:last]
                out[f"{side}_mask"][row, prompt : prompt + last - first] = True
        return out


@dataclasses.dataclass(frozen=True)
class Part:
    """Pairs that pass through the model together, padded to `width` tokens."""

    pairs: np.ndarray
    width: int


def encode_pairs(
    prompter: Prompter, records: Iterable[dict], *, ends: Ends, max_tokens: int, max_prompt_tokens: int
) -> PairRows:
    """Records {id, messages, chosen, rejected, ...} as token rows, all in memory.

    Prompts beyond max_prompt_tokens keep their end, answers are cut where the whole exceeds max_tokens. A finished
    answer ends as `ends` says; one that was cut off, when it was sampled or here, has no end: a model is not taught to
    stop in mid-sentence.
    """
    blocks = encode_blocks(prompter, records, ends=ends, max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens)
    done, offset = list(blocks), 0
    bounds = [np.zeros((0, 4), np.int64)]
    for block in done:
        bounds.append(block.bounds + offset)
        offset += len(block.flat)
    flat = np.concatenate([np.zeros(0, np.int32), *(block.flat for block in done)])
    ids = [i for block in done for i in block.ids]
    return PairRows(ids, flat, np.concatenate(bounds), *_cuts(done))


def encode_blocks(
    prompter: Prompter, records: Iterable[dict], *, ends: Ends, max_tokens: int, max_prompt_tokens: int
) -> Iterator[PairRows]:
    """The rows of `encode_pairs` in blocks, as the records are read: one block of records is held at a time."""
    for part in _blocks(records):
        prompts = prompter.encode_many([prompter.render_messages(record["messages"]) for record in part])
        answers = [_answers(prompter.tokenizer, part, side, ends) for side in SIDES]
        ids = [str(record["id"]) for record in part]
        part.clear()
        pieces, cut, prompts_cut = [], 0, 0
        for prompt, *sides in zip(prompts, *answers, strict=True):
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
    """The rows kept in folder, memory-mapped; where there are none, those of blocks() are written there first.

    Only the first host encodes and writes: every block is appended to the files as it comes, and rows.json, which says
    that they are whole, is written last. identity: what the rows depend on, such as hashes of tokenizer, template and
    data. Raises ValueError where the rows in the folder are of another identity, naming what differs, and on every host
    what blocks() raises on the first.
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
    """Write the blocks one after the other into the files of a folder; returns what rows.json says of them."""
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
            os.fsync(file.fileno())  # what rows.json says must be there
    return {"cut": int(cuts[0]), "prompts_cut": int(cuts[1]), "sizes": sizes}


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _mapped(path: Path, dtype, size: int) -> np.ndarray:
    """A file of numbers, memory-mapped; ValueError if it does not hold so many."""
    held = path.stat().st_size if path.exists() else 0
    if held != size * np.dtype(dtype).itemsize:
        raise ValueError(
            f"{path} has {held} bytes, its rows.json says {size * np.dtype(dtype).itemsize}: delete {path.parent}"
        )
    return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)


@dataclasses.dataclass(frozen=True)
class _Texts(Sequence[str]):
    """Texts in one array of bytes u8; ends i64[N]."""

    data: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:  # pyrefly: ignore[bad-override]  (no slices are taken)
        end = int(self.ends[i])
        i %= len(self.ends)
        return self.data[int(self.ends[i - 1]) if i else 0 : end].tobytes().decode()


def _cuts(blocks: Sequence[PairRows]) -> tuple[int, int]:
    return sum(block.cut for block in blocks), sum(block.prompts_cut for block in blocks)


def batches(n: int, batch_size: int, seed: int) -> Any:
    """An endless iterator over i64[batch_size] pair numbers with `get_state` and `set_state`; each epoch has its own
    shuffle, and what comes is the same on every host.

    Raises ValueError if there are fewer pairs than a batch.
    """
    import grain

    if n < batch_size:
        raise ValueError(f"{n} pairs are fewer than a batch of {batch_size}: add prompts or lower train.batch_size")
    order = grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size)
    return iter(order.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def widths(rows: PairRows, n: int, most: int) -> list[int]:
    """At most n widths, evenly spaced up to that of the longest pair, none above `most`: each is a compiled program."""
    longest = _rounded(int(rows.lengths.max()))
    return sorted({min(_rounded(-(-longest * k // n)), most) for k in range(1, n + 1)})


def parts(rows: PairRows, pairs: np.ndarray, size: int, allowed: Sequence[int]) -> Iterator[Part]:
    """The pairs in parts of `size`, similar lengths together and the longest first, each as wide as it has to be.

    The last part repeats its last pair where the number does not divide.
    """
    order = np.asarray(pairs)[np.argsort(-rows.lengths[pairs], kind="stable")]
    for start in range(0, len(order), size):
        part = order[start : start + size]
        part = np.concatenate([part, np.repeat(part[-1:], size - len(part))])
        yield Part(part, next(width for width in allowed if width >= rows.lengths[part[0]]))


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


def _rounded(length: int) -> int:
    return -(-length // _WIDTH_STEP) * _WIDTH_STEP
