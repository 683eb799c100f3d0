"""Attention with the best kernel available, and probes: what chosen query rows attend to, whichever kernel did the rest."""

import logging
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from retmask_jax.model.kernels import cudnn
from retmask_jax.model.kernels.blocked import HIDDEN, Scores, Streams, blocked, dot, plain, platform
from retmask_jax.model.kernels.choice import choose, target
from retmask_jax.model.kernels.shares import Shares
from retmask_jax.model.layers import Fork, context_shards, precision

log = logging.getLogger(__name__)

EVERYWHERE = (0, 2**31 - 1)  # a span of all positions
_PROBED_AT_ONCE = 8
_SMALL = 2**19  # bytes of a row's keys and values that a core's cache holds together with the rest


class Keys(flax.struct.PyTreeNode):
    """The keys [R,B,K,D,S] and values [R,B,K,S,D] of R layers, and which layer to read.

    Attributes:
        positions_BS: i32, the absolute position of each slot; a negative one marks an empty slot.
        layer: The index, among the R, of the layer to read.
        contiguous: Whether the positions of a row follow each other.
    """

    k_RBKDS: jax.Array
    v_RBKSD: jax.Array
    positions_BS: jax.Array
    layer: jax.Array | int = 0
    contiguous: bool = flax.struct.field(pytree_node=False, default=True)

    @classmethod
    def of(cls, k_BSKD: jax.Array, v_BSKD: jax.Array) -> "Keys":
        """Keys at positions 0, 1, ..."""
        positions_BS = jnp.broadcast_to(jnp.arange(k_BSKD.shape[1]), k_BSKD.shape[:2])
        return cls(k_BSKD.transpose(0, 2, 3, 1)[None], v_BSKD.swapaxes(1, 2)[None], positions_BS)

    @property
    def k_BKDS(self) -> jax.Array:
        return self.k_RBKDS[self.layer]

    @property
    def v_BKSD(self) -> jax.Array:
        return self.v_RBKSD[self.layer]

    @property
    def kv_heads(self) -> int:
        return self.k_RBKDS.shape[2]


class Probe(flax.struct.PyTreeNode):
    """What to report about attention, per layer and head, for some query rows of a call.

    Reported are the `top` keys with the largest weights, and the sum of the weights in token spans.

    Attributes:
        rows_BP: i32, the query rows.
        spans_BN2: i32, token spans [start, end), or None.
        relative: Whether spans count from each query's own position, so that [-1, 0) is the token before it.
        top: How many keys to report.
        values: Also report the part of the head's output that it reads in each span.
        weights: Also report the weights of the `top` keys.
        queries: Also report the queries, as they meet the keys.
        pairs: The number of rotary pairs, to also report the covariance over the keys of what they add to q.k; 0: do not.
        projected: Also report the outputs of q_proj, bias included, before any norm, rotation and mask.
    """

    rows_BP: Any
    spans_BN2: Any = None
    relative: bool = flax.struct.field(pytree_node=False, default=False)
    top: int = flax.struct.field(pytree_node=False, default=1)
    values: bool = flax.struct.field(pytree_node=False, default=False)
    weights: bool = flax.struct.field(pytree_node=False, default=False)
    queries: bool = flax.struct.field(pytree_node=False, default=False)
    pairs: int = flax.struct.field(pytree_node=False, default=0)
    projected: bool = flax.struct.field(pytree_node=False, default=False)


class Probed(flax.struct.PyTreeNode):
    """The answers to a `Probe`.

    Attributes:
        keys: i32[B,P,...,H,top], absolute positions, the largest weight first; -1 where fewer keys are seen.
        mass: f32[B,P,...,H,N], the sums of weights in the spans, or None.
        values: f32[B,P,...,H,N,D], weighted sums of the values in the spans, or None.
        pairs: f32[B,1,...,H,R,R], covariance over the keys of what two rotary pairs add to q.k, mean over the rows, or
            None. The dimensions that are not rotated count as one more pair.
        projected: f32[B,P,...,H,D], the outputs of q_proj, or None.
        weights: f32[B,P,...,H,top], the softmax's weights of `keys`, 0 where there is no key; or None.
        queries: [B,P,...,H,D], after norm and rotation; or None.
    """

    keys: jax.Array
    mass: jax.Array | None = None
    values: jax.Array | None = None
    pairs: jax.Array | None = None
    projected: jax.Array | None = None
    weights: jax.Array | None = None
    queries: jax.Array | None = None


def attend(
    q_BTHD: jax.Array,
    keys: Keys,
    scores: Scores,
    start_B: jax.Array | None = None,
    kernel: str = "auto",
    positions_BT: jax.Array | None = None,
    streams: Streams | None = None,
) -> jax.Array:
    """Causal attention with softmax in float32; returns the heads' outputs [B,T,H,D]. Head h reads kv head h // G.

    Args:
        start_B: The position of the first query of each row, where the keys are at any positions; None: queries and keys
            are the same T positions, from 0 on.
        kernel: One of KERNELS; "auto" takes the fastest that the call and the device allow.
        positions_BT: Positions of a few queries that do not follow each other.
        streams: Which heads stream, [B,H] or [1,H]; None: none.
    """
    batch, length, heads, width = q_BTHD.shape
    shards = context_shards(length) if start_B is None and positions_BT is None else 1
    chosen = "plain"
    if positions_BT is None:
        call = q_BTHD.dtype.name, length, width, start_B is None, scores, streams is not None
        chosen = choose(kernel, *target(), *call)
    if chosen == "splash":
        from retmask_jax.model.kernels.splash import splash_attend, unsupported

        qkv = q_BTHD, keys.k_BKDS.swapaxes(2, 3), keys.v_BKSD
        reason = unsupported(*qkv) if kernel == "auto" else None
        if reason is None:
            return splash_attend(*qkv, scores)
        log.info("the blocked kernel instead of splash: %s", reason)
        chosen = "blocked"
    if shards > 1:
        return _over_context(q_BTHD, keys, scores, shards, streams)
    if chosen == "cudnn" and start_B is None:
        return cudnn.alone(q_BTHD, keys.k_BKDS.transpose(0, 3, 1, 2), keys.v_BKSD.swapaxes(1, 2), scores)
    if chosen == "cudnn":
        return cudnn.after_cache(q_BTHD, keys.k_BKDS, keys.v_BKSD, start_B, keys.positions_BS[:, 0], scores)
    q_BKGTD = q_BTHD.reshape(batch, length, keys.kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    first_B = jnp.zeros(batch, jnp.int32) if start_B is None else start_B
    positions_BT = first_B[:, None] + jnp.arange(length) if positions_BT is None else positions_BT
    if chosen == "blocked" and keys.contiguous:

        def one(row, of_heads, k_DS, v_SD):
            q_GTD, streams = of_heads
            return blocked(q_GTD, k_DS, v_SD, first_B[row], keys.positions_BS[row, 0], streams, scores)
    else:

        def one(row, of_heads, k_DS, v_SD):
            q_GTD, streams = of_heads
            return plain(q_GTD, k_DS, v_SD, positions_BT[row], keys.positions_BS[row], scores, streams)

    streams = None if streams is None else streams.of_groups(batch, keys.kv_heads)
    return _over_heads(one, (q_BKGTD, streams), keys).reshape(batch, heads, length, width).swapaxes(1, 2)


def attend_forked(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    fork: Fork,
    scores: Scores,
    kernel: str = "auto",
    streams: Streams | None = None,
) -> jax.Array:
    """`attend` in texts that fork, [B,T,H,D]: a branch sees its beginning and itself.

    Beginnings take the kernel of keys without a cache, and branches that of queries after a cache.
    """
    (q_BPHD, q_BNAHD), *kv = (fork.split(x) for x in (q_BTHD, k_BTKD, v_BTKD))
    begun_BPHD = attend(q_BPHD, Keys.of(*(begun_BPKD for begun_BPKD, _ in kv)), scores, None, kernel, streams=streams)
    return fork.join(begun_BPHD, _attend_branches(q_BNAHD, kv, fork.start_B, scores, kernel, streams))


def _attend_branches(
    q_BNAHD: jax.Array,
    kv: list[tuple[jax.Array, jax.Array]],
    start_B: jax.Array,
    scores: Scores,
    kernel: str,
    streams: Streams | None,
) -> jax.Array:
    """Each device computes some of the rows, heads and queries. Left to the compiler, devices would exchange blocks.

    Args:
        kv: Of keys and of values, those of the beginnings [B,P,K,D] and of the branches [B,N,A,K,D].
    """

    def attend_own(first_1, start_B, q_BNAHD, kv, streams):
        start_M, q_MAHD = jnp.repeat(start_B, q_BNAHD.shape[1]) + first_1, q_BNAHD.reshape(-1, *q_BNAHD.shape[2:])
        keys = Keys.of(*(_continued(begun, branch, start_B) for begun, branch in kv))
        streams = jax.tree.map(lambda gate_BH: jnp.repeat(gate_BH, q_BNAHD.shape[1], axis=0), streams)
        return attend(q_MAHD, keys, scores, start_M, kernel, streams=streams).reshape(q_BNAHD.shape)

    batch, _, length, heads, _ = q_BNAHD.shape
    streams = jax.tree.map(lambda gate: jnp.broadcast_to(gate, (batch, heads)), streams)
    shares = Shares.of_call(batch, heads, kv[0][0].shape[2])
    if not shares.free or shares.mesh.size == 1:
        return attend_own(jnp.zeros(1, jnp.int32), start_B, q_BNAHD, kv, streams)
    rows, split, queries = shares.row_axes or None, shares.head_axes or None, context_shards(length)
    along = "context" if queries > 1 else None
    of_queries, of_keys = PartitionSpec(rows, None, along, split), PartitionSpec(rows, None, split)
    of_kv = [(of_keys, PartitionSpec(rows, None, None, split))] * 2
    of_rest = PartitionSpec(along), PartitionSpec(rows), of_queries, of_kv, PartitionSpec(rows, split)
    mapped = shares.over_devices(attend_own, of_rest, of_queries)
    kv = jax.tree.map(lambda x: shares.repeated(x, axis=x.ndim - 2), kv)
    return mapped(length // queries * jnp.arange(queries), start_B, q_BNAHD, kv, streams)


def _continued(begun_BPKD: jax.Array, branch_BNAKD: jax.Array, start_B: jax.Array) -> jax.Array:
    """[B*N,P+A,K,D]: each branch right after the last token of its beginning; what comes after it means nothing."""

    def text(begun_PKD, branch_AKD, start):
        room_PKD = jnp.pad(begun_PKD, ((0, len(branch_AKD)), (0, 0), (0, 0)))
        return jax.lax.dynamic_update_slice_in_dim(room_PKD, branch_AKD, start, axis=0)

    text_BNSKD = jax.vmap(jax.vmap(text, (None, 0, None)))(begun_BPKD, branch_BNAKD, start_B)
    return text_BNSKD.reshape(-1, *text_BNSKD.shape[2:])


def _over_context(q_BTHD: jax.Array, keys: Keys, scores: Scores, shards: int, streams: Streams | None) -> jax.Array:
    """Attention with the queries split along the context axis of the mesh: each device has all keys.

    In blocks: besides splash, no other kernel can begin in the middle of a row.
    """
    length = q_BTHD.shape[1] // shards
    first_C = length * jnp.arange(shards)  # where the queries of each device begin

    def own_queries(first_1, q_BTHD, keys, streams):
        start_B = jnp.broadcast_to(first_1, len(q_BTHD))
        return attend(q_BTHD, keys, scores, start_B, "blocked", streams=streams)

    split, whole = PartitionSpec(None, "context"), PartitionSpec()
    mapped = jax.shard_map(
        own_queries,
        in_specs=(PartitionSpec("context"), split, whole, whole),
        out_specs=split,
        axis_names={"context"},
        check_vma=False,
    )
    return mapped(first_C, q_BTHD, keys, streams)


def probe(
    q_BPHD: jax.Array,
    positions_BP: jax.Array,
    keys: Keys,
    request: Probe,
    scores: Scores,
    streams: Streams | None = None,
) -> Probed:
    """The answers for query rows at these positions, each [B,P,H,...]; the weights of only a few rows exist at a time."""
    batch, _, heads, width = q_BPHD.shape

    def one(args):
        q_BHD, query_B = args
        q_BKGTD = q_BHD.reshape(batch, keys.kv_heads, -1, 1, width)
        products_BKGS = _over_heads(lambda row, q_GTD, k_DS, v_SD: dot(q_GTD[:, 0], k_DS, (1, 0)), q_BKGTD, keys)
        products_BHS = products_BKGS.reshape(batch, heads, -1)
        seen_BHS = scores.seen(query_B[:, None], keys.positions_BS)[:, None]
        # Neither a positive scale nor a cap changes the order; what streaming heads lose does.
        raw_BHS, order_BHS = scores.of(products_BHS), products_BHS
        if streams is not None:
            away_B11S = streams.away(query_B[:, None, None, None], keys.positions_BS[:, None, None])
            share_BHS = streams.share(away_B11S)[:, :, 0]
            seen_BHS &= share_BHS > 0
            raw_BHS = order_BHS = raw_BHS + jnp.log(jnp.where(share_BHS > 0, share_BHS, 1))
        slots_BHN, keys_BHN = _top(jnp.where(seen_BHS, order_BHS, HIDDEN), keys.positions_BS, request.top)
        found = Probed(keys_BHN, queries=q_BHD if request.queries else None)
        if request.pairs:
            found = found.replace(pairs=_covariance(q_BKGTD[:, :, :, 0], seen_BHS, keys, request.pairs))
        if request.spans_BN2 is None and not request.weights:
            return found
        weights_BHS = jax.nn.softmax(jnp.where(seen_BHS, raw_BHS, HIDDEN), axis=-1)
        if request.weights:
            top_BHN = jnp.take_along_axis(weights_BHS, slots_BHN, axis=-1, mode="fill", fill_value=0)
            found = found.replace(weights=jnp.where(keys_BHN < 0, 0, top_BHN))
        if request.spans_BN2 is None:
            return found
        first_BN1, end_BN1 = jnp.split(request.spans_BN2, 2, axis=-1)
        places_B1S = keys.positions_BS[:, None] - (query_B[:, None, None] if request.relative else 0)
        inside_BNS = (places_B1S >= first_BN1) & (places_B1S < end_BN1)
        mass_BHN = jnp.einsum(
            "bhs,bns->bhn", weights_BHS, inside_BNS.astype(jnp.float32), precision=precision(jnp.float32)
        )
        found = found.replace(mass=mass_BHN)
        return found.replace(values=_values(weights_BHS, inside_BNS, keys)) if request.values else found

    found = jax.lax.map(one, (q_BPHD.swapaxes(0, 1), positions_BP.T), batch_size=_PROBED_AT_ONCE)
    if request.pairs:
        found = found.replace(pairs=found.pairs.mean(axis=0, keepdims=True))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), found)


def _values(weights_BHS: jax.Array, inside_BNS: jax.Array, keys: Keys) -> jax.Array:
    """f32[B,H,N,D]: the values in each span, summed with a head's weights."""
    batch, heads, slots = weights_BHS.shape
    weights_BKGS = weights_BHS.reshape(batch, keys.kv_heads, -1, slots)
    parts_BKGNS = jnp.where(inside_BNS[:, None, None], weights_BKGS[:, :, :, None], 0)
    v_BKSD = keys.v_BKSD.astype(jnp.float32)
    found_BKGND = jnp.einsum("bkgns,bksd->bkgnd", parts_BKGNS, v_BKSD, precision=precision(jnp.float32))
    return found_BKGND.reshape(batch, heads, *found_BKGND.shape[3:])


def _covariance(q_BKGD: jax.Array, seen_BHS: jax.Array, keys: Keys, n_pairs: int) -> jax.Array:
    """f32[B,H,R,R]: covariance, over the keys seen, of what each two rotary pairs add to q.k."""
    products_BKGDS = (q_BKGD[..., None] * keys.k_BKDS[:, :, None]).astype(jnp.float32)
    first, second, rest = jnp.split(products_BKGDS, (n_pairs, 2 * n_pairs), axis=3)
    parts = [first + second] + ([rest.sum(axis=3, keepdims=True)] if rest.shape[3] else [])
    parts_BHRS = jnp.concatenate(parts, axis=3).reshape(len(q_BKGD), -1, n_pairs + len(parts) - 1, rest.shape[-1])
    seen_BH1S = seen_BHS[:, :, None]
    n_BH11 = seen_BH1S.sum(axis=-1, keepdims=True)
    mean_BHR1 = jnp.where(seen_BH1S, parts_BHRS, 0).sum(axis=-1, keepdims=True) / n_BH11
    around_BHRS = jnp.where(seen_BH1S, parts_BHRS - mean_BHR1, 0)
    exact = precision(jnp.float32)
    return jnp.einsum("bhrs,bhqs->bhrq", around_BHRS, around_BHRS, precision=exact) / n_BH11


def _top(products_BHS: jax.Array, positions_BS: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """i32[B,H,n]: slots of the n largest, the earlier first among equals, and their positions, -1 for hidden ones."""
    if n == 1:
        slots_BHN = jnp.argmax(products_BHS, axis=-1)[..., None]
    else:
        n_slots = products_BHS.shape[-1]
        slots_BHN = jax.lax.top_k(products_BHS, min(n, n_slots))[1]
        slots_BHN = jnp.pad(slots_BHN, ((0, 0), (0, 0), (0, n - slots_BHN.shape[-1])), constant_values=n_slots)
    found_BHN = jax.vmap(lambda positions_S, slots: positions_S.at[slots].get(mode="fill", fill_value=-1))(
        positions_BS, slots_BHN
    )
    hidden = jnp.take_along_axis(products_BHS, slots_BHN, axis=-1, mode="fill", fill_value=HIDDEN) == HIDDEN
    return slots_BHN, jnp.where(hidden, -1, found_BHN)


def _over_heads(function: Callable[..., jax.Array], of_heads: Any, keys: Keys) -> jax.Array:
    """[B,K,...]: function(row, what its heads have, k_DS, v_SD) of each row and kv head; of_heads: arrays [B,K,...].

    One at a time on a CPU, where its blocks then stay in the cache, or all of a row where they are small; all at once
    elsewhere.
    """
    batch, kv_heads = jax.tree.leaves(of_heads)[0].shape[:2]
    if platform() != "cpu":
        over_kv_heads = jax.vmap(function, (None, 0, 0, 0))
        return jax.vmap(over_kv_heads)(jnp.arange(batch), of_heads, keys.k_BKDS, keys.v_BKSD)
    layers, n = keys.k_RBKDS.shape[0], batch * kv_heads
    if layers > 1 and 2 * math.prod(keys.v_RBKSD.shape[2:]) * keys.v_RBKSD.dtype.itemsize <= _SMALL:
        over_kv_heads = jax.vmap(function, (None, 0, 0, 0))
        return jax.lax.map(
            lambda args: over_kv_heads(*args, keys.k_RBKDS[keys.layer, args[0]], keys.v_RBKSD[keys.layer, args[0]]),
            (jnp.arange(batch), of_heads),
        )
    of_each = jax.tree.map(lambda x_BKX: x_BKX.reshape(n, *x_BKX.shape[2:]), of_heads)
    if layers == 1:
        k_NDS, v_NSD = (x.reshape(n, *x.shape[3:]) for x in (keys.k_RBKDS, keys.v_RBKSD))
        rows_N = jnp.repeat(jnp.arange(batch), kv_heads)
        out = jax.lax.map(lambda args: function(*args), (rows_N, of_each, k_NDS, v_NSD))
    else:  # each is read where it lies, and in the cache's own shape: of a long cache nothing is copied

        def one(args):
            i, of_one = args
            at = (keys.layer, i // kv_heads, i % kv_heads)
            return function(i // kv_heads, of_one, keys.k_RBKDS[at], keys.v_RBKSD[at])

        out = jax.lax.map(one, (jnp.arange(n), of_each))
    return out.reshape(batch, kv_heads, *out.shape[1:])
