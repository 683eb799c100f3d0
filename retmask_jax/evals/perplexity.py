"""Loss on plain text: what an intervention or a training costs in general, and at which positions of the context."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from retmask_jax.evals.measured import Measured
from retmask_jax.generation.batching import full_batches
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.logprobs import token_logprobs
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host
from retmask_jax.utils.store import Store, request_key

METRIC = "nats per token"
POSITIONS = "positions "  # with their range the names of the tasks of `run_positions`

Windows = Int[np.ndarray, "windows length"]


def text_windows(tokenizer: Any, sentences: Sequence[str], length: int, n: int) -> Int[np.ndarray, "n length"]:
    """Cuts a text into n consecutive windows, each with a BOS first if the tokenizer has one.

    Raises:
        ValueError: The text is too short.
    """
    ids, bos = _ids(tokenizer, sentences)
    body = length - len(bos)
    if len(ids) < n * body:
        raise ValueError(f"the text has {len(ids)} tokens; {n} windows of {length} need {n * body}: ask for fewer")
    return np.array([bos + ids[i * body : (i + 1) * body] for i in range(n)], np.int32)


def sliding_windows(
    tokenizer: Any, sentences: Sequence[str], length: int, stride: int, n: int | None = None
) -> Int[np.ndarray, "windows length"]:
    """Cuts a text into windows that each start `stride` tokens after the one before, each with a BOS first if the
    tokenizer has one.

    Args:
        n: The most windows; None for as many as the text has. Text after the last window is not used.

    Raises:
        ValueError: The text is shorter than a window, or the stride leaves no context.
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


def losses_under(
    lm: LanguageModel,
    windows: Windows,
    masks: Sequence[Interventions],
    *,
    batch_size: int,
    known: Mapping[tuple[int, int], float] | None = None,
    done: Callable[[tuple[int, int], float], None] | None = None,
) -> Float64[np.ndarray, "masks windows"]:
    """Computes the mean negative log-probability per token of each window, in nats, under each of many masks.

    Args:
        masks: Shared by all windows; those of one kind share a program.
        known: Losses of an earlier run by (mask, window), which are not computed again.
        done: Called with each new loss.
    """
    n = len(windows)

    def work(todo: list[int], batch_size: int):
        for mask in sorted({i // n for i in todo}):
            rows = [i % n for i in todo if i // n == mask]
            for batch in full_batches(rows, min(batch_size, n)):
                logps = to_host(token_logprobs(lm.config, lm.params, windows[batch], masks[mask]))
                yield [mask * n + row for row in batch], (-logps.astype(np.float64)).mean(axis=1).tolist()

    losses = memory.in_batches(
        len(masks) * n,
        batch_size,
        "text loss",
        "window",
        work,
        known={mask * n + row: loss for (mask, row), loss in (known or {}).items()},
        done=None if done is None else lambda i, loss: done(divmod(i, n), loss),
    )
    return np.reshape(np.array(losses, np.float64), (len(masks), n))


def token_losses(
    lm: LanguageModel,
    windows: Windows,
    interventions: Interventions | None = None,
    *,
    batch_size: int,
    kept: Store | None = None,
    what: str = "text loss",
) -> Float64[np.ndarray, "windows length-1"]:
    """Computes the negative log-probabilities of the tokens at positions 1, 2, ..., in nats.

    If memory runs out, the batch is halved.

    Args:
        kept: Losses of this model under these interventions; only missing ones are computed, and added.
        what: The work's name in the progress bar.
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
    """Returns ranges [first, end) of positions by powers of two: (1, 2), (2, 4), (4, 8), ... A window begins at 0."""
    return [(2**k, min(2 ** (k + 1), length)) for k in range((length - 1).bit_length())]


def run_positions(
    lm: LanguageModel,
    windows: Windows,
    *,
    batch_size: int = 1,
    kept: Store | None = None,
    interventions: Interventions | None = None,
) -> list[Measured]:
    """Measures the mean loss of each window over all its tokens, and in each of `position_buckets`, in nats per token."""
    losses = token_losses(lm, windows, interventions, batch_size=batch_size, kept=kept)
    buckets = {"all": (1, windows.shape[1])}
    buckets |= {f"{POSITIONS}{first}-{end - 1}": (first, end) for first, end in position_buckets(windows.shape[1])}
    return [_measured(name, losses[:, first - 1 : end - 1], windows) for name, (first, end) in buckets.items()]


def run_sliding(
    lm: LanguageModel,
    windows: Windows,
    stride: int,
    *,
    batch_size: int = 1,
    kept: Store | None = None,
    interventions: Interventions | None = None,
) -> Measured:
    """Measures the mean loss of the last `stride` tokens of each window of `sliding_windows`, in nats per token.

    So every token counts once, each with at least length - stride tokens before it, and all windows weigh the same. The
    first tokens of the text, which have less context, do not count.
    """
    losses = token_losses(lm, windows, interventions, batch_size=batch_size, kept=kept)
    return _measured(f"stride {stride}", losses[:, -stride:], windows)


def _measured(task: str, losses: Float64[np.ndarray, "windows tokens"], windows: Windows) -> Measured:
    ids = tuple(map(str, range(len(windows))))
    return Measured("perplexity", task, METRIC, ids, losses.mean(axis=1), False, windows.shape[1])


def _ids(tokenizer, sentences: Sequence[str]) -> tuple[list[int], list[int]]:
    """Returns the tokens of the text, and a list of the tokenizer's BOS or of nothing."""
    ids = tokenizer(" ".join(sentences), add_special_tokens=False)["input_ids"]
    return ids, [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
