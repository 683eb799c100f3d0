"""Causal attention of one KV head in plain JAX: in one softmax, or in blocks with memory linear in the length.

Keys come as k_DS, width first: a single query then reads them in long runs, twice as fast on a CPU.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Generator

import flax.struct
import jax
import jax.numpy as jnp

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.layers import precision, softcap

QUERY_BLOCK, KEY_BLOCK = 128, 256  # fastest on CPUs, where a block's scores stay in the cache; a wide optimum
_ON_GPU = 256, 1024  # there all rows and heads meet a block at once, and each turn of the loop costs a launch
_ALIGNED = 16  # numbers that a vector unit takes at once
HIDDEN = -1e30
_MOST = 80.0  # logarithm of the largest weight, of a key that counts nothing, so that 0 times it is 0
_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """The platform of the programs that are traced now: "cpu", "gpu" or "tpu".

    It is that of the mesh that is set, whose devices need not be attached, else JAX's default.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    return _PLATFORM.get() or (target or jax.devices()[0]).platform


@contextlib.contextmanager
def compiled_for(name: str) -> Generator[None, None, None]:
    """Within this context programs are traced for another platform than that of the attached devices."""
    before = _PLATFORM.set(name)
    try:
        yield
    finally:
        _PLATFORM.reset(before)


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a query weighs keys: scale * q.k, capped where `cap` is given, over the last `window` keys (None: all)."""

    scale: float
    window: int | None = None
    cap: float | None = None

    @classmethod
    def for_layer(cls, config: ModelConfig, place: int) -> "Scores":
        """Of the layers at one place of a model's layer pattern."""
        window = config.window if config.layer_pattern[place] == "sliding" else None
        return cls(config.attention_scale, window, config.attention_softcap)

    def seen(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Whether a query sees a key, by their absolute positions (broadcast against each other)."""
        seen = (key_positions <= query_positions) & (key_positions >= 0)
        return seen if self.window is None else seen & (key_positions > query_positions - self.window)

    def of(self, products: jax.Array) -> jax.Array:
        """What the softmax is taken of, from products q.k."""
        return softcap(products * self.scale, self.cap)


class Streams(flax.struct.PyTreeNode):
    """Heads that see only the beginning of their row and their last keys.

    Attributes:
        gate: [..., H], whether a head streams, or the share of its weight that a key out of reach loses.
        sink: How many tokens at the beginning are in reach.
        window: How many keys are in reach at the end, with that at the query's position, as `Scores.window` counts them.
    """

    gate: jax.Array
    sink: int = flax.struct.field(pytree_node=False)
    window: int = flax.struct.field(pytree_node=False)

    def of_groups(self, batch: int, kv_heads: int) -> "Streams":
        """The same with a gate [B,K,G], from [B,H] or [1,H]."""
        gate_BH = jnp.broadcast_to(self.gate, (batch, self.gate.shape[-1]))
        return self.replace(gate=gate_BH.reshape(batch, kv_heads, -1))

    def away(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Whether a key is out of reach, by absolute positions (broadcast against each other)."""
        return (key_positions >= self.sink) & (key_positions <= query_positions - self.window)

    def share(self, away: jax.Array) -> jax.Array:
        """f32[..., H, T, S]: what keys keep of their weights. away: bool[..., T, S], with an axis of heads or none."""
        return 1 - self.gate.astype(jnp.float32)[..., None, None] * away


def plain(
    q_GTD: jax.Array,
    k_DS: jax.Array,
    v_SD: jax.Array,
    query_positions_T: jax.Array,
    key_positions_S: jax.Array,
    scores: Scores,
    streams: Streams | None = None,
) -> jax.Array:
    """Attention in one softmax over all S keys; stores G*T*S weights, differentiable to any order."""
    groups, length, width = q_GTD.shape
    raw_GTS = scores.of(dot(q_GTD.reshape(-1, width), k_DS, (1, 0))).reshape(groups, length, -1)
    seen_TS = scores.seen(query_positions_T[:, None], key_positions_S)
    raw_GTS = jnp.where(seen_TS, raw_GTS, HIDDEN)
    if streams is None:
        weights_GTS = jax.nn.softmax(raw_GTS, axis=-1)
    else:
        share_GTS = streams.share(streams.away(query_positions_T[:, None], key_positions_S))
        top_GT1 = jnp.where(share_GTS > 0, raw_GTS, HIDDEN).max(axis=-1, keepdims=True)
        weights_GTS = _weights(raw_GTS, jax.lax.stop_gradient(top_GT1), share_GTS)
        weights_GTS /= jnp.maximum(weights_GTS.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return jnp.einsum("gts,sd->gtd", weights_GTS.astype(v_SD.dtype), v_SD, precision=precision(v_SD.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def blocked(
    q_GTD: jax.Array,
    k_DS: jax.Array,
    v_SD: jax.Array,
    first_query: jax.Array | int,
    first_key: jax.Array | int,
    streams: Streams | None,
    scores: Scores,
) -> jax.Array:
    """Attention block by block, for queries at first_query, first_query + 1, ... and keys at first_key, ...

    Keys at negative positions do not exist. Only blocks that some query sees are computed, so a window costs only what its
    keys cost. The gradient recomputes the weights block by block from their normalisers (arXiv 2205.14135); it can be
    taken once, and not in forward mode.
    """
    return _forward(q_GTD, k_DS, v_SD, first_query, first_key, streams, scores)[0]


def _forward(
    q_GTD: jax.Array,
    k_DS: jax.Array,
    v_SD: jax.Array,
    first_query: jax.Array | int,
    first_key: jax.Array | int,
    streams: Streams | None,
    scores: Scores,
) -> tuple[jax.Array, jax.Array]:
    """(output, log of the normaliser f32[C,N] per block of queries)."""
    tiles = _Tiles(q_GTD.shape, k_DS.shape[1], first_query, first_key, scores)
    q_CND, k_DS, v_SD = tiles.queries(q_GTD), tiles.keys(k_DS, 1), tiles.keys(v_SD, 0)

    def block_of_queries(c):
        def add(s, state):
            top_N, total_N, sum_ND = state
            raw_NS, share_NS = tiles.scores(q_CND[c], k_DS, c, s), tiles.share(streams, c, s)
            counted_NS = raw_NS if share_NS is None else jnp.where(share_NS > 0, raw_NS, HIDDEN)
            new_top_N = jnp.maximum(top_N, counted_NS.max(axis=1))
            weights_NS = _weights(raw_NS, new_top_N[:, None], share_NS)
            shrink_N = jnp.exp(top_N - new_top_N)
            sum_ND = sum_ND * shrink_N[:, None] + dot(weights_NS.astype(v_SD.dtype), tiles.block(v_SD, s, 0), (1, 0))
            return new_top_N, total_N * shrink_N + weights_NS.sum(axis=1), sum_ND

        rows, width = q_CND.shape[1], v_SD.shape[1]
        start = (jnp.full(rows, HIDDEN), jnp.zeros(rows), jnp.zeros((rows, width)))
        top_N, total_N, sum_ND = jax.lax.fori_loop(*tiles.seen_by(c), add, start)
        total_N = jnp.where(total_N > 0, total_N, 1.0)  # queries of padding may see no key
        return (sum_ND / total_N[:, None]).astype(q_GTD.dtype), top_N + jnp.log(total_N)

    out_CND, normaliser_CN = jax.lax.map(block_of_queries, jnp.arange(len(q_CND)))
    return tiles.unblocked(out_CND), normaliser_CN


def _forward_saving(
    q_GTD: jax.Array,
    k_DS: jax.Array,
    v_SD: jax.Array,
    first_query: jax.Array | int,
    first_key: jax.Array | int,
    streams: Streams | None,
    scores: Scores,
) -> tuple[jax.Array, tuple]:
    out_GTD, normaliser_CN = _forward(q_GTD, k_DS, v_SD, first_query, first_key, streams, scores)
    return out_GTD, (q_GTD, k_DS, v_SD, first_query, first_key, streams, out_GTD, normaliser_CN)


def _backward(scores: Scores, saved: tuple, d_out_GTD: jax.Array) -> tuple:
    q_GTD, k_DS, v_SD, first_query, first_key, streams, out_GTD, normaliser_CN = saved
    tiles = _Tiles(q_GTD.shape, k_DS.shape[1], first_query, first_key, scores)
    q_CND, d_out_CND = tiles.queries(q_GTD), tiles.queries(d_out_GTD)
    keys_DS, values_SD = tiles.keys(k_DS, 1), tiles.keys(v_SD, 0)
    # The softmax's own term: the mean of the gradient of the weights under the weights.
    mean_CN = jnp.sum(d_out_CND.astype(jnp.float32) * tiles.queries(out_GTD), axis=-1)

    def block_of_queries(sums, c):
        def add(s, state):
            d_q_ND, d_gate_G, d_k_DS, d_v_DS = state
            raw_NS, share_NS = tiles.scores(q_CND[c], keys_DS, c, s), tiles.share(streams, c, s)
            weights_NS = _weights(raw_NS, normaliser_CN[c][:, None], share_NS)
            d_weights_NS = dot(d_out_CND[c], tiles.block(values_SD, s, 0), (1, 1))
            d_raw_NS = weights_NS * (d_weights_NS - mean_CN[c][:, None])
            if d_gate_G is not None:
                whole_NS = _weights(raw_NS, normaliser_CN[c][:, None], tiles.away(streams, c, s))
                d_gate_G -= (whole_NS * (d_weights_NS - mean_CN[c][:, None])).reshape(tiles.groups, -1).sum(axis=1)
            if scores.cap is not None:  # of a hidden score the weight is 0 already
                d_raw_NS *= 1 - jnp.square(jnp.where(raw_NS == HIDDEN, 0.0, raw_NS) / scores.cap)
            d_raw_NS = (d_raw_NS * scores.scale).astype(q_GTD.dtype)
            d_q_ND += dot(d_raw_NS, tiles.block(keys_DS, s, 1), (1, 1))
            # The values' sum has its width first, too: a product then turns round its narrow factor, not the weights.
            d_k_DS = tiles.add(d_k_DS, s, dot(q_CND[c], d_raw_NS, (0, 0)))
            d_v_DS = tiles.add(d_v_DS, s, dot(d_out_CND[c], weights_NS.astype(d_out_GTD.dtype), (0, 0)))
            return d_q_ND, d_gate_G, d_k_DS, d_v_DS

        d_q_ND, *sums = jax.lax.fori_loop(*tiles.seen_by(c), add, (jnp.zeros(q_CND.shape[1:]), *sums))
        return tuple(sums), d_q_ND.astype(q_GTD.dtype)

    is_gate = streams is not None and streams.gate.dtype != jnp.bool_
    zeros = jnp.zeros(keys_DS.shape, jnp.float32), jnp.zeros(values_SD.shape[::-1], jnp.float32)
    zeros = jnp.zeros(tiles.groups) if is_gate else None, *zeros
    (d_gate_G, d_k_DS, d_v_DS), d_q_CND = jax.lax.scan(block_of_queries, zeros, jnp.arange(len(q_CND)))
    d_streams = streams.replace(gate=d_gate_G.astype(streams.gate.dtype)) if is_gate else None
    n_keys = k_DS.shape[1]
    d_k_DS, d_v_SD = d_k_DS[:, :n_keys].astype(k_DS.dtype), d_v_DS.T[:n_keys].astype(v_SD.dtype)
    return tiles.unblocked(d_q_CND), d_k_DS, d_v_SD, None, None, d_streams


blocked.defvjp(_forward_saving, _backward)


class _Tiles:
    """How queries and keys are cut into blocks, and which blocks meet."""

    def __init__(
        self,
        query_shape: tuple[int, ...],
        n_keys: int,
        first_query: jax.Array | int,
        first_key: jax.Array | int,
        scores: Scores,
    ) -> None:
        self.groups, self.length, self.width = query_shape
        query_block, key_block = _ON_GPU if platform() == "gpu" else (QUERY_BLOCK, KEY_BLOCK)
        self.query_block = even_size(self.length, query_block)
        self.key_block = even_size(n_keys, query_block if n_keys <= 2 * key_block else key_block)
        self.n_key_blocks = -(-n_keys // self.key_block)
        self.first_query, self.first_key, self.n_keys, self.rule = first_query, first_key, n_keys, scores

    def queries(self, x_GTD: jax.Array) -> jax.Array:
        """[blocks, groups * queries of a block, D], padded."""
        x_GTD = _padded(x_GTD, 1, self.query_block)
        x_GCTD = x_GTD.reshape(self.groups, -1, self.query_block, x_GTD.shape[-1])
        return x_GCTD.swapaxes(0, 1).reshape(-1, self.groups * self.query_block, x_GTD.shape[-1])

    def unblocked(self, x_CND: jax.Array) -> jax.Array:
        """The inverse of `queries`."""
        x_CGTD = x_CND.reshape(len(x_CND), self.groups, self.query_block, -1)
        return x_CGTD.swapaxes(0, 1).reshape(self.groups, -1, x_CND.shape[-1])[:, : self.length]

    def keys(self, x: jax.Array, axis: int) -> jax.Array:
        return _padded(x, axis, self.key_block)

    def block(self, x: jax.Array, s: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, s * self.key_block, self.key_block, axis)

    def add(self, sum_DS: jax.Array, s: jax.Array, term_DS: jax.Array) -> jax.Array:
        sum_block_DS = self.block(sum_DS, s, 1) + term_DS
        return jax.lax.dynamic_update_slice_in_dim(sum_DS, sum_block_DS, s * self.key_block, axis=1)

    def seen_by(self, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The range [begin, end) of key blocks that hold a key some query of block c sees."""
        first = self.first_query + c * self.query_block - self.first_key  # as an index of keys
        end = jnp.clip((first + self.query_block - 1) // self.key_block + 1, 0, self.n_key_blocks)
        begin = (
            -self.first_key if self.rule.window is None else jnp.maximum(-self.first_key, first - self.rule.window + 1)
        )
        return jnp.clip(begin // self.key_block, 0, end), end

    def scores(self, q_ND: jax.Array, k_DS: jax.Array, c: jax.Array, s: jax.Array) -> jax.Array:
        """f32[N,S] of query block c and key block s, HIDDEN where a query does not see a key."""
        query_T, key_S = self.positions(c, s)
        seen_NS = self.rule.seen(jnp.tile(query_T, self.groups)[:, None], key_S)
        exists_S = key_S < self.first_key + self.n_keys
        return jnp.where(seen_NS & exists_S, self.rule.of(dot(q_ND, self.block(k_DS, s, 1), (1, 0))), HIDDEN)

    def positions(self, c: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Absolute positions of the queries of block c and of the keys of block s."""
        query_T = self.first_query + c * self.query_block + jnp.arange(self.query_block)
        return query_T, self.first_key + s * self.key_block + jnp.arange(self.key_block)

    def away(self, streams: Streams, c: jax.Array, s: jax.Array) -> jax.Array:
        """bool[N,S]: whether a key of block s is out of reach for a streaming head of query block c."""
        query_T, key_S = self.positions(c, s)
        return streams.away(jnp.tile(query_T, self.groups)[:, None], key_S)

    def share(self, streams: Streams | None, c: jax.Array, s: jax.Array) -> jax.Array | None:
        """f32[N,S]: what the keys keep of their weights; None where no head streams."""
        if streams is None:
            return None
        away_GTS = self.away(streams, c, s).reshape(self.groups, self.query_block, -1)
        return streams.share(away_GTS).reshape(-1, self.key_block)


def even_size(length: int, most: int, aligned: int = _ALIGNED) -> int:
    """The size of equal parts, at most `most` and a multiple of `aligned`, that pad a length least."""
    return min(most, aligned * -(-length // (aligned * -(-length // most))))


def _weights(raw: jax.Array, top: jax.Array, share: jax.Array | None) -> jax.Array:
    """exp(raw - top), times the share that keys keep of it, where there is one."""
    return jnp.exp(raw - top) if share is None else jnp.exp(jnp.minimum(raw - top, _MOST)) * share


def _padded(x: jax.Array, axis: int, multiple_of: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple_of)
    return jnp.pad(x, widths)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """f32: a and b contracted over one axis each."""
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision(a.dtype), preferred_element_type=jnp.float32
    )
