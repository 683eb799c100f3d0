"""Causal experiments: answers under many masks in one compiled program, and what they come to."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from retmask_jax.data.answers import holds
from retmask_jax.data.needles import Case
from retmask_jax.generation.decode import generate_many
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head, Interventions, stack
from retmask_jax.utils import stats

_MASK_BYTES = 2**30  # of masks repeated for each case, at a time


@dataclasses.dataclass(frozen=True)
class Condition:
    """One mask of an experiment: its kind ("retrieval", "layer-matched", ...), the draw, and what is masked.

    k: rotary pairs that each head loses, where they are not the same `pairs` for all (None: as many as those).
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
        return len(self.pairs) if self.k is None else self.k

    @property
    def site(self) -> str:
        return self.interventions.rope_site


def answers(
    lm: LanguageModel,
    cases: Sequence[Case],
    masks: Sequence[Interventions],
    *,
    max_new_tokens: int,
    batch_size: int,
    what: str = "answer",
) -> list[list[str]]:
    """Greedy answers [mask][case]: the cases under every mask are rows of the same compiled program, one for each rotary
    site."""
    prompts = [case.tokens for case in cases]
    texts: list[list[str]] = [[] for _ in masks]
    for some in _together(lm.config, masks, len(cases)):
        together = stack([masks[i] for i in some])
        per_row = jax.tree.map(lambda x: np.repeat(np.asarray(x), len(cases), axis=0), together)
        results = generate_many(
            lm.config,
            lm.params,
            prompts * len(some),
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            interventions=per_row,
            what=what,
        )
        said = lm.tokenizer.batch_decode([result.tokens for result in results], skip_special_tokens=True)
        for place, i in enumerate(some):
            texts[i] = said[place * len(cases) : (place + 1) * len(cases)]
    return texts


def hits(texts: Sequence[str], cases: Sequence[Case], field: str = "answer") -> np.ndarray:
    """bool[cases]: the words of the case's `answer` (or `memory`) occur in the text, in order, in any case (`holds`)."""
    return np.array([holds(text, getattr(case.needle, field)) for text, case in zip(texts, cases, strict=True)])


def summarise(conditions: Sequence[Condition], outcomes: Mapping[str, np.ndarray]) -> list[dict]:
    """One row per condition and task: value with its interval, and the paired test against the untouched model.

    outcomes: task -> bool[conditions, cases]; the first condition is the untouched model. q: p-values of a task adjusted
    for the false discovery rate over its conditions (Benjamini-Hochberg).
    """
    rows = []
    for task, outcome_CN in outcomes.items():
        tests = [stats.mcnemar(outcome_CN[0], outcome) for outcome in outcome_CN]
        p_values = [test["p_value"] for test in tests[1:]]
        adjusted = [1.0, *(stats.benjamini_hochberg(p_values).tolist() if p_values else [])]
        for condition, outcome, test, q in zip(conditions, outcome_CN, tests, adjusted, strict=True):
            rows.append(
                {
                    "task": task,
                    "experiment": condition.experiment,
                    "kind": condition.kind,
                    "draw": condition.draw,
                    "k": condition.n_pairs,
                    "site": condition.site,
                    "heads": [list(head) for head in condition.heads],
                    "pairs": list(condition.pairs),
                    **stats.proportion(outcome),
                    "change": stats.paired_bootstrap(outcome, outcome_CN[0]),
                    "mcnemar": test,
                    "q": q,
                }
            )
    return rows


def mean_over_draws(conditions: Sequence[Condition], outcome_CN, kind: str, k: int | None = None, **wanted) -> dict:
    """Mean outcome over the draws of a kind (and number of pairs k), with its interval over cases.

    wanted: other attributes of the conditions that are meant, such as experiment="dose".
    """
    chosen = [
        i
        for i, c in enumerate(conditions)
        if c.kind == kind
        and (k is None or c.n_pairs == k)
        and all(getattr(c, name) == value for name, value in wanted.items())
    ]
    outcomes = np.asarray(outcome_CN)[chosen]
    return stats.proportion(outcomes[0]) if len(chosen) == 1 else stats.bootstrap_mean(outcomes.mean(axis=0))


def contrast(conditions: Sequence[Condition], outcome_CN, ours: Mapping, others: Mapping) -> dict:
    """How much more cases two sorts of conditions get right, others less ours, paired by case: {"change": interval over
    cases of the difference, draws averaged; "p_value": of McNemar's exact test, median over the pairs of draws}.

    ours, others: the attributes that say which conditions are meant, such as {"kind": "random", "n_pairs": 4}.
    """
    sides = [
        [
            outcome
            for c, outcome in zip(conditions, outcome_CN, strict=True)
            if all(getattr(c, name) == value for name, value in wanted.items())
        ]
        for wanted in (others, ours)
    ]
    tests = [stats.mcnemar(a, b)["p_value"] for a in sides[0] for b in sides[1]]
    change = stats.paired_bootstrap(*(np.stack(side).astype(float) for side in sides))
    return {"change": change, "p_value": float(np.median(tests))}


def _together(config: ModelConfig, masks: Sequence[Interventions], n_cases: int) -> list[list[int]]:
    """Indices of masks of one rotary site, as many at a time as may be repeated for each case in memory."""
    by_site: dict[str, list[int]] = {}
    for i, mask in enumerate(masks):
        by_site.setdefault(mask.rope_site, []).append(i)
    at_once = max(1, _MASK_BYTES // (n_cases * _bytes_of_a_mask(config, masks)))
    return [some[i : i + at_once] for some in by_site.values() for i in range(0, len(some), at_once)]


def _bytes_of_a_mask(config: ModelConfig, masks: Sequence[Interventions]) -> int:
    width = 1 + config.n_pairs + (4 * config.head_dim if any(mask.head_mean is not None for mask in masks) else 0)
    return config.n_layers * config.n_heads * width
