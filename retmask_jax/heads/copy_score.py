"""Detection: which heads look at the needle's token while the model copies it (arXiv 2404.15574)."""

import collections
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from retmask_jax.data.answers import rouge1_recall
from retmask_jax.data.needles import Case
from retmask_jax.generation.decode import generate_many
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.reading import read_answers
from retmask_jax.heads.scores import HeadScores
from retmask_jax.utils import stats

log = logging.getLogger(__name__)
RIGHT_RECALL = 0.5
COUNTED = "counted"


class NoCaseCounts(ValueError):
    """No detection case counts, so no head has a score. outcomes: why not, per case."""

    def __init__(self, message: str, outcomes: Sequence[str]):
        super().__init__(message)
        self.outcomes = list(outcomes)


@dataclasses.dataclass(frozen=True)
class Detection:
    """scores: of the counted cases. answers and outcomes: per case, the model's answer (where a detector reads the gold
    answer, that one), and "counted" or why it was not."""

    scores: HeadScores
    answers: list[str]
    outcomes: list[str]

    @property
    def reasons(self) -> dict[str, int]:
        """Number of cases per outcome."""
        return dict(collections.Counter(self.outcomes))


def detect(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 16,
    released: bool = False,
    read: bool = True,
) -> Detection:
    """Copy scores by greedy decoding: METHODS of arXiv 2404.15574, one score per head and counted case.

    A case counts if the ROUGE-1 recall of the answer against the needle's answer part is above 0.5. Decoding ends at
    EOS or a newline. read: where a first batch answers with the needle's words, read the others' in one pass each
    (`read_answers`) and decode only where the model says something else; the result is the same. released=True
    repeats the published detector: it never stops before max_new_tokens and adds up repeated copies, so that scores
    can exceed 1. Raises NoCaseCounts, a ValueError, if no case counts.
    """
    results = _greedy(lm, cases, max_new_tokens, batch_size, released, read)
    return score_answers(lm, cases, results, max_new_tokens=max_new_tokens, released=released)


def score_answers(
    lm: LanguageModel,
    cases: Sequence[Case],
    results: Sequence[tuple[Any, Any]],
    *,
    max_new_tokens: int,
    released: bool = False,
) -> Detection:
    """Copy scores of the model's answers, as in `detect`: results are (tokens i32[n], argmax i32[n,L,H]) per case."""
    newline = newline_ids(lm.tokenizer)
    answers, outcomes, per_case = [], [], []
    for case, (tokens_N, argmax_NLH) in zip(cases, results, strict=True):
        end = len(tokens_N) if released else _first(tokens_N, newline)
        tokens_N, argmax_NLH = tokens_N[:end], argmax_NLH[:end]
        answer = lm.tokenizer.decode(tokens_N, skip_special_tokens=True)
        answers.append(answer)
        outcomes.append(_outcome(answer, case.needle.answer, cut=end == max_new_tokens))
        if outcomes[-1] == COUNTED:
            per_case.append(copy_score(np.asarray(case.tokens), case.span, tokens_N, argmax_NLH, released))
    return collect(per_case, answers, outcomes)


def collect(per_case: Sequence[np.ndarray], answers: list[str], outcomes: list[str]) -> Detection:
    """The Detection of scores f32[L,H], one for each outcome that says counted; NoCaseCounts if none does."""
    reasons = dict(collections.Counter(outcomes))
    if not per_case:
        raise NoCaseCounts(
            f"none of {len(outcomes)} detection cases counts: {reasons}; "
            "check the chat template and the lengths, or give max_new_tokens room",
            outcomes,
        )
    log.info("%d of %d cases counted: %s", len(per_case), len(outcomes), reasons)
    return Detection(HeadScores(np.stack(per_case, axis=-1)), answers, outcomes)


def newline_ids(tokenizer) -> np.ndarray:
    """Ids of the tokens whose text holds a newline."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return np.array([i for i, text in enumerate(texts) if "\n" in text], np.int64)


def copy_score(prompt_S, span: tuple[int, int], tokens_N, argmax_NLH, released: bool = False) -> np.ndarray:
    """f32[L,H]: |tokens a head copied from the needle| / |tokens of the needle|, both as sets.

    A head copies token n if its strongest key lies in the span [start, end) and holds the token that is generated.
    released=True counts every copy, repeats included, and divides by the length of the span.
    """
    start, end = span
    inside_NLH = (argmax_NLH >= start) & (argmax_NLH < end)
    key_NLH = np.minimum(argmax_NLH, len(prompt_S) - 1)  # keys behind the prompt lie in no span
    hit_NLH = inside_NLH & (prompt_S[key_NLH] == np.asarray(tokens_N)[:, None, None])
    if released:
        return hit_NLH.sum(axis=0).astype(np.float32) / (end - start)
    needle_ids = np.unique(prompt_S[start:end])
    copied = [(hit_NLH & (np.asarray(tokens_N) == i)[:, None, None]).any(axis=0) for i in needle_ids]
    return np.sum(copied, axis=0).astype(np.float32) / len(needle_ids)


def words_of(case: Case) -> tuple[int, ...]:
    """The tokens of the needle's answer part, as they stand in the prompt."""
    return tuple(case.tokens[slice(*case.span)])


def stability(scores: HeadScores, steps: int = 10, **selection) -> list[dict]:
    """How the head set settles as cases are added: [{"cases", "heads", "jaccard" (with the final set)}, ...].

    selection: threshold=... or top_k=..., as in `HeadScores.heads`.
    """
    total = int(scores.counts.max())
    final = scores.heads(**selection)
    rows = []
    for n in sorted({max(1, round(total * (i + 1) / steps)) for i in range(steps)}):
        first = HeadScores([[cases[:n] for cases in row] for row in scores.per_case])
        heads = first.heads(**selection)
        rows.append({"cases": n, "heads": len(heads), "jaccard": stats.jaccard(heads, final)})
    return rows


def _outcome(answer: str, reference: str, cut: bool) -> str:
    if not answer.strip():
        return "empty answer"
    if rouge1_recall(answer, reference) > RIGHT_RECALL:
        return COUNTED
    return "wrong answer, cut at the token limit" if cut else "wrong answer"


def _greedy(lm, cases, max_new_tokens: int, batch_size: int, released: bool, read: bool) -> list:
    """(tokens, argmax) of each case's greedy answer."""
    results: list[Any] = [None] * len(cases)

    def decode(chosen) -> None:
        decoded = generate_many(
            lm.config,
            lm.params,
            [cases[i].tokens for i in chosen],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            stop_ids=() if released else None,
            probe=True,
            what="detect",
        )
        for i, result in zip(chosen, decoded, strict=True):
            results[i] = result.tokens, result.argmax

    def read_others(closing: tuple[int, ...]) -> None:
        """Results of those that say the needle's words and the closing, and stop."""
        drafts = {
            i: (*words_of(cases[i]), *closing, lm.config.eos_ids[0])
            for i, result in enumerate(results)
            if result is None
        }
        drafts = {i: draft for i, draft in drafts.items() if len(draft) <= max_new_tokens}
        if not drafts:
            return
        found = read_answers(
            lm, [cases[i].tokens for i in drafts], list(drafts.values()), batch_size=batch_size, what="detect"
        )
        for (i, draft), forced in zip(drafts.items(), found, strict=True):
            *said, last = forced.predicted.tolist()
            if tuple(said) == draft[:-1] and last in lm.config.eos_ids:
                results[i] = forced.predicted[:-1], forced.argmax[:-1]

    first = sorted(range(len(cases)), key=lambda i: len(cases[i].tokens))[:batch_size]
    if read and not released and lm.config.eos_ids and len(first) < len(cases):
        decode(first)
        closing = _usual_closing([cases[i] for i in first], [results[i][0] for i in first], max_new_tokens)
        if closing is not None:
            read_others(closing)
    decode([i for i, result in enumerate(results) if result is None])
    return results


def _usual_closing(cases, answers, max_new_tokens: int) -> tuple[int, ...] | None:
    """What most answers say behind the needle's words before they stop; None if most say something else."""
    closings = collections.Counter(
        tuple(map(int, tokens[len(words) :]))
        for tokens, words in zip(answers, map(words_of, cases), strict=True)
        if len(tokens) < max_new_tokens and tuple(tokens[: len(words)]) == words
    )
    (closing, count), *_ = closings.most_common(1) or [(None, 0)]
    return closing if count > len(cases) / 2 else None


def _first(tokens_N, stop_ids) -> int:
    """Index of the first stop id, or the number of tokens."""
    found = np.flatnonzero(np.isin(tokens_N, stop_ids))
    return int(found[0]) if len(found) else len(tokens_N)
