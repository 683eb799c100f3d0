"""Attention by cuDNN's fused kernel: NVIDIA GPUs from Ampere on, half precision, no soft cap; with and without a cache.

cuDNN's causal mask shows query t the first t + 1 keys, whichever keys come before the queries. Queries that continue a
cache therefore take two calls, of the queries among themselves and of the queries with the keys before them, whose
results are weighted by the normalisers of their softmaxes.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from retmask_jax.model.kernels.blocked import Scores, blocked

_DTYPES = ("bfloat16", "float16")
_CAPABILITY = (8, 0)  # Ampere; cuDNN has no fused attention for what is older


def unsupported(dtype: str, width: int, scores: Scores) -> str | None:
    """Why the kernel cannot compute a call; None where it can."""
    if dtype not in _DTYPES:
        return f"computes in {' or '.join(_DTYPES)}, not in {dtype}"
    if scores.cap is not None:
        return f"has no soft cap, the model has {scores.cap}"
    return None if width <= 128 and width % 8 == 0 else f"takes heads of 8, 16, ... 128 dimensions, not of {width}"


def unsuited(devices: Sequence) -> str | None:
    """Why the kernel does not run on these devices; None where it does.

    Args:
        devices: Of JAX, with `device_kind`; those of CUDA have a `compute_capability` such as "9.0", those of ROCm, whose
            platform is "gpu" too, one such as "gfx942", others none.
    """
    for device in devices:
        has = str(getattr(device, "compute_capability", None) or "none")
        version = re.fullmatch(r"(\d+)\.(\d+)", has)
        if version is None or tuple(map(int, version.groups())) < _CAPABILITY:
            least = ".".join(map(str, _CAPABILITY))
            return f"needs CUDA devices of compute capability {least} or newer, {device.device_kind} has {has}"
    return None


def alone(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, scores: Scores) -> jax.Array:
    """Causal attention of T positions among themselves, [B,T,H,D]."""
    window = None if scores.window is None else (scores.window - 1, 0)
    length = q_BTHD.shape[1]
    # JAX refuses the gradient of an odd length; no query sees the padding.
    qkv = (jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in (q_BTHD, k_BTKD, v_BTKD))
    return jax.nn.dot_product_attention(
        *qkv, scale=scores.scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def after_cache(
    q_BTHD: jax.Array, k_BKDS: jax.Array, v_BKSD: jax.Array, start_B: jax.Array, first_B: jax.Array, scores: Scores
) -> jax.Array:
    """Causal attention of T queries that continue a cache, [B,T,H,D].

    The queries' own keys are among the S. The gradient is that of the blocked kernel: cuDNN gives none of a normaliser.

    Args:
        start_B: The position of the first query of each row.
        first_B: The position of the first key of each row. Keys at negative positions do not exist; only a window may have
            such.
    """
    length, n_keys = q_BTHD.shape[1], k_BKDS.shape[3]
    window = None if scores.window is None or scores.window >= n_keys else scores.window
    before_B = start_B - first_B  # index of the first query's own key
    own = _slots(k_BKDS, v_BKSD, before_B[:, None] + jnp.arange(length))
    found = fused(q_BTHD, *own, scores.scale, causal=True, window=window)
    if length == n_keys or window == 1:
        return found[0]
    if window is None:
        keys = k_BKDS.transpose(0, 3, 1, 2), v_BKSD.swapaxes(1, 2)
        early = fused(q_BTHD, *keys, scores.scale, seen_B=jnp.maximum(before_B, 1))
        return _joined(found, early, before_B > 0)
    # Of the window - 1 keys before the first query, query t sees all but the first t: with both in reverse order, a
    # causal mask.
    n = window - 1
    q_BNHD = jnp.pad(q_BTHD[:, :n], ((0, 0), (0, max(0, n - length)), (0, 0), (0, 0)))[:, ::-1]
    keys = _slots(k_BKDS, v_BKSD, before_B[:, None] - 1 - jnp.arange(n))
    seen_B = jnp.minimum(start_B, before_B)
    early = fused(q_BNHD, *keys, scores.scale, causal=True, seen_B=jnp.clip(seen_B, 1, n))
    first = found[0][:, :n], found[1][:, :n]
    early = early[0][:, ::-1][:, :length], early[1][:, ::-1][:, :length]
    return jnp.concatenate([_joined(first, early, seen_B > 0), found[0][:, n:]], axis=1)


def _after_cache_saving(*arguments: Any) -> tuple[jax.Array, tuple]:
    return after_cache(*arguments), arguments[:5]


def _after_cache_backward(scores: Scores, saved: tuple, d_out_BTHD: jax.Array) -> tuple:
    *qkv, start_B, first_B = saved

    def in_blocks(q_BTHD, k_BKDS, v_BKSD):
        batch, length, heads, width = q_BTHD.shape
        q_BKGTD = q_BTHD.reshape(batch, length, k_BKDS.shape[1], -1, width).transpose(0, 2, 3, 1, 4)
        over_heads = jax.vmap(lambda *x: blocked(*x, None, scores), (0, 0, 0, None, None))
        out_BKGTD = jax.vmap(over_heads)(q_BKGTD, k_BKDS, v_BKSD, start_B, first_B)
        return out_BKGTD.reshape(batch, heads, length, width).swapaxes(1, 2)

    return *jax.vjp(in_blocks, *qkv)[1](d_out_BTHD), None, None


after_cache.defvjp(_after_cache_saving, _after_cache_backward)


def fused(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    scale: float,
    *,
    causal: bool = False,
    window: int | None = None,
    seen_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(output [B,T,H,D], log of the softmax's normaliser f32[B,T,H]).

    Args:
        seen_B: How many keys of each row exist; None: all.
    """
    # The public function rounds the normaliser to the dtype of the queries.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    masks = (MaskType.NO_MASK, MaskType.CAUSAL) if seen_B is None else (MaskType.PADDING, MaskType.PADDING_CAUSAL)
    queries_B = None if seen_B is None else jnp.full(len(q_BTHD), q_BTHD.shape[1], jnp.int32)
    found = dot_product_attention(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        q_seqlen=queries_B,
        kv_seqlen=seen_B,
        scale=scale,
        mask_type=masks[causal],
        sliding_window_length=window,
        return_residual=True,
    )
    out_BTHD, normaliser_BHT = cast(tuple[jax.Array, jax.Array], found)
    return out_BTHD, normaliser_BHT.swapaxes(1, 2)


def _slots(k_BKDS: jax.Array, v_BKSD: jax.Array, index_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B,N,K,D] in these slots; an index outside gives the nearest slot."""
    k_BKDN = jax.vmap(lambda x, index: jnp.take(x, index, axis=2, mode="clip"))(k_BKDS, index_BN)
    v_BKND = jax.vmap(lambda x, index: jnp.take(x, index, axis=1, mode="clip"))(v_BKSD, index_BN)
    return k_BKDN.transpose(0, 3, 1, 2), v_BKND.swapaxes(1, 2)


def _joined(own: tuple[jax.Array, jax.Array], early: tuple[jax.Array, jax.Array], has_early_B: jax.Array) -> jax.Array:
    """The softmax over two sets of keys, from (output, normaliser) over each."""
    (own_BTHD, own_BTH), (early_BTHD, early_BTH) = own, early
    share_BTH1 = jax.nn.sigmoid(early_BTH - own_BTH)[..., None]
    both_BTHD = own_BTHD * (1 - share_BTH1) + early_BTHD * share_BTH1
    return jnp.where(has_early_B[:, None, None, None], both_BTHD, own_BTHD).astype(own_BTHD.dtype)
