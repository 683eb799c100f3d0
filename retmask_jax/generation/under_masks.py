"""Greedy answers to the same prompts under many masks: what lies before the first masked layer is computed once."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from retmask_jax.generation.batching import batches_by_length, pad_rows, pad_to_bucket, padded_width
from retmask_jax.generation.decode import DECODING, Generated, cache_slots, decode_on, one_row, shared_width
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.prefill import usual_chunk
from retmask_jax.generation.sampling import Draws
from retmask_jax.generation.sweep import first_groups
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import Layers
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kv_cache import Cache, empty_cache
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.sharding import STACKED_ROWS, mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens, make_call
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host

_SHARE = 8  # the states before all groups of layers take at most this part of the free memory


def can_share(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> bool:
    """Whether prompts pass through the model in one piece, so that `answers_under` takes them."""
    longest = max(map(len, prompts), default=0)
    return config.lora is None and 0 < padded_width(config, longest, max_new_tokens) <= usual_chunk()


def answers_under(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    masks: Sequence[Interventions],
    *,
    max_new_tokens: int,
    batch_size: int,
    known: Mapping[int, Any] | None = None,
    done: Callable[[int, Generated], None] | None = None,
    what: str = "answer",
) -> list[list[Generated]]:
    """Greedy answers [mask][prompt], as of `generate_many`.

    One pass of the untouched model keeps the input of every group of layers and the caches. Each mask begins at the first
    group that it touches. Two programs serve all masks of one kind.

    Args:
        masks: Shared by all prompts; of any rotary site.
        batch_size: Prompts in a pass.
        known, done: As of `memory.in_batches`; the index of an answer is prompt x number of masks + mask.
    """
    config, n = lm.config, len(masks)
    dense = [normalise(config, mask) for mask in masks]
    starts = [first_groups(config, one)[0] for one in dense]
    draws = Draws.of(config, None, 0.0, 1.0).greedy._replace(most=np.int32(max_new_tokens))
    new = shared_width(max_new_tokens)

    def work(todo: list[int], batch_size: int):
        left = sorted({i // n for i in todo})
        size = min(batch_size, _most_rows(lm, max(len(prompts[i]) for i in left)))
        for batch in batches_by_length([prompts[i] for i in left], size):
            rows = [left[i] for i in batch]
            tokens_BT, lengths_B = pad_rows([prompts[i] for i in rows], config.pad_id)
            check_tokens(config, tokens_BT, lengths_B, max_new_tokens)
            tokens_BT = pad_to_bucket(config, tokens_BT, max_new_tokens)
            longest = np.int32(lengths_B.max() + max_new_tokens)
            before = _read(config, lm.params, tokens_BT, lengths_B, longest, max_new_tokens=new)
            for k in sorted({i % n for i in todo if i // n in rows}):
                shared = dense[k], starts[k], draws, longest
                out = to_host(_answer(config, lm.params, lengths_B, *shared, *before, max_new_tokens=new))
                yield [i * n + k for i in rows], [one_row(out, row) for row in range(len(rows))]

    with mesh_of(lm.params):
        found = memory.in_batches(n * len(prompts), batch_size, what, "answer", work, known=known, done=done)
    return [found[k::n] for k in range(n)]


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new_tokens")
@row_parallel("tokens_BT", "lengths_B", results=STACKED_ROWS)
def _read(
    config: ModelConfig,
    params: PyTree,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    longest: jax.Array,
    *,
    max_new_tokens: int,
) -> tuple[jax.Array, Cache]:
    """(the input of each group of layers [R,B,T,E], the caches of those before the last) in the untouched model."""
    batch, width = tokens_BT.shape
    dtype = jax.tree.leaves(params)[0].dtype
    cache = empty_cache(config, batch, cache_slots(width, max_new_tokens), dtype)
    layers = _layers(config, params, width, lengths_B, longest)
    carry = layers.embed(tokens_BT), cache["blocks"]
    states_RBTE, blocks = layers.states_and_caches(carry, normalise(config).by_layer(config))
    return states_RBTE, {"blocks": blocks, "tail": cache["tail"]}


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new_tokens", compiler_options=DECODING)
@row_parallel("lengths_B", stacked=("states_RBTE", "cache"))
def _answer(
    config: ModelConfig,
    params: PyTree,
    lengths_B: jax.Array,
    masks: Masks,
    start: jax.Array,
    draws: Draws,
    longest: jax.Array,
    states_RBTE: jax.Array,
    cache: Cache,
    *,
    max_new_tokens: int,
) -> Generated:
    """Answers under one mask, from the states before group `start` on."""
    layers = _layers(config, params, states_RBTE.shape[2], lengths_B, longest)
    last_B1 = lengths_B[:, None] - 1
    first = layers.rows_from_group(start, states_RBTE[start], cache, masks.by_layer(config), last_B1)
    return decode_on(config, params, first, lengths_B, masks, draws, None, longest, max_new_tokens)


def _layers(config: ModelConfig, params: PyTree, width: int, lengths_B, longest: jax.Array) -> Layers:
    return Layers(config, params, make_call(config, width, None, lengths_B, longest))


def _most_rows(lm: LanguageModel, length: int) -> int:
    """Rows whose states before all groups fit into their part of the free memory."""
    config, dtype = lm.config, jax.tree.leaves(lm.params)[0].dtype
    row = (config.repeats + 1) * padded_width(config, length, 1) * config.hidden_size * dtype.itemsize
    return max(1, memory.limit() * jax.local_device_count() // (_SHARE * row))
