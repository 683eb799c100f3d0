"""Preference pairs: records on disk, token rows for training, and the deterministic loader."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from retmask_jax.generate import pad_rows
from retmask_jax.haystack import Prompter

_LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class Rows:
    """Token rows of answers behind their prompts: tokens i32[N,T] and loss_mask bool[N,T] (the answer's tokens)."""

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairRows:
    """Chosen and rejected rows of the same width; cut: how many answers were shortened, prompts_cut likewise."""

    chosen: Rows
    rejected: Rows
    cut: int
    prompts_cut: int

    def __len__(self) -> int:
        return len(self.chosen.tokens)


def encode_pairs(prompter: Prompter, records: Sequence[dict], *, eos_id: int, max_tokens: int,
                 max_prompt_tokens: int) -> PairRows:  # fmt: skip
    """Records {messages, chosen, rejected, ...} as token rows.

    Prompts beyond max_prompt_tokens keep their end, answers are cut where the whole exceeds max_tokens. An answer
    that was not cut off when it was sampled ends with the EOS id.
    """
    prompts = [prompter.encode(prompter.render_messages(record["messages"]))[0] for record in records]
    kept = [prompt[-max_prompt_tokens:] for prompt in prompts]
    sides = {}
    cut = 0
    for side in ("chosen", "rejected"):
        answers = [
            _answer_ids(prompter.tokenizer, record[side], record[f"{side}_finished"], eos_id) for record in records
        ]
        room = [max_tokens - len(prompt) for prompt in kept]
        cut += sum(len(answer) > space for answer, space in zip(answers, room, strict=True))
        sides[side] = [answer[:space] for answer, space in zip(answers, room, strict=True)]
    width = max(len(p) + len(a) for side in sides.values() for p, a in zip(kept, side, strict=True))
    width = min(-(-width // _LENGTH_STEP) * _LENGTH_STEP, max(width, max_tokens))
    rows = {side: _rows(kept, answers, eos_id, width) for side, answers in sides.items()}
    prompts_cut = sum(len(prompt) > max_prompt_tokens for prompt in prompts)
    return PairRows(rows["chosen"], rows["rejected"], cut, prompts_cut)


def batches(examples: dict[str, np.ndarray], batch_size: int, seed: int) -> Any:
    """An endless, randomly accessible sequence of batches: item i is the batch of step i, whatever came before.

    Every epoch has its own shuffle. Raises ValueError if there are fewer examples than a batch.
    """
    import grain

    size = len(next(iter(examples.values())))
    if size < batch_size:
        raise ValueError(
            f"{size} examples are fewer than a batch of {batch_size}: add prompts or lower train.batch_size"
        )
    source = grain.MapDataset.range(size).seed(seed).shuffle().repeat().batch(batch_size)
    return source.map(lambda rows: {name: values[rows] for name, values in examples.items()})


def _answer_ids(tokenizer, text: str, finished: bool, eos_id: int) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids + [eos_id] if finished else ids


def _rows(prompts, answers, pad_id: int, width: int) -> Rows:
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tokens, lengths = pad_rows(rows, pad_id)
    tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=pad_id)
    starts = np.array([len(prompt) for prompt in prompts])
    at = np.arange(width)
    return Rows(tokens, (at >= starts[:, None]) & (at < lengths[:, None]))
