"""Prefill: prompts through the model in chunks, with a cache; and prompts that share their beginnings."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from retmask_jax.model.attention import Probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import HiddenRows, hidden_rows
from retmask_jax.model.kernels.blocked import even_size, platform
from retmask_jax.model.kv_cache import Cache
from retmask_jax.model.masking import Masks

# Tokens of a row that pass through the model at once: bounds the memory of activations at any length. A GPU reads all
# weights for each chunk in the time in which it multiplies hundreds of tokens.
_CHUNK = {"gpu": 4096}
_CHUNK_ELSEWHERE = 1024
_CHUNK_ALIGNED = 64  # tokens of which a larger chunk is a multiple
ALIGNED = 16  # slots of a cache: rows of keys then begin where a GPU or a vector unit can load many at once
_WORTH_SHARING = 64  # tokens of a common beginning below which reuse saves nothing


def prefill(
    config: ModelConfig,
    params: PyTree,
    tokens_BT: jax.Array,
    end_B: jax.Array,
    masks: Masks,
    cache: Cache | None,
    rows_BP: jax.Array,
    *,
    start_B: jax.Array | None = None,
    probe: Probe | None = None,
    longest: jax.Array | int | None = None,
    chunk: int | None = None,
) -> HiddenRows:
    """Run tokens through the model, filling the cache, and keep the final states of some positions.

    Pure, to be called under jit. Chunks after the end of the longest row are not computed.

    Args:
        end_B: The position at which the tokens of each row end.
        cache: Has at least `slots_for` slots after those that are filled already; None: nothing is cached.
        rows_BP: i32, the positions to keep, among the T; a probe asks about the same.
        start_B: How many positions of each row the cache holds already; None: none.
        longest: As in `hidden`.
        chunk: Tokens of a row that pass through the model at once; None: `usual_chunk`.
    """
    batch, length = tokens_BT.shape
    chunk = chunk or usual_chunk()
    run = functools.partial(hidden_rows, config, params, masks=masks, end_B=end_B, longest=longest)
    if length <= chunk:
        return run(tokens_BT, rows_BP=rows_BP, cache=cache, start_B=start_B, probe=probe)
    start_B = jnp.zeros(batch, jnp.int32) if start_B is None else start_B
    chunk = part_size(length, chunk)
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, -length % chunk)))

    def one(c: jax.Array | int, cache: Cache | None) -> HiddenRows:
        """The result of chunk c, which is meaningless for positions outside the chunk."""
        part_BT = jax.lax.dynamic_slice_in_dim(tokens_BT, c * chunk, chunk, axis=1)
        local_BP = jnp.clip(rows_BP - c * chunk, 0, chunk - 1)
        many = (
            rows_BP.shape[1] > chunk
        )  # then each position of the chunk is computed once, and not each row in each chunk
        asked_BP = jnp.broadcast_to(jnp.arange(chunk), (batch, chunk)) if many else local_BP
        asked = None if probe is None else probe.replace(rows_BP=asked_BP)
        found = run(part_BT, rows_BP=asked_BP, cache=cache, start_B=start_B + c * chunk, probe=asked)
        if not many:
            return found
        take = jax.vmap(lambda x, rows_P: x[rows_P])
        return jax.tree.map(lambda x: take(x, local_BP), found.replace(cache=None)).replace(cache=found.cache)

    def add(c, state: HiddenRows) -> HiddenRows:
        new, inside_BP = one(c, state.cache), rows_BP // chunk == c
        kept = jax.tree.map(
            lambda new, old: jnp.where(inside_BP.reshape(*inside_BP.shape, *(1,) * (new.ndim - 2)), new, old),
            new.replace(cache=None),
            state.replace(cache=None),
        )
        return kept.replace(cache=new.cache)

    shapes = jax.eval_shape(lambda cache: one(0, cache), cache)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.replace(cache=None))
    n_chunks = -(-jnp.max(end_B - start_B) // chunk)
    return jax.lax.fori_loop(0, n_chunks, add, empty.replace(cache=cache))


def usual_chunk() -> int:
    """Tokens of a row that pass through the model at once on this device."""
    return _CHUNK.get(platform(), _CHUNK_ELSEWHERE)


def slots_for(length: int, chunk: int | None = None) -> int:
    """The number of slots that a cache needs for `length` new tokens, with the padding of the last chunk."""
    part = part_size(length, chunk or usual_chunk())
    return -(-length // part) * part


def part_size(length: int, chunk: int) -> int:
    """The size of the equal parts in which `length` tokens of a row pass through the model, each of at most `chunk`."""
    return length if length <= chunk else even_size(length, chunk, min(_CHUNK_ALIGNED, chunk))


@dataclasses.dataclass(frozen=True)
class Shared:
    """Prompts that share a prefix, which is computed once.

    Attributes:
        members: The indices of the prompts.
        starts: How many tokens of the prefix each of them has; the rest of the prompt continues from there.
    """

    prefix: tuple[int, ...]
    members: tuple[int, ...]
    starts: tuple[int, ...]


def share_prefixes(prompts: Sequence[Sequence[int]]) -> list[Shared]:
    """Groups of prompts and what each prompt shares with the prefix of its group, so that little is computed twice.

    The prefix is the prompt that shares most with the others of its group, without its last token, which is computed in
    that prompt's row. Prompts that share too little form a group with an empty prefix.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    groups: list[list[int]] = []
    for i in order:
        if groups and common_prefix(prompts[groups[-1][0]], prompts[i]) >= _WORTH_SHARING:
            groups[-1].append(i)
        else:
            groups.append([i])
    shared, alone = [], []
    for group in groups:
        # In sorted order two prompts share the least of what their neighbours between them share.
        steps = [common_prefix(prompts[a], prompts[b]) for a, b in zip(group, group[1:], strict=False)]
        best, starts = max(((i, _shared_with(i, steps)) for i in range(len(group))), key=lambda choice: sum(choice[1]))
        prefix = tuple(prompts[group[best]][:-1])
        starts = [min(start, len(prompts[i]) - 1, len(prefix)) for i, start in zip(group, starts, strict=True)]
        saved = sum(starts) - len(prefix)
        if saved > 0:
            shared.append(Shared(prefix, tuple(group), tuple(starts)))
        else:
            alone += group
    return shared + ([Shared((), tuple(sorted(alone)), (0,) * len(alone))] if alone else [])


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def _shared_with(i: int, steps: list[int]) -> list[int]:
    """How much of prompt i each of the sorted prompts shares, from what neighbours share."""
    before = np.minimum.accumulate(steps[:i][::-1])[::-1] if i else []
    after = np.minimum.accumulate(steps[i:]) if i < len(steps) else []
    return [*map(int, before), 10**9, *map(int, after)]
