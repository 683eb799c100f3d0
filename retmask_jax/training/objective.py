"""What is minimised: the loss of a part of a batch, and the metrics that go with it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float32, PyTree, Shaped

from retmask_jax.generation.logprobs import branch_logprobs, over_chunks, sequence_logprobs
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.transformer import check_tokens, hidden
from retmask_jax.training.losses import contrast_loss, dpo_loss
from retmask_jax.training.settings import Settings
from retmask_jax.utils.array_types import Tokens

_OF_PAIRS = ("reward_chosen", "reward_rejected", "margin", "accuracy")


def part_loss(
    config: ModelConfig,
    settings: Settings,
    params: PyTree,
    batch: Mapping[str, jax.Array],
    ablated: Masks | None = None,
) -> tuple[Float32[jax.Array, ""], dict[str, Float32[jax.Array, ""]]]:
    """Returns (loss, metrics) of some pairs, computed in settings.compute_dtype.

    Args:
        config: Config of the model, with adapters if they are trained.
        batch: n pairs as `PairRows.forked` gives them, or for other objectives than "dpo" `PairRows.chosen`, weight f32[n]
            and, if the loss has a reference, its log-probabilities of both answers, reference f32[n,2].
        ablated: The masks of the objective "contrast".

    Returns:
        The loss and each metric as sums over the pairs, each pair's value times its weight.
    """
    params = jax.tree.map(lambda x: x.astype(settings.compute_dtype), params)
    weight = batch["weight"]
    if settings.objective == "dpo":
        losses, values = _preference(config, settings, params, batch)
        return jnp.sum(weight * losses), {name: jnp.sum(weight * values[name]) for name in _OF_PAIRS}
    rows = batch["tokens"], batch["counted"]
    if settings.objective == "sft":
        losses = -sequence_logprobs(config, params, *rows, remat=settings.remat)
    else:
        assert ablated is not None, "the objective contrast needs masks"
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
    """Returns for each row the sum of `losses.contrast_loss` between the model and itself under masks.

    Arguments and errors are those of `sequence_logprobs`; the sum runs over the counted positions. It is differentiable
    with respect to params, and the masked pass takes no gradient.
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
    """Returns the names of the metrics of `part_loss`, the loss first."""
    return ("loss", *(_OF_PAIRS if settings.objective == "dpo" else ()))


def pair_logprobs(
    config: ModelConfig, params: PyTree, batch: Mapping[str, jax.Array], *, remat: bool = False
) -> Float32[jax.Array, "n 2"]:
    """Returns log-probabilities of chosen and rejected answers in nats; the prompt of a pair is computed once."""
    prompts, answers = (batch["prompts"], batch["lengths"]), (batch["answers"], batch["counted"])
    return branch_logprobs(config, params, *prompts, *answers, longest=jnp.max(batch["longest"]), remat=remat)


def _preference(config, settings, params, batch):
    """(loss, metrics) by pair, f32[n] each."""
    sums_N2 = pair_logprobs(config, params, batch, remat=settings.remat)
    counts_N2 = jnp.maximum(1, batch["counted"].sum(axis=2))
    divisor = counts_N2 if settings.averages else 1
    chosen, rejected = (sums_N2 / divisor).T
    reference = (batch["reference"] / divisor).T if settings.has_reference else (0.0, 0.0)
    losses = dpo_loss(
        chosen,
        rejected,
        *reference,
        beta=settings.beta,
        kind=settings.loss,
        label_smoothing=settings.label_smoothing,
        gamma=settings.gamma,
    )
    losses += settings.nll_weight * (-sums_N2 / counts_N2)[:, 0]
    good, bad = settings.beta * (chosen - reference[0]), settings.beta * (rejected - reference[1])
    return losses, {"reward_chosen": good, "reward_rejected": bad, "margin": good - bad, "accuracy": good > bad}
