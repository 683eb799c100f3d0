"""Which heads to take out, and which others as controls; curves over their number; the smallest set that matters."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from retmask_jax.causal import Condition
from retmask_jax.generate import pad_rows
from retmask_jax.head_scores import HeadScores
from retmask_jax.hosts import to_host
from retmask_jax.lm import LanguageModel
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head, Interventions, all_heads, mask_heads, mask_queries, random_heads
from retmask_jax.sequence import token_logprobs

IDLE = 0.1  # a head whose masking moves the text less than this share of what the most active one does is called idle

# What a masked head does: it writes nothing (RetMask); its mean over plain text (LOCOS); the mean value of all keys, as
# its query is zero (arXiv 2404.15574's block list).
MODES = ("zero", "mean", "query")


def knockout_conditions(config: ModelConfig, heads: Sequence[Head], activity_LH, *, draws: int, seed: int = 0,
                        scores_LH=None, mode: str = "zero", mean_LHD=None) -> list[Condition]:  # fmt: skip
    """The untouched model, the retrieval heads masked, and as controls as many other heads, `draws` of each kind: of any
    layer, of the same layers, of similar activity (see `activity`) and, where scores_LH are given, the lowest-scoring.

    mode: one of MODES; "mean" needs mean_LHD (`head_statistics`).
    """
    controls: dict[str, Callable[[int], list[Head]]] = {
        "any layer": lambda s: random_heads(config, n=len(heads), exclude=heads, seed=s),
        "layer-matched": lambda s: random_heads(config, like=heads, seed=s),
        "activity-matched": lambda s: activity_matched(heads, activity_LH, seed=s),
    }
    if scores_LH is not None:
        controls["lowest-scoring"] = lambda s: lowest_scoring(scores_LH, heads, seed=s)
    chosen = [("retrieval", 0, heads)]
    chosen += [(kind, draw, choose(seed + draw)) for kind, choose in controls.items() for draw in range(draws)]
    return [Condition("none", 0, Interventions(), experiment=mode)] + [
        Condition(kind, draw, take_out(config, some, mode, mean_LHD), tuple(some), experiment=mode)
        for kind, draw, some in chosen
    ]


def curve_conditions(config: ModelConfig, scores: HeadScores, heads: Sequence[Head], sizes: Iterable[int | float], *,
                     draws: int, seed: int = 0) -> list[Condition]:  # fmt: skip
    """The highest-scoring heads masked, more and more of them, and as many at random that are neither among those nor
    retrieval heads, where the model has as many.

    sizes: whole numbers of heads, or shares (as floats) of the retrieval heads, rounded up.
    """
    conditions = []
    for n in head_numbers(sizes, len(heads), scores.mean.size):
        best = scores.heads(top_k=n)
        conditions.append(Condition("highest-scoring", 0, mask_heads(config, best), tuple(best), experiment="curve"))
        others = set(best) | {tuple(head) for head in heads}
        for draw in range(draws if scores.mean.size - len(others) >= n else 0):
            chosen = random_heads(config, n=n, exclude=others, seed=seed + draw)
            conditions.append(Condition("random", draw, mask_heads(config, chosen), tuple(chosen), experiment="curve"))
    return conditions


def head_numbers(sizes: Iterable[int | float], n_retrieval: int, n_all: int) -> list[int]:
    """Sizes of `curve_conditions` as numbers of heads, ascending; ValueError for one the model does not have."""
    numbers = sorted({math.ceil(size * n_retrieval) if isinstance(size, float) else int(size) for size in sizes})
    if numbers and not 1 <= numbers[0] <= numbers[-1] <= n_all:
        wrong = numbers[0] if numbers[0] < 1 else numbers[-1]
        raise ValueError(f"a curve over {wrong} heads: the model has {n_all}, so its numbers lie in 1 to {n_all}")
    return numbers


def minimal_set(heads: Sequence[Head], recall_of: Callable[[list[list[Head]]], Sequence[float]],
                limit: float) -> tuple[list[Head], list[dict[str, Any]]]:  # fmt: skip
    """The heads that are left when, one by one, those are spared that recall can do without: (heads, steps).

    recall_of: recall with each of several sets masked. A head is spared as long as recall stays at most `limit`, first
    the one that leaves it lowest (of equal ones the last, which scores lowest). Each step: {"head" spared, "recall"}.
    Greedy: a smaller set may exist.
    """
    kept, steps = list(heads), []
    while kept:
        recall = np.asarray(recall_of([kept[:i] + kept[i + 1 :] for i in range(len(kept))]), float)
        i = int(np.flatnonzero(recall == recall.min())[-1])
        if recall[i] > limit:
            break
        steps.append({"head": list(kept.pop(i)), "recall": float(recall[i])})
    return kept, steps


def take_out(config: ModelConfig, heads: Sequence[Head], mode: str, mean_LHD=None) -> Interventions:
    """Interventions that take heads out in one of MODES."""
    match mode:
        case "zero":
            return mask_heads(config, heads)
        case "mean":
            return mask_heads(config, heads, mean_LHD)
        case "query":
            return mask_queries(config, heads)
    raise ValueError(f"knock-out mode is {mode!r}; it must be one of {', '.join(MODES)}")


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
    free = _others(log_activity.shape, heads)
    chosen = []
    for head in heads:
        free.sort(key=lambda other: abs(log_activity[other] - log_activity[head]))
        chosen.append(free.pop(int(rng.integers(min(nearest, len(free))))))
    return sorted(chosen)


def lowest_scoring(scores_LH, heads: Sequence[Head], seed: int = 0) -> list[Head]:
    """As many heads outside `heads`, of the lowest scores; which of equal ones, the seed decides."""
    scores_LH = np.asarray(scores_LH)
    free = _others(scores_LH.shape, [tuple(head) for head in heads])
    order = np.random.default_rng(seed).permutation(len(free))
    return sorted(sorted((free[i] for i in order), key=lambda head: scores_LH[head])[: len(heads)])


def _others(shape: tuple[int, int], heads: list[Head]) -> list[Head]:
    free = [index for index in np.ndindex(shape) if index not in set(heads)]
    if len(free) < len(heads):
        raise ValueError(f"{len(heads)} control heads are wanted, the model has only {len(free)} others")
    return free
