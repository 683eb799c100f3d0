"""What is minimised: the loss of a part of a batch, and the metrics that go with it."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float32, PyTree, Shaped

from retmask_jax.generation.logprobs import over_chunks, sequence_logprobs
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.masks import Masks, normalise
from retmask_jax.model.transformer import check_tokens, hidden
from retmask_jax.training.losses import contrast_loss, dpo_loss
from retmask_jax.training.settings import Settings
from retmask_jax.utils.array_types import Tokens

_OF_PAIRS = ("reward_chosen", "reward_rejected", "margin", "accuracy")


def part_loss(config: ModelConfig, settings: Settings, params, batch, ablated=None):
    """(loss, metrics) of pairs, each a sum over pairs of their value times batch["weight"] f32[n].

    batch: `PairRows.padded`, weight and, with a reference, ref_chosen and ref_rejected f32[n]. Chosen and rejected rows
    share one forward pass. ablated: the Masks of the objective "contrast". Computed in settings.compute_dtype.
    """
    params = jax.tree.map(lambda x: x.astype(settings.compute_dtype), params)
    weight = batch["weight"]
    if settings.objective == "dpo":
        losses, values = _preference(config, settings, params, batch)
        return jnp.sum(weight * losses), {name: jnp.sum(weight * values[name]) for name in _OF_PAIRS}
    rows = batch["chosen"], batch["chosen_mask"]
    if settings.objective == "sft":
        losses = -sequence_logprobs(config, params, *rows, remat=settings.remat)
    else:
        losses = sequence_contrast(config, params, *rows, ablated, settings.contrast_strength, remat=settings.remat)
    return jnp.sum(weight * losses), {}


def sequence_contrast(
    config: ModelConfig,
    params: PyTree,
    tokens: Tokens,
    loss_mask: Shaped[ArrayLike, "B T"],
    masks: Masks,
    strength: float,
    *,
    remat: bool = False,
) -> Float32[jax.Array, " B"]:
    """f32[B]: sum over the counted positions of `losses.contrast_loss` between the model and itself under masks.

    Arguments and errors as in `sequence_logprobs`. Differentiable; the masked pass takes no gradient.
    """
    tokens = check_tokens(config, tokens)
    counted_BT = jnp.asarray(loss_mask)[:, 1:] != 0
    normal_BTE = hidden(config, params, tokens, normalise(config), remat=remat).x_BTE[:, :-1]
    fixed = jax.lax.stop_gradient(params)
    ablated_BTE = hidden(config, fixed, tokens, masks).x_BTE[:, :-1]

    def contrast(logits_of, normal_BTE, ablated_BTE):
        return contrast_loss(logits_of(normal_BTE), logits_of(ablated_BTE), strength)

    return jnp.sum(over_chunks(config, params, contrast, (normal_BTE, ablated_BTE), counted_BT), axis=1)


def metric_names(settings: Settings) -> tuple[str, ...]:
    """The metrics of `part_loss`, the loss first."""
    return ("loss", *(_OF_PAIRS if settings.objective == "dpo" else ()))


def pair_logprobs(config: ModelConfig, params, batch, *, remat: bool = False):
    """(chosen, rejected): f32[n], log-probabilities of the answers, both sides in one forward pass."""
    tokens = jnp.concatenate([batch["chosen"], batch["rejected"]])
    mask = jnp.concatenate([batch["chosen_mask"], batch["rejected_mask"]])
    return jnp.split(sequence_logprobs(config, params, tokens, mask, remat=remat), 2)


def _preference(config, settings, params, batch):
    """(loss, metrics) by pair, f32[n] each."""
    sums = pair_logprobs(config, params, batch, remat=settings.remat)
    counts = [jnp.maximum(1, batch[f"{side}_mask"].sum(axis=1)) for side in ("chosen", "rejected")]
    divisors = counts if settings.averages else (1, 1)
    chosen, rejected = (x / n for x, n in zip(sums, divisors, strict=True))
    reference = (0.0, 0.0)
    if settings.has_reference:
        reference = [batch[f"ref_{side}"] / n for side, n in zip(("chosen", "rejected"), divisors, strict=True)]
    losses = dpo_loss(
        chosen,
        rejected,
        *reference,
        beta=settings.beta,
        kind=settings.loss,
        label_smoothing=settings.label_smoothing,
        gamma=settings.gamma,
    )
    losses += settings.nll_weight * -sums[0] / counts[0]
    good, bad = settings.beta * (chosen - reference[0]), settings.beta * (rejected - reference[1])
    return losses, {"reward_chosen": good, "reward_rejected": bad, "margin": good - bad, "accuracy": good > bad}
