"""Loss on plain text: what an intervention or a training costs in general, and where in the context."""

from collections.abc import Sequence

import numpy as np

from retmask_jax.evals.measured import Measured
from retmask_jax.generation.batching import full_batches
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.logprobs import token_logprobs
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host
from retmask_jax.utils.store import Store, request_key

METRIC = "nats per token"
POSITIONS = "positions "  # what the tasks of `run_positions` are called, before their range


def text_windows(tokenizer, sentences: Sequence[str], length: int, n: int) -> np.ndarray:
    """i32[n, length]: consecutive windows of a text, each behind the tokenizer's BOS where it has one.

    Raises ValueError if the text is too short.
    """
    ids, bos = _ids(tokenizer, sentences)
    body = length - len(bos)
    if len(ids) < n * body:
        raise ValueError(f"the text has {len(ids)} tokens; {n} windows of {length} need {n * body}: ask for fewer")
    return np.array([bos + ids[i * body : (i + 1) * body] for i in range(n)], np.int32)


def sliding_windows(tokenizer, sentences: Sequence[str], length: int, stride: int, n: int | None = None) -> np.ndarray:
    """i32[windows, length]: windows that each start `stride` tokens behind the one before, behind BOS where there is one.

    n: the most windows; what is left of the text behind the last is not read. Raises ValueError for a text shorter than
    a window, or a stride that leaves no context.
    """
    ids, bos = _ids(tokenizer, sentences)
    body = length - len(bos)
    if not 1 <= stride < body:
        raise ValueError(f"a stride of {stride} in windows of {length} tokens: it must be in 1..{body - 1}")
    if len(ids) < body:
        raise ValueError(
            f"the text has {len(ids)} tokens; a window of {length} needs {body}: shorten it or give more text"
        )
    starts = range(0, len(ids) - body + 1, stride)[:n]
    return np.array([bos + ids[start : start + body] for start in starts], np.int32)


def text_loss(
    lm: LanguageModel, windows: np.ndarray, interventions: Interventions | None = None, *, batch_size: int
) -> np.ndarray:
    """f64[windows]: mean negative log-probability per token, in nats."""
    return token_losses(lm, windows, interventions, batch_size=batch_size).mean(axis=1)


def token_losses(
    lm: LanguageModel,
    windows: np.ndarray,
    interventions: Interventions | None = None,
    *,
    batch_size: int,
    kept: Store | None = None,
    what: str = "text loss",
) -> np.ndarray:
    """f64[windows, length - 1]: negative log-probability of the tokens at positions 1, 2, ... in nats.

    kept: of this model under these interventions; only what it lacks is computed. Where memory runs out the batch is
    halved.
    """
    kept = Store() if kept is None else kept
    keys = [request_key("token losses", window) for window in windows]
    missing = kept.missing(keys)

    def work(todo: list[int], batch_size: int):
        for batch in full_batches(todo, min(batch_size, len(todo))):
            rows = [missing[i] for i in batch]
            found = -to_host(token_logprobs(lm.config, lm.params, windows[rows], interventions)).astype(np.float64)
            for row, losses in zip(rows, found, strict=True):
                kept.add(keys[row], losses.tolist())
            yield batch, found

    if missing:
        memory.in_batches(len(missing), batch_size, what, "window", work)
    return np.array([kept[key] for key in keys])


def position_buckets(length: int) -> list[tuple[int, int]]:
    """Positions [first, end) by powers of two, that of a window's first token being 0: (1, 2), (2, 4), (4, 8), ..."""
    return [(2**k, min(2 ** (k + 1), length)) for k in range((length - 1).bit_length())]


def run_positions(
    lm: LanguageModel,
    windows: np.ndarray,
    *,
    batch_size: int = 1,
    kept: Store | None = None,
    interventions: Interventions | None = None,
) -> list[Measured]:
    """Mean loss of each window over all its tokens, and in each bucket of `position_buckets`: nats per token."""
    losses = token_losses(lm, windows, interventions, batch_size=batch_size, kept=kept)
    buckets = {"all": (1, windows.shape[1])}
    buckets |= {f"{POSITIONS}{first}-{end - 1}": (first, end) for first, end in position_buckets(windows.shape[1])}
    return [_measured(name, losses[:, first - 1 : end - 1], windows) for name, (first, end) in buckets.items()]


def run_sliding(
    lm: LanguageModel,
    windows: np.ndarray,
    stride: int,
    *,
    batch_size: int = 1,
    kept: Store | None = None,
    interventions: Interventions | None = None,
) -> Measured:
    """Mean loss of the last `stride` tokens of each window of `sliding_windows`: nats per token.

    So every token counts once, all windows weigh the same, and each token has at least the rest of its window before it;
    the text's first tokens, which have less, do not count.
    """
    losses = token_losses(lm, windows, interventions, batch_size=batch_size, kept=kept)
    return _measured(f"stride {stride}", losses[:, -stride:], windows)


def _measured(task: str, losses: np.ndarray, windows: np.ndarray) -> Measured:
    ids = tuple(map(str, range(len(windows))))
    return Measured("perplexity", task, METRIC, ids, losses.mean(axis=1), False, windows.shape[1])


def _ids(tokenizer, sentences: Sequence[str]) -> tuple[list[int], list[int]]:
    """(tokens of the text, BOS if the tokenizer has one)."""
    ids = tokenizer(" ".join(sentences), add_special_tokens=False)["input_ids"]
    return ids, [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
