"""Operations that a model needs at least, from its shape."""

import flax.linen as nn
import jax

from retmask_jax.model.config import ModelConfig
from retmask_jax.sharding import param_shapes


def forward_flops(config: ModelConfig, tokens: int, counted: int) -> float:
    """Operations a row of `tokens` needs, with logits of `counted` of them: two per weight and token that meet, and four
    per dimension of a head for each pair of a query and a key that it sees."""
    pairs = sum(_seen(tokens, config.window if kind == "sliding" else None) for kind in layer_kinds(config))
    attention = 4 * config.n_heads * config.head_dim * pairs
    return 2.0 * weights_in_blocks(config) * tokens + attention + 2.0 * counted * config.hidden_size * config.vocab_size


def training_flops(config: ModelConfig, tokens: int, *, remat: bool) -> float:
    """Operations that a row of `tokens` costs forward and backward, all of them counted.

    Backward takes twice the forward pass, for the inputs' and the weights' gradients. Logits are always computed
    again there, blocks with remat.
    """
    blocks = forward_flops(config, tokens, counted=0)
    logits = forward_flops(config, tokens, counted=tokens) - blocks
    return (4 if remat else 3) * blocks + 4 * logits


def weights_in_blocks(config: ModelConfig) -> int:
    """Weights that a token meets in all matrices but the embedding and the output's."""
    leaves = jax.tree.leaves_with_path(nn.unbox(param_shapes(config)))
    kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel" and path[0].key != "lm_head")
    experts = sum(leaf.size for path, leaf in leaves if path[-1].key in ("gate", "up", "down"))
    return kernels + experts // max(config.n_experts, 1) * config.experts_per_token


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The kind of each layer."""
    return config.layer_pattern * config.repeats + config.tail


def _seen(tokens: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees."""
    width = tokens if window is None else min(window, tokens)
    return width * (width + 1) / 2 + (tokens - width) * width
