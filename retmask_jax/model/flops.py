"""How many operations a model needs at least, and how many a device can do at most."""

import functools
from collections.abc import Sequence

import jax

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.sharding import plain_shapes

# Operations per second of dense bfloat16 products, by JAX's name of the device; from the vendors' data sheets.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}


def forward_flops(config: ModelConfig, tokens: int, counted: int, before: int = 0) -> float:
    """Operations of a forward pass over `tokens` of a row after `before` others, with logits of `counted` of them.

    Two per weight and token that meet, and four per dimension of a head for each pair of a query and a key that it sees.
    """
    windows = [config.window if kind == "sliding" else None for kind in layer_kinds(config)]
    pairs = sum(_seen(before + tokens, window) - _seen(before, window) for window in windows)
    attention = 4 * config.n_heads * config.head_dim * pairs
    return 2.0 * block_weights(config) * tokens + attention + 2.0 * counted * config.hidden_size * config.vocab_size


def training_flops(config: ModelConfig, prompt: int, answers: Sequence[int]) -> float:
    """Operations of the forward and backward pass of a prompt, once, and of answers to it; recomputation not counted.

    Three times the forward pass, or twice where only adapters are trained and no weight has a gradient.

    Args:
        prompt: Tokens of the prompt.
        answers: Tokens of each answer; of all of them there are logits.
    """
    return (3 if config.lora is None else 2) * sum(_blocks_and_logits(config, prompt, answers))


def executed_flops(config: ModelConfig, prompt: int, answers: Sequence[int], *, remat: bool) -> float:
    """As `training_flops`, recomputation counted.

    Logits are always recomputed in the backward pass, and blocks with `remat`.
    """
    blocks, logits = _blocks_and_logits(config, prompt, answers)
    passes = 3 if config.lora is None else 2
    return (passes + remat) * blocks + 4 * logits


def peak_flops() -> float | None:
    """Operations per second of all devices together, in bfloat16; None for unknown devices."""
    kind = jax.devices()[0].device_kind
    known = [name for name in _PEAKS if kind.startswith(name)]
    return jax.device_count() * _PEAKS[max(known, key=len)] if known else None


@functools.cache
def block_weights(config: ModelConfig) -> int:
    """The number of weights that a token is multiplied with, except those of the embedding and the output matrix."""
    leaves = jax.tree.leaves_with_path(plain_shapes(config))
    kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel" and path[0].key != "lm_head")
    experts = sum(leaf.size for path, leaf in leaves if path[-1].key in ("gate", "up", "down"))
    return kernels + experts // max(config.n_experts, 1) * config.experts_per_token


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The kind of each layer, in order."""
    return config.layer_pattern * config.repeats + config.tail


def _blocks_and_logits(config: ModelConfig, prompt: int, answers: Sequence[int]) -> tuple[float, float]:
    """Operations of a forward pass over a prompt and the answers to it: of the blocks, of the logits."""
    blocks = forward_flops(config, prompt, 0) + sum(forward_flops(config, answer, 0, prompt) for answer in answers)
    return blocks, 2.0 * sum(answers) * config.hidden_size * config.vocab_size


def _seen(tokens: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees."""
    width = tokens if window is None else min(window, tokens)
    return width * (width + 1) / 2 + (tokens - width) * width
