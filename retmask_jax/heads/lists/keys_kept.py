"""A budget of keys: the KV heads of a list that keep all their keys while all others stream, and the share of keys kept.

A KV head is kept whole for the sake of any of its query heads, and its other query heads then see all keys too.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head, Interventions, all_heads, stream_heads

KVHead = tuple[int, int]  # (layer, KV head)


def kv_heads_of(config: ModelConfig, heads: Iterable[Head]) -> list[KVHead]:
    """The KV heads of query heads, each once, in the order of the first of its query heads."""
    group = config.n_heads // config.n_kv_heads
    return list(dict.fromkeys((layer, head // group) for layer, head in heads))


def kept_for(config: ModelConfig, heads: Sequence[Head], size: int) -> tuple[int, list[KVHead]]:
    """(k, `size` KV heads): how many of the best heads have one of these, and these; fewer where the list ends.

    >>> import retmask_jax as rm
    >>> config = rm.load("bundled").config  # 8 query heads on 4 KV heads in each layer
    >>> kept_for(config, [(1, 0), (1, 1), (3, 7), (0, 2)], 2)
    (3, [(1, 0), (3, 3)])
    """
    kept: dict[KVHead, None] = {}
    for k, head in enumerate(heads):
        (kv_head,) = kv_heads_of(config, [head])
        if kv_head not in kept and len(kept) == size:
            return k, list(kept)
        kept[kv_head] = None
    return len(heads), list(kept)


def random_kv_heads(config: ModelConfig, seed: int) -> list[KVHead]:
    """All KV heads of a model in a random order."""
    every = kv_heads_of(config, all_heads(config))
    return [every[i] for i in np.random.default_rng(seed).permutation(len(every))]


def numbers_kept(kept: Iterable[int | float], total: int) -> list[int]:
    """How many KV heads are kept, ascending, from numbers and (as floats) shares of `total`.

    Raises:
        ValueError: A number of KV heads that the model does not have.
    """
    numbers = sorted({round(one * total) if isinstance(one, float) else int(one) for one in kept})
    if numbers and not 0 <= numbers[0] <= numbers[-1] <= total:
        wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise ValueError(f"a budget of {wrong} KV heads: the model has {total}, so its numbers lie in 0 to {total}")
    return numbers


def stream_all_but(config: ModelConfig, kept: Iterable[KVHead], sink: int, window: int) -> Interventions:
    """Interventions under which all query heads stream but those of the KV heads that are kept."""
    whole, group = set(kept), config.n_heads // config.n_kv_heads
    others = [(layer, head) for layer, head in all_heads(config) if (layer, head // group) not in whole]
    return stream_heads(config, others, sink, window)


def share_of_keys(config: ModelConfig, kept: Sequence[KVHead], length: int, sink: int, window: int) -> float:
    """The share of its keys that a model sees of a text, after `length` tokens, where all KV heads but these stream.

    Layers whose own window shows no more than streaming does lose nothing.
    """
    behind = np.arange(length)[::-1]  # how far each key lies back from the last
    in_reach = (behind < window) | (np.arange(length) < sink)
    own = {"full": behind >= 0, "sliding": behind < (config.window or length)}
    kinds = [*config.layer_pattern * config.repeats, *config.tail]
    whole_L = np.array([own[kind].sum() for kind in kinds])
    streamed_L = np.array([(own[kind] & in_reach).sum() for kind in kinds])
    n_kept_L = np.bincount([layer for layer, _ in kept], minlength=config.n_layers)
    seen_L = n_kept_L * whole_L + (config.n_kv_heads - n_kept_L) * streamed_L
    return float(seen_L.sum() / (config.n_kv_heads * whole_L.sum()))
