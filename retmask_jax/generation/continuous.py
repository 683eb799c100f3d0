"""Generation whose batch is refilled as rows finish: for many prompts whose answers differ in length."""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from retmask_jax.generation.batching import pad_rows, pad_to_bucket, padded_width
from retmask_jax.generation.continuous_programs import (
    Prompts,
    Shared,
    State,
    decode_rows,
    empty_state,
    programs,
    replace_rows,
    rows_at_once,
    slots_needed,
    start_rows,
)
from retmask_jax.generation.decode import Generated
from retmask_jax.generation.sampling import ContrastDecoding, Draws, check_options, side_by_side, used
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kv_cache import empty_cache
from retmask_jax.model.masking import Masks, normalise_each
from retmask_jax.model.sharding import ROW_AXES, full_share, mesh_of, row_shares
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import least, to_host
from retmask_jax.utils.progress import with_rate

log = logging.getLogger(__name__)

# Where each device decodes other rows, this many steps pass between two looks at which rows are done. (To wait until an
# eighth of the rows are free would be to wait for the slowest device.) It is few compared with the steps of an answer, and
# many compared with the time of a look.
_STEPS = 16
# Changing to a narrower cache costs the wait for the rows in progress, about half of a longest answer. It is worth that
# where the share that it saves of the requests left amounts to more than this many batches.
_WORTH_WAITING = 2
_CHECKED_AT_ONCE = 1024
_FILLED = 0.9  # fraction of the free memory that rows may fill: the rest is lost between arrays
_FREE = -1


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt's tokens, the number of the mask it runs under and the seed of its draws."""

    tokens: Sequence[int]
    mask: int = 0
    seed: int = 0


def generate_stream(
    config: ModelConfig,
    params: PyTree,
    requests: Sequence[Request],
    *,
    batch_size: int | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    masks: Sequence[Interventions] | None = None,
    contrast: ContrastDecoding | None = None,
    what: str = "sample",
) -> Iterator[tuple[int, Generated]]:
    """Continue each request by up to max_new_tokens, in a batch whose rows are refilled as they finish.

    Where memory runs out the batch is halved and unfinished requests begin anew. Where rotary frequencies depend on the
    length, those of the longest request and max_new_tokens hold for all. Other options as in `generate`.

    Args:
        batch_size: Rows of the batch; None: as many as the device's free memory holds, by the compiler's report.
        masks: The different masks, each shared by all rows; None: one that masks nothing.
        contrast: As of `generate`, the same for all requests.
        what: Names the work in the progress bar and the log.

    Yields:
        (index of a request, its result), as soon as its row has finished and is collected. The result is what
        `generate_many` gives for the prompt, mask and seed: NumPy tokens i32[n] without pad or stop id, and stops i32[].

    Raises:
        ValueError: A request does not fit; before anything runs.
    """
    check_options(max_new_tokens, temperature, top_p)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    masks = masks or [Interventions()]
    longest = _check(config, requests, max_new_tokens, n_masks=len(masks)) + max_new_tokens
    if config.depends_on_length:
        log.info("%s: rotary frequencies are those of %d tokens, the longest prompt and max_new_tokens", what, longest)
    contrast = used(contrast)
    draws = Draws.of(config, stop_ids, temperature, top_p, contrast)
    shared = Shared(params, _masks(config, masks, contrast), draws, np.int32(longest))
    job = _Job(config, max_new_tokens, shared, requests)
    return with_rate(_stream(job, batch_size, what), lambda item: int(item[1].lengths), len(requests), what, "prompt")


def _masks(config: ModelConfig, masks: Sequence[Interventions], contrast: ContrastDecoding | None) -> Masks:
    """The masks of `Shared`."""
    dense = normalise_each(config, masks)
    if contrast is None:
        return dense
    others = normalise_each(config, [contrast.interventions])
    return side_by_side(dense.repeated(len(masks)), others.repeated(len(masks)))


@dataclasses.dataclass(frozen=True)
class _Job:
    config: ModelConfig
    max_new_tokens: int
    shared: Shared
    requests: Sequence[Request]

    @property
    def params(self) -> PyTree:
        return self.shared.params

    def slots(self, request: int) -> int:
        """The number of slots of a cache in which this request and all shorter ones fit."""
        return slots_needed(self.config, len(self.requests[request].tokens), self.max_new_tokens)


def _stream(job: _Job, batch_size: int | None, what: str) -> Iterator[tuple[int, Generated]]:
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
    """Requests, the longest first, cut where a narrower cache is worth waiting for all rows in progress."""
    widths = [job.slots(i) for i in indices]

    def room(width: int) -> int:
        with mesh_of(job.params):
            return _room(job.config, job.shared, width, least(memory.limit()))

    cuts, rows = [0], batch_size or room(widths[0])
    for at, width in enumerate(widths):
        saved = 1 - width / widths[cuts[-1]]
        if saved * (len(indices) - at) / rows > _WORTH_WAITING:
            cuts.append(at)
            rows = batch_size or room(width)
    prefills = {padded_width(job.config, len(job.requests[i].tokens), job.max_new_tokens) for i in indices}
    log.info(
        "%s: caches of %s slots, prompts of up to %d lengths: that many programs to decode and to prefill",
        what,
        ", ".join(str(widths[cut]) for cut in cuts),
        len(prefills),
    )
    return [indices[start:end] for start, end in zip(cuts, [*cuts[1:], len(indices)], strict=True)]


def _filling(job: _Job, group: Sequence[int], what: str) -> int:
    """The rows of a batch that fills the free memory, or has all requests of the group."""
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


def rows_that_fill(config: ModelConfig, shared: Shared, length: int, max_new_tokens: int, free: int, most: int) -> int:
    """How many rows of prompts of up to `length` tokens fit into `free` bytes on each device of the mesh that is set.

    The size of the caches gives a first number, which is lowered until the compiler's report says that it fits.

    Args:
        shared: Arrays, or their shapes.
        most: The largest number that is of use.
    """
    shares, slots = full_share(1, ROW_AXES), slots_needed(config, length, max_new_tokens)
    rows, free = min(most, _room(config, shared, slots, free)), int(_FILLED * free)
    while (rows := max(shares, rows - rows % shares)) > shares:
        try:
            needed = sum(programs(config, shared, rows, length, max_new_tokens).needed())
        except jax.errors.JaxRuntimeError as error:  # a TPU's compiler refuses what does not fit
            if not memory.is_out_of_memory(error):
                raise
            needed = int(1.4 * free)
        if needed <= free:
            break
        rows = min(rows - 1, int(rows * free / needed))
    return rows


def _room(config: ModelConfig, shared: Shared, slots: int, free: int) -> int:
    """The number of rows whose caches alone fill this many bytes of each device."""
    dtype = jax.tree.leaves(shared.params)[0].dtype
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    row = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(config, shared.draws.passes, slots, dtype)))
    held = sum(x.size * x.dtype.itemsize for x in row) // (1 if config.n_kv_heads % tensor else tensor)
    return max(1, int(_FILLED * free) // held * full_share(1, ROW_AXES))


def _refilled(job: _Job, group: Sequence[int], batch_size: int) -> Iterator[tuple[int, Generated]]:
    """(index, result) of each request of a group, from one batch. The longest comes first and its cache fits all."""
    with mesh_of(job.params):
        batch = full_share(batch_size, ROW_AXES)
        at_once, shares = rows_at_once(batch), row_shares(batch)
        blank_B, slots = np.zeros(batch, np.int32), job.slots(group[0])
        options = {"slots": slots, "max_new_tokens": job.max_new_tokens, "passes": job.shared.draws.passes}
        state = empty_state(job.config, job.params, blank_B, **options)
    waiting, owner_B = collections.deque(group), np.full(batch, _FREE)
    while waiting or (owner_B != _FREE).any():
        with mesh_of(job.params):
            while waiting and (taken := _take(waiting, owner_B, at_once, shares)) is not None:
                state = _admit(job, state, *taken)
            steps = _STEPS if waiting and shares > 1 else job.max_new_tokens
            enough = at_once if waiting and shares == 1 else batch // shares
            state = decode_rows(job.config, job.shared, np.int32(steps), np.int32(enough), *state)
            rows = to_host(state[0])
        for row in np.flatnonzero(rows.done_B & (owner_B != _FREE)):
            n = rows.count_B[row]
            yield int(owner_B[row]), Generated(rows.tokens_BN[row, :n].copy(), n, stops=rows.stop_B[row])
            owner_B[row] = _FREE


def _take(
    waiting: collections.deque, owner_B: np.ndarray, at_once: int, shares: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(requests, rows) i32[at_once]: what to prefill next, and in which row of its device each goes.

    None where no device has room for its share. The new owners are written into owner_B. Where requests or rows do not
    suffice, the first request fills the remaining places; its row index then marks it as left out.
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


def _admit(job: _Job, state: State, indices: np.ndarray, row_F: np.ndarray) -> State:
    """The state with new requests in the rows row_F."""
    requests = [job.requests[i] for i in indices]
    tokens, lengths = pad_rows([request.tokens for request in requests], job.config.pad_id)
    seeds = np.array([request.seed for request in requests]).astype(np.uint32)
    masks = np.array([request.mask for request in requests], np.int32)
    prompts = Prompts(pad_to_bucket(job.config, tokens, job.max_new_tokens), lengths, seeds, masks)
    new = start_rows(job.config, job.shared, prompts, max_new_tokens=job.max_new_tokens)
    return replace_rows(row_F, *state, *new)


def _check(config: ModelConfig, requests: Sequence[Request], max_new_tokens: int, n_masks: int) -> int:
    """The number of tokens of the longest prompt; ValueError for a request that does not fit."""
    for i, request in enumerate(requests):
        if len(request.tokens) == 0:
            raise ValueError(f"request {i} has no tokens; a prompt needs one at least")
        if not 0 <= request.mask < n_masks:
            raise ValueError(f"request {i} has mask {request.mask}; the masks run from 0 to {n_masks - 1}")
    for start in range(0, len(requests), _CHECKED_AT_ONCE):
        prompts = [request.tokens for request in requests[start : start + _CHECKED_AT_ONCE]]
        check_tokens(config, *pad_rows(prompts, config.pad_id), max_new_tokens)
    return max((len(request.tokens) for request in requests), default=0)
