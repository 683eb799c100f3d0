"""The layers around attention: RMSNorm, the gated MLP, and projections with their logical axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from retmask_jax.model.config import ModelConfig

_ACTIVATIONS = {"silu": jax.nn.silu}


def precision(dtype) -> jax.lax.Precision | None:
    """float32 products are exact on every backend (accelerators round them otherwise); narrower types need no help."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class RMSNorm(nn.Module):
    """x / rms(x) * scale, the statistics in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", init, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * scale.astype(x.dtype)


def dense(x, features: int, axes: tuple[str, str], name: str):
    """A bias-free dense layer over the last axis, inside a compact module; `axes` name its kernel's logical axes."""
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
    layer = nn.Dense(features, use_bias=False, kernel_init=init, precision=precision(x.dtype), name=name)
    # One matrix product over all tokens: on a CPU several times faster than a batched one.
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTE):
        act = _ACTIVATIONS[self.config.activation]
        gate_BTM = dense(x_BTE, self.config.mlp_size, ("embed", "mlp"), "gate")
        up_BTM = dense(x_BTE, self.config.mlp_size, ("embed", "mlp"), "up")
        return dense(act(gate_BTM) * up_BTM, self.config.hidden_size, ("mlp", "embed"), "down")
