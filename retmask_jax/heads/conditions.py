"""Causal experiments: answers under many masks in one compiled program, and their statistics."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from retmask_jax.data.answers import holds
from retmask_jax.data.needles import Case
from retmask_jax.generation.decode import Generated, generate_many
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.generation.under_masks import answers_under, can_share
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head, Interventions, is_empty, stack
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import McNemar, Number

Place = tuple[int, int]  # of a mask and of a case
_MASK_BYTES = 2**30  # of masks repeated for each case, at a time


@dataclasses.dataclass(frozen=True)
class Condition:
    """One mask of an experiment: its kind ("retrieval", "layer-matched", ...), the draw, and what is masked.

    k: how many rotary pairs each head loses, where `pairs` does not say it because they differ from head to head, or
    because they stand for another number of pairs; None: as many as `pairs`.
    """

    kind: str
    draw: int
    interventions: Interventions
    heads: tuple[Head, ...] = ()
    pairs: tuple[int, ...] = ()
    experiment: str = ""
    k: int | None = None

    @property
    def n_pairs(self) -> int:
        """How many rotary pairs each head loses."""
        return len(self.pairs) if self.k is None else self.k

    @property
    def site(self) -> str:
        """Where rotary pairs are ablated: "rotary" or "projection"."""
        return self.interventions.rope_site


UNTOUCHED = Condition("none", 0, Interventions())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionRow(Number):
    """The share of a task's cases that are right under a condition, and the paired test against the untouched model.

    k: rotary pairs that each head loses; change: against the untouched model; q: the p-value of `mcnemar`, adjusted for the
    false discovery rate over the conditions of a task (Benjamini-Hochberg).
    """

    value: float
    task: str
    experiment: str
    kind: str
    draw: int
    k: int
    site: str
    heads: list[Head]
    pairs: list[int]
    change: Number
    mcnemar: McNemar
    q: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """How many more cases one sort of condition gets right than another one, paired by case.

    change: mean over draws of the difference, with its interval over cases; p_value: of McNemar's exact test, the median
    over the pairs of draws.
    """

    change: Number
    p_value: float


def answers(
    lm: LanguageModel,
    cases: Sequence[Case],
    masks: Sequence[Interventions],
    *,
    max_new_tokens: int,
    batch_size: int,
    contrast: ContrastDecoding | None = None,
    known: Mapping[Place, Sequence[int]] | None = None,
    done: Callable[[Place, list[int]], None] | None = None,
    what: str = "answer",
) -> list[list[str]]:
    """Greedy answers [mask][case]; what lies before the first layer that a mask touches is computed once for all masks.

    Args:
        contrast: Answers are decoded by contrast, and nothing is shared among masks; the same for all masks and cases.
        known: Tokens of answers of an earlier run, which are not computed again.
        done: Called with each new answer.
    """
    prompts, n = [case.tokens for case in cases], len(masks)
    said = dict(known or {})

    def add(mask: int, case: int, generated: Generated) -> None:
        tokens: list[int] = np.asarray(generated.tokens).tolist()
        said[mask, case] = tokens
        if done is not None:
            done((mask, case), tokens)

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "what": what}
    if n > 1 and contrast is None and can_share(lm.config, prompts, max_new_tokens):
        earlier = {case * n + mask: tokens for (mask, case), tokens in said.items()}
        answers_under(lm, prompts, masks, known=earlier, done=lambda i, one: add(i % n, i // n, one), **options)
    else:
        for some in _together(lm.config, masks, len(cases)):
            missing = [place for place in itertools.product(some, range(len(cases))) if place not in said]
            _answer(lm, prompts, masks, missing, contrast, add, options)
    texts = lm.tokenizer.batch_decode
    return [texts([said[mask, case] for case in range(len(cases))], skip_special_tokens=True) for mask in range(n)]


def hits(texts: Sequence[str], cases: Sequence[Case], field: str = "answer") -> Bool[np.ndarray, " cases"]:
    """Whether the words of each case's `answer` (or `memory`) occur in its text, in order, in upper or lower case."""
    return np.array([holds(text, getattr(case.needle, field)) for text, case in zip(texts, cases, strict=True)])


def summarise(
    conditions: Sequence[Condition], outcomes: Mapping[str, Bool[np.ndarray, "conditions cases"]]
) -> list[ConditionRow]:
    """One row per task and condition.

    Args:
        conditions: The first is the untouched model.
        outcomes: Right or wrong, by task.
    """
    rows = []
    for task, outcome_CN in outcomes.items():
        tests = [stats.mcnemar(outcome_CN[0], outcome) for outcome in outcome_CN]
        p_values = [test.p_value for test in tests[1:]]
        adjusted = [1.0, *(stats.benjamini_hochberg(p_values).tolist() if p_values else [])]
        for condition, outcome, test, q in zip(conditions, outcome_CN, tests, adjusted, strict=True):
            rows.append(
                ConditionRow.of(
                    stats.proportion(outcome),
                    task=task,
                    experiment=condition.experiment,
                    kind=condition.kind,
                    draw=condition.draw,
                    k=condition.n_pairs,
                    site=condition.site,
                    heads=[(layer, head) for layer, head in condition.heads],
                    pairs=list(condition.pairs),
                    change=stats.paired_bootstrap(outcome, outcome_CN[0]),
                    mcnemar=test,
                    q=q,
                )
            )
    return rows


def mean_over_draws(
    conditions: Sequence[Condition], outcome_CN: Bool[np.ndarray, "conditions cases"], **wanted: Any
) -> Number:
    """Mean outcome over the conditions chosen, which are draws of one kind, with its interval over cases.

    Args:
        wanted: Attributes of the conditions to choose, such as kind="random", n_pairs=4.
    """
    outcomes_DN = _chosen(conditions, outcome_CN, wanted)
    return stats.proportion(outcomes_DN[0]) if len(outcomes_DN) == 1 else stats.bootstrap_mean(outcomes_DN.mean(axis=0))


def contrast(
    conditions: Sequence[Condition],
    outcome_CN: Bool[np.ndarray, "conditions cases"],
    ours: Mapping[str, Any],
    others: Mapping[str, Any],
) -> Contrast:
    """How many more cases are right under the other conditions than under ours.

    Args:
        ours, others: Attributes of the conditions to choose, such as {"kind": "random", "n_pairs": 4}.
    """
    ours_DN, others_DN = (_chosen(conditions, outcome_CN, wanted) for wanted in (ours, others))
    p_values = [stats.mcnemar(a, b).p_value for a in others_DN for b in ours_DN]
    change = stats.paired_bootstrap(others_DN.astype(float), ours_DN.astype(float))
    return Contrast(change=change, p_value=float(np.median(p_values)))


def _chosen(conditions: Sequence[Condition], outcome_CN, wanted: Mapping[str, Any]) -> np.ndarray:
    """The outcomes of the conditions whose attributes have these values."""
    chosen = [i for i, c in enumerate(conditions) if all(getattr(c, name) == v for name, v in wanted.items())]
    return np.asarray(outcome_CN)[chosen]


def _answer(lm, prompts, masks, missing: Sequence[Place], contrast, add, options: dict[str, Any]) -> None:
    """Answers these, each row under its mask."""
    if not missing:
        return
    chosen = sorted({mask for mask, _ in missing})
    together, rows = stack([masks[mask] for mask in chosen]), [chosen.index(mask) for mask, _ in missing]
    generate_many(
        lm.config,
        lm.params,
        [prompts[case] for _, case in missing],
        interventions=jax.tree.map(lambda x: np.asarray(x)[rows], together),
        contrast=contrast,
        done=lambda i, generated: add(*missing[i], generated),
        **options,
    )


def _together(config: ModelConfig, masks: Sequence[Interventions], n_cases: int) -> list[list[int]]:
    """Indices of masks of one rotary site and way to stream, as many at a time as may be repeated for each case in memory."""
    by_site: dict[tuple, list[int]] = {}
    for i, mask in enumerate(masks):
        way = None if is_empty(mask.stream_mask) else (mask.stream_sink, mask.stream_window)
        by_site.setdefault((mask.rope_site, way), []).append(i)
    at_once = max(1, _MASK_BYTES // (n_cases * _bytes_of_a_mask(config, masks)))
    return [some[i : i + at_once] for some in by_site.values() for i in range(0, len(some), at_once)]


def _bytes_of_a_mask(config: ModelConfig, masks: Sequence[Interventions]) -> int:
    means = sum(any(getattr(mask, name) is not None for mask in masks) for name in ("head_mean", "query_mean"))
    return config.n_layers * config.n_heads * (3 + config.n_pairs + 4 * config.head_dim * means)
