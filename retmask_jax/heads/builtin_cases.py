"""A first experiment in two calls: detection and recall on the texts of the package, for any model that writes English."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool

from retmask_jax.data.builtin_files import haystack as read_haystack
from retmask_jax.data.builtin_files import path_of
from retmask_jax.data.needles import Case, Needle, build_cases, can_write, draw_specs, read_needles
from retmask_jax.data.prompter import make_prompter
from retmask_jax.data.tasks import check_writable
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.conditions import answers, hits
from retmask_jax.heads.detectors import DETECTORS
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.interventions import Interventions

_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Built-in texts in one language: files of needles to detect with and to test with, a haystack, how it is asked."""

    detect: str
    test: str
    haystack: str
    template: str | None = None
    prefix: bool = True


ENGLISH = Texts("builtin:needles", "builtin:codes", "builtin:essays")
# The bundled model knows 354 words and no others.
TINY = Texts(
    "bundled/detect_needles.jsonl", "bundled/test_needles.jsonl", "bundled/test_text.txt", "{context} {question}", False
)


def find_heads(
    lm: LanguageModel,
    n: int = 60,
    lengths: Sequence[int] = (512, 1024, 2048),
    detector: str = "copy",
    seed: int = 0,
    *,
    needles: str | os.PathLike | Sequence[Needle] | None = None,
    haystack: str | os.PathLike | None = None,
    batch_size: int = 8,
) -> HeadScores:
    """Scores every head by what it does while the model answers questions about needles, and prints how many cases count.

    Chat models are asked in their chat template, with thinking off, others in plain text. Replies are begun for the model.

    Args:
        lm: A model with a tokenizer.
        n: Cases, spread over the lengths.
        lengths: Tokens of a prompt.
        detector: One of `heads.detectors.DETECTORS`; "copy" is that of the papers.
        seed: Of the choice and order of needles and sentences.
        needles: A JSONL file of needle, question and answer, or a list of Needle; None for built-in ones.
        haystack: A text file; None for the built-in essays.
        batch_size: Rows in a pass.

    Returns:
        The scores of the cases that count.

    Raises:
        ValueError: No such detector, no room in the model's context, a tokenizer that cannot write the built-in texts, or
            no case counts, with the reasons.

    >>> import retmask_jax as rm
    >>> scores = rm.find_heads(rm.load("bundled"), n=8, lengths=(128,))
    8 of 8 cases count
    >>> scores.heads(top_k=3)
    [(1, 0), (1, 2), (1, 3)]
    """
    if detector not in DETECTORS:
        raise ValueError(f"detector is {detector!r}; it must be one of {', '.join(DETECTORS)}")
    cases = builtin_cases(lm, "detect", n, lengths, seed, needles, haystack)
    found = DETECTORS[detector](lm, cases, batch_size=batch_size)
    others = ", ".join(f"{outcome}: {count}" for outcome, count in found.reasons.items() if outcome != "counted")
    print(f"{found.reasons['counted']} of {len(cases)} cases count" + (f" ({others})" if others else ""))
    return found.scores


def needle_recall(
    lm: LanguageModel,
    interventions: Interventions | None = None,
    n: int = 60,
    lengths: Sequence[int] = (1024,),
    seed: int = 1,
    *,
    needles: str | os.PathLike | Sequence[Needle] | None = None,
    haystack: str | os.PathLike | None = None,
    max_new_tokens: int = 12,
    batch_size: int = 8,
) -> Bool[np.ndarray, " n"]:
    """Returns which of n questions about codes in a text the model answers right; arguments as of `find_heads`.

    The cases are the same for the same seed, so the results of several calls are paired.

    Args:
        interventions: What is ablated, shared by all cases.
        max_new_tokens: The longest reply.

    Raises:
        ValueError: As of `find_heads`; or the interventions have a mask for each row.

    >>> import retmask_jax as rm
    >>> lm = rm.load("bundled")
    >>> masked = rm.mask_heads(lm.config, [(1, 0), (1, 1), (1, 2), (1, 3)])
    >>> [float(rm.needle_recall(lm, mask, n=8, lengths=(128,)).mean()) for mask in (None, masked)]
    [1.0, 0.0]
    """
    iv = interventions or Interventions()
    if iv.has_rows:
        raise ValueError("needle_recall takes one mask for all cases, these interventions have one for each row")
    cases = builtin_cases(lm, "test", n, lengths, seed, needles, haystack)
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "what": "recall"}
    (texts,) = answers(lm, cases, [iv], **options)
    return hits(texts, cases)


def builtin_cases(
    lm: LanguageModel,
    use: Literal["detect", "test"],
    n: int,
    lengths: Sequence[int],
    seed: int,
    needles: str | os.PathLike | Sequence[Needle] | None = None,
    haystack: str | os.PathLike | None = None,
    shuffle: bool = True,
) -> list[Case]:
    """The first n of the cases that each length gets in turn, in the order of the lengths; arguments and errors as of
    `find_heads`. use: which of the built-in needles are asked for. shuffle: as of `build_cases`."""
    if n < 1 or not lengths:
        raise ValueError(f"{n} cases of lengths {tuple(lengths)} were asked for: ask for at least one")
    if max(lengths) >= lm.config.max_length:
        raise ValueError(f"a prompt of {max(lengths)} tokens leaves no room in the model's {lm.config.max_length}")
    texts = _texts_for(lm.tokenizer, needles is None or haystack is None)
    if needles is None or isinstance(needles, (str, os.PathLike)):
        name = os.fspath(needles or getattr(texts, use))
        check_writable(lm.tokenizer, name)
        needles = read_needles(path_of(name))
    sentences = read_haystack(os.fspath(haystack or texts.haystack), lengths)
    prompter = make_prompter(lm.tokenizer, texts.template, chat=None, template_kwargs={"enable_thinking": False})
    each = -(-n // len(lengths))
    specs = draw_specs(needles, lengths, _DEPTHS, per_length=each, seed=seed)
    kept = sorted(range(len(specs)), key=lambda i: i % each)[:n]
    return build_cases(
        prompter, sentences, needles, [specs[i] for i in sorted(kept)], shuffle=shuffle, prefix=texts.prefix
    )


def _texts_for(tokenizer, builtin: bool) -> Texts:
    """The built-in texts that a tokenizer can write; ValueError where it can write none and they are needed."""
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, which text prompts need: load a folder that has one")
    for texts in (ENGLISH, TINY):
        if can_write(tokenizer, read_needles(path_of(texts.test))[0]):
            return texts
    if builtin:
        raise ValueError("the model's tokenizer cannot write the built-in English texts: give needles and a haystack")
    return ENGLISH
