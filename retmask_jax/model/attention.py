"""Attention over keys in slots of absolute position, memory-linear in the number of queries; and probes of rows."""

import dataclasses

import jax
import jax.numpy as jnp

from retmask_jax.model.layers import precision, softcap

_QUERY_CHUNK = 128
_SEGMENTS = 8
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a query weighs keys: scale * q.k, capped where `cap` is given, over the last `window` keys (None: all)."""

    scale: float
    window: int | None = None
    cap: float | None = None

    def seen(self, query_positions, key_positions):
        """Whether a query sees a key, by their absolute positions (broadcast against each other)."""
        seen = key_positions <= query_positions
        return seen if self.window is None else seen & (key_positions > query_positions - self.window)


def attend(q_BTHD, k_BKSD, v_BKSD, scores: Scores, start_B=None):
    """Causal attention with softmax in float32; returns the heads' outputs, [B,T,H,D]. Head h reads kv head h // G.

    start_B None: queries and keys are the same T positions. Else query t of row b stands at start_B[b] + t and sees
    the cache slots up to there, slot s holding position s.
    """
    batch, length, heads, width = q_BTHD.shape
    kv_heads = k_BKSD.shape[1]
    q_BKGTD = q_BTHD.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    if start_B is None:
        q_NGTD, k_NSD, v_NSD = (x.reshape(batch * kv_heads, *x.shape[2:]) for x in (q_BKGTD, k_BKSD, v_BKSD))
        out = _over_rows(lambda q, k, v: _causal(q, k, v, scores))(q_NGTD, k_NSD, v_NSD)
    else:
        positions_BT = start_B[:, None] + jnp.arange(length)
        over_heads = jax.vmap(lambda q, k, v, p: _weighted(q, k, v, p, 0, scores), (0, 0, 0, None))
        out = jax.vmap(over_heads)(q_BKGTD, k_BKSD, v_BKSD, positions_BT)
    return out.reshape(batch, heads, length, width).swapaxes(1, 2)


def probe_argmax(q_BTHD, k_BKSD, rows_BP, start_B, scores: Scores):
    """i32[B,P,H]: absolute position of the key with the largest attention weight, for the query rows rows_BP."""
    batch, _, heads, width = q_BTHD.shape
    kv_heads = k_BKSD.shape[1]
    q_BPHD = jnp.take_along_axis(q_BTHD, rows_BP[:, :, None, None], axis=1)
    q_BPKGD = q_BPHD.reshape(batch, -1, kv_heads, heads // kv_heads, width)
    # Neither a positive scale nor a cap changes which is largest.
    raw_BPKGS = jnp.einsum("bpkgd,bksd->bpkgs", q_BPKGD, k_BKSD, precision=precision(q_BTHD.dtype),
                           preferred_element_type=jnp.float32)  # fmt: skip
    seen_BPS = scores.seen((start_B[:, None] + rows_BP)[:, :, None], jnp.arange(k_BKSD.shape[2]))
    best_BPKG = jnp.argmax(jnp.where(seen_BPS[:, :, None, None], raw_BPKGS, _HIDDEN), axis=-1)
    return best_BPKG.reshape(batch, -1, heads)


def _over_rows(function):
    """One (row, kv head) at a time on a CPU, where its scores then stay in the cache; all at once elsewhere."""
    if jax.default_backend() == "cpu":
        return lambda *xs: jax.lax.map(lambda x: function(*x), xs)
    return jax.vmap(function)


def _causal(q_GTD, k_SD, v_SD, scores):
    """Self-attention of one kv head: queries in segments, each against the keys that some query of it sees."""
    length = q_GTD.shape[1]
    chunks = -(-length // _QUERY_CHUNK)
    per_segment = -(-chunks // _SEGMENTS)
    step = per_segment * _QUERY_CHUNK
    out = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        first = 0 if scores.window is None else max(0, begin - scores.window + 1)
        out.append(_segment(q_GTD[:, begin:end], k_SD[first:end], v_SD[first:end], begin, first, scores))
    return jnp.concatenate(out, axis=1)


def _segment(q_GTD, k_SD, v_SD, begin, first, scores):
    """Queries begin, begin + 1, ... against keys first, first + 1, ...; recomputed in the backward pass."""
    groups, length, width = q_GTD.shape
    attend_chunk = jax.checkpoint(lambda q, p: _weighted(q, k_SD, v_SD, p, first, scores))
    positions_T = begin + jnp.arange(length)
    if length <= _QUERY_CHUNK:
        return attend_chunk(q_GTD, positions_T)
    pad = -length % _QUERY_CHUNK
    q_CGTD = jnp.pad(q_GTD, ((0, 0), (0, pad), (0, 0))).reshape(groups, -1, _QUERY_CHUNK, width).swapaxes(0, 1)
    # Padded queries stand where the first one does, so that they see a key.
    positions_CT = jnp.pad(positions_T, (0, pad), constant_values=begin).reshape(-1, _QUERY_CHUNK)
    out_CGTD = jax.lax.map(lambda args: attend_chunk(*args), (q_CGTD, positions_CT))
    return out_CGTD.swapaxes(0, 1).reshape(groups, -1, width)[:, :length]


def _weighted(q_GTD, k_SD, v_SD, positions_T, first, scores):
    """Queries at positions_T against keys at first, first + 1, ..."""
    exact = precision(q_GTD.dtype)
    raw_GTS = jnp.einsum("gtd,sd->gts", q_GTD, k_SD, precision=exact, preferred_element_type=jnp.float32)
    capped_GTS = softcap(raw_GTS * scores.scale, scores.cap)
    seen_TS = scores.seen(positions_T[:, None], first + jnp.arange(k_SD.shape[0]))
    weights_GTS = jax.nn.softmax(jnp.where(seen_TS, capped_GTS, _HIDDEN), axis=-1).astype(v_SD.dtype)
    return jnp.einsum("gts,sd->gtd", weights_GTS, v_SD, precision=exact)
