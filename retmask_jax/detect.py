"""Detection: which heads look at the needle's token while the model copies it (arXiv 2404.15574)."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Sequence

import numpy as np

from retmask_jax import stats
from retmask_jax.generate import generate_many
from retmask_jax.haystack import Case
from retmask_jax.head_scores import HeadScores
from retmask_jax.lm import LanguageModel

log = logging.getLogger(__name__)

RIGHT_RECALL = 0.5
COUNTED = "counted"


@dataclasses.dataclass(frozen=True)
class Detection:
    """scores: of the counted cases. answers and outcomes: per case; an outcome is "counted" or why it was not."""

    scores: HeadScores
    answers: list[str]
    outcomes: list[str]

    @property
    def reasons(self) -> dict[str, int]:
        """Number of cases per outcome."""
        return dict(collections.Counter(self.outcomes))


def detect(lm: LanguageModel, cases: Sequence[Case], *, max_new_tokens: int = 50, batch_size: int = 16,
           released: bool = False) -> Detection:  # fmt: skip
    """Copy scores by greedy decoding: METHODS of arXiv 2404.15574, one score per head and counted case.

    A case counts if the ROUGE-1 recall of the answer against the needle's answer part is above 0.5. Decoding ends at
    EOS or a newline. released=True repeats the published detector: it never stops before max_new_tokens and adds up
    repeated copies, so that scores can exceed 1. Raises ValueError if no case counts.
    """
    newline = _newline_ids(lm.tokenizer)
    results = generate_many(
        lm.config, lm.params, [case.tokens for case in cases], batch_size=batch_size, max_new_tokens=max_new_tokens,
        stop_ids=() if released else None, probe=True, what="detect",
    )  # fmt: skip
    answers, outcomes, per_case = [], [], []
    for case, result in zip(cases, results, strict=True):
        end = len(result.tokens) if released else _first(result.tokens, newline)
        tokens_N, argmax_NLH = result.tokens[:end], result.argmax[:end]
        answer = lm.tokenizer.decode(tokens_N, skip_special_tokens=True)
        answers.append(answer)
        outcomes.append(_outcome(answer, case.needle.answer, cut=end == max_new_tokens))
        if outcomes[-1] == COUNTED:
            per_case.append(copy_score(np.asarray(case.tokens), case.span, tokens_N, argmax_NLH, released))
    if not per_case:
        raise ValueError(
            f"none of {len(cases)} detection cases counts: {dict(collections.Counter(outcomes))}; "
            "check the chat template and the lengths, or give max_new_tokens room"
        )
    log.info("%d of %d cases counted: %s", len(per_case), len(cases), dict(collections.Counter(outcomes)))
    return Detection(HeadScores(np.stack(per_case, axis=-1)), answers, outcomes)


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


def rouge1_recall(answer: str, reference: str) -> float:
    """ROUGE-1 recall of answer against reference, with stemming."""
    return _rouge().score(reference, answer)["rouge1"].recall


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


def _newline_ids(tokenizer) -> np.ndarray:
    """Ids of the tokens whose text holds a newline."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return np.array([i for i, text in enumerate(texts) if "\n" in text], np.int64)


def _first(tokens_N, stop_ids) -> int:
    """Index of the first stop id, or the number of tokens."""
    found = np.flatnonzero(np.isin(tokens_N, stop_ids))
    return int(found[0]) if len(found) else len(tokens_N)


@functools.cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=True)
