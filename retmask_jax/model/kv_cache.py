"""The key/value cache: a pytree of arrays with one entry per position of the layer pattern."""

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from retmask_jax.model.attention import Keys
from retmask_jax.model.config import ModelConfig


class KV(flax.struct.PyTreeNode):
    """The keys (rotated) [repeats, B, K, D, S] and values [repeats, B, K, S, D] of the layers at one place of the pattern.

    Slot s holds position s. In a ring of S slots it holds the latest position p with p % S == s.
    """

    k: jax.Array
    v: jax.Array
    ring: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def slots(self) -> int:
        return self.v.shape[3]

    def extend(
        self, repeat: jax.Array | int, k_BTKD: jax.Array, v_BTKD: jax.Array, start_B: jax.Array, end_B: jax.Array
    ) -> tuple[Keys, "KV"]:
        """(the keys that T new queries of layer `repeat` may see, the cache with the new positions).

        Row b's new positions begin at start_B[b]; those from end_B[b] on are padding, which a ring does not take. Without a
        ring all T positions need slots: positions without a slot would be written over others.
        """
        k_BKDT, v_BKTD = k_BTKD.transpose(0, 2, 3, 1).astype(self.k.dtype), v_BTKD.swapaxes(1, 2).astype(self.v.dtype)
        length = v_BKTD.shape[2]
        if not self.ring:
            new = KV(_write(self.k, k_BKDT, repeat, start_B, 4), _write(self.v, v_BKTD, repeat, start_B, 3))
            positions_BS = jnp.broadcast_to(jnp.arange(self.slots), (len(start_B), self.slots))
            return Keys(new.k, new.v, positions_BS, repeat), new
        if length == 1:
            slot_B = start_B % self.slots
            new = KV(_write(self.k, k_BKDT, repeat, slot_B, 4), _write(self.v, v_BKTD, repeat, slot_B, 3), ring=True)
            return Keys(new.k, new.v, self._held(start_B + 1), repeat, contiguous=False), new
        # What the ring held before, in order, then the new ones: a long chunk may push out what its first queries see.
        order_BS = (start_B[:, None] + jnp.arange(self.slots)) % self.slots
        k_BKDS = jnp.concatenate([_take(self.k[repeat], order_BS, 3), k_BKDT], axis=3)
        v_BKSD = jnp.concatenate([_take(self.v[repeat], order_BS, 2), v_BKTD], axis=2)
        positions_BS = start_B[:, None] - self.slots + jnp.arange(self.slots + length)
        # Each slot takes its latest real position, if that is a new one: the index of it among those just put together.
        index_BS = self._held(jnp.minimum(start_B + length, end_B)) - start_B[:, None] + self.slots
        index_BS = jnp.where(index_BS >= self.slots, index_BS, jnp.argsort(order_BS, axis=1))
        new = KV(
            self.k.at[repeat].set(_take(k_BKDS, index_BS, 3)),
            self.v.at[repeat].set(_take(v_BKSD, index_BS, 2)),
            ring=True,
        )
        return Keys(k_BKDS[None], v_BKSD[None], positions_BS), new

    def _held(self, end_B: jax.Array) -> jax.Array:
        """i32[B,S]: position in each slot of a ring once positions up to end_B are in it; negative where empty."""
        last_B1 = end_B[:, None] - 1
        return last_B1 - (last_B1 - jnp.arange(self.slots)) % self.slots


# {"blocks": {place in the pattern: KV}, "tail": {place: KV}}; None where nothing is cached.
Cache = dict[str, dict[str, KV] | None]
NO_CACHE: Cache = {"blocks": None, "tail": None}


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike, *, rings: bool = True) -> Cache:
    """A zeroed cache for `length` positions.

    Args:
        rings: Sliding layers store only their window; without rings they store all positions, and a row may then continue
            from any of them.
    """

    def kv(place: int, repeats: int) -> KV:
        window = config.window if rings and config.layer_pattern[place] == "sliding" else None
        slots = length if window is None else min(window, length)
        shape = (repeats, batch, config.n_kv_heads)
        keys, values = (*shape, config.head_dim, slots), (*shape, slots, config.head_dim)
        return KV(jnp.zeros(keys, dtype), jnp.zeros(values, dtype), ring=slots < length)

    return {
        "blocks": {str(i): kv(i, config.repeats) for i in range(len(config.layer_pattern))},
        "tail": {str(i): kv(i, 1) for i in range(len(config.tail))},
    }


def put_rows(cache: Cache, new: Cache, row_F: jax.Array) -> Cache:
    """The cache with rows row_F i32[F] taken from another cache, which has as many slots or fewer.

    Rows whose index lies beyond the last row are left out. Further slots keep what they held: no query sees a slot before its
    position has been written there.
    """

    order_F = jnp.argsort(row_F)  # those that are left out come last

    def put(kv: KV, new: KV) -> KV:
        def row(n, kv: KV) -> KV:
            f = order_F[n]
            at = (0, row_F[f], 0, 0, 0)
            return kv.replace(
                k=jax.lax.dynamic_update_slice(kv.k, jax.lax.dynamic_slice_in_dim(new.k, f, 1, axis=1), at),
                v=jax.lax.dynamic_update_slice(kv.v, jax.lax.dynamic_slice_in_dim(new.v, f, 1, axis=1), at),
            )

        return jax.lax.fori_loop(0, jnp.sum(row_F < kv.k.shape[1]), row, kv)

    return jax.tree.map(put, cache, new, is_leaf=lambda x: isinstance(x, KV))


def _write(
    cache_RBKXX: jax.Array, new_BKXX: jax.Array, repeat: jax.Array | int, start_B: jax.Array, axis: int
) -> jax.Array:
    """The cache with `new` written in place from slot start_B[b] of each row on. axis: of the slots in [R,B,K,...]."""
    rows_B = jnp.arange(len(start_B))
    if new_BKXX.shape[axis - 1] == 1:
        new_BKD = jnp.squeeze(new_BKXX, axis - 1)
        at = (repeat, rows_B, slice(None), *((start_B, slice(None)) if axis == 3 else (slice(None), start_B)))
        return cache_RBKXX.at[at].set(new_BKD)

    def write_row(b, cache_RBKXX):
        at = [repeat, b, 0, 0, 0]
        at[axis] = start_B[b]
        return jax.lax.dynamic_update_slice(cache_RBKXX, new_BKXX[b][None, None], at)

    return jax.lax.fori_loop(0, len(start_B), write_row, cache_RBKXX)


def _take(x_BKXX: jax.Array, index_BS: jax.Array, axis: int) -> jax.Array:
    """Slots index_BS of each row along `axis`."""
    index = index_BS[:, None, None, :] if axis == 3 else index_BS[:, None, :, None]
    return jnp.take_along_axis(x_BKXX, index, axis=axis)
