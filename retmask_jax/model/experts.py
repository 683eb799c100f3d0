"""Expert layers: a router picks a few gated MLPs for each token."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.layers import ACTIVATIONS, precision


class Experts(nn.Module):
    """The sum over a token's chosen experts of weight * down(activation(gate(x)) * up(x)); the router is in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTE):
        cfg = self.config
        n, chosen = cfg.n_experts, cfg.experts_per_token
        x_NE = x_BTE.reshape(-1, cfg.hidden_size)
        router = nn.Dense(
            n,
            use_bias=False,
            precision=precision(jnp.float32),
            dtype=jnp.float32,
            name="router",
            kernel_init=_init("embed", None),
        )
        weight_NC, expert_NC = jax.lax.top_k(jax.nn.softmax(router(x_NE), axis=-1), chosen)
        if cfg.normalise_router:
            weight_NC /= weight_NC.sum(axis=-1, keepdims=True)

        into, back = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        gate_XEM = self.param("gate", _init(*into), (n, cfg.hidden_size, cfg.expert_size))
        up_XEM = self.param("up", _init(*into), (n, cfg.hidden_size, cfg.expert_size))
        down_XME = self.param("down", _init(*back), (n, cfg.expert_size, cfg.hidden_size))
        # One row per token and chosen expert, N * C of them.
        expert_R = expert_NC.reshape(-1)
        x_RE = jnp.repeat(x_NE, chosen, axis=0)
        gate_RM, up_RM = (rows_times(x_RE, w.astype(x_RE.dtype), expert_R) for w in (gate_XEM, up_XEM))
        out_RE = rows_times(ACTIVATIONS[cfg.activation](gate_RM) * up_RM, down_XME.astype(x_RE.dtype), expert_R)
        out_NCE = out_RE.reshape(-1, chosen, cfg.hidden_size) * weight_NC[..., None].astype(out_RE.dtype)
        return out_NCE.sum(axis=1).reshape(x_BTE.shape)


@jax.custom_vjp
def rows_times(x_RI, w_XIO, expert_R):
    """f[R,O]: row r times the matrix of its expert, w_XIO[expert_R[r]], without a copy of the matrix per row.

    `jax.lax.ragged_dot` over rows sorted by expert. It has no batching rule for matrices that the batch shares; here
    the rows of all members of a batch become one longer list.
    """
    return _product(x_RI, w_XIO, expert_R)


def _forward(x_RI, w_XIO, expert_R):
    return _product(x_RI, w_XIO, expert_R), (x_RI, w_XIO, expert_R)


def _backward(saved, out_RO):
    x_RI, w_XIO, expert_R = saved
    to_x_RI = _product(out_RO, w_XIO.swapaxes(1, 2), expert_R)
    return to_x_RI, _weight_gradient(x_RI, w_XIO, expert_R, out_RO), np.zeros(expert_R.shape, jax.dtypes.float0)


rows_times.defvjp(_forward, _backward)


def _ragged(x_RI, w_XIO, expert_R):
    order_R = jnp.argsort(expert_R)
    sizes_X = jnp.bincount(expert_R, length=w_XIO.shape[0]).astype(jnp.int32)
    out_RO = jax.lax.ragged_dot(x_RI[order_R], w_XIO, sizes_X, precision=precision(x_RI.dtype))
    return out_RO[jnp.argsort(order_R)]


@jax.custom_batching.custom_vmap
def _product(x_RI, w_XIO, expert_R):
    return _ragged(x_RI, w_XIO, expert_R)


@_product.def_vmap
def _product_of_batch(size, batched, x, w, expert):
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
def _weight_gradient(x_RI, w_XIO, expert_R, out_RO):
    _, pull = jax.vjp(functools.partial(_ragged, x_RI, expert_R=expert_R), w_XIO)
    return pull(out_RO)[0]


def _init(*axes):
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
