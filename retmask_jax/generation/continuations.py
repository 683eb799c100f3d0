"""Prompts with given tokens after them, in batches; a beginning that several prompts share is computed once."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from retmask_jax.generation.batching import bucket, full_batches, pad_rows
from retmask_jax.generation.prefill import ALIGNED, part_size, prefill, share_prefixes, slots_for, usual_chunk
from retmask_jax.model.attention import Probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import HiddenRows
from retmask_jax.model.kernels.blocked import platform
from retmask_jax.model.kv_cache import empty_cache
from retmask_jax.model.masking import Masks
from retmask_jax.model.sharding import full_share

# Tokens read per chunk after a shared prefix. Small, so that little is padded when continuations differ in length; a CPU is
# busy with two rows of so many.
_CHUNK = {"cpu": 128}
_CHUNK_ELSEWHERE = 256
_WIDTH_STEP = 64  # texts without a shared prefix are padded to a multiple of this
_SLOTS_STEP = 128  # of a cache that begins with a shared prefix, so that few groups differ in it


@dataclasses.dataclass(frozen=True)
class Batch:
    """Texts that are read together.

    Attributes:
        rows: The index of each text; a full batch may repeat one.
        prefix: The cache of the prefix that the texts continue, with slots for them and the tokens after them; or None.
        tokens_BT: The texts after the prefix, right-padded.
        start_B: The number of the prefix's tokens that each text continues.
        end_B: The length of each text, including the prefix.
        prompt_B: The length of each prompt, which a text begins with.
    """

    rows: list[int]
    prefix: PyTree | None
    tokens_BT: Int[np.ndarray, "B T"]
    start_B: Int[np.ndarray, " B"]
    end_B: Int[np.ndarray, " B"]
    prompt_B: Int[np.ndarray, " B"]


def shared_batches(
    config: ModelConfig,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    given: Sequence[Sequence[int]],
    todo: Sequence[int],
    *,
    batch_size: int,
    masks: Masks,
    longest: np.int32,
    more: int = 0,
    least: int = 0,
) -> Iterator[Batch]:
    """Batches of prompts with the tokens given after them, of the indices `todo`; the longest prompts come first.

    Args:
        given: For each prompt; may be empty.
        masks: The same for all prompts.
        longest: As in `hidden`.
        more: Free slots for this many tokens after each prompt.
        least: Texts without a shared prefix are padded to this many tokens, or more.
    """
    groups = share_prefixes([prompts[i] for i in todo])
    for group in sorted(groups, key=lambda group: -max(len(prompts[todo[i]]) for i in group.members)):
        group = dataclasses.replace(group, members=tuple(todo[i] for i in group.members))
        # After a shared prefix, chunks are computed up to the longest row of a batch. So rows are sorted by length, and
        # batches are small on a CPU, which two rows, or one per device, keep busy. All batches are padded to one width,
        # for one program.
        shared = bool(group.prefix)
        size = min(batch_size, full_share(2 if shared and platform() == "cpu" else len(group.members)))
        starts = dict(zip(group.members, group.starts, strict=True))
        rest = {i: (*prompts[i][starts[i] :], *given[i]) for i in group.members}
        width = slots_for(max(map(len, rest.values())), _chunk()) if shared else least
        width = -(-width // _WIDTH_STEP) * _WIDTH_STEP
        batches = list(full_batches(sorted(rest, key=lambda i: starts[i] - len(prompts[i])), size))
        prefix = None
        if shared:
            filled = max(_filled([starts[i] for i in batch], [len(rest[i]) for i in batch], width) for batch in batches)
            slots = max(filled, max(len(prompts[i]) for i in group.members) + more)
            prefix = _read_prefix(config, params, group.prefix, masks, longest, slots)
        for batch in batches:
            texts = [rest[i] for i in batch]
            tokens_BT, lengths_B = pad_rows(texts, config.pad_id, multiple_of=_WIDTH_STEP, least=width)
            start_B, prompt_B = (
                np.array(x, np.int32) for x in ([starts[i] for i in batch], [len(prompts[i]) for i in batch])
            )
            yield Batch(batch, prefix, tokens_BT, start_B, start_B + lengths_B, prompt_B)


def read_on(
    config: ModelConfig,
    params: PyTree,
    prefix: PyTree | None,
    tokens_BT: Int[jax.Array, "B T"],
    start_B: Int[jax.Array, " B"],
    end_B: Int[jax.Array, " B"],
    masks: Masks,
    rows_BP: Int[jax.Array, "B P"],
    *,
    more: int | None = None,
    probe: Probe | None = None,
    longest: jax.Array | int | None = None,
) -> HiddenRows:
    """`prefill` of a `Batch`, to be called under jit.

    Args:
        rows_BP: As in `prefill`; those after the end of a text stand for its last one.
        more: Free slots for this many tokens more in the cache that is returned, which a prefix has already; None: no cache
            is needed.
        probe: Asks about rows_BP, whatever its own rows are.
        longest: As in `prefill`.
    """
    batch, length = tokens_BT.shape
    chunk = usual_chunk() if prefix is None else _chunk()
    cache = None
    if prefix is not None:
        cache = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=1), prefix)
    elif length > chunk or more is not None:
        dtype = jax.tree.leaves(params)[0].dtype
        slots = -(-(slots_for(length, chunk) + (more or 0)) // ALIGNED) * ALIGNED
        cache = empty_cache(config, batch, slots, dtype, rings=False)
    rows_BP = jnp.minimum(rows_BP, (end_B - start_B)[:, None] - 1)
    return prefill(
        config,
        params,
        tokens_BT,
        end_B,
        masks,
        cache,
        rows_BP,
        start_B=None if prefix is None else start_B,
        probe=None if probe is None else probe.replace(rows_BP=rows_BP),
        longest=longest,
        chunk=chunk,
    )


def _chunk() -> int:
    return _CHUNK.get(platform(), _CHUNK_ELSEWHERE)


def _filled(starts: Sequence[int], lengths: Sequence[int], width: int) -> int:
    """The slots that a batch fills, with the padding of its rows to whole parts of the longest one."""
    part = part_size(width, _chunk())
    return max(starts) + -(-max(lengths) // part) * part


def _read_prefix(
    config: ModelConfig, params: PyTree, prefix: Sequence[int], masks: Masks, longest: np.int32, slots: int
) -> PyTree:
    """The cache of a shared prefix (one row, every position), with so many slots or somewhat more."""
    length = bucket(len(prefix))
    slots = -(-max(slots, slots_for(length)) // _SLOTS_STEP) * _SLOTS_STEP
    tokens_1T = np.pad(np.array([prefix], np.int32), ((0, 0), (0, length - len(prefix))))
    return _prefix_cache(config, params, tokens_1T, np.array([len(prefix)], np.int32), masks, longest, slots=slots)


@functools.partial(jax.jit, static_argnums=0, static_argnames="slots")
def _prefix_cache(config, params, tokens_1T, end_1, masks, longest, *, slots: int):
    cache = empty_cache(config, 1, slots, jax.tree.leaves(params)[0].dtype, rings=False)
    return prefill(config, params, tokens_1T, end_1, masks, cache, jnp.zeros((1, 1), jnp.int32), longest=longest).cache
