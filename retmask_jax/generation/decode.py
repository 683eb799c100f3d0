"""Generation: prefill and one compiled decode loop."""

import functools
import logging
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int, PyTree

from retmask_jax.generation.batching import batches_by_length, pad_rows, pad_to_bucket, padded_width
from retmask_jax.generation.prefill import ALIGNED, prefill, slots_for
from retmask_jax.generation.sampling import (
    NO_STOP,
    ContrastDecoding,
    Draws,
    check_options,
    next_tokens,
    row_keys,
    side_by_side,
    used,
)
from retmask_jax.model.attention import Probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import HiddenRows, next_hidden
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kv_cache import empty_cache
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.sharding import mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import compiled, memory
from retmask_jax.utils.array_types import Array, Lengths, Tokens
from retmask_jax.utils.hosts import to_host

log = logging.getLogger(__name__)
# Compiler options of programs that decode. On a GPU cuBLAS multiplies with weights and keys in place; for the kernels that
# XLA generates, those of each layer would be copied first, which takes longer than the product of a few rows. Other
# devices ignore the option.
DECODING = {"xla_gpu_enable_triton_gemm": False}
_SHARED = 8  # limits of new tokens up to a multiple of this share a program


class Generated(flax.struct.PyTreeNode):
    """Generated tokens.

    Attributes:
        tokens: i32[B,N], the pad id after a stop id.
        lengths: i32[B], the stop id not counted.
        stops: i32[B], the stop id that ended each row, or -1 where max_new_tokens did.
        argmax: i32[B,N,L,H], the key that each head attended to most when it predicted tokens[:, n]; None without a probe.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    stops: Int[Array, " B"]
    argmax: Int[Array, "B N L H"] | None = None


def generate(
    config: ModelConfig,
    params: PyTree,
    tokens: Tokens,
    lengths: Lengths,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Int[ArrayLike, " B"] = 0,
    interventions: Interventions | None = None,
    stop_ids: Sequence[int] | None = None,
    contrast: ContrastDecoding | None = None,
    probe: bool = False,
) -> Generated:
    """Continue each row of right-padded tokens i32[B,T] (lengths i32[B]) by up to max_new_tokens.

    Prompts are padded to a bucket of lengths; within a bucket one program serves every mask, seed, temperature, top_p and
    set of stop ids. Where rotary frequencies depend on the length (dynamic, longrope), those of the longest prompt and
    max_new_tokens hold from the first token on.

    Args:
        temperature: 0 is greedy.
        seed: One integer, or i32[B] to make the draws of a row independent of its batch.
        stop_ids: None: the model's EOS ids; (): never stop.
        contrast: Tokens are chosen by the contrast of the model under `interventions` with the model under those of the
            contrast. No value of it compiles anything either, except that alpha 0 is plain decoding, another program.
        probe: Also record `argmax`; not under contrast.
    """
    tokens = np.asarray(tokens)
    if lengths is None or tokens.size == 0:
        raise ValueError(
            f"generate needs at least one prompt and the length of each, got tokens of shape {tokens.shape}"
        )
    check_tokens(config, tokens, lengths, max_new_tokens)
    check_options(max_new_tokens, temperature, top_p)
    contrast = used(contrast)
    draws = Draws.of(config, stop_ids, temperature, top_p, contrast)
    masks = _masks_of_passes(config, interventions, contrast, len(tokens), probe)
    arguments = _arguments(config, tokens, lengths, masks, draws, np.asarray(seed), max_new_tokens)
    with mesh_of(params):
        out = generate_batch(config, params, *arguments, max_new_tokens=shared_width(max_new_tokens), probe=probe)
    if max_new_tokens % _SHARED == 0:
        return out
    return out.replace(
        tokens=out.tokens[:, :max_new_tokens], argmax=None if out.argmax is None else out.argmax[:, :max_new_tokens]
    )


def generate_many(
    config: ModelConfig,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    interventions: Interventions | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    contrast: ContrastDecoding | None = None,
    probe: bool = False,
    done: Callable[[int, Generated], None] | None = None,
    what: str = "generate",
) -> list[Generated]:
    """Continue prompts of any lengths, sorted into batches of similar length; results are in the order of the prompts.

    Where memory runs out the batch is halved and the work continues. Other options as in `generate`.

    Args:
        interventions: Shared by all prompts, or with a row for each; so are those of the contrast.
        seeds: One per prompt; None: 0, 1, ...
        done: As of `memory.in_batches`.
        what: Names the work in the progress bar and the log.

    Returns:
        One row for each prompt, as NumPy arrays: tokens i32[n] without pad or stop id, stops i32[], and argmax i32[n,L,H]
        with a probe.
    """
    check_options(max_new_tokens, temperature, top_p)
    contrast = used(contrast)
    draws = Draws.of(config, stop_ids, temperature, top_p, contrast)
    draws = draws if temperature > 0 else draws.greedy
    masks = _masks_of_passes(config, interventions, contrast, len(prompts), probe)
    seed_of = np.arange(len(prompts)) if seeds is None else np.asarray(seeds)
    options = {"max_new_tokens": shared_width(max_new_tokens), "probe": probe}

    def arguments(rows: np.ndarray) -> tuple:
        tokens, lengths = pad_rows([prompts[i] for i in rows], config.pad_id)
        check_tokens(config, tokens, lengths, max_new_tokens)
        taken = [one.take(rows) for one in masks]
        return _arguments(config, tokens, lengths, taken, draws, seed_of[rows], max_new_tokens)

    def compile_for(rows: np.ndarray) -> None:
        with mesh_of(params):
            generate_batch.lower(config, params, *arguments(rows), **options).compile()

    def work(todo: list[int], batch_size: int):
        batches = [
            np.array([todo[i] for i in batch]) for batch in batches_by_length([prompts[i] for i in todo], batch_size)
        ]
        widths = [padded_width(config, len(prompts[rows[0]]), max_new_tokens) for rows in batches]
        one_of_each = {width: rows for width, rows in zip(widths, batches, strict=True)}
        ahead = compiled.Ahead({width: functools.partial(compile_for, rows) for width, rows in one_of_each.items()})
        for width, rows in zip(widths, batches, strict=True):
            ahead.wait(width)
            with mesh_of(params):
                out = to_host(generate_batch(config, params, *arguments(rows), **options))
            yield rows, [one_row(out, row) for row in range(len(rows))]

    return memory.in_batches(len(prompts), batch_size, what, "prompt", work, done=done)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "probe"), compiler_options=DECODING)
def generate_batch(
    config: ModelConfig,
    params: PyTree,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    masks: Masks,
    draws: Draws,
    seeds_B: jax.Array,
    rows_B: jax.Array,
    *,
    max_new_tokens: int,
    probe: bool,
) -> Generated:
    """The compiled program of `generate`, for prompts padded to a bucket.

    Args:
        masks: With a row for each row of a pass, see `Draws`.
        max_new_tokens: Width of the result; `draws.most` may be less.
        seeds_B, rows_B: u32, as in `row_keys`.
    """
    longest = lengths_B.max() + jnp.minimum(draws.most, max_new_tokens)
    return _generate_rows(
        config, params, tokens_BT, lengths_B, masks, draws, seeds_B, rows_B, longest, max_new_tokens, probe
    )


@row_parallel("tokens_BT", "lengths_B", "masks", "seeds_B", "rows_B")
def _generate_rows(
    config: ModelConfig,
    params: PyTree,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    masks: Masks,
    draws: Draws,
    seeds_B: jax.Array,
    rows_B: jax.Array,
    longest: jax.Array,
    max_new_tokens: int,
    probe: bool,
) -> Generated:
    batch, width = tokens_BT.shape
    keys_B = None if draws.temperature is None else row_keys(seeds_B, rows_B)
    dtype = jax.tree.leaves(params)[0].dtype
    cache = empty_cache(config, draws.passes * batch, cache_slots(width, max_new_tokens), dtype)

    end_B = draws.spread(lengths_B)
    last_B1 = end_B[:, None] - 1
    first = prefill(
        config,
        params,
        draws.spread(tokens_BT),
        end_B,
        masks,
        cache,
        last_B1,
        longest=longest,
        probe=Probe(last_B1) if probe else None,
    )
    return decode_on(config, params, first, lengths_B, masks, draws, keys_B, longest, max_new_tokens, probe)


def cache_slots(width: int, max_new_tokens: int) -> int:
    """Slots of a cache for prompts padded to `width` and their answers."""
    return -(-max(slots_for(width), width + max_new_tokens) // ALIGNED) * ALIGNED


def decode_on(
    config: ModelConfig,
    params: PyTree,
    first: HiddenRows,
    lengths_B: jax.Array,
    masks: Masks,
    draws: Draws,
    keys_B: jax.Array | None,
    longest: jax.Array,
    max_new_tokens: int,
    probe: bool = False,
) -> Generated:
    """Draw tokens until all rows are done; pure, to be called under jit. Other arguments as of `generate_batch`.

    Args:
        first: Of the last token of each prompt, with the cache of the prompts, and what it probed; with a row for each row
            of a pass, as masks are.
        keys_B: As of `row_keys`; None where nothing is drawn.
    """
    batch = len(lengths_B)
    only = Probe(jnp.zeros((batch, 1), jnp.int32)) if probe else None

    def record(buffers: tuple, probed, token_B: jax.Array, done_B: jax.Array, step: jax.Array | int):
        """Write one step's tokens (pad for rows that are done) and probes into the result."""
        tokens_BN, argmax_BNLH = buffers
        tokens_BN = tokens_BN.at[:, step].set(jnp.where(done_B, config.pad_id, token_B))
        if probe:
            argmax_BNLH = argmax_BNLH.at[:, step].set(probed.keys[:, 0, :, :, 0])
        return tokens_BN, argmax_BNLH

    def unfinished(state):
        step, _, _, done_B, *_ = state
        return (step < jnp.minimum(draws.most, max_new_tokens)) & ~done_B.all()

    def decode(state):
        step, cache, token_B, done_B, count_B, stop_B, buffers = state
        last_B, start_B = draws.spread(token_B), draws.spread(lengths_B + step - 1)
        out = next_hidden(config, params, last_B, masks, cache=cache, start_B=start_B, probe=only, longest=longest)
        token_B, stops_B = next_tokens(config, params, draws, out.x_BTE, keys_B, step)
        stop_B = jnp.where(stops_B & ~done_B, token_B, stop_B)
        done_B |= stops_B
        buffers = record(buffers, out.probed, token_B, done_B, step)
        return step + 1, out.cache, token_B, done_B, count_B + ~done_B, stop_B, buffers

    empty = (
        jnp.full((batch, max_new_tokens), config.pad_id, jnp.int32),
        jnp.zeros((batch, max_new_tokens, config.n_layers, config.n_heads), jnp.int32) if probe else None,
    )
    token_B, done_B = next_tokens(config, params, draws, first.x_BPE, keys_B, 0)
    buffers = record(empty, first.probed, token_B, done_B, 0)
    stop_B = jnp.where(done_B, token_B, NO_STOP)
    state = (jnp.int32(1), first.cache, token_B, done_B, (~done_B).astype(jnp.int32), stop_B, buffers)
    *_, count_B, stop_B, (tokens_BN, argmax_BNLH) = jax.lax.while_loop(unfinished, decode, state)
    return Generated(tokens_BN, count_B, stop_B, argmax_BNLH)


def shared_width(max_new_tokens: int) -> int:
    """The tokens of a result of `generate_batch`, with those that are cut off."""
    return -(-max_new_tokens // _SHARED) * _SHARED


def _masks_of_passes(
    config: ModelConfig, interventions: Interventions | None, contrast: ContrastDecoding | None, rows: int, probe: bool
) -> list[Masks]:
    """The masks of the rows without and, where there is one, with the contrast."""
    masks = [normalise(config, interventions, rows)]
    if contrast is None:
        return masks
    if probe:
        raise ValueError("a probe records what heads see in one pass, contrast decoding has two: leave one of them out")
    return [*masks, normalise(config, contrast.interventions, rows)]


def _arguments(
    config: ModelConfig,
    tokens: np.ndarray,
    lengths: Lengths,
    masks: Sequence[Masks],
    draws: Draws,
    seeds: np.ndarray,
    max_new_tokens: int,
) -> tuple:
    """The arrays of `generate_batch` but the parameters, from tokens and options that are checked."""
    lengths = np.asarray(lengths, np.int32)
    if lengths.min(initial=1) < 1 or lengths.max(initial=1) > tokens.shape[1]:
        raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}; tokens have 1 to {tokens.shape[1]}")
    if seeds.shape not in ((), (len(tokens),)):
        raise ValueError(f"seed has shape {seeds.shape}; it must be one number or one for each of {len(tokens)} rows")
    if config.depends_on_length:
        longest = lengths.max() + max_new_tokens
        log.info("rotary frequencies are those of %d tokens, the longest prompt and max_new_tokens", longest)
    rows = np.arange(len(tokens)) if seeds.ndim == 0 else np.zeros(len(tokens), int)
    repeated = [one.repeated(len(tokens)) for one in masks]  # shared masks, too: one program for both
    return (
        pad_to_bucket(config, tokens, max_new_tokens),
        lengths,
        side_by_side(*repeated) if len(repeated) == 2 else repeated[0],
        draws._replace(most=np.int32(max_new_tokens)),
        np.broadcast_to(seeds, len(tokens)).astype(np.uint32),
        rows.astype(np.uint32),
    )


def one_row(out: Generated, row: int) -> Generated:
    """One row's result, cut at its end."""
    n = out.lengths[row]
    argmax = None if out.argmax is None else out.argmax[row, :n]
    return Generated(out.tokens[row, :n], n, out.stops[row], argmax)
