"""AdamW as the papers use it."""

import jax
import jax.numpy as jnp
import optax

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


def _decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
