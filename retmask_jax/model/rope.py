"""Rotary position embedding: inverse frequencies and the rotation (rotate-half layout, pair r = dims r and r + R)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from retmask_jax.model.config import ModelConfig, Rope


def inverse_frequencies(
    config: ModelConfig, kind: str = "full", length: ArrayLike | None = None
) -> np.ndarray | jax.Array:
    """f32[R]: radians per token of each rotary pair, after scaling, highest frequency first.

    NumPy, unless the length is traced.

    Args:
        kind: Of the layer.
        length: Tokens of the longest row, where frequencies depend on it (dynamic, longrope); None: a text that fits the
            original context.
    """
    ropes = config.ropes
    rope = ropes.get(kind) or next(iter(ropes.values()))
    rotary = 2 * config.n_pairs
    exponent_R = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    if rope.depends_on_length:
        length = rope.original_length if length is None else length
        return _BY_LENGTH[rope.kind](rope, exponent_R, length).astype(np.float32)
    freq_R = (1.0 / np.power(np.float32(rope.theta), exponent_R)).astype(np.float32)
    return _SCALINGS[rope.kind](rope, freq_R).astype(np.float32)


def rotation(
    config: ModelConfig, kind: str, positions_BT: jax.Array, length: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) for a layer kind, each f32[B,T,1,R], of the angle position * frequency."""
    freq_R = inverse_frequencies(config, kind, length)
    angles_BT1R = positions_BT[:, :, None, None].astype(jnp.float32) * freq_R
    scale = config.ropes[kind].attention_scale
    return jnp.cos(angles_BT1R) * scale, jnp.sin(angles_BT1R) * scale


def rotate(x_BTHD: jax.Array, cos_BT1R: jax.Array, sin_BT1R: jax.Array) -> jax.Array:
    """Rotate each pair (r, r + R) of the first 2R entries of the last axis by its angle, in float32."""
    pairs = cos_BT1R.shape[-1]
    x32_BTHD = x_BTHD.astype(jnp.float32)
    first, second, rest = jnp.split(x32_BTHD, (pairs, 2 * pairs), axis=-1)
    turned = [first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x_BTHD.dtype)


def rope_pairs(config: ModelConfig, k: int, which: str, seed: int = 0) -> list[int]:
    """Indices of k rotary pairs: the "low"est or "high"est by frequency after scaling, or "random" by seed.

    Raises:
        ValueError: The model has fewer pairs, or `which` is another word.

    >>> import retmask_jax as rm
    >>> config = rm.load("bundled").config
    >>> rm.rope_pairs(config, 4, "low"), rm.rope_pairs(config, 4, "high")
    ([12, 13, 14, 15], [0, 1, 2, 3])
    """
    if not 0 <= k <= config.n_pairs:
        raise ValueError(f"k is {k}; the model has {config.n_pairs} rotary pairs")
    by_frequency = np.argsort(inverse_frequencies(config), kind="stable")
    match which:
        case "low":
            chosen = by_frequency[:k]
        case "high":
            chosen = by_frequency[::-1][:k]
        case "random":
            chosen = np.random.default_rng(seed).choice(config.n_pairs, size=k, replace=False)
        case _:
            raise ValueError(f'which is {which!r}; it must be "low", "high" or "random"')
    return sorted(int(pair) for pair in chosen)


def check_all_rotate(config: ModelConfig) -> None:
    """Raises ValueError for a model that takes no rotary masks."""
    if (why := why_no_rotary_masks(config)) is not None:
        raise ValueError(f"{why}: mask heads, and leave rope_mask None")


def why_no_rotary_masks(config: ModelConfig) -> str | None:
    """Returns why a model takes no rotary masks, or None.

    Where some layers have no RoPE, taking out a pair would mean one thing in some heads and another in others.
    """
    if not (still := config.layers_without_rope):
        return None
    shown = ", ".join(map(str, still[:4])) + ", ..." * (len(still) > 4)
    return (
        f"the model has no RoPE in {len(still)} of its {config.n_layers} layers ({shown}), so it takes no rotary masks"
    )


def yarn_attention_scale(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """What cos and sin are multiplied by where a checkpoint does not say (arXiv 2309.00071, equation 22)."""

    def scale(m):
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def longrope_attention_scale(factor: float, original_length: int) -> float:
    """The same for LongRoPE (arXiv 2402.13753)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


def _llama3(rope: Rope, freq_R: np.ndarray) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Llama 3.1's scaling)."""
    turns_R = rope.original_length * freq_R / (2 * np.pi)
    keep_R = (turns_R - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep_R = np.clip(keep_R, 0.0, 1.0)
    return keep_R * freq_R + (1 - keep_R) * freq_R / rope.factor


def _yarn(rope: Rope, freq_R: np.ndarray) -> np.ndarray:
    """Pairs that turn less than beta_slow times in the original context are slowed by `factor`, those that turn more
    than beta_fast times kept, those between blended by their index (arXiv 2309.00071)."""
    rotary = 2 * len(freq_R)

    def index(turns):
        """Which pair turns so often; not a whole number."""
        return rotary * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    slowed_R = np.clip((np.arange(len(freq_R)) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return slowed_R * freq_R / rope.factor + (1 - slowed_R) * freq_R


def _dynamic(rope: Rope, exponent_R: np.ndarray, length: ArrayLike) -> jax.Array:
    """A larger theta where the text is longer than the original context (NTK-aware scaling)."""
    pairs = len(exponent_R)
    stretch = rope.factor * jnp.maximum(length, rope.original_length) / rope.original_length - (rope.factor - 1)
    theta = jnp.float32(rope.theta) * stretch.astype(jnp.float32) ** (pairs / (pairs - 1))
    return 1.0 / theta**exponent_R


def _longrope(rope: Rope, exponent_R: np.ndarray, length: ArrayLike) -> jax.Array:
    """A factor for each pair, from one set for short texts and another for long texts (arXiv 2402.13753)."""
    short_R, long_R = (np.array(factors, np.float32) for factors in (rope.short_factors, rope.long_factors))
    factors_R = jnp.where(jnp.asarray(length) > rope.original_length, long_R, short_R)
    return 1.0 / (factors_R * np.power(np.float32(rope.theta), exponent_R))


_BY_LENGTH = {"dynamic": _dynamic, "longrope": _longrope}
_SCALINGS = {
    "default": lambda rope, freq_R: freq_R,
    "linear": lambda rope, freq_R: freq_R / rope.factor,
    "llama3": _llama3,
    "yarn": _yarn,
}
