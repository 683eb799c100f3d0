"""The copy score: which heads look at the needle's token while the model copies it (arXiv 2404.15574).

`detect_plain` computes it as the paper defines it. `detect` gives the same scores many times faster.
"""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int

from retmask_jax.data.answers import rouge1_recall
from retmask_jax.data.needles import Case
from retmask_jax.generation.batching import is_small
from retmask_jax.generation.decode import Generated, generate_many
from retmask_jax.generation.drafts import Ends, answer_drafts
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.detection import COUNTED, Detection, collect
from retmask_jax.model.attention import Probe
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import normalise
from retmask_jax.model.sharding import mesh_of
from retmask_jax.model.transformer import check_tokens, hidden
from retmask_jax.utils.progress import track

_CLOSING = 4  # tokens of an answer after the needle's words that are expected, and not decoded one by one
RIGHT_RECALL = 0.5  # ROUGE-1 recall of the reference above which an answer is right

# The tokens of a greedy answer, and for each the key position that each head weighs most when it predicts the token.
Answer = tuple[Int[np.ndarray, " N"], Int[np.ndarray, "N L H"]]


# --- as the paper defines it: one case at a time, one token at a time, without a cache ---


def detect_plain(lm: LanguageModel, cases: Sequence[Case], *, max_new_tokens: int = 50) -> Detection:
    """Computes copy scores by plain greedy decoding; errors as of `detect`.

    A head's score in a case is |needle tokens that it copied| / |needle tokens|, both as sets. A case counts if the
    model's answer is right. The score of a head is its mean over the counted cases.
    """
    newlines = set(newline_ids(lm.tokenizer).tolist())
    width = max((len(case.tokens) for case in cases), default=0) + max_new_tokens
    per_case, answers, outcomes = [], [], []
    for case in track(cases, len(cases), "detect plainly", "case"):
        tokens, copied = _answer_plainly(lm, case, newlines, max_new_tokens, width)
        answers.append(lm.tokenizer.decode(tokens, skip_special_tokens=True))
        outcomes.append(_outcome(answers[-1], case.needle.answer, cut=len(tokens) == max_new_tokens))
        if outcomes[-1] == COUNTED:
            n_needle = len(set(words_of(case)))
            per_case.append(np.array([[len(of_head) / n_needle for of_head in of_layer] for of_layer in copied]))
    return collect(per_case, answers, outcomes)


def _answer_plainly(
    lm: LanguageModel, case: Case, newlines: set[int], max_new_tokens: int, width: int
) -> tuple[list[int], list[list[set[int]]]]:
    """Returns the tokens of the greedy answer, and for each layer and head the needle tokens that it copied.

    A head copies a token if the key that it weighs most, when the model predicts the token, is in the needle's answer
    part and is that token.
    """
    start, end = case.span
    copied: list[list[set[int]]] = [[set() for _ in range(lm.config.n_heads)] for _ in range(lm.config.n_layers)]
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        token, key_LH = _read_on(lm, [*case.tokens, *answer], width)
        if token in lm.config.eos_ids or (token in newlines and lm.tokenizer.decode(answer).strip()):
            break
        answer.append(token)
        for (layer, head), key in np.ndenumerate(key_LH):
            if start <= key < end and case.tokens[key] == token:
                copied[layer][head].add(token)
    return answer, copied


def _read_on(lm: LanguageModel, tokens: list[int], width: int) -> tuple[int, Int[np.ndarray, "L H"]]:
    """Returns the most likely next token, and the key position that each head weighs most when it predicts it.

    The row is padded to `width` tokens, so that one program serves all cases and steps.
    """
    row_1T = check_tokens(lm.config, [tokens + [lm.config.pad_id] * (width - len(tokens))])
    with mesh_of(lm.params):
        token, key_LH = _next_token(lm.config, lm.params, row_1T, len(tokens) - 1)
    return int(token), np.asarray(key_LH)


@functools.partial(jax.jit, static_argnums=0)
def _next_token(config, params, tokens_1T, last):
    last_11 = jnp.full((1, 1), last)
    out = hidden(config, params, tokens_1T, normalise(config), probe=Probe(last_11))
    assert out.probed is not None  # it was asked for
    logits_V = unembed(config, params, out.x_BTE[0, last])
    return jnp.argmax(logits_V), out.probed.keys[0, 0, :, :, 0]


# --- the same made fast: in batches, with a cache, and with what can be foreseen of an answer read in one pass ---


def detect(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 16,
    released: bool = False,
    read: bool = True,
) -> Detection:
    """Computes the copy scores of `detect_plain` in batches; this is the detector `copy` of the command.

    An answer ends at EOS, or at a line end after its first word. A case counts if the ROUGE-1 recall of the answer against
    the needle's answer part is above 0.5.

    Args:
        lm: The model.
        cases: Needle cases.
        max_new_tokens: The longest answer.
        batch_size: Cases that are decoded together.
        released: Repeat the detector that was released with the paper: it always decodes max_new_tokens tokens and
            counts repeated copies again, so that scores can exceed 1.
        read: Read the needle's words after each prompt in the same pass, and decode from where the model says something
            else (`answer_drafts`); False decodes all. The scores are the same.

    Raises:
        NoCaseCounts: No case counts; a ValueError.
    """
    found = greedy_answers(lm, cases, max_new_tokens, batch_size, released, read)
    return score_answers(lm, cases, found, max_new_tokens=max_new_tokens, released=released)


def score_answers(
    lm: LanguageModel, cases: Sequence[Case], found: Sequence[Answer], *, max_new_tokens: int, released: bool = False
) -> Detection:
    """Computes copy scores from the model's answers; arguments and errors as of `detect`."""
    answers, outcomes, per_case = [], [], []
    for case, (tokens_N, key_NLH) in zip(cases, found, strict=True):
        end = len(tokens_N) if released else answer_end(lm.tokenizer, tokens_N)
        tokens_N, key_NLH = tokens_N[:end], key_NLH[:end]
        answer = lm.tokenizer.decode(tokens_N, skip_special_tokens=True)
        answers.append(answer)
        outcomes.append(_outcome(answer, case.needle.answer, cut=end == max_new_tokens))
        if outcomes[-1] == COUNTED:
            per_case.append(copy_score(np.asarray(case.tokens), case.span, tokens_N, key_NLH, released))
    return collect(per_case, answers, outcomes)


def copies(
    prompt_S: Int[np.ndarray, " S"],
    span: tuple[int, int],
    tokens_N: Int[np.ndarray, " N"],
    key_NLH: Int[np.ndarray, "N L H"],
) -> tuple[Bool[np.ndarray, "N L H"], Bool[np.ndarray, "N L H"]]:
    """Returns (whether a head's strongest key is in the needle's answer part, whether it is also the token that is said).

    Args as of `copy_score`.
    """
    inside_NLH = (key_NLH >= span[0]) & (key_NLH < span[1])
    read_NLH = prompt_S[np.minimum(key_NLH, len(prompt_S) - 1)]  # keys after the prompt are in no span
    return inside_NLH, inside_NLH & (read_NLH == tokens_N[:, None, None])


def copy_score(
    prompt_S: Int[np.ndarray, " S"],
    span: tuple[int, int],
    tokens_N: Int[np.ndarray, " N"],
    key_NLH: Int[np.ndarray, "N L H"],
    released: bool = False,
) -> Float32[np.ndarray, "L H"]:
    """Computes the scores of one case: |needle tokens that a head copied| / |needle tokens|, both as sets.

    Args:
        prompt_S: Tokens of the prompt.
        span: Token span [start, end) of the needle's answer part.
        tokens_N: The model's answer.
        key_NLH: The key position that each head weighs most when it predicts tokens_N[n].
        released: Count every copy, repeats included, and divide by the length of the span.
    """
    start, end = span
    _, hit_NLH = copies(prompt_S, span, tokens_N, key_NLH)
    if released:
        return hit_NLH.sum(axis=0).astype(np.float32) / (end - start)
    needle_ids = np.unique(prompt_S[start:end])
    copied = [(hit_NLH & (tokens_N == i)[:, None, None]).any(axis=0) for i in needle_ids]
    return np.sum(copied, axis=0).astype(np.float32) / len(needle_ids)


def newline_ids(tokenizer: Any) -> Int[np.ndarray, " ids"]:
    """Returns the ids of the tokens whose text has a newline."""
    return np.flatnonzero(_vocabulary(tokenizer)[0])


@functools.lru_cache(maxsize=1)
def _vocabulary(tokenizer: Any) -> tuple[Bool[np.ndarray, " V"], Bool[np.ndarray, " V"]]:
    """For each token whether it has a line end in it, and whether it has text other than blanks: special ones have none."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    words = [bool(text.strip()) and i not in special for i, text in enumerate(texts)]
    return np.array(["\n" in text for text in texts]), np.array(words)


def words_of(case: Case) -> tuple[int, ...]:
    """Returns the tokens of the needle's answer part, as they are in the prompt."""
    return tuple(case.tokens[slice(*case.span)])


def _outcome(answer: str, reference: str, cut: bool) -> str:
    if not answer.strip():
        return "empty answer"
    if rouge1_recall(answer, reference) > RIGHT_RECALL:
        return COUNTED
    return "wrong answer, cut at the token limit" if cut else "wrong answer"


def greedy_answers(
    lm: LanguageModel, cases: Sequence[Case], max_new_tokens: int, batch_size: int, released: bool, read: bool
) -> list[Answer]:
    """Returns the greedy answer to each case, to what ends it; arguments as of `detect`."""
    if released or not read or not cases:
        return _decode(lm, cases, max_new_tokens, batch_size, () if released else None)
    words = [words_of(case) for case in cases]
    width = max(map(len, words)) + _CLOSING
    least = max(len(case.tokens) for case in cases) + width if is_small(lm.config) else 0
    options = {"max_new_tokens": max_new_tokens, "width": width, "batch_size": batch_size, "least": least}
    ends, counted = Ends.of(lm.config, *_vocabulary(lm.tokenizer)), 0

    def note(i: int, found: Generated) -> str:
        nonlocal counted
        answer = lm.tokenizer.decode(found.tokens, skip_special_tokens=True)
        counted += rouge1_recall(answer, cases[i].needle.answer) > RIGHT_RECALL
        return f"{counted} counted"

    def answers(chosen: Sequence[int], closing: tuple[int, ...]) -> dict[int, Answer]:
        prompts, drafts = [cases[i].tokens for i in chosen], [(*words[i], *closing) for i in chosen]
        of_chosen = answer_drafts(
            lm, prompts, drafts, ends, what="detect", note=lambda k, found: note(chosen[k], found), **options
        )
        return {i: (np.asarray(one.tokens), np.asarray(one.argmax)) for i, one in zip(chosen, of_chosen, strict=True)}

    by_length = sorted(range(len(cases)), key=lambda i: len(cases[i].tokens))
    first, others = by_length[:batch_size], by_length[batch_size:]
    found = answers(first, ())
    if others:
        found |= answers(others, _usual_closing(lm, [words[i] for i in first], [found[i][0] for i in first]))
    return [found[i] for i in range(len(cases))]


def _decode(
    lm: LanguageModel, cases: Sequence[Case], max_new_tokens: int, batch_size: int, stop_ids: Sequence[int] | None
) -> list[Answer]:
    """Returns the answers to the cases, decoded token by token."""
    decoded = generate_many(
        lm.config,
        lm.params,
        [case.tokens for case in cases],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        probe=True,
        what="detect",
    )
    return [(np.asarray(generated.tokens), np.asarray(generated.argmax)) for generated in decoded]


def _usual_closing(
    lm: LanguageModel, words: Sequence[tuple[int, ...]], answers: Sequence[Int[np.ndarray, " N"]]
) -> tuple[int, ...]:
    """Returns how answers most often go on after the needle's words, and a stop id; nothing is lost where that is wrong."""
    closings = collections.Counter(
        tuple(map(int, tokens[len(needle) :][:_CLOSING]))
        for tokens, needle in zip(answers, words, strict=True)
        if tuple(tokens[: len(needle)]) == needle
    )
    return *max(closings, key=closings.__getitem__, default=()), *lm.config.eos_ids[:1]


def answer_end(tokenizer: Any, tokens_N: Int[np.ndarray, " N"]) -> int:
    """Returns the index of the first newline after a word, or the number of tokens."""
    for place in np.flatnonzero(np.isin(tokens_N, newline_ids(tokenizer))):
        if tokenizer.decode(tokens_N[:place], skip_special_tokens=True).strip():
            return int(place)
    return len(tokens_N)
