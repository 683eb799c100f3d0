"""Loss on plain text: what an intervention or a training costs in general."""

from collections.abc import Sequence

import numpy as np

from retmask_jax.generate import full_batches
from retmask_jax.hosts import to_host
from retmask_jax.lm import LanguageModel
from retmask_jax.model.interventions import Interventions
from retmask_jax.sequence import token_logprobs


def text_windows(tokenizer, sentences: Sequence[str], length: int, n: int) -> np.ndarray:
    """i32[n, length]: consecutive windows of a text, each behind the tokenizer's BOS where it has one.

    Raises ValueError if the text is too short.
    """
    ids = tokenizer(" ".join(sentences), add_special_tokens=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(bos)
    if len(ids) < n * body:
        raise ValueError(f"the text has {len(ids)} tokens; {n} windows of {length} need {n * body}: ask for fewer")
    return np.array([bos + ids[i * body : (i + 1) * body] for i in range(n)], np.int32)


def text_loss(lm: LanguageModel, windows: np.ndarray, interventions: Interventions | None = None, *,
              batch_size: int) -> np.ndarray:  # fmt: skip
    """f64[windows]: mean negative log-probability per token, in nats."""
    batch_size = min(batch_size, len(windows))
    losses = []
    for rows in full_batches(range(len(windows)), batch_size):
        logps = to_host(token_logprobs(lm.config, lm.params, windows[rows], interventions)).astype(np.float64)
        losses.append(-logps.mean(axis=1))
    return np.concatenate(losses)[: len(windows)]
