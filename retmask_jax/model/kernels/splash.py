"""Self-attention by JAX's splash kernel for TPUs (jax.experimental.pallas), over the mesh where one is set."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec

from retmask_jax.model.kernels.blocked import Scores
from retmask_jax.model.kernels.shares import Shares

_BLOCKS = (512, 384, 256, 128)
_WIDTHS = {jnp.dtype(jnp.float32): 256, jnp.dtype(jnp.bfloat16): 512}  # widest heads whose blocks fit on the chip


def splash_attend(
    q_BTHD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, scores: Scores, *, interpret: bool = False
) -> jax.Array:
    """Causal self-attention of T positions, [B,T,H,D]; head h reads kv head h // G. Differentiable, linear memory.

    Under `jax.set_mesh`, shard_map splits rows, heads and queries by the rules of the logical axes "batch", "heads" and
    "length"; every share of the queries sees all keys.

    Args:
        interpret: Run the kernel on any backend, for tests.

    Raises:
        ValueError: `unsupported` gives a reason why the kernel cannot compute this call.
    """
    reason = unsupported(q_BTHD, k_BKSD, v_BKSD)
    if reason is not None:
        raise ValueError(f"splash attention cannot do this call: {reason}")
    # The kernel has no scale. This rounds queries once more in bfloat16, as every user of it does.
    q_BHTD = (q_BTHD.astype(jnp.float32) * scores.scale).astype(q_BTHD.dtype).swapaxes(1, 2)
    attend = functools.partial(_attend, scores=scores, interpret=interpret)
    if q_BTHD.dtype == jnp.float32:
        attend = functools.partial(_exactly, attend)
    return attend(q_BHTD, k_BKSD, v_BKSD).swapaxes(1, 2)


def unsupported(q_BTHD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array) -> str | None:
    """Why splash attention cannot compute a call with arrays (or shapes) like these; None where it can."""
    (_, length, heads, width), (_, kv_heads, slots, _) = q_BTHD.shape, k_BKSD.shape
    dtypes = {jnp.dtype(x.dtype) for x in (q_BTHD, k_BKSD, v_BKSD)}
    if len(dtypes) > 1 or not dtypes <= _WIDTHS.keys():
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        return f"queries, keys and values are {names}; it needs one type, float32 or bfloat16"
    if slots != length:
        return f"{length} queries look at {slots} keys; it needs the same positions for both"
    if heads % kv_heads:
        return f"{heads} query heads do not share {kv_heads} key/value heads evenly"
    widest = _WIDTHS[dtypes.pop()]
    return f"heads are {width} wide; it takes up to {widest} in this type" if width > widest else None


def _attend(q_BHTD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, *, scores: Scores, interpret: bool) -> jax.Array:
    """Padded to whole blocks of positions for each share of the queries, and cut back."""
    length = q_BHTD.shape[2]
    shares = Shares.of_call(q_BHTD.shape[0], q_BHTD.shape[1], k_BKSD.shape[1])
    block, padded = _blocks(length, shares.queries)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_Band(padded, scores.window)] * (q_BHTD.shape[1] // shares.heads)),
        block_sizes=_block_sizes(block),
        head_shards=1,
        q_seq_shards=shares.queries,
        attn_logits_soft_cap=scores.cap,
        interpret=interpret,
    )
    pads = ((0, 0), (0, 0), (0, padded - length), (0, 0))
    return _on_each_device(kernel, shares, *(jnp.pad(x, pads) for x in (q_BHTD, k_BKSD, v_BKSD)))[:, :, :length]


def _blocks(length: int, shares: int = 1) -> tuple[int, int]:
    """(block, padded length): the largest block that pads by at most an eighth more than the smallest one does, where
    each share of the queries has whole blocks."""
    padded = {block: -(-length // (block * shares)) * block * shares for block in _BLOCKS}
    block = max(block for block in _BLOCKS if padded[block] <= padded[128] * 9 // 8)
    return block, padded[block]


def _block_sizes(block: int) -> splash.BlockSizes:
    # The fused backward kernel would store one copy of the queries' gradient for every block of keys.
    return splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )


class _Band(splash.LocalMask):
    """A query sees the last `window` keys, the key at its position included (None: all keys up to there).

    The kernel's host code asks a mask for every block of [T, T]. Nearly all blocks are seen whole or not at all, which an
    array of one entry can express: a mask of 128K positions then takes seconds instead of a minute.
    """

    def __init__(self, length: int, window: int | None) -> None:
        left = None if window is None or window >= length else window - 1
        super().__init__((length, length), (left, 0), offset=0)

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        q, k = idx
        nearest, farthest = (
            q.start - (k.stop - 1),
            q.stop - 1 - k.start,
        )  # how many positions the keys come before the query
        left = math.inf if self.window_size[0] is None else self.window_size[0]
        if farthest < 0 or nearest > left:
            return np.zeros((1, 1), bool)
        if nearest >= 0 and farthest <= left:
            return np.ones((1, 1), bool)
        return super().__getitem__(idx)

    __hash__ = splash.LocalMask.__hash__


def _on_each_device(kernel: Any, shares: Shares, q_BHTD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array) -> jax.Array:
    """The kernel on each device's rows, heads and queries."""
    if not shares.free:
        return jax.vmap(kernel)(q_BHTD, k_BKSD, v_BKSD)
    k_BKSD, v_BKSD = (shares.repeated(x, axis=1) for x in (k_BKSD, v_BKSD))
    along = PartitionSpec(None, shares.query_axes or None)
    of_kernel = kernel.manual_sharding_spec(NamedSharding(shares.mesh, along))
    of_keys = PartitionSpec(shares.row_axes or None, shares.head_axes or None)
    of_queries = PartitionSpec(*of_keys, shares.query_axes or None)
    mapped = shares.over_devices(
        lambda kernel, *qkv: jax.vmap(kernel)(*qkv), (of_kernel, of_queries, of_keys, of_keys), of_queries
    )
    return mapped(kernel, q_BHTD, k_BKSD, v_BKSD)


# A kernel multiplies float32 matrices in bfloat16 by default, and has no argument for it, while the setting
# around the call is gone when the backward pass is traced.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exactly(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return function(*arrays)


def _exactly_forward(function: Callable[..., jax.Array], *arrays: jax.Array) -> tuple[jax.Array, Callable]:
    with jax.default_matmul_precision("highest"):
        return jax.vjp(function, *arrays)


def _exactly_backward(_: Any, pullback: Callable, out: jax.Array) -> tuple:
    with jax.default_matmul_precision("highest"):
        return pullback(out)


_exactly.defvjp(_exactly_forward, _exactly_backward)
