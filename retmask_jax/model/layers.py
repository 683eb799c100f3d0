"""The layers around attention: RMSNorm, the gated MLP, and projections with their logical axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from retmask_jax.model.config import ModelConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def precision(dtype) -> jax.lax.Precision | None:
    """float32 products are exact on every backend (accelerators round them otherwise); narrower types need no help."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def softcap(x, cap: float | None):
    """cap * tanh(x / cap): nearly x where x is small, never beyond the cap. None: x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis, in float32."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.constant(1.0 - self.offset), ("norm",))
        scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * (scale + self.offset if self.offset else scale)).astype(x.dtype)


def norm(config: ModelConfig, name: str) -> RMSNorm:
    """A norm with the model's epsilon and offset."""
    return RMSNorm(config.norm_eps, config.norm_offset, name=name)


def dense(x, features: int, axes: tuple[str, str], name: str, bias: bool = False):
    """A dense layer over the last axis, inside a compact module; `axes` name its kernel's logical axes."""
    layer = nn.Dense(
        features,
        use_bias=bias,
        precision=precision(x.dtype),
        name=name,
        kernel_init=nn.with_logical_partitioning(nn.initializers.normal(0.02), axes),
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
    def __call__(self, x_BTE):
        act = ACTIVATIONS[self.config.activation]
        gate_BTM = dense(x_BTE, self.config.mlp_size, ("embed", "mlp"), "gate")
        up_BTM = dense(x_BTE, self.config.mlp_size, ("embed", "mlp"), "up")
        return dense(act(gate_BTM) * up_BTM, self.config.hidden_size, ("mlp", "embed"), "down")
