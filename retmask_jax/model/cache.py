"""The key/value cache: a pytree of arrays with one entry per position of the layer pattern."""

import flax.struct
import jax
import jax.numpy as jnp

from retmask_jax.model.config import ModelConfig


@flax.struct.dataclass
class KV:
    """Keys (rotated) and values of `repeats` layers, each [repeats, B, K, S, D]; slot s holds absolute position s."""

    k: jax.Array
    v: jax.Array

    def write(self, repeat, k_BTKD, v_BTKD, start_B) -> "KV":
        """The cache with T new positions of layer `repeat`, row b at slots start_B[b] and on."""
        return KV(_write(self.k, repeat, k_BTKD, start_B), _write(self.v, repeat, v_BTKD, start_B))

    def read(self, repeat):
        """(k_BKSD, v_BKSD) of layer `repeat`."""
        return self.k[repeat], self.v[repeat]


def empty_cache(config: ModelConfig, batch: int, length: int, dtype) -> dict[str, dict[str, KV]]:
    """A zeroed cache for `length` positions: {"blocks": {position in the pattern: KV}, "tail": {...}}."""

    def kv(repeats):
        shape = (repeats, batch, config.n_kv_heads, length, config.head_dim)
        return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return {
        "blocks": {str(i): kv(config.repeats) for i in range(len(config.layer_pattern))},
        "tail": {str(i): kv(1) for i in range(len(config.tail))},
    }


def _write(cache_RBKSD, repeat, new_BTKD, start_B):
    new_BKTD = new_BTKD.swapaxes(1, 2).astype(cache_RBKSD.dtype)

    def one_row(cache_KSD, new_KTD, start):
        return jax.lax.dynamic_update_slice_in_dim(cache_KSD, new_KTD, start, axis=1)

    if new_BKTD.shape[2] > 1:
        rows_BKSD = jax.vmap(one_row)(cache_RBKSD[repeat], new_BKTD, start_B)
        return jax.lax.dynamic_update_index_in_dim(cache_RBKSD, rows_BKSD, repeat, axis=0)
    rows = jnp.arange(cache_RBKSD.shape[1])
    return cache_RBKSD.at[repeat, rows, :, start_B].set(new_BKTD[:, :, 0])
