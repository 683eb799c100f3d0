"""Prompts of different lengths in batches: padded to few lengths, sorted, always full."""

from collections.abc import Iterator, Sequence

import numpy as np

from retmask_jax.model.config import ModelConfig

_SMALL = 256  # up to this hidden size, padding prompts takes less time than compiling programs for more widths


def is_small(config: ModelConfig) -> bool:
    """Whether few widths of prompts are better than little padding."""
    return config.hidden_size <= _SMALL


def pad_to_bucket(config: ModelConfig, tokens_BT: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """i32: tokens padded to their bucket, or to what the model's context leaves before the new ones."""
    more = (0, 0), (0, padded_width(config, tokens_BT.shape[1], max_new_tokens) - tokens_BT.shape[1])
    return np.pad(np.asarray(tokens_BT, np.int32), more, constant_values=config.pad_id)


def padded_width(config: ModelConfig, length: int, max_new_tokens: int) -> int:
    """The width of `pad_to_bucket`."""
    return min(bucket(length, 128 if is_small(config) else 64), config.max_length - max_new_tokens)


def bucket(length: int, least: int = 64) -> int:
    """The padded length of a prompt: the next multiple of an eighth of the power of two above it, and of `least`."""
    step = max(least, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def batches_by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts, the longest first, always batch_size of them: the last batch repeats its last prompt."""
    yield from full_batches(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), batch_size)


def full_batches(items: Sequence, batch_size: int) -> Iterator[list]:
    """The items in order, batch_size at a time; the last batch repeats its last item, so that one program serves all."""
    for start in range(0, len(items), batch_size):
        batch = list(items[start : start + batch_size])
        yield batch + batch[-1:] * (batch_size - len(batch))


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, *, multiple_of: int = 1, least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens i32[B,T] right-padded, lengths i32[B]). T is at least `least`, above that a multiple."""
    lengths = np.array([len(row) for row in rows], np.int32)
    width = max(least, -(-int(lengths.max()) // multiple_of) * multiple_of)
    tokens = np.full((len(rows), width), pad_id, np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens, lengths
