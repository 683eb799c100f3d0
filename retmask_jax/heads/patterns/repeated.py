"""Detectors of other fields: what heads do on random tokens that are repeated, where only the repetition can be learned from.

A text is the token that begins a text, if the tokenizer has one, then random tokens, then the same tokens again. `induction`
and `previous_token` are entries of `heads.detectors.DETECTORS`, and are called as these: each case gives the length and the
seed of one text, so that many cases are many seeds. What the case says is not read.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int, PyTree

from retmask_jax.data.needles import Case
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.detection import COUNTED, Detection, collect
from retmask_jax.heads.reading import measure_answers
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import HiddenRows


def induction(lm: LanguageModel, cases: Sequence[Case], *, batch_size: int = 16) -> Detection:
    """Measures the attention of each repeated token to the token after its first occurrence, mean over the repetition.

    This is the prefix-matching score of arXiv 2209.11895, whose texts have 25 tokens four times, and TransformerLens's
    induction score.

    Raises:
        ValueError: A case is too short for two tokens and their repetition, or the tokenizer has no ordinary tokens.

    >>> import retmask_jax as rm
    >>> scores = rm.find_heads(rm.load("bundled"), n=4, lengths=(128,), detector="induction")
    4 of 4 cases count
    >>> scores.heads(top_k=4)
    [(1, 0), (1, 2), (1, 3), (1, 1)]
    """
    return _on_repeats(lm, cases, lambda n: (1 - n, 2 - n), batch_size, "induction")


def previous_token(lm: LanguageModel, cases: Sequence[Case], *, batch_size: int = 16) -> Detection:
    """Measures the attention of each repeated token to the token before it, mean over the repetition; errors as of
    `induction`.

    In a circuit of two layers that copies, such heads tell each token what came before it, for an induction head to find.

    >>> import retmask_jax as rm
    >>> scores = rm.find_heads(rm.load("bundled"), n=4, lengths=(128,), detector="previous_token")
    4 of 4 cases count
    >>> scores.heads(threshold=0.5)
    [(0, 0)]
    """
    return _on_repeats(lm, cases, lambda n: (-1, 0), batch_size, "previous token")


def repeated_tokens(lm: LanguageModel, length: int, seed: int) -> Int[np.ndarray, " T"]:
    """Returns a text of at most `length` tokens: the token that begins a text, random tokens, and the same again.

    The random ones are ordinary tokens, no two of them alike as far as the vocabulary goes; then all of it comes again, in
    another order.

    Raises:
        ValueError: As of `induction`.
    """
    ids, start = _ordinary_tokens(lm), _start(lm)
    n = (length - len(start)) // 2
    if n < 2 or not len(ids):
        raise ValueError(
            f"{length} tokens of which {len(ids)} sorts can be drawn: a repetition needs room for two tokens twice, and one sort"
        )
    rng = np.random.default_rng(seed)
    random_N = np.concatenate([rng.permutation(ids) for _ in range(-(-n // len(ids)))])[:n]
    return np.concatenate([start, random_N, random_N]).astype(np.int32)


def _on_repeats(
    lm: LanguageModel, cases: Sequence[Case], span_of: Callable[[int], tuple[int, int]], batch_size: int, what: str
) -> Detection:
    """Scores heads by the attention mass in a span of keys, which count from the query and depend on how many tokens are
    repeated; mean over the repetition."""
    # One token less than the case has: where the last one would be predicted is measured, too.
    texts = [repeated_tokens(lm, len(case.tokens) - 1, case.spec.seed).tolist() for case in cases]
    repeated = [(len(text) - len(_start(lm))) // 2 for text in texts]
    found = measure_answers(
        lm,
        [text[: len(text) - n + 1] for text, n in zip(texts, repeated, strict=True)],
        # `measure_answers` measures where an answer is predicted: from the first repeated token to the last.
        [[*text[len(text) - n + 1 :], lm.config.pad_id] for text, n in zip(texts, repeated, strict=True)],
        _mass,
        spans=[(span_of(n),) for n in repeated],
        relative=True,
        batch_size=batch_size,
        what=what,
    )
    return collect([mass_NLH.mean(axis=0) for mass_NLH in found], [""] * len(cases), [COUNTED] * len(cases))


def _mass(config: ModelConfig, params: PyTree, out: HiddenRows, target_BN: jax.Array) -> Float32[Any, "B N L H"]:
    """Returns the attention mass in the span."""
    assert out.probed is not None and out.probed.mass is not None  # it was asked for
    return out.probed.mass[..., 0]


def _start(lm: LanguageModel) -> list[int]:
    """The token that begins a text, or nothing."""
    start = getattr(lm.tokenizer, "bos_token_id", None)
    return [] if start is None else [start]


def _ordinary_tokens(lm: LanguageModel) -> Int[np.ndarray, " ids"]:
    """The ids of all tokens that were not added to the vocabulary; of a model without a tokenizer, all that end nothing."""
    tokenizer, config = lm.tokenizer, lm.config
    if tokenizer is None:
        return np.setdiff1d(np.arange(config.vocab_size), [*config.eos_ids, config.pad_id])
    return np.setdiff1d(np.arange(min(len(tokenizer), config.vocab_size)), list(tokenizer.added_tokens_decoder))
