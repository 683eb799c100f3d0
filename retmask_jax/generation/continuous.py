"""Generation whose batch is refilled as rows finish: for many prompts whose answers differ in length."""

import collections
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax.generation.batching import bucket, pad_rows, pad_to_bucket, take_rows
from retmask_jax.generation.decode import DECODING, NO_STOP, Draws, Generated, check_options, next_tokens, row_keys
from retmask_jax.generation.prefill import prefill, slots_for
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import next_hidden
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kv_cache import empty_cache, put_rows
from retmask_jax.model.sharding import ROW_AXES, ROWS, STACKED_ROWS, by_rows, constrain, full_share, mesh_of, row_shares
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import least, to_host
from retmask_jax.utils.progress import with_rate

log = logging.getLogger(__name__)

# A finished row idles until it is refilled. On one device decoding goes on until an eighth of the rows are free, the
# number that one prefill then fills: on average a sixteenth of the batch idles, and a prefill has rows enough to be
# worth its start, whatever the lengths of the answers. Devices with rows of their own would wait for the slowest to get
# there, so they decode a few steps between two looks at them: few against an answer, many against the look's time.
_REFILLED = 8
_STEPS = 16
# A narrower cache costs the wait for the rows on their way: about half of a longest answer. It is worth that from this
# many batches of average answers on, by the share of them that the narrower cache saves.
_WORTH_WAITING = 2
_CHECKED_AT_ONCE = 1024
_FILLED = 0.9  # of the free memory that rows may fill: the rest is lost between arrays
_FREE = -1


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt's tokens, the number of the mask it runs under and the seed of its draws."""

    tokens: Sequence[int]
    mask: int = 0
    seed: int = 0


def generate_stream(
    config: ModelConfig,
    params,
    requests: Sequence[Request],
    *,
    batch_size: int | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    masks: Interventions | None = None,
    what: str = "sample",
) -> Iterator[tuple[int, Generated]]:
    """Continue each request by up to max_new_tokens: (its index, its result) as soon as its row is harvested.

    A result is what `generate_many` gives for the prompt, mask and seed: NumPy tokens i32[n] without pad or stop id, and
    stops i32[].
    masks: arrays with a leading axis over the different masks (None: one that masks nothing). Options as in
    `generate`; where rotary frequencies depend on the length, those of the longest request and max_new_tokens hold for
    all. batch_size None: as many rows as the device's free memory holds, by the compiler's report. Where memory runs out
    the batch is halved and unfinished requests begin anew. Raises ValueError for a request that does not fit before
    anything runs.
    """
    check_options(max_new_tokens, temperature, top_p)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    masks = _per_mask(config, masks)
    longest = _check(config, requests, max_new_tokens, n_masks=len(masks.head_mask)) + max_new_tokens
    if config.depends_on_length:
        log.info("%s: rotary frequencies are those of %d tokens, the longest prompt and max_new_tokens", what, longest)
    draws = Draws.of(config, stop_ids, temperature, top_p)
    job = _Job(config, max_new_tokens, (params, masks, draws, np.int32(longest)), requests)
    return with_rate(_stream(job, batch_size, what), lambda item: int(item[1].lengths), len(requests), what, "prompt")


@dataclasses.dataclass(frozen=True)
class _Job:
    """shared: (params, masks with their leading axis, Draws, longest), the same for all rows."""

    config: ModelConfig
    max_new_tokens: int
    shared: tuple
    requests: Sequence[Request]

    @property
    def params(self):
        return self.shared[0]


@flax.struct.dataclass
class _Rows:
    """Requests on their way, a row each. token_B was drawn last and is in no cache yet; count_B: how many were drawn
    that are no stop id; done_B: finished, or free; stop_B: the stop id that was drawn, or NO_STOP."""

    token_B: Any
    length_B: Any
    count_B: Any
    done_B: Any
    stop_B: Any
    tokens_BN: Any
    seed_B: Any
    mask_B: Any

    @classmethod
    def of(cls, length_B, seed_B, mask_B, max_new_tokens: int, done: bool) -> "_Rows":
        batch = len(length_B)
        zeros_B, tokens_BN = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, max_new_tokens), jnp.int32)
        stop_B = jnp.full(batch, NO_STOP, jnp.int32)
        return cls(zeros_B, length_B, zeros_B, jnp.full(batch, done), stop_B, tokens_BN, seed_B, mask_B)

    def add(self, token_B, stops_B) -> "_Rows":
        """With the next token of each row that is not done."""
        goes_on_B = ~self.done_B & ~stops_B
        tokens_BN = self.tokens_BN.at[jnp.arange(len(token_B)), self.count_B].set(token_B)  # behind count_B it is free
        count_B = self.count_B + goes_on_B
        done_B = ~goes_on_B | (count_B == tokens_BN.shape[1])
        stop_B = jnp.where(stops_B & ~self.done_B, token_B, self.stop_B)
        return self.replace(token_B=token_B, count_B=count_B, done_B=done_B, stop_B=stop_B, tokens_BN=tokens_BN)

    def draw(self, config, shared, x_B1E) -> "_Rows":
        """With a token drawn from the last hidden state of each row."""
        params, _, draws, _ = shared
        keys_B = row_keys(self.seed_B, jnp.zeros_like(self.seed_B))
        return self.add(*next_tokens(config, params, draws, x_B1E, keys_B, self.count_B))


def _stream(job: _Job, batch_size: int, what: str):
    longest_first = sorted(range(len(job.requests)), key=lambda i: -len(job.requests[i].tokens))
    left = dict.fromkeys(longest_first)
    while left:
        rows = batch_size or 1
        try:
            for group in _groups(job, list(left), batch_size, what):
                rows = batch_size or _filling(job, group, what)
                for i, result in _refilled(job, group, rows):
                    del left[i]
                    yield i, result
        except jax.errors.JaxRuntimeError as error:
            batch_size = memory.halved(error, rows, what)


def _groups(job: _Job, indices: list[int], batch_size: int | None, what: str) -> list[list[int]]:
    """Requests, the longest first, cut where a narrower cache is worth waiting for all rows on their way."""
    widths = [_slots(job, len(job.requests[i].tokens)) for i in indices]

    def room(width: int) -> int:
        with mesh_of(job.params):
            return _room(job.config, job.params, width, least(memory.limit()))

    cuts, rows = [0], batch_size or room(widths[0])
    for at, width in enumerate(widths):
        saved = 1 - width / widths[cuts[-1]]
        if saved * (len(indices) - at) / rows > _WORTH_WAITING:
            cuts.append(at)
            rows = batch_size or room(width)
    prefills = {bucket(len(job.requests[i].tokens)) for i in indices}
    log.info(
        "%s: caches of %s slots, prompts of up to %d lengths: that many programs to decode and to prefill",
        what,
        ", ".join(str(widths[cut]) for cut in cuts),
        len(prefills),
    )
    return [indices[start:end] for start, end in zip(cuts, [*cuts[1:], len(indices)], strict=True)]


def _filling(job: _Job, group: Sequence[int], what: str) -> int:
    """Rows of a batch that fills the free memory, or has all requests of the group."""
    length, free = max(len(job.requests[i].tokens) for i in group), least(memory.limit())
    with mesh_of(job.params):
        rows = rows_that_fill(job.config, job.shared, length, job.max_new_tokens, free, most=len(group))
    log.info(
        "%s: %d rows of up to %d tokens fill the memory of %.2f GiB",
        what,
        rows,
        length + job.max_new_tokens,
        free / 2**30,
    )
    return rows


def rows_that_fill(config: ModelConfig, shared, length: int, max_new_tokens: int, free: int, most: int) -> int:
    """How many rows of prompts of up to `length` tokens need no more than so many bytes on each device of the mesh that
    is set: by the size of the caches, then as much less as the compiler's report says. shared as in `programs`."""
    shares, slots = full_share(1, ROW_AXES), max(bucket(length + max_new_tokens), slots_for(bucket(length)))
    rows, free = min(most, _room(config, shared[0], slots, free)), int(_FILLED * free)
    while (rows := max(shares, rows - rows % shares)) > shares:
        try:
            needed = sum(programs(config, shared, rows, length, max_new_tokens).needed())
        except jax.errors.JaxRuntimeError as error:  # the compiler of a TPU says so itself
            if not memory.is_out_of_memory(error):
                raise
            needed = int(1.4 * free)
        if needed <= free:
            break
        rows = min(rows - 1, int(rows * free / needed))
    return rows


def _room(config: ModelConfig, params, slots: int, free: int) -> int:
    """Rows of which the caches alone fill so many bytes of each device."""
    dtype, tensor = jax.tree.leaves(params)[0].dtype, jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    row = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(config, 1, slots, dtype)))
    held = sum(x.size * x.dtype.itemsize for x in row) // (1 if config.n_kv_heads % tensor else tensor)
    return max(1, int(_FILLED * free) // held * full_share(1, ROW_AXES))


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a batch of so many rows runs, by shapes: jitted functions with their arguments. state: _Rows and cache."""

    empty: tuple
    prefill: tuple
    decode: tuple

    def needed(self) -> tuple[int, int]:
        """(bytes of the rows and caches on a device, the most that a program takes beside them)."""
        empty, prefill, decode = (
            function.lower(*given, **options).compile().memory_analysis()
            for function, given, options in (self.empty, self.prefill, self.decode)
        )
        beside = max(decode.temp_size_in_bytes, prefill.temp_size_in_bytes + prefill.output_size_in_bytes)
        return empty.output_size_in_bytes, beside


def programs(config: ModelConfig, shared, rows: int, length: int, max_new_tokens: int) -> Programs:
    """The Programs of a batch for prompts of up to `length` tokens, on the mesh that is set; shared as in `_Job`, or its
    shapes."""
    batch, slots = full_share(rows, ROW_AXES), max(bucket(length + max_new_tokens), slots_for(bucket(length)))
    n = full_share(-(-batch // _REFILLED), ROW_AXES)
    width = min(bucket(length), config.max_length - max_new_tokens)
    numbers = [jax.ShapeDtypeStruct((n,), dtype) for dtype in (jnp.int32, jnp.uint32, jnp.int32)]
    prompts = jax.ShapeDtypeStruct((n, width), jnp.int32), *numbers
    empty = _empty, (config, shared[0], np.zeros(batch, np.int32)), {"slots": slots, "max_new_tokens": max_new_tokens}
    state = _state_shapes(empty)
    one = jax.ShapeDtypeStruct((), jnp.int32)
    return Programs(
        empty,
        (_start, (config, shared, prompts), {"max_new_tokens": max_new_tokens}),
        (_decode, (config, shared, one, one, *state), {}),
    )


def _state_shapes(empty):
    """The state that a program gives, as shapes with the places the compiler chose."""
    function, given, options = empty
    compiled = function.lower(*given, **options).compile()
    shapes = jax.eval_shape(functools.partial(function, given[0], **options), *given[1:])
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, compiled.output_shardings
    )


def _slots(job: _Job, length: int) -> int:
    """Slots for prompts of up to this length and their answers, of which few different numbers occur."""
    return max(bucket(length + job.max_new_tokens), slots_for(bucket(length)))


def _refilled(job: _Job, group: Sequence[int], batch_size: int):
    """(index, result) of each request of a group, from one batch; the longest comes first and fits the cache."""
    with mesh_of(job.params):
        batch = full_share(batch_size, ROW_AXES)
        at_once = full_share(-(-batch // _REFILLED), ROW_AXES)
        shares = row_shares(batch)
        blank_B = np.zeros(batch, np.int32)
        state = _empty(
            job.config,
            job.params,
            blank_B,
            slots=_slots(job, len(job.requests[group[0]].tokens)),
            max_new_tokens=job.max_new_tokens,
        )
    waiting, owner_B = collections.deque(group), np.full(batch, _FREE)
    while waiting or (owner_B != _FREE).any():
        with mesh_of(job.params):
            while waiting and (taken := _take(waiting, owner_B, at_once, shares)) is not None:
                state = _admit(job, state, *taken)
            steps = _STEPS if waiting and shares > 1 else job.max_new_tokens
            enough = at_once if waiting and shares == 1 else batch // shares
            state = _decode(job.config, job.shared, np.int32(steps), np.int32(enough), *state)
            rows = to_host(state[0])
        for row in np.flatnonzero(rows.done_B & (owner_B != _FREE)):
            n = rows.count_B[row]
            yield int(owner_B[row]), Generated(rows.tokens_BN[row, :n].copy(), n, stops=rows.stop_B[row])
            owner_B[row] = _FREE


def _take(waiting: collections.deque, owner_B: np.ndarray, at_once: int, shares: int):
    """(requests, rows) i32[at_once]: what to prefill next, and in which row of its device each goes; None where no
    device has room for its share. The rows' owners are noted.

    Where requests or rows do not suffice the first request stands in for more, to be left out.
    """
    owner_DB, per_device = owner_B.reshape(shares, -1), at_once // shares
    free = [np.flatnonzero(owners == _FREE)[:per_device] for owners in owner_DB]
    if max(map(len, free)) < per_device:
        return None
    requests_DF = np.full((shares, per_device), waiting[0])
    rows_DF = np.full((shares, per_device), owner_DB.shape[1], np.int32)
    for device, f in itertools.product(range(shares), range(per_device)):
        if waiting and f < len(free[device]):
            row = free[device][f]
            rows_DF[device, f] = row
            requests_DF[device, f] = owner_DB[device, row] = waiting.popleft()
    return requests_DF.ravel(), rows_DF.ravel()


def _admit(job: _Job, state, indices, row_F):
    """The state with new requests in the rows row_F."""
    requests = [job.requests[i] for i in indices]
    tokens, lengths = pad_rows([request.tokens for request in requests], job.config.pad_id)
    seeds = np.array([request.seed for request in requests]).astype(np.uint32)
    prompts = (
        pad_to_bucket(job.config, tokens, job.max_new_tokens),
        lengths,
        seeds,
        np.array([request.mask for request in requests], np.int32),
    )
    new = _start(job.config, job.shared, prompts, max_new_tokens=job.max_new_tokens)
    return _place(row_F, *state, *new)


# The state is (_Rows, cache). A cache is given away to each program and changed in place.
_STATE = ROWS, STACKED_ROWS


@functools.partial(jax.jit, static_argnums=0, static_argnames=("slots", "max_new_tokens"))
def _empty(config, params, blank_B, *, slots, max_new_tokens):
    """The state of a batch of free rows."""
    dtype = jax.tree.leaves(params)[0].dtype

    def blank(_, blank_B):
        rows = _Rows.of(blank_B, blank_B.astype(jnp.uint32), blank_B, max_new_tokens, done=True)
        return _laid_out(rows, empty_cache(config, len(blank_B), slots, dtype))

    return by_rows(blank, (), blank_B, split=(ROWS, _STATE))


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new_tokens")
def _start(config, shared, prompts, *, max_new_tokens):
    """The state of a few rows behind their prompts, with their first token."""

    def start(shared, prompts):
        params, masks, _, longest = shared
        tokens_BT, length_B, seed_B, mask_B = prompts
        cache = empty_cache(config, len(tokens_BT), slots_for(tokens_BT.shape[1]), jax.tree.leaves(params)[0].dtype)
        first = prefill(
            config, params, tokens_BT, length_B, take_rows(masks, mask_B), cache, length_B[:, None] - 1, longest=longest
        )
        rows = _Rows.of(length_B, seed_B, mask_B, max_new_tokens, done=False)
        return _laid_out(rows.draw(config, shared, first.x_BPE), first.cache)

    return by_rows(start, shared, prompts, split=(ROWS, _STATE))


@functools.partial(jax.jit, donate_argnames="cache")
def _place(row_F, rows, cache, new_rows, new_cache):
    """The state with other rows in its rows row_F."""

    def place(_, args):
        row_F, (rows, cache), (new_rows, new_cache) = args
        rows = jax.tree.map(lambda old, new: old.at[row_F].set(new, mode="drop"), rows, new_rows)
        return _laid_out(rows, put_rows(cache, new_cache, row_F))

    args = row_F, (rows, cache), (new_rows, new_cache)
    return by_rows(place, (), args, split=((ROWS, _STATE, _STATE), _STATE))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache", compiler_options=DECODING)
def _decode(config, shared, steps, enough, rows, cache):
    """The state after so many steps, or as soon as enough rows are done."""

    def decode(shared, state):
        (params, masks, draws, longest), steps, enough = shared
        iv = take_rows(masks, state[0].mask_B)

        def one(loop):
            step, (rows, cache) = loop
            # What a row that is done computes means nothing; it stays where a new prompt writes first.
            start_B = jnp.where(rows.done_B, 0, rows.length_B + rows.count_B - 1)
            out = next_hidden(config, params, rows.token_B, iv, cache=cache, start_B=start_B, longest=longest)
            return step + 1, (rows.draw(config, shared[0], out.x_BTE), out.cache)

        def unfinished(loop):
            step, (rows, _) = loop
            return (step < steps) & (jnp.sum(rows.done_B) < enough)

        return _laid_out(*jax.lax.while_loop(unfinished, one, (jnp.int32(0), state))[1])

    return by_rows(decode, (shared, steps, enough), (rows, cache), split=(_STATE, _STATE))


def _laid_out(rows, cache):
    return constrain(rows, ("batch",)), constrain(cache, (None, "batch", "heads"))


def _per_mask(config: ModelConfig, masks: Interventions | None) -> Interventions:
    """Masks with their leading axis, a missing part as often."""
    masks = (masks or Interventions()).fill(config)
    n_masks = next((len(part) for part in masks.of_rows().values()), 1)
    return masks.fill(config, n_masks).per_row(n_masks)


def _check(config: ModelConfig, requests: Sequence[Request], max_new_tokens: int, n_masks: int) -> int:
    """Tokens of the longest prompt; ValueError for a request that does not fit."""
    for i, request in enumerate(requests):
        if len(request.tokens) == 0:
            raise ValueError(f"request {i} has no tokens; a prompt needs one at least")
        if not 0 <= request.mask < n_masks:
            raise ValueError(f"request {i} has mask {request.mask}; the masks run from 0 to {n_masks - 1}")
    for start in range(0, len(requests), _CHECKED_AT_ONCE):
        prompts = [request.tokens for request in requests[start : start + _CHECKED_AT_ONCE]]
        check_tokens(config, *pad_rows(prompts, config.pad_id), max_new_tokens)
    return max((len(request.tokens) for request in requests), default=0)
