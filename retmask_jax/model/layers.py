"""The layers around attention (RMSNorm, gated MLP, experts, projections with their logical axes), how layers are grouped,
and how texts that fork lie in rows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from retmask_jax.model.config import ModelConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


# Under jit, since Flax traces the initializer of every parameter whenever a model is applied: then once per shape.
_SMALL = jax.jit(nn.initializers.normal(0.02), static_argnums=(1, 2))


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 products are exact on every backend (accelerators round them otherwise); narrower types need no help."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap): nearly x where x is small, never beyond the cap. Without a cap, x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def scaled(x: jax.Array, scale: float | None) -> jax.Array:
    """x times a scale, in float32 and rounded once. Without a scale, x."""
    return x if scale is None else (x.astype(jnp.float32) * scale).astype(x.dtype)


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], initializer: Callable = _SMALL
) -> jax.Array:
    """A parameter of a compact module, declared with the logical axes that the sharding rules know."""
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(initializer, axes), shape))


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis, in float32."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.initializers.constant(1.0 - self.offset)
        scale = weight(self, "scale", x.shape[-1:], ("norm",), ones).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * (scale + self.offset if self.offset else scale)).astype(x.dtype)


def norm(config: ModelConfig, name: str | None) -> RMSNorm:
    """A norm with the model's epsilon and offset."""
    return RMSNorm(config.norm_eps, config.norm_offset, name=name)


def dense(x: jax.Array, features: int, axes: tuple[str, str], name: str, bias: bool = False) -> jax.Array:
    """A dense layer over the last axis, inside a compact module. axes: the logical axes of its kernel."""
    layer = nn.Dense(
        features,
        use_bias=bias,
        precision=precision(x.dtype),
        name=name,
        kernel_init=nn.with_logical_partitioning(_SMALL, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
    )
    if jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1:
        return layer(x)  # rows and positions are split over different axes, which one axis of both could not be
    # One matrix product over all tokens: on a CPU several times faster than a batched one.
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.config.activation]
        gate_BTM = dense(x_BTE, self.config.mlp_size, ("embed", "mlp"), "gate")
        up_BTM = dense(x_BTE, self.config.mlp_size, ("embed", "mlp"), "up")
        return dense(act(gate_BTM) * up_BTM, self.config.hidden_size, ("mlp", "embed"), "down")


class Experts(nn.Module):
    """The sum over a token's chosen experts of weight * down(activation(gate(x)) * up(x)); the router is in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        cfg = self.config
        n, chosen = cfg.n_experts, cfg.experts_per_token
        x_NE = x_BTE.reshape(-1, cfg.hidden_size)
        router = nn.Dense(
            n,
            use_bias=False,
            precision=precision(jnp.float32),
            dtype=jnp.float32,
            name="router",
            kernel_init=nn.with_logical_partitioning(_SMALL, ("embed", None)),
        )
        weight_NC, expert_NC = jax.lax.top_k(jax.nn.softmax(router(x_NE), axis=-1), chosen)
        if cfg.normalise_router:
            weight_NC /= weight_NC.sum(axis=-1, keepdims=True)

        into, back = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        gate_XEM = weight(self, "gate", (n, cfg.hidden_size, cfg.expert_size), into)
        up_XEM = weight(self, "up", (n, cfg.hidden_size, cfg.expert_size), into)
        down_XME = weight(self, "down", (n, cfg.expert_size, cfg.hidden_size), back)
        # One row per token and chosen expert, N * C of them.
        expert_R = expert_NC.reshape(-1)
        x_RE = jnp.repeat(x_NE, chosen, axis=0)
        gate_RM, up_RM = (rows_times(x_RE, w.astype(x_RE.dtype), expert_R) for w in (gate_XEM, up_XEM))
        out_RE = rows_times(ACTIVATIONS[cfg.activation](gate_RM) * up_RM, down_XME.astype(x_RE.dtype), expert_R)
        out_NCE = out_RE.reshape(-1, chosen, cfg.hidden_size) * weight_NC[..., None].astype(out_RE.dtype)
        return out_NCE.sum(axis=1).reshape(x_BTE.shape)


@jax.custom_vjp
def rows_times(x_RI: jax.Array, w_XIO: jax.Array, expert_R: jax.Array) -> jax.Array:
    """f[R,O]: row r times the matrix of its expert, w_XIO[expert_R[r]], without a copy of the matrix per row.

    `jax.lax.ragged_dot` over rows sorted by expert. It has no batching rule for matrices that the batch shares; here
    the rows of all members of a batch become one longer list.
    """
    return _product(x_RI, w_XIO, expert_R)


class Embedding(nn.Module):
    """Rows of the table [V, E], times the model's embedding scale."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        shape = (self.config.vocab_size, self.config.hidden_size)
        x_BTE = weight(self, "embedding", shape, ("vocab", "embed"))[tokens_BT]
        scale = self.config.embed_scale
        return x_BTE if scale is None else x_BTE * jnp.asarray(scale, x_BTE.dtype)


class Unembedding(nn.Module):
    """Declares the output matrix [E, V], which `unembed` applies to the positions that are asked for."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        return weight(self, "kernel", (self.config.hidden_size, self.config.vocab_size), ("embed", "vocab"))


def unembed(config: ModelConfig, params: PyTree, x_BTE: jax.Array) -> jax.Array:
    """Logits in float32, f32[..., V]."""
    return logits(config, unembedding(config, params), x_BTE)


def unembedding(config: ModelConfig, params: PyTree) -> jax.Array:
    """The output matrix [E, V]."""
    return params["embed"]["embedding"].T if config.tied_embeddings else params["lm_head"]["kernel"]


def logits(config: ModelConfig, table_EV: jax.Array, x_BTE: jax.Array) -> jax.Array:
    """f32[..., V] of states and the output matrix."""
    product = jnp.dot(x_BTE, table_EV, precision=precision(x_BTE.dtype), preferred_element_type=jnp.float32)
    return softcap(scaled(product, config.logit_scale), config.logit_softcap)


def at_positions(x_BTX: jax.Array, rows_BP: jax.Array | None) -> jax.Array:
    """[B,P,...]: some positions of each row; all of them where rows_BP is None."""
    if rows_BP is None:
        return x_BTX
    return jnp.take_along_axis(x_BTX, rows_BP.reshape(*rows_BP.shape, *(1,) * (x_BTX.ndim - 2)), axis=1)


class Fork(flax.struct.PyTreeNode):
    """Texts that fork: each row holds a beginning and, side by side, N branches that each continue it.

    Everything but attention treats a row as its T = P + N * A tokens, so that what branches share is computed once.

    Attributes:
        start_B: i32, the lengths of the beginnings, which are the positions at which their branches begin.
        width: P, what beginnings are padded to.
        branches: N.
        shares: In how many equal shares a row is laid out. Each has its share of the beginning and of every branch, so that
            devices that split the positions of a row split all of them.
    """

    start_B: jax.Array
    width: int = flax.struct.field(pytree_node=False)
    branches: int = flax.struct.field(pytree_node=False)
    shares: int = flax.struct.field(pytree_node=False, default=1)

    @classmethod
    def of(cls, start_B: jax.Array, width: int, branches: int, branch_width: int) -> "Fork":
        """The fork of rows with these widths, laid out for the mesh that is set."""
        return cls(start_B, width, branches, min(context_shards(width), context_shards(branch_width)))

    def positions(self, length: int) -> jax.Array:
        """i32[B,T]: the position that each of T tokens has in its text."""
        batch, own = len(self.start_B), (length - self.width) // self.branches
        begun_BP = jnp.broadcast_to(jnp.arange(self.width), (batch, self.width))
        branch_B1A = self.start_B[:, None, None] + jnp.arange(own)
        return self.join(begun_BP, jnp.broadcast_to(branch_B1A, (batch, self.branches, own)))

    def join(self, begun_BPX: jax.Array, branch_BNAX: jax.Array) -> jax.Array:
        """[B,T,...]: rows of beginnings and their branches."""
        batch, _, *rest = begun_BPX.shape
        begun_BCPX = begun_BPX.reshape(batch, self.shares, -1, *rest)
        branch_BNCAX = branch_BNAX.reshape(batch, self.branches, self.shares, -1, *rest)
        branch_BCAX = branch_BNCAX.swapaxes(1, 2).reshape(batch, self.shares, -1, *rest)
        return jnp.concatenate([begun_BCPX, branch_BCAX], axis=2).reshape(batch, -1, *rest)

    def split(self, x_BTX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(beginnings [B,P,...], branches [B,N,A,...]), the inverse of `join`."""
        batch, _, *rest = x_BTX.shape
        x_BCTX = x_BTX.reshape(batch, self.shares, -1, *rest)
        begun_BCPX, branch_BCAX = jnp.split(x_BCTX, [self.width // self.shares], axis=2)
        branch_BCNAX = branch_BCAX.reshape(batch, self.shares, self.branches, -1, *rest)
        branch_BNAX = branch_BCNAX.swapaxes(1, 2).reshape(batch, self.branches, -1, *rest)
        return begun_BCPX.reshape(batch, self.width, *rest), branch_BNAX


def context_shards(length: int) -> int:
    """Over how many devices of the mesh that is set the positions of a row are split; 1 where they do not divide."""
    shards = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    return shards if length % shards == 0 else 1


def split_layers(config: ModelConfig, per_layer: PyTree) -> dict[str, dict[str, Any]]:
    """Arrays in absolute layer order [L, ...] as {"blocks": {i: [repeats, ...]}, "tail": {j: [...]}}."""
    period = len(config.layer_pattern)
    scanned = period * config.repeats
    return {
        "blocks": {str(i): jax.tree.map(lambda x: x[i:scanned:period], per_layer) for i in range(period)},
        "tail": {str(j): jax.tree.map(lambda x: x[scanned + j], per_layer) for j in range(len(config.tail))},
    }


def merge_layers(config: ModelConfig, grouped: PyTree) -> PyTree:
    """The inverse of `split_layers`: arrays [L, ...] in absolute layer order."""

    def merge(*arrays):
        blocks, tail = jnp.stack(arrays[:period], axis=1), [x[None] for x in arrays[period:]]
        return jnp.concatenate([blocks.reshape(-1, *blocks.shape[2:]), *tail], axis=0)

    period = len(config.layer_pattern)
    blocks = [grouped["blocks"][str(i)] for i in range(period)]
    return jax.tree.map(merge, *blocks, *(grouped["tail"][str(j)] for j in range(len(config.tail))))


def _rows_times_forward(x_RI: jax.Array, w_XIO: jax.Array, expert_R: jax.Array) -> tuple:
    return _product(x_RI, w_XIO, expert_R), (x_RI, w_XIO, expert_R)


def _rows_times_backward(saved: tuple[jax.Array, jax.Array, jax.Array], out_RO: jax.Array) -> tuple:
    x_RI, w_XIO, expert_R = saved
    to_x_RI = _product(out_RO, w_XIO.swapaxes(1, 2), expert_R)
    return to_x_RI, _weight_gradient(x_RI, w_XIO, expert_R, out_RO), np.zeros(expert_R.shape, jax.dtypes.float0)


rows_times.defvjp(_rows_times_forward, _rows_times_backward)


def _ragged(x_RI: jax.Array, w_XIO: jax.Array, expert_R: jax.Array) -> jax.Array:
    order_R = jnp.argsort(expert_R)
    sizes_X = jnp.bincount(expert_R, length=w_XIO.shape[0]).astype(jnp.int32)
    out_RO = jax.lax.ragged_dot(x_RI[order_R], w_XIO, sizes_X, precision=precision(x_RI.dtype))
    return out_RO[jnp.argsort(order_R)]


@jax.custom_batching.custom_vmap
def _product(x_RI: jax.Array, w_XIO: jax.Array, expert_R: jax.Array) -> jax.Array:
    return _ragged(x_RI, w_XIO, expert_R)


@_product.def_vmap
def _product_of_batch(
    size: int, batched: Sequence[bool], x: jax.Array, w: jax.Array, expert: jax.Array
) -> tuple[jax.Array, bool]:
    if batched[1]:
        each = [
            one if is_batched else jnp.broadcast_to(one, (size, *one.shape))
            for one, is_batched in zip((x, w, expert), batched, strict=True)
        ]
        return jax.lax.map(lambda args: _product(*args), tuple(each)), True
    x_VRI = x if batched[0] else jnp.broadcast_to(x, (size, *x.shape))
    expert_VR = expert if batched[2] else jnp.broadcast_to(expert, (size, *expert.shape))
    flat = _product(x_VRI.reshape(-1, x_VRI.shape[-1]), w, expert_VR.reshape(-1))
    return flat.reshape(size, -1, flat.shape[-1]), True


@jax.custom_batching.sequential_vmap
def _weight_gradient(x_RI: jax.Array, w_XIO: jax.Array, expert_R: jax.Array, out_RO: jax.Array) -> jax.Array:
    _, pull = jax.vjp(functools.partial(_ragged, x_RI, expert_R=expert_R), w_XIO)
    return pull(out_RO)[0]
