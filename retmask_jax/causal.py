"""Causal experiments: answers under many masks in one compiled program, knock-out and rotary dose-response."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from retmask_jax import stats
from retmask_jax.generate import generate_many, pad_rows
from retmask_jax.haystack import Case
from retmask_jax.hosts import to_host
from retmask_jax.lm import LanguageModel
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import (
    Head,
    Interventions,
    all_heads,
    mask_heads,
    mask_rope,
    random_heads,
    rope_pairs,
    stack,
)
from retmask_jax.sequence import token_logprobs

IDLE = 0.1  # a head whose masking moves the text less than this share of what the most active one does is called idle


@dataclasses.dataclass(frozen=True)
class Condition:
    """One mask of an experiment: its kind ("retrieval", "layer-matched", ...), the draw, and what is masked."""

    kind: str
    draw: int
    interventions: Interventions
    heads: tuple[Head, ...] = ()
    pairs: tuple[int, ...] = ()


def answers(lm: LanguageModel, cases: Sequence[Case], masks: Sequence[Interventions], *, max_new_tokens: int,
            batch_size: int, what: str = "answer") -> list[list[str]]:  # fmt: skip
    """Greedy answers [mask][case]: the cases under every mask are rows of the same compiled program."""
    rows = [i for i in range(len(masks)) for _ in cases]
    filled = stack([mask.fill(lm.config) for mask in masks])
    per_row = filled.replace(head_mask=filled.head_mask[np.array(rows)], rope_mask=filled.rope_mask[np.array(rows)])
    prompts = [case.tokens for case in cases] * len(masks)
    results = generate_many(lm.config, lm.params, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens,
                            interventions=per_row, what=what)  # fmt: skip
    texts = lm.tokenizer.batch_decode([result.tokens for result in results], skip_special_tokens=True)
    return [texts[i * len(cases) : (i + 1) * len(cases)] for i in range(len(masks))]


def hits(texts: Sequence[str], cases: Sequence[Case], field: str = "answer") -> np.ndarray:
    """bool[cases]: the words of the case's `answer` (or `memory`) occur in the text, in order, in any case."""
    wanted = [_words(getattr(case.needle, field)) for case in cases]
    return np.array([f" {part} " in f" {_words(text)} " for part, text in zip(wanted, texts, strict=True)])


def knockout_conditions(config: ModelConfig, heads: Sequence[Head], activity_LH, *, draws: int,
                        seed: int = 0) -> list[Condition]:  # fmt: skip
    """The untouched model, the retrieval heads masked, and `draws` each of three kinds of random non-retrieval heads:
    of any layer, of the same layers, and of similar activity (see `activity`)."""
    controls = {
        "any layer": lambda s: random_heads(config, n=len(heads), exclude=heads, seed=s),
        "layer-matched": lambda s: random_heads(config, like=heads, seed=s),
        "activity-matched": lambda s: activity_matched(heads, activity_LH, seed=s),
    }
    conditions = [
        Condition("none", 0, Interventions()),
        Condition("retrieval", 0, mask_heads(config, heads), tuple(heads)),
    ]
    for kind, choose in controls.items():
        for draw in range(draws):
            chosen = choose(seed + draw)
            conditions.append(Condition(kind, draw, mask_heads(config, chosen), tuple(chosen)))
    return conditions


def rope_conditions(config: ModelConfig, heads: Sequence[Head], ks: Sequence[int], *, draws: int,
                    seed: int = 0) -> list[Condition]:  # fmt: skip
    """Rotary pairs out of the retrieval heads: the k lowest and highest by frequency and `draws` random choices, for
    each k; and the k lowest out of layer-matched control heads."""
    control = random_heads(config, like=heads, seed=seed)
    conditions = [Condition("none", 0, Interventions())]

    def add(kind, draw, chosen, pairs):
        conditions.append(Condition(kind, draw, mask_rope(config, chosen, pairs), tuple(chosen), tuple(pairs)))

    for k in ks:
        add("lowest", 0, heads, rope_pairs(config, k, "low"))
        add("highest", 0, heads, rope_pairs(config, k, "high"))
        add("control heads, lowest", 0, control, rope_pairs(config, k, "low"))
        for draw in range(draws):
            add("random", draw, heads, rope_pairs(config, k, "random", seed=seed + draw))
    return conditions


def activity(lm: LanguageModel, rows: Sequence[Sequence[int]], *, batch_size: int) -> np.ndarray:
    """f32[L,H]: mean absolute change of the log-probability of a token of text when one head alone is masked."""
    config = lm.config
    tokens_BT, lengths_B = pad_rows(rows, config.pad_id)
    real_BT = np.arange(1, tokens_BT.shape[1]) < lengths_B[:, None]
    masks = [Interventions(), *(mask_heads(config, [head]) for head in all_heads(config))]
    logps = []
    for mask in masks:  # one shape, one program
        parts = [
            to_host(token_logprobs(config, lm.params, tokens_BT[i : i + batch_size], interventions=mask))
            for i in range(0, len(tokens_BT), batch_size)
        ]
        logps.append(np.concatenate(parts)[real_BT])
    change = np.abs(np.stack(logps[1:]) - logps[0]).mean(axis=1)
    return change.reshape(config.n_layers, config.n_heads).astype(np.float32)


def activity_matched(heads: Sequence[Head], activity_LH, seed: int = 0, nearest: int = 3) -> list[Head]:
    """For each head one outside `heads`, drawn from the `nearest` by ratio of activity that are not taken yet."""
    rng = np.random.default_rng(seed)
    log_activity = np.log(np.asarray(activity_LH, np.float64) + 1e-9)
    heads = [tuple(head) for head in heads]
    free = [index for index in np.ndindex(log_activity.shape) if index not in set(heads)]
    if len(free) < len(heads):
        raise ValueError(f"{len(heads)} control heads are wanted, the model has only {len(free)} others")
    chosen = []
    for head in heads:
        free.sort(key=lambda other: abs(log_activity[other] - log_activity[head]))
        chosen.append(free.pop(int(rng.integers(min(nearest, len(free))))))
    return sorted(chosen)


def summarise(conditions: Sequence[Condition], outcomes: Mapping[str, np.ndarray]) -> list[dict]:
    """One row per condition and task: value with its interval, and the paired test against the untouched model.

    outcomes: task -> bool[conditions, cases]; the first condition is the untouched model.
    """
    rows = []
    for task, outcome_CN in outcomes.items():
        for condition, outcome in zip(conditions, outcome_CN, strict=True):
            rows.append({
                "task": task, "kind": condition.kind, "draw": condition.draw, "k": len(condition.pairs),
                "heads": [list(head) for head in condition.heads], "pairs": list(condition.pairs),
                **stats.proportion(outcome),
                "change": stats.paired_bootstrap(outcome, outcome_CN[0]),
                "mcnemar": stats.mcnemar(outcome_CN[0], outcome),
            })  # fmt: skip
    return rows


def mean_over_draws(conditions: Sequence[Condition], outcome_CN, kind: str, k: int | None = None) -> dict:
    """Mean outcome over the draws of a kind (and number of pairs k), with its interval over cases."""
    chosen = [i for i, c in enumerate(conditions) if c.kind == kind and (k is None or len(c.pairs) == k)]
    outcomes = np.asarray(outcome_CN)[chosen]
    return stats.proportion(outcomes[0]) if len(chosen) == 1 else stats.bootstrap_mean(outcomes.mean(axis=0))


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
