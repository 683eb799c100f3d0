"""Losses over sequence log-probabilities, as pure functions."""

import jax
import jax.numpy as jnp

KINDS = ("sigmoid",)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float = 0.1, kind: str = "sigmoid",
             label_smoothing: float = 0.0):  # fmt: skip
    """f32[pairs]: direct preference optimisation (arXiv 2305.18290, eq. 7) on log-probabilities f32[pairs].

    label_smoothing: assumed share of pairs whose preference is the wrong way round (conservative DPO).
    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def sft_loss(chosen, n_tokens):
    """f32[]: mean negative log-probability per answer token over the batch."""
    return -jnp.sum(chosen) / jnp.sum(n_tokens)
