"""AdamW as the papers use it, and which parameters it changes where only some heads are trained."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from retmask_jax.model import lora
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import mask_heads
from retmask_jax.model.layers import split_layers
from retmask_jax.model.sharding import plain_shapes
from retmask_jax.training.settings import Settings


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Returns AdamW with clipping by the global norm and the learning rate of `schedule`; weights of norms are not
    decayed."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            schedule(settings),
            settings.b1,
            settings.b2,
            settings.eps,
            weight_decay=settings.weight_decay,
            mask=_decayed,
            mu_dtype=jnp.dtype(settings.first_moment_dtype),
        ),
    )


def schedule(settings: Settings) -> optax.Schedule:
    """Returns the learning rate by step: linear up over the share `warmup` of the steps, then a cosine down to
    final_learning_rate."""
    warmup = min(max(1, round(settings.warmup * settings.steps)), settings.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warmup, settings.steps, settings.final_learning_rate
    )


def trained_parts(config: ModelConfig, settings: Settings) -> PyTree | None:
    """Returns where an update may change what is trained: all parameters, or the adapters.

    Of a chosen head that is its columns of q, kernel and bias, and its rows of o; of the KV head that it reads the columns of
    k and v, which other heads of the group read as well. With settings.mlp the MLPs, experts and routers of all layers
    come on top. Embeddings and norms never do.

    Adapters A B follow the kernel whose change they are: of q, k and v the columns of B are chosen, of o the rows of A; the
    other adapter is trained in layers with a chosen head.

    Args:
        config: Config of the start model, without adapters.
        settings: heads, mlp, and the adapters.

    Returns:
        bool arrays that broadcast with the parameters; None where settings.heads is, for everywhere.

    Raises:
        ValueError: The model does not have one of the heads.
    """
    if settings.heads is None:
        return None
    chosen_LH = np.asarray(mask_heads(config, settings.heads).head_mask)
    chosen_LK = chosen_LH.reshape(config.n_layers, config.n_kv_heads, -1).any(axis=-1)
    queries, keys = (np.repeat(chosen, config.head_dim, axis=1) for chosen in (chosen_LH, chosen_LK))
    columns = split_layers(config, {"q": queries, "k": keys, "v": keys, "o": queries})

    def part(path, leaf):
        group, place, *names = (entry.key for entry in path)
        if group in columns and names[0] == "attn" and names[1] in columns[group][place]:
            return _of_projection(columns[group][place][names[1]], names)
        return np.full((1,) * leaf.ndim, settings.mlp and group in columns and names[0] in ("mlp", "experts"))

    return jax.tree.map_with_path(part, _trained_shapes(config, settings))


def count_trained(config: ModelConfig, settings: Settings) -> int:
    """Returns how many parameters, or entries of adapters, updates change; errors as `trained_parts`."""
    shapes, parts = _trained_shapes(config, settings), trained_parts(config, settings)
    if parts is None:
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))
    counts = jax.tree.map(lambda leaf, part: int(part.sum()) * leaf.size // part.size, shapes, parts)
    return sum(jax.tree.leaves(counts))


def _trained_shapes(config: ModelConfig, settings: Settings) -> PyTree:
    shapes = plain_shapes(dataclasses.replace(config, lora=settings.lora))
    return shapes if settings.lora is None else lora.split(shapes)[0]


def _of_projection(chosen: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Where an array of q, k, v or o is trained, from the columns (of o the rows) of the chosen heads, bool[..., H*D]."""
    _, layer, array = names
    if array == "bias":
        return chosen
    if array.endswith(lora.SUFFIXES[layer == "o"]):  # an adapter without an axis of heads
        return np.expand_dims(chosen.any(axis=-1), (-2, -1))
    return np.expand_dims(chosen, -1 if layer == "o" else -2)


def _decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
