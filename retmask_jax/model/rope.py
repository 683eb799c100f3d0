"""Rotary position embedding: inverse frequencies and the rotation (rotate-half layout, pair r = dims r and r + R)."""

import jax.numpy as jnp
import numpy as np

from retmask_jax.model.config import ModelConfig, Rope


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """f32[R]: radians per token of each rotary pair, after scaling, highest frequency first."""
    rope = config.rope
    exponent_R = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freq_R = (1.0 / np.power(np.float32(rope.theta), exponent_R)).astype(np.float32)
    return _SCALINGS[rope.kind](rope, freq_R).astype(np.float32)


def rotation(config: ModelConfig, positions_BT):
    """(cos, sin), each f32[B,T,1,R], of the angle position * frequency."""
    angles_BT1R = positions_BT[:, :, None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles_BT1R), jnp.sin(angles_BT1R)


def rotate(x_BTHD, cos_BT1R, sin_BT1R):
    """Rotate each pair (r, r + R) of the last axis by its angle, in float32."""
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R], axis=-1)
    return rotated.astype(x_BTHD.dtype)


def _llama3(rope: Rope, freq_R: np.ndarray) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Llama 3.1's scaling)."""
    turns_R = rope.original_length * freq_R / (2 * np.pi)
    keep_R = (turns_R - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep_R = np.clip(keep_R, 0.0, 1.0)
    return keep_R * freq_R + (1 - keep_R) * freq_R / rope.factor


_SCALINGS = {
    "default": lambda rope, freq_R: freq_R,
    "linear": lambda rope, freq_R: freq_R / rope.factor,
    "llama3": _llama3,
}
