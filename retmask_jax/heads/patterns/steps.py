"""Which heads retrieve at each token of an answer, and how long such sets of heads persist.

A head retrieves at a token in one of two senses (KINDS): its strongest key is in the needle's answer part, or it is there and
is the token that is said, which is what the copy score counts.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from retmask_jax.data.needles import Case
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.copy_score import answer_end, copies, greedy_answers, score_answers
from retmask_jax.heads.detection import COUNTED
from retmask_jax.model.interventions import Head
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import Number

IN_NEEDLE, COPIES = KINDS = "in the needle", "copies"
# What is measured of each kind, by the field of `Persistence`.
MEASURES = {
    "heads": "heads at a token",
    "distinct": "heads in an answer",
    "following": "overlap of neighbouring tokens",
    "listed": "overlap with the retrieval heads",
    "active": "share of the retrieval heads",
    "run": "tokens in a row",
    "shuffled": "tokens in a row, by chance",
}
_LEAST = 2  # cases in which an answer must be so long for a row
_LISTED = 12  # heads that retrieve most often

Active = Bool[np.ndarray, "N L H"]  # which heads retrieve at each token of an answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRow:
    """The heads that retrieve at one token of the answers. A number is the mean over the answers that have such a token.

    Attributes:
        kind: One of KINDS.
        position: Of the token in the answer, from 0 on.
        heads: How many retrieve.
        following: Jaccard index with those at the next token; None where there is none, or never a head at either.
        listed: Jaccard index with the retrieval heads.
        active: Share of the retrieval heads that retrieve.
    """

    kind: str
    position: int
    heads: Number
    following: Number | None
    listed: Number
    active: Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Persistence:
    """How long sets of heads persist: means over the tokens of an answer, then over answers.

    Attributes:
        kind: One of KINDS.
        heads: How many retrieve at a token.
        distinct: How many retrieve at any token of an answer.
        following: Jaccard index of the heads at neighbouring tokens, where one of the two has any.
        listed: Jaccard index with the retrieval heads.
        active: Share of the retrieval heads that retrieve.
        run: Tokens in a row at which a head retrieves.
        shuffled: The same, expected if the tokens of an answer came in random order: what a run is long by chance.
    """

    kind: str
    heads: Number
    distinct: Number
    following: Number | None
    listed: Number
    active: Number
    run: Number | None
    shuffled: Number | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSteps(Number):
    """The share of an answer's tokens at which a head retrieves, mean over answers.

    Attributes:
        kind: One of KINDS.
        listed: Whether it is one of the retrieval heads.
        run: Tokens in a row, mean over its runs in all answers; None where it has none.
        by_position: Share of the answers in which it retrieves at each position, as far as the rows go.
    """

    kind: str
    layer: int
    head: int
    listed: bool
    run: float | None
    by_position: list[float]


@dataclasses.dataclass(frozen=True)
class Steps:
    """Which heads retrieve token by token, in all answers that count.

    Attributes:
        outcomes: For each case "counted", or why it does not count.
        answers: The texts, of all cases.
        active: By kind, for each answer that counts.
    """

    outcomes: list[str]
    answers: list[str]
    active: dict[str, list[Active]]


def follow(lm: LanguageModel, cases: Sequence[Case], *, max_new_tokens: int = 50, batch_size: int = 16) -> Steps:
    """Decodes greedy answers, and records which heads retrieve at each of their tokens.

    Answers end, and count, as for the copy score.

    Raises:
        NoCaseCounts: No case counts; a ValueError.
    """
    found = greedy_answers(lm, cases, max_new_tokens, batch_size, released=False, read=True)
    scored = score_answers(lm, cases, found, max_new_tokens=max_new_tokens)
    active: dict[str, list[Active]] = {kind: [] for kind in KINDS}
    for case, (tokens_N, key_NLH), outcome in zip(cases, found, scored.outcomes, strict=True):
        if outcome == COUNTED:
            end = answer_end(lm.tokenizer, tokens_N)
            of_case = copies(np.asarray(case.tokens), case.span, tokens_N[:end], key_NLH[:end])
            for kind, retrieves_NLH in zip(KINDS, of_case, strict=True):
                active[kind].append(retrieves_NLH)
    return Steps(scored.outcomes, scored.answers, active)


def by_position(kind: str, answers: Sequence[Active], heads: Sequence[Head]) -> list[StepRow]:
    """Returns a row for each position that at least two answers have.

    Args:
        answers: At least one.
        heads: The retrieval heads.
    """
    listed_LH = _mask(answers[0], heads)
    rows = []
    for position in range(_positions(answers)):
        there = [active_NLH[position] for active_NLH in answers if len(active_NLH) > position]
        pairs = [active_NLH[position : position + 2] for active_NLH in answers if len(active_NLH) > position + 1]
        rows.append(
            StepRow(
                kind=kind,
                position=position,
                heads=_number([active_LH.sum() for active_LH in there]),
                following=_defined([_jaccard(*pair) for pair in pairs]),
                listed=_number([_jaccard(active_LH, listed_LH) for active_LH in there]),
                active=_number([active_LH[listed_LH].mean() for active_LH in there]),
            )
        )
    return rows


def persistence(kind: str, answers: Sequence[Active], heads: Sequence[Head]) -> Persistence:
    """Returns how long the heads of these answers persist; arguments as of `by_position`."""
    listed_LH = _mask(answers[0], heads)
    runs = [run_length(active_NLH) for active_NLH in answers]
    return Persistence(
        kind=kind,
        heads=_number([active_NLH.sum(axis=(1, 2)).mean() for active_NLH in answers]),
        distinct=_number([active_NLH.any(axis=0).sum() for active_NLH in answers]),
        following=_defined([_mean(map(_jaccard, active_NLH, active_NLH[1:])) for active_NLH in answers]),
        listed=_number([_mean(_jaccard(one_LH, listed_LH) for one_LH in active_NLH) for active_NLH in answers]),
        active=_number([active_NLH[:, listed_LH].mean() for active_NLH in answers]),
        run=_defined([length for length, _ in runs]),
        shuffled=_defined([by_chance for _, by_chance in runs]),
    )


def most_active(kind: str, answers: Sequence[Active], heads: Sequence[Head]) -> list[HeadSteps]:
    """Returns the heads that retrieve at the largest share of tokens, the best first; arguments as of `by_position`."""
    share_ALH = np.array([active_NLH.mean(axis=0) for active_NLH in answers])
    mean_LH, (_, n_heads) = share_ALH.mean(axis=0), share_ALH.shape[1:]
    best = np.argsort(-mean_LH, axis=None, kind="stable")[: min(_LISTED, int((mean_LH > 0).sum()))]
    found = []
    for layer, head in (divmod(int(place), n_heads) for place in best):
        of_head = [active_NLH[:, layer, head] for active_NLH in answers]
        found.append(
            HeadSteps.of(
                _number(share_ALH[:, layer, head]),
                kind=kind,
                layer=layer,
                head=head,
                listed=(layer, head) in heads,
                run=float(sum(map(np.sum, of_head)) / sum(map(_runs, of_head))),
                by_position=[
                    float(np.mean([active_N[position] for active_N in of_head if len(active_N) > position]))
                    for position in range(_positions(answers))
                ],
            )
        )
    return found


def run_length(active_NLH: Active) -> tuple[float, float]:
    """Returns for how many tokens in a row a head retrieves in one answer, mean over runs; and the same expected by chance.

    By chance: if the N tokens came in random order, a head that retrieves at k of them would have k (N - k + 1) / N runs.
    Both are nan where no head retrieves.

    >>> one_head = np.array([1, 1, 0, 1], bool)[:, None, None]
    >>> run_length(one_head)  # three tokens in two runs; in random order, three tokens in 3 * 2 / 4 runs
    (1.5, 2.0)
    """
    tokens_LH, n = active_NLH.sum(axis=0), len(active_NLH)
    runs, expected = _runs(active_NLH), float((tokens_LH * (n - tokens_LH + 1) / n).sum()) if n else 0.0
    return (float(tokens_LH.sum() / runs), float(tokens_LH.sum() / expected)) if runs else (np.nan, np.nan)


def _runs(active: Bool[np.ndarray, "N ..."]) -> int:
    """How often retrieval begins along the first axis."""
    return int(active[:1].sum() + (active[1:] & ~active[:-1]).sum())


def _positions(answers: Sequence[Active]) -> int:
    """How many tokens at least two answers have, or the one there is."""
    lengths = sorted((len(active_NLH) for active_NLH in answers), reverse=True)
    return lengths[min(_LEAST, len(lengths)) - 1]


def _jaccard(a_LH: Bool[np.ndarray, "L H"], b_LH: Bool[np.ndarray, "L H"]) -> float:
    """The shared heads over all heads of both; nan where both are empty."""
    union = (a_LH | b_LH).sum()
    return float((a_LH & b_LH).sum() / union) if union else np.nan


def _mask(like_NLH: Active, heads: Sequence[Head]) -> Bool[np.ndarray, "L H"]:
    mask_LH = np.zeros(like_NLH.shape[1:], bool)
    for head in heads:
        mask_LH[head] = True
    return mask_LH


def _mean(values: Iterable[float]) -> float:
    """The mean of the values that are defined; nan where none is."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else np.nan


def _number(values: Sequence[float] | Float[np.ndarray, " answers"]) -> Number:
    """The mean over answers with its interval, which one answer alone does not give."""
    return stats.bootstrap_mean(values) if len(values) > 1 else stats.exact(values[0], 1)


def _defined(values: Sequence[float]) -> Number | None:
    known = [value for value in values if np.isfinite(value)]
    return _number(known) if known else None
