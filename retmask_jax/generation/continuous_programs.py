"""The compiled programs of `generate_stream`: a batch whose rows begin and end at different times.

The state of a batch is (Rows, cache). Each program gives its cache away to the next one, which changes it in place. Under
contrast the cache, and all passes, have two rows for each of Rows, side by side (`Draws`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from retmask_jax.generation.batching import bucket, padded_width
from retmask_jax.generation.decode import DECODING
from retmask_jax.generation.prefill import prefill, slots_for
from retmask_jax.generation.sampling import NO_STOP, Draws, next_tokens, pair_rows, row_keys
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import next_hidden
from retmask_jax.model.kv_cache import Cache, empty_cache, put_rows
from retmask_jax.model.masking import Masks
from retmask_jax.model.sharding import ROW_AXES, ROWS, STACKED_ROWS, constrain, full_share, row_parallel

# A finished row idles until it is refilled. On one device decoding goes on until an eighth of the rows are free, the
# number that one prefill then fills: on average a sixteenth of the batch idles, and a prefill has enough rows to be
# worth its start, however long the answers are.
_REFILLED = 8

State = tuple["Rows", Any]
_STATE = ROWS, STACKED_ROWS


class Shared(NamedTuple):
    """What all rows have in common.

    Attributes:
        masks: A row for each of the different masks; under contrast two, side by side.
        longest: Tokens of the longest prompt and its answer.
    """

    params: Any
    masks: Masks
    draws: Draws
    longest: Any

    def masks_of(self, mask_B: jax.Array) -> Masks:
        """The masks of the rows of a pass, from the number of each row's mask."""
        return self.masks.take(mask_B if self.draws.passes == 1 else pair_rows(mask_B))


class Prompts(NamedTuple):
    """Prompts that begin together: right-padded tokens i32[F,T], their lengths, seeds of their draws, and masks."""

    tokens_FT: Any
    length_F: Any
    seed_F: Any
    mask_F: Any


class Rows(flax.struct.PyTreeNode):
    """The requests in progress, one per row.

    Attributes:
        token_B: The token that was drawn last; it is in no cache yet.
        length_B: The length of the prompt.
        count_B: How many tokens were drawn that are no stop id.
        done_B: Whether the row has finished, or is free.
        stop_B: The stop id that was drawn, or NO_STOP.
        tokens_BN: The tokens that were drawn.
        seed_B: The seed of the draws.
        mask_B: The number of the mask.
    """

    token_B: Any
    length_B: Any
    count_B: Any
    done_B: Any
    stop_B: Any
    tokens_BN: Any
    seed_B: Any
    mask_B: Any

    @classmethod
    def begin(
        cls, length_B: jax.Array, seed_B: jax.Array, mask_B: jax.Array, max_new_tokens: int, done: bool
    ) -> "Rows":
        """Rows for which no token was drawn yet."""
        batch = len(length_B)
        zeros_B, tokens_BN = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, max_new_tokens), jnp.int32)
        stop_B = jnp.full(batch, NO_STOP, jnp.int32)
        return cls(zeros_B, length_B, zeros_B, jnp.full(batch, done), stop_B, tokens_BN, seed_B, mask_B)

    def add(self, token_B: jax.Array, stops_B: jax.Array) -> "Rows":
        """The rows with the next token of each that is not done."""
        goes_on_B = ~self.done_B & ~stops_B
        tokens_BN = self.tokens_BN.at[jnp.arange(len(token_B)), self.count_B].set(token_B)  # free from count_B on
        count_B = self.count_B + goes_on_B
        done_B = ~goes_on_B | (count_B == tokens_BN.shape[1])
        stop_B = jnp.where(stops_B & ~self.done_B, token_B, self.stop_B)
        return self.replace(token_B=token_B, count_B=count_B, done_B=done_B, stop_B=stop_B, tokens_BN=tokens_BN)

    def draw(self, config: ModelConfig, shared: Shared, x_B1E: jax.Array) -> "Rows":
        """The rows with a token drawn from the last hidden state of each."""
        keys_B = row_keys(self.seed_B, jnp.zeros_like(self.seed_B))
        return self.add(*next_tokens(config, shared.params, shared.draws, x_B1E, keys_B, self.count_B))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("slots", "max_new_tokens", "passes"))
@row_parallel("blank_B", results=_STATE)
def empty_state(
    config: ModelConfig, params: PyTree, blank_B: jax.Array, *, slots: int, max_new_tokens: int, passes: int = 1
) -> State:
    """The state of a batch of free rows. blank_B: zeros i32[B], as many as there are rows. passes: as of `Draws`."""
    dtype = jax.tree.leaves(params)[0].dtype
    rows = Rows.begin(blank_B, blank_B.astype(jnp.uint32), blank_B, max_new_tokens, done=True)
    return laid_out(rows, empty_cache(config, passes * len(blank_B), slots, dtype))


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new_tokens")
@row_parallel("prompts", results=_STATE)
def start_rows(config: ModelConfig, shared: Shared, prompts: Prompts, *, max_new_tokens: int) -> State:
    """The state of a few rows after their prompts, with their first token."""
    tokens_FT, length_F, seed_F, mask_F = prompts
    dtype = jax.tree.leaves(shared.params)[0].dtype
    draws, masks = shared.draws, shared.masks_of(mask_F)
    cache = empty_cache(config, draws.passes * len(tokens_FT), slots_for(tokens_FT.shape[1]), dtype)
    given, end_F = draws.spread(tokens_FT), draws.spread(length_F)
    first = prefill(config, shared.params, given, end_F, masks, cache, end_F[:, None] - 1, longest=shared.longest)
    rows = Rows.begin(length_F, seed_F, mask_F, max_new_tokens, done=False)
    return laid_out(rows.draw(config, shared, first.x_BPE), first.cache)


@functools.partial(jax.jit, donate_argnames="cache")
@row_parallel("row_F", "rows", "new_rows", stacked=("cache", "new_cache"), results=_STATE)
def replace_rows(row_F: jax.Array, rows: Rows, cache: Cache, new_rows: Rows, new_cache: Cache) -> State:
    """The state with the new rows in its rows row_F."""
    batch, cached = len(rows.done_B), jax.tree.leaves(cache)[0].shape[1]
    rows = jax.tree.map(lambda old, new: old.at[row_F].set(new, mode="drop"), rows, new_rows)
    return laid_out(rows, put_rows(cache, new_cache, row_F if cached == batch else pair_rows(row_F)))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache", compiler_options=DECODING)
@row_parallel("rows", stacked=("cache",), results=_STATE)
def decode_rows(
    config: ModelConfig, shared: Shared, steps: ArrayLike, enough: ArrayLike, rows: Rows, cache: Cache
) -> State:
    """The state after this many steps, or as soon as enough rows are done."""
    draws, masks = shared.draws, shared.masks_of(rows.mask_B)

    def one(loop):
        step, (rows, cache) = loop
        # What a row that is done computes means nothing; it stays where a new prompt writes first.
        start_B = jnp.where(rows.done_B, 0, rows.length_B + rows.count_B - 1)
        token_B, start_B = draws.spread(rows.token_B), draws.spread(start_B)
        out = next_hidden(config, shared.params, token_B, masks, cache=cache, start_B=start_B, longest=shared.longest)
        return step + 1, (rows.draw(config, shared, out.x_BTE), out.cache)

    def unfinished(loop):
        step, (rows, _) = loop
        return (step < steps) & (jnp.sum(rows.done_B) < enough)

    return laid_out(*jax.lax.while_loop(unfinished, one, (jnp.int32(0), (rows, cache)))[1])


def laid_out(rows: Any, cache: Cache | None) -> tuple[Any, Any]:
    """A state as every program of it returns it, so that each is compiled once."""
    return constrain(rows, ("batch",)), constrain(cache, (None, "batch", "heads"))


def slots_needed(config: ModelConfig, length: int, max_new_tokens: int) -> int:
    """Cache slots for prompts of up to this length and their answers; few different numbers occur."""
    return max(bucket(length + max_new_tokens), slots_for(padded_width(config, length, max_new_tokens)))


def rows_at_once(batch: int) -> int:
    """How many rows of a batch begin together."""
    return full_share(-(-batch // _REFILLED), ROW_AXES)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function, its positional arguments (or their shapes) and its keyword arguments."""

    function: jax.stages.Wrapped
    arguments: tuple
    options: dict[str, Any]

    def compiled(self) -> Any:
        """The function compiled for these arguments."""
        return self.function.lower(*self.arguments, **self.options).compile()


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs that a batch of a given number of rows runs."""

    empty: Program
    prefill: Program
    decode: Program

    def needed(self) -> tuple[int, int]:
        """(bytes of the rows and caches on a device, the most bytes that a program takes in addition)."""
        empty, prefill, decode = (call.compiled().memory_analysis() for call in (self.empty, self.prefill, self.decode))
        added = max(decode.temp_size_in_bytes, prefill.temp_size_in_bytes + prefill.output_size_in_bytes)
        return empty.output_size_in_bytes, added


def programs(config: ModelConfig, shared: Shared, rows: int, length: int, max_new_tokens: int) -> Programs:
    """The Programs of a batch for prompts of up to `length` tokens, on the mesh that is set.

    Args:
        shared: Arrays, or their shapes.
    """
    batch = full_share(rows, ROW_AXES)
    n = rows_at_once(batch)
    width = padded_width(config, length, max_new_tokens)
    numbers = [jax.ShapeDtypeStruct((n,), dtype) for dtype in (jnp.int32, jnp.uint32, jnp.int32)]
    prompts = Prompts(jax.ShapeDtypeStruct((n, width), jnp.int32), *numbers)
    options = {"slots": slots_needed(config, length, max_new_tokens), "max_new_tokens": max_new_tokens}
    options["passes"] = shared.draws.passes
    empty = Program(empty_state, (config, shared.params, np.zeros(batch, np.int32)), options)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    return Programs(
        empty,
        Program(start_rows, (config, shared, prompts), {"max_new_tokens": max_new_tokens}),
        Program(decode_rows, (config, shared, number, number, *_result_shapes(empty)), {}),
    )


def _result_shapes(call: Program) -> Any:
    """What a program returns, as shapes with the places that the compiler chose."""
    config, *arrays = call.arguments
    shapes = jax.eval_shape(functools.partial(call.function, config, **call.options), *arrays)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, call.compiled().output_shardings
    )
