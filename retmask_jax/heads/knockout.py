"""Which heads to ablate, and which others as controls; curves over their number; the smallest set that matters."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from numpy.typing import ArrayLike

from retmask_jax.generation.batching import full_batches, pad_rows
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.logprobs import chosen_logprobs
from retmask_jax.heads.conditions import Condition
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import Layers
from retmask_jax.model.interventions import (
    Head,
    Interventions,
    all_heads,
    layer_matched,
    mask_heads,
    mask_queries,
    random_heads,
)
from retmask_jax.model.masking import normalise
from retmask_jax.model.sharding import STACKED_ROWS, full_share, mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens, make_call
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host

IDLE = 0.1  # a head is called idle if masking it changes the text by less than this share of what the most active head does

# What an ablated head writes: nothing (RetMask); its mean over plain text; the mean value of all keys, because its query is
# zero (the block list of arXiv 2404.15574); what its mean query over plain text reads (LOCOS, arXiv 2607.01002).
MODES = ("zero", "mean", "query", "query_mean")

CONTROLS = ("any layer", "layer-matched", "activity-matched", "lowest-scoring")  # the kinds of `control_heads`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spared:
    """A step of `minimal_set`: the head that is no longer masked, and recall with the remaining heads masked."""

    head: Head
    recall: float


def knockout_conditions(
    config: ModelConfig,
    heads: Sequence[Head],
    activity_LH: ArrayLike,
    *,
    draws: int,
    seed: int = 0,
    scores_LH: ArrayLike | None = None,
    mode: str = "zero",
    mean_LHD: Float32[np.ndarray, "L H D"] | None = None,
) -> list[Condition]:
    """The untouched model, the retrieval heads ablated, and the sets of `control_heads`.

    Args:
        mode: One of MODES.
        mean_LHD: As of `ablate`.
    """
    chosen = [("retrieval", 0, heads)]
    chosen += control_heads(config, heads, activity_LH, draws=draws, seed=seed, scores_LH=scores_LH)
    return [Condition("none", 0, Interventions(), experiment=mode)] + [
        Condition(kind, draw, ablate(config, some, mode, mean_LHD), tuple(some), experiment=mode)
        for kind, draw, some in chosen
    ]


def control_heads(
    config: ModelConfig,
    heads: Sequence[Head],
    activity_LH: ArrayLike | None = None,
    *,
    draws: int,
    seed: int = 0,
    scores_LH: ArrayLike | None = None,
) -> list[tuple[str, int, list[Head]]]:
    """As many other heads, as (kind, draw, heads): `draws` sets of each kind.

    They are of any layer, of the same layers, where activity_LH is given of similar activity (see `activity`) and, where
    scores_LH are given, the lowest-scoring heads.
    """
    kinds: dict[str, Callable[[int], list[Head]]] = {
        "any layer": lambda s: random_heads(config, n=len(heads), exclude=heads, seed=s),
        "layer-matched": lambda s: layer_matched(config, heads, s),
    }
    if activity_LH is not None:
        kinds["activity-matched"] = lambda s: activity_matched(heads, activity_LH, seed=s)
    if scores_LH is not None:
        kinds["lowest-scoring"] = lambda s: lowest_scoring(scores_LH, heads, seed=s)
    return [(kind, draw, choose(seed + draw)) for kind, choose in kinds.items() for draw in range(draws)]


def curve_conditions(
    config: ModelConfig,
    scores: HeadScores,
    heads: Sequence[Head],
    sizes: Iterable[int | float],
    *,
    draws: int,
    seed: int = 0,
) -> list[Condition]:
    """More and more of the highest-scoring heads masked, and as many random others.

    The random heads are neither among those nor retrieval heads; sizes for which too few are left have none.

    Args:
        sizes: Whole numbers of heads, or shares (as floats) of the retrieval heads, rounded up.
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
    """Sizes of `curve_conditions` as numbers of heads, ascending; ValueError for a number that the model does not have."""
    numbers = sorted({math.ceil(size * n_retrieval) if isinstance(size, float) else int(size) for size in sizes})
    if numbers and not 1 <= numbers[0] <= numbers[-1] <= n_all:
        wrong = numbers[0] if numbers[0] < 1 else numbers[-1]
        raise ValueError(f"a curve over {wrong} heads: the model has {n_all}, so its numbers lie in 1 to {n_all}")
    return numbers


def minimal_set(
    heads: Sequence[Head], recall_of: Callable[[list[list[Head]]], Sequence[float]], limit: float
) -> tuple[list[Head], list[Spared]]:
    """A small set of heads whose masking keeps recall at most `limit`, and the steps that led to it.

    Heads are spared one at a time while recall stays at most `limit`: in each step the head without which recall is lowest
    (of several such heads the last, which scores lowest). The search is greedy, so a smaller set may exist.

    Args:
        heads: Best first.
        recall_of: Recall with each of several sets masked.
    """
    kept, steps = list(heads), []
    while kept:
        recall = np.asarray(recall_of([kept[:i] + kept[i + 1 :] for i in range(len(kept))]), float)
        i = int(np.flatnonzero(recall == recall.min())[-1])
        if recall[i] > limit:
            break
        steps.append(Spared(head=kept.pop(i), recall=float(recall[i])))
    return kept, steps


def ablate(
    config: ModelConfig, heads: Sequence[Head], mode: str, mean_LHD: Float32[np.ndarray, "L H D"] | None = None
) -> Interventions:
    """Interventions that ablate heads in one of MODES.

    Args:
        mean_LHD: For "mean" and "query_mean", the mean outputs or queries (`head_statistics(...).mean_for(mode)`).

    Raises:
        ValueError: The mode is unknown or needs a mean, or the model has no such head or takes no such mask.
    """
    if mode in ("mean", "query_mean") and mean_LHD is None:
        raise ValueError(f"knock-out mode {mode!r} needs means: give those of head_statistics")
    match mode:
        case "zero":
            return mask_heads(config, heads)
        case "mean":
            return mask_heads(config, heads, mean_LHD)
        case "query":
            return mask_queries(config, heads)
        case "query_mean":
            return mask_queries(config, heads, mean_LHD)
    raise ValueError(f"knock-out mode is {mode!r}; it must be one of {', '.join(MODES)}")


def activity(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    known: Mapping[tuple[int, Head], float] | None = None,
    done: Callable[[tuple[int, Head], float], None] | None = None,
) -> Float32[np.ndarray, "L H"]:
    """Mean absolute change of the log-probability of a token (nats) when one head alone is masked, on texts of tokens.

    Each pass starts at the first layer with a masked head, from the states that the untouched model had there.

    Args:
        batch_size: Rows in a pass, each a text under one mask; halved where memory runs out.
        known: Changes, summed over the tokens of a text, by (text, head), which are not computed again.
        done: Called with each new one.
    """
    config, heads = lm.config, all_heads(lm.config)
    places = [(text, head) for text in range(len(rows)) for head in heads]
    tokens_NT, lengths_N = pad_rows(rows, config.pad_id)
    check_tokens(config, tokens_NT)
    real_NT = np.arange(1, tokens_NT.shape[1]) < lengths_N[:, None]

    def work(todo: list[int], batch_size: int):
        texts = sorted({i // len(heads) for i in todo})
        for batch in full_batches(texts, min(batch_size, full_share(len(texts)))):
            at_once = min(len(heads), max(1, batch_size // len(batch)))
            tokens_BT = tokens_NT[batch]
            states_RBTE = _states(config, lm.params, tokens_BT)

            def logprobs(some: Sequence[Head | None], tokens_BT=tokens_BT, states_RBTE=states_RBTE):
                return to_host(_masked_logprobs(config, lm.params, *_late(config, some), tokens_BT, states_RBTE))

            untouched_B1T = logprobs([None] * at_once)[:, :1]
            left = sorted({i % len(heads) for i in todo if i // len(heads) in batch})
            for some in full_batches(left, at_once):
                change_BKT = np.abs(logprobs([heads[h] for h in some]) - untouched_B1T, dtype=np.float64)
                total_BK = (change_BKT * real_NT[batch, None]).sum(axis=2)
                yield [text * len(heads) + h for text in batch for h in some], total_BK.ravel().tolist()

    with mesh_of(lm.params):
        total_NLH = memory.in_batches(
            len(places),
            batch_size,
            "activity",
            "mask",
            work,
            known=None if known is None else {i: known[place] for i, place in enumerate(places) if place in known},
            done=None if done is None else lambda i, total: done(places[i], total),
        )
    total_LH = np.sum(np.reshape(total_NLH, (len(rows), config.n_layers, config.n_heads)), axis=0)
    return (total_LH / real_NT.sum()).astype(np.float32)


def activity_matched(heads: Sequence[Head], activity_LH: ArrayLike, seed: int = 0, nearest: int = 3) -> list[Head]:
    """As many heads outside `heads`: for each head one of the `nearest` by ratio of activity that are still free."""
    rng = np.random.default_rng(seed)
    log_activity = np.log(np.asarray(activity_LH, np.float64) + 1e-9)
    heads = [tuple(head) for head in heads]
    free = _others(log_activity.shape, heads)
    chosen = []
    for head in heads:
        free.sort(key=lambda other: abs(log_activity[other] - log_activity[head]))
        chosen.append(free.pop(int(rng.integers(min(nearest, len(free))))))
    return sorted(chosen)


def lowest_scoring(scores_LH: ArrayLike, heads: Sequence[Head], seed: int = 0) -> list[Head]:
    """As many heads outside `heads`, those with the lowest scores; the seed decides between equal scores."""
    scores_LH = np.asarray(scores_LH)
    free = _others(scores_LH.shape, [tuple(head) for head in heads])
    order = np.random.default_rng(seed).permutation(len(free))
    return sorted(sorted((free[i] for i in order), key=lambda head: scores_LH[head])[: len(heads)])


def _others(shape: tuple[int, int], heads: list[Head]) -> list[Head]:
    free = [index for index in np.ndindex(shape) if index not in set(heads)]
    if len(free) < len(heads):
        raise ValueError(f"{len(heads)} control heads are wanted, the model has only {len(free)} others")
    return free


def _late(config: ModelConfig, heads: Sequence[Head | None]) -> tuple[np.ndarray, np.int32]:
    """(bool[K,L,H]: for each head its mask, all False for None; the first group of layers with a masked head)."""
    mask_KLH = np.zeros((len(heads), config.n_layers, config.n_heads), bool)
    for mask_LH, head in zip(mask_KLH, heads, strict=True):
        if head is not None:
            mask_LH[head] = True
    first = min((head[0] for head in heads if head is not None), default=config.n_layers - 1)
    return mask_KLH, np.int32(first // len(config.layer_pattern))


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_BT", results=STACKED_ROWS)
def _states(config: ModelConfig, params, tokens_BT):
    """[R,B,T,E]: the input of each group of layers in the untouched model."""
    layers = _layers(config, params, *tokens_BT.shape)
    return layers.states(layers.embed(tokens_BT), normalise(config).by_layer(config))


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_BT", stacked=("states_RBTE",))
def _masked_logprobs(config: ModelConfig, params, mask_KLH, start, tokens_BT, states_RBTE):
    """f32[B,K,T-1]: log-probability of each token of the texts under each mask, from the states of group `start` on."""
    n_masks, (batch, length) = len(mask_KLH), tokens_BT.shape
    tokens_XT, x_XTE = (jnp.repeat(x, n_masks, axis=0) for x in (tokens_BT, states_RBTE[start]))
    masks = normalise(config, Interventions(jnp.tile(mask_KLH, (batch, 1, 1))), batch * n_masks)
    layers = _layers(config, params, batch * n_masks, length)
    x_XTE = layers.normed(layers.from_group(start, x_XTE, masks.by_layer(config)))[:, :-1]
    logp_XT = chosen_logprobs(config, params, x_XTE, tokens_XT[:, 1:], jnp.ones(x_XTE.shape[:2], bool))
    return logp_XT.reshape(batch, n_masks, -1)


def _layers(config: ModelConfig, params, batch: int, length: int) -> Layers:
    return Layers(config, params, make_call(config, length, None, jnp.full(batch, length)))
