"""Preference pairs as token rows: encoded once, kept on disk, and put into batches of a few widths."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.end_tokens import Ends
from retmask_jax.files import write_array, write_json
from retmask_jax.haystack import Prompter
from retmask_jax.hosts import wait_for_all

SIDES = ("chosen", "rejected")
_WIDTH_STEP = 64
_AT_ONCE = 4096  # records that are tokenized together


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

    def padded(self, pairs: Sequence[int], width: int, pad_id: int) -> dict[str, np.ndarray]:
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


def encode_pairs(prompter: Prompter, records: Sequence[dict], *, ends: Ends, max_tokens: int,
                 max_prompt_tokens: int) -> PairRows:  # fmt: skip
    """Records {id, messages, chosen, rejected, ...} as token rows.

    Prompts beyond max_prompt_tokens keep their end, answers are cut where the whole exceeds max_tokens. A finished
    answer ends as `ends` says; one that was cut off, when it was sampled or here, has no end: a model is not taught to
    stop in mid-sentence.
    """
    pieces, lengths, cut, prompts_cut = [], [], 0, 0
    for start in range(0, len(records), _AT_ONCE):
        part = records[start : start + _AT_ONCE]
        prompts = prompter.encode_many([prompter.render_messages(record["messages"]) for record in part])
        answers = [_answers(prompter.tokenizer, part, side, ends) for side in SIDES]
        for prompt, *sides in zip(prompts, *answers, strict=True):
            kept = prompt[-max_prompt_tokens:]
            room = max_tokens - len(kept)
            prompts_cut += len(prompt) > max_prompt_tokens
            cut += sum(len(answer) > room for answer in sides)
            row = [kept, *(answer[:room] for answer in sides)]
            lengths.append([len(piece) for piece in row])
            pieces += row
    ends = np.cumsum(np.array(lengths, np.int64).reshape(-1))
    bounds = np.concatenate([np.concatenate([[0], ends[2:-1:3]])[:, None], ends.reshape(-1, 3)], axis=1)
    flat = np.fromiter((token for piece in pieces for token in piece), np.int32, count=int(ends[-1]))
    return PairRows([record["id"] for record in records], flat, bounds, cut, prompts_cut)


def kept_rows(folder: Path, identity: dict[str, Any], encode) -> PairRows:
    """The rows kept in folder, memory-mapped; encoded by encode() and written there first where there are none.

    identity: what the rows depend on, such as hashes of tokenizer, template and data. Raises ValueError where the
    rows in the folder are of another identity, naming what differs.
    """
    about = folder / "rows.json"
    if not about.exists():
        rows = encode()
        write_array(folder / "flat.npy", rows.flat)
        write_array(folder / "bounds.npy", rows.bounds)
        facts = {"cut": rows.cut, "prompts_cut": rows.prompts_cut, "ids": list(rows.ids)}
        write_json(about, {"identity": identity} | facts)
        wait_for_all("rows")
    facts = json.loads(about.read_text())
    check_identity(folder, facts["identity"], identity)
    flat, bounds = (np.load(folder / name, mmap_mode="r") for name in ("flat.npy", "bounds.npy"))
    return PairRows(facts["ids"], flat, bounds, facts["cut"], facts["prompts_cut"])


def check_identity(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError where what a file was made from is not what it would be made from now."""
    changed = [name for name in wanted if stored.get(name) != wanted[name]]
    if changed:
        shown = ", ".join(f"{name} {stored.get(name)}, now {wanted[name]}" for name in changed)
        raise ValueError(f"{path} was made with another {shown}: delete it to make it again")


def batches(n: int, batch_size: int, seed: int):
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


def _answers(tokenizer, records, side: str, ends: Ends) -> list[list[int]]:
    ids = tokenizer([record[side] for record in records], add_special_tokens=False)["input_ids"]
    return [row + ends.after(record, side) for row, record in zip(ids, records, strict=True)]


def _rounded(length: int) -> int:
    return -(-length // _WIDTH_STEP) * _WIDTH_STEP
