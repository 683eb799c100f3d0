"""Mask sweeps: many masks on the same prompts in one compiled program."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int, PyTree

from retmask_jax.generation.batching import bucket, full_batches
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import Layers
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import Masks, normalise, normalise_each
from retmask_jax.model.sharding import STACKED_ROWS, mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens, make_call
from retmask_jax.utils import memory
from retmask_jax.utils.array_types import Lengths, Tokens
from retmask_jax.utils.hosts import to_host
from retmask_jax.utils.progress import track


def sweep(
    lm: LanguageModel,
    tokens: Tokens,
    lengths: Lengths,
    masks: Sequence[Interventions],
    *,
    wanted: Int[ArrayLike, "M K"] | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """f32[N,M,V]: the next-token logits after each of M prompts under each of N shared masks.

    Every mask starts at the first layer it touches, from what the untouched model computed up to there, and computes the
    last layer for the last token only. One program serves all masks.

    Args:
        tokens: i32[M,T], right-padded.
        lengths: i32[M].
        wanted: i32[M,K], tokens whose log-probabilities are returned instead, f32[N,M,K].
        batch_size: Prompts at once; None: as many as fit into memory by the compiler's report.

    Raises:
        ValueError: The shapes do not fit.
        OutOfMemory: A single prompt is too much.
    """
    config = lm.config
    tokens, lengths = np.asarray(check_tokens(config, tokens, lengths)), np.asarray(lengths, np.int32)
    if not masks:
        raise ValueError("a sweep needs at least one mask")
    if lengths.min(initial=1) < 1:
        raise ValueError("a prompt of a sweep is empty: every length must be at least 1")
    stacked = normalise_each(config, masks)
    starts_N = first_groups(config, stacked)
    width = min(bucket(tokens.shape[1]), config.max_length)
    tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=config.pad_id)
    wanted = np.zeros((len(tokens), 0), np.int32) if wanted is None else np.asarray(wanted, np.int32)
    longest = np.int32(lengths.max())

    def arguments(rows: np.ndarray) -> tuple:
        return lm.params, tokens[rows], lengths[rows] - 1, wanted[rows], stacked, starts_N, longest

    @functools.cache
    def compile_for(size: int) -> Any:
        return _sweep.lower(config, *arguments(np.zeros(size, int))).compile()

    def run(size: int) -> np.ndarray:
        batch, program = memory.largest_batch(compile_for, size, "sweep")
        parts = []
        batches = list(full_batches(range(len(tokens)), batch))
        for rows in track(batches, len(batches), "sweep", "batch"):
            parts.append(to_host(program(*arguments(rows))))
        return np.concatenate(parts, axis=1)[:, : len(tokens)]

    with mesh_of(lm.params):
        return memory.in_smaller_batches(run, batch_size or len(tokens), "sweep")


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_MT", "last_M", "wanted_MK", results=STACKED_ROWS)
def _sweep(
    config: ModelConfig,
    params: PyTree,
    tokens_MT: jax.Array,
    last_M: jax.Array,
    wanted_MK: jax.Array,
    masks: Masks,
    starts_N: jax.Array,
    longest: jax.Array,
) -> jax.Array:
    """f32[N,M,...]."""
    call = make_call(config, tokens_MT.shape[1], None, last_M + 1, longest)
    layers = Layers(config, params, call)
    inputs_RMTE = layers.states(layers.embed(tokens_MT), normalise(config).by_layer(config))

    def one(args):
        mask, start = args
        x_M1E = layers.from_group(start, inputs_RMTE[start], mask.by_layer(config), last_M[:, None])
        logits_MV = unembed(config, params, layers.normed(x_M1E))[:, 0]
        if not wanted_MK.shape[1]:
            return logits_MV
        return jnp.take_along_axis(jax.nn.log_softmax(logits_MV), wanted_MK, axis=1)

    shared_by_prompts = jax.tree.map(lambda array_N: array_N[:, None], masks)
    return jax.lax.map(one, (shared_by_prompts, starts_N))


def first_groups(config: ModelConfig, masks: Masks) -> np.ndarray:
    """i32[N]: the first group of layers that each mask touches; the last group for a mask that touches none."""
    touched_NL = np.any((masks.head_BLH != 0) | (masks.query_BLH != 0), axis=2)
    touched_NL |= np.any(masks.rope_BLHR != 0, axis=(2, 3))
    if masks.streams is not None:
        touched_NL |= np.any(masks.streams.gate != 0, axis=2)
    first_N = np.where(touched_NL.any(axis=1), touched_NL.argmax(axis=1), config.n_layers - 1)
    return (first_N // len(config.layer_pattern)).astype(np.int32)
