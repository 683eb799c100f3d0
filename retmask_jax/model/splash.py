"""Self-attention by JAX's splash kernel for TPUs (jax.experimental.pallas), over the mesh where one is set."""

import functools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType, PartitionSpec

log = logging.getLogger(__name__)

_BLOCKS = (512, 384, 256, 128)
_WIDTHS = {jnp.dtype(jnp.float32): 256, jnp.dtype(jnp.bfloat16): 512}  # widest heads whose blocks fit on the chip


def splash_attend(q_BTHD, k_BKSD, v_BKSD, scores, *, interpret: bool = False):
    """Causal self-attention of T positions, [B,T,H,D]; head h reads kv head h // G. Differentiable, linear memory.

    scores: a `Scores` of model/attention.py. Under `jax.set_mesh`, shard_map splits rows and heads as the rules of the
    logical axes "batch" and "heads" say. interpret runs the kernel on any backend, for tests. Raises ValueError for a
    call that `unsupported` names.
    """
    reason = unsupported(q_BTHD, k_BKSD, v_BKSD)
    if reason is not None:
        raise ValueError(f"splash attention cannot do this call: {reason}")
    # The kernel has no scale. This rounds queries once more in bfloat16, as every user of it does.
    q_BHTD = (q_BTHD.astype(jnp.float32) * scores.scale).astype(q_BTHD.dtype).swapaxes(1, 2)
    attend = functools.partial(_attend, scores=scores, interpret=interpret)
    if q_BTHD.dtype == jnp.float32:
        attend = functools.partial(_exactly, attend)
    return _over_mesh(attend, q_BHTD, k_BKSD, v_BKSD).swapaxes(1, 2)


def unsupported(q_BTHD, k_BKSD, v_BKSD) -> str | None:
    """Why splash attention cannot do a call with arrays (or shapes) like these, or None where it can."""
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


def _attend(q_BHTD, k_BKSD, v_BKSD, *, scores, interpret):
    """On one device: padded to whole blocks of positions and whole lanes of head width, and cut back."""
    _, heads, length, width = q_BHTD.shape
    block, padded = _blocks(length)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([_Band(padded, scores.window)] * heads),
        block_sizes=_block_sizes(block),
        attn_logits_soft_cap=scores.cap,
        interpret=interpret,
    )
    pads = ((0, 0), (0, 0), (0, padded - length), (0, 0))
    padded_qkv = (jnp.pad(x, pads) for x in (q_BHTD, k_BKSD, v_BKSD))
    return jax.vmap(kernel)(*padded_qkv)[:, :, :length]


def _blocks(length: int) -> tuple[int, int]:
    """(block, padded length): the largest block that pads by at most an eighth more than the smallest one does."""
    padded = {block: -(-length // block) * block for block in _BLOCKS}
    block = max(block for block in _BLOCKS if padded[block] <= padded[128] * 9 // 8)
    return block, padded[block]


def _block_sizes(block: int) -> splash.BlockSizes:
    # The fused backward kernel would store one copy of the queries' gradient for every block of keys.
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash.BlockSizes(**dict.fromkeys(names, block))


class _Band(splash.LocalMask):
    """A query sees the last `window` keys, its own included (None: all up to its own).

    The kernel's host code asks a mask for every block of [T, T]. Nearly all are seen as a whole or not at all, and one
    entry says so: a mask of 128K positions takes seconds instead of a minute.
    """

    def __init__(self, length: int, window: int | None):
        left = None if window is None or window >= length else window - 1
        super().__init__((length, length), (left, 0), offset=0)

    def __getitem__(self, block) -> np.ndarray:
        q, k = block
        nearest, farthest = q.start - (k.stop - 1), q.stop - 1 - k.start  # how far behind the query keys lie
        left = math.inf if self.window_size[0] is None else self.window_size[0]
        if farthest < 0 or nearest > left:
            return np.zeros((1, 1), bool)
        if nearest >= 0 and farthest <= left:
            return np.ones((1, 1), bool)
        return super().__getitem__(block)

    __hash__ = splash.LocalMask.__hash__


def _over_mesh(attend, q_BHTD, k_BKSD, v_BKSD):
    """attend on each device's rows and heads; kv heads are repeated where their number alone keeps heads together."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if not free:
        return attend(q_BHTD, k_BKSD, v_BKSD)
    rows, heads = _axes(mesh, free, q_BHTD.shape[0], q_BHTD.shape[1], k_BKSD.shape[1])
    shards = math.prod(mesh.shape[axis] for axis in heads)
    repeats = math.lcm(k_BKSD.shape[1], shards) // k_BKSD.shape[1]
    if repeats > 1:
        k_BKSD, v_BKSD = jnp.repeat(k_BKSD, repeats, axis=1), jnp.repeat(v_BKSD, repeats, axis=1)
    spec = PartitionSpec(rows or None, heads or None)
    mapped = jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, axis_names=free, check_vma=False)
    return mapped(q_BHTD, k_BKSD, v_BKSD)


def _axes(mesh, free, batch: int, heads: int, kv_heads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes (of the rows, of the heads), by the rules of "batch" and "heads"; axes left by the rows go to the heads.

    So one long row is still split over the whole mesh. An axis that divides neither computes the same on each device.
    """
    for_rows, for_heads = (
        tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis in free)
        for axes in nn.logical_to_mesh_axes(("batch", "heads"))
    )
    rows = _fitting(mesh, for_rows, lambda shards: batch % shards == 0)
    left = tuple(axis for axis in for_rows if axis not in rows)
    split = _fitting(mesh, for_heads + left, lambda shards: heads % math.lcm(kv_heads, shards) == 0)
    idle = [axis for axis in for_heads + left if axis not in split]
    if idle:
        log.info("%d rows and %d heads are not split over %s of the mesh", batch, heads, ", ".join(idle))
    return rows, split


def _fitting(mesh, axes, fits) -> tuple[str, ...]:
    """The axes in order, less those with which the number of shards no longer fits."""
    chosen, shards = (), 1
    for axis in axes:
        if fits(shards * mesh.shape[axis]):
            chosen, shards = (*chosen, axis), shards * mesh.shape[axis]
    return chosen


# A kernel multiplies float32 matrices in bfloat16 unless told otherwise, and has no argument for it, while the setting
# around the call is gone when the backward pass is traced.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exactly(function, *arrays):
    with jax.default_matmul_precision("highest"):
        return function(*arrays)


def _exactly_forward(function, *arrays):
    with jax.default_matmul_precision("highest"):
        return jax.vjp(function, *arrays)


def _exactly_backward(_, pullback, out):
    with jax.default_matmul_precision("highest"):
        return pullback(out)


_exactly.defvjp(_exactly_forward, _exactly_backward)
