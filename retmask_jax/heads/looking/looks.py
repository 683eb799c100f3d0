"""What every head looks at while a model predicts each token of an answer, untouched and with some heads masked."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.copy_score import copy_score
from retmask_jax.heads.lists.formats import read_scores
from retmask_jax.heads.looking.asked import Asked, Prompt, asked_of
from retmask_jax.heads.looking.begun import Begun
from retmask_jax.heads.scores import HeadScores
from retmask_jax.hf.tokenizer import token_texts
from retmask_jax.model.interventions import Head, mask_heads
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils.progress import track

UNTOUCHED, GIVEN, MASKED = "untouched", "given", "masked"
COPIED = "copy score in this prompt"
BEST = 8  # heads that are masked where none are named


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reply:
    """An answer of N tokens, read by the model that gave it (one that is given: by the untouched model).

    Attributes:
        name: "untouched", "given" or "masked".
        tokens: With the stop id that ended it, if one did.
        texts: Of the tokens.
        probabilities: Of each token, given those before it, in the model "untouched" and in the one "masked".
        keys: The positions, in prompt and answer, that a head weighs most while a token is predicted, the largest weight
            first; -1: there are no more.
        weights: Of these keys; 0 where there is none.
        attention: All weights of the chosen heads. S: tokens of prompt and answer; the last of them is seen by none.
    """

    name: str
    tokens: Int[np.ndarray, " N"]
    texts: list[str]
    probabilities: dict[str, Float32[np.ndarray, " N"]]
    keys: Int[np.ndarray, "N L H K"]
    weights: Float32[np.ndarray, "N L H K"]
    attention: Float32[np.ndarray, "N S heads"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Looks:
    """What heads look at in one prompt.

    Attributes:
        model: Its name, "" where it has none.
        prompt: Tokens of the prompt.
        texts: Of these tokens.
        span: Of what a right answer copies, if that is known.
        scores: Of all heads.
        scored: What the scores are, in words.
        heads: The chosen ones, best first, which are masked in the second answer.
        replies: The answer, and that of the masked model.
    """

    model: str
    prompt: Int[np.ndarray, " T"]
    texts: list[str]
    span: tuple[int, int] | None
    scores: HeadScores
    scored: str
    heads: list[Head]
    replies: list[Reply]


class Question(NamedTuple):
    """What is asked of a model, checked against it: a prompt, the answer given or None, room for answers, heads by name or
    the number of them, and scores or None."""

    asked: Asked
    given: list[int] | None
    room: int
    n: int
    named: list[Head] | None
    scores: HeadScores | None


def question_of(
    lm: LanguageModel,
    prompt: Prompt = None,
    answer: str | Sequence[int] | None = None,
    heads: int | Sequence[Head] | None = None,
    *,
    scores: HeadScores | str | os.PathLike | None = None,
    begin: str = "",
    chat: bool | None = None,
    max_new_tokens: int = 24,
) -> Question:
    """Returns what is asked, for a model whose weights need not be there.

    Arguments and errors as of `retmask_jax.reports.looking.view.look`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    shape = lm.config.n_layers, lm.config.n_heads
    if isinstance(scores, (str, os.PathLike)):
        scores = read_scores(scores, lm.config)
    if scores is not None and scores.mean.shape != shape:
        raise ValueError(f"scores has shape {scores.mean.shape}; the model has {shape[0]} layers of {shape[1]} heads")
    n, named = (heads, None) if isinstance(heads, int) else (BEST, heads)
    _check_heads(lm, n, named)
    given = None if answer is None else _tokens_of(lm, answer)
    room = max(max_new_tokens, len(given or ()))
    asked = asked_of(lm, prompt, begin, chat, room)
    unique = None if named is None else list(dict.fromkeys(map(tuple, np.asarray(named).tolist())))
    return Question(asked, given, room, n, unique, scores)


def look_at(lm: LanguageModel, question: Question) -> Looks:
    """Reads a prompt untouched and masked, decodes or reads the answers, and keeps what the heads look at.

    The prompt passes through the model once untouched and once masked, whatever is read after it.

    Raises:
        ValueError: No head copies, where neither heads nor scores were given.
    """
    asked, given, room, n, named, scores = question
    with track(None, 4, "look", "pass") as shown:
        plain = Begun.of_prompt(lm, asked.tokens, None, room)
        shown.update()
        first = given or plain.answer()
        used = scores or _own_scores(lm, asked, first, plain.see(first).keys[..., 0])
        chosen = named or _best(used, n)
        shown.update()
        masked = Begun.of_prompt(lm, asked.tokens, mask_heads(lm.config, chosen), room)
        shown.update()
        models = {UNTOUCHED: plain, MASKED: masked}
        replies = [
            _reply(UNTOUCHED if given is None else GIVEN, first, UNTOUCHED, models, chosen),
            _reply(MASKED, masked.answer(), MASKED, models, chosen),
        ]
        shown.update()
    return Looks(
        model=_name(lm.source.folder),
        prompt=np.array(asked.tokens, np.int32),
        texts=_texts(lm, asked.tokens),
        span=asked.span,
        scores=used,
        scored=COPIED if scores is None else "score",
        heads=chosen,
        replies=replies,
    )


def _reply(name: str, said: Sequence[int], reader: str, models: Mapping[str, Begun], heads: Sequence[Head]) -> Reply:
    """An answer as one of the models reads it, with its probabilities in both."""
    seen = {model: begun.see(said, heads if model == reader else ()) for model, begun in models.items()}
    return Reply(
        name=name,
        tokens=np.array(said, np.int32),
        texts=_texts(models[reader].lm, said),
        probabilities={model: np.exp(one.logprobs) for model, one in seen.items()},
        keys=seen[reader].keys,
        weights=seen[reader].weights,
        attention=seen[reader].rows,
    )


def _own_scores(lm: LanguageModel, asked: Asked, said: Sequence[int], key_NLH: Int[np.ndarray, "N L H"]) -> HeadScores:
    """The copy score of one answer. Without a span: the share of the answer's tokens that are in the prompt and that a
    head copies from anywhere in it, as sets."""
    prompt = np.array(asked.tokens)
    end = len(said) - (said[-1] in lm.config.eos_ids)
    said_N, key_NLH = np.array(said[:end], np.int32), key_NLH[:end]
    if asked.span is not None:
        return HeadScores.from_array(copy_score(prompt, asked.span, said_N, key_NLH))
    there = max(1, len(np.intersect1d(prompt, said_N)))
    of_prompt_LH = copy_score(prompt, (0, len(prompt)), said_N, key_NLH)
    return HeadScores.from_array(of_prompt_LH * len(np.unique(prompt)) / there)


def _check_heads(lm: LanguageModel, n: int, named: Sequence[Head] | None) -> None:
    """ValueError for numbers of heads, or heads, that the model does not have."""
    total = lm.config.n_layers * lm.config.n_heads
    if n < 1 or (named is None and n > total):
        raise ValueError(f"heads is {n}; it must be from 1 to the model's {total}, or a list of heads")
    if named is not None and not len(named):
        raise ValueError("heads is empty: name at least one, or leave it out for the best by score")
    mask_heads(lm.config, named or ())


def _best(scores: HeadScores, n: int) -> list[Head]:
    best = [head for head in scores.heads(top_k=min(n, scores.mean.size)) if scores.mean[head] > 0]
    if not best:
        raise ValueError("no head copies a token of the answer from this prompt: name heads, or give scores")
    return best


def _tokens_of(lm: LanguageModel, answer: str | Sequence[int]) -> list[int]:
    if isinstance(answer, str):
        if lm.tokenizer is None:
            raise ValueError("the model has no tokenizer, which an answer in words needs: give its tokens")
        answer = lm.tokenizer.encode(answer, add_special_tokens=False)
    if not len(answer):
        raise ValueError("the answer has no tokens: leave it out for the model's own")
    check_tokens(lm.config, np.array([answer]))
    return list(map(int, answer))


def _texts(lm: LanguageModel, ids: Sequence[int]) -> list[str]:
    return [f" {one}" for one in ids] if lm.tokenizer is None else token_texts(lm.tokenizer, ids)


def _name(folder: Path | None) -> str:
    """The name of a model by its folder, which for one of the hub is a snapshot in its cache."""
    if folder is None:
        return ""
    cached = folder.parent.name == "snapshots"
    return (
        folder.parents[1].name.removeprefix("models--").replace("--", "/")
        if cached
        else folder.name.removesuffix(".gguf")
    )
