"""Losses over sequence log-probabilities, and over pairs of next-token distributions, as pure functions."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

_Pairs = Float[jax.Array, " pairs"]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A preference loss: one entry of LOSSES.

    Attributes:
        of: of(good, bad, beta, **options) gives the losses, f32[pairs], of the log-probabilities of chosen and rejected
            answers, f32[pairs]; where the loss has a reference, the reference's are subtracted before.
        options: Which of label_smoothing and gamma `of` takes.
        reference: Whether the loss compares with a reference model.
        per_token: Whether `of` takes log-probabilities per token of the answer instead of their sum.
    """

    of: Callable[..., jax.Array]
    options: tuple[str, ...] = ()
    reference: bool = True
    per_token: bool = False


def dpo_loss(
    chosen: Float[ArrayLike, " pairs"],
    rejected: Float[ArrayLike, " pairs"],
    ref_chosen: Float[ArrayLike, " pairs"] | None,
    ref_rejected: Float[ArrayLike, " pairs"] | None,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Float[jax.Array, " pairs"]:
    """Returns a preference loss on log-probabilities of the model and of the reference, a value for each pair.

    With h = (chosen - ref_chosen) - (rejected - ref_rejected), the kinds are
    "sigmoid", -log sigmoid(beta h): DPO (arXiv 2305.18290, eq. 7);
    "ipo",     (h - 1 / (2 beta))^2: IPO (arXiv 2310.12036, eq. 17);
    "hinge",   max(0, 1 - beta h): the hinge loss of SLiC on the same h (arXiv 2309.06657);
    "simpo",   -log sigmoid(beta (chosen - rejected) - gamma): SimPO (arXiv 2405.14734, eq. 6). It has no reference, so
               ref_chosen and ref_rejected are not used (None will do), and takes log-probabilities per token.

    Args:
        chosen: Log-probabilities of the chosen answers under the model, in nats.
        rejected: Those of the rejected answers.
        ref_chosen: Log-probabilities of the chosen answers under the reference.
        ref_rejected: Those of the rejected answers.
        beta: Strength of the preference, more than 0.
        kind: A name in LOSSES.
        label_smoothing: Assumed share of pairs whose preference is the wrong way round, from 0 to less than 0.5; for
            "sigmoid" and "simpo".
        gamma: Margin by which a chosen answer must win; for "simpo".

    Raises:
        ValueError: The kind is unknown, an option is out of range or not one of this kind, or a reference is missing.

    >>> import jax.numpy as jnp, retmask_jax as rm
    >>> chosen, rejected, start = jnp.array([-1.0, -2.0]), jnp.array([-3.0, -2.0]), jnp.array([-2.0, -2.0])
    >>> loss = rm.dpo_loss(chosen, rejected, ref_chosen=start, ref_rejected=start, beta=0.5)  # h is 2 and 0
    >>> [f"{x:.3f}" for x in loss]
    ['0.313', '0.693']
    """
    check_loss(kind, beta, label_smoothing, gamma)
    loss, given = LOSSES[kind], {"label_smoothing": label_smoothing, "gamma": gamma}
    good, bad = cast(Any, chosen), cast(Any, rejected)  # ArrayLike has no arithmetic for type checkers
    if loss.reference:
        if ref_chosen is None or ref_rejected is None:
            raise ValueError(f"{kind} compares with a reference: give ref_chosen and ref_rejected")
        good, bad = good - ref_chosen, bad - ref_rejected
    return loss.of(good, bad, beta, **{name: given[name] for name in loss.options})


def check_loss(kind: str, beta: float, label_smoothing: float, gamma: float) -> None:
    """Raises ValueError for an unknown kind of loss, and for an option that is out of range or not one of this kind."""
    if kind not in LOSSES:
        raise ValueError(f"kind of loss is {kind!r}; it must be one of {', '.join(LOSSES)}")
    options = LOSSES[kind].options
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be more than 0")
    if label_smoothing and "label_smoothing" not in options:
        raise ValueError(f"label_smoothing is {label_smoothing}, which {kind} does not have: set it to 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and less than 0.5")
    if gamma and "gamma" not in options:
        having = ", ".join(name for name, loss in LOSSES.items() if "gamma" in loss.options)
        raise ValueError(f"gamma is {gamma}, which only {having} has, not {kind}: set it to 0")


def contrast_loss(
    normal_BTV: Float[jax.Array, "B T V"], ablated_BTV: Float[jax.Array, "B T V"], strength: float
) -> Float[jax.Array, "B T"]:
    """Returns how far the model's next-token distribution is from the one that the contrast with the masked model asks
    for.

    This goes beyond the papers. RetMask samples an answer y
    of the normal model p and a rejected one of the ablated model q, and DPO fits their preference. A pair (y from p,
    y' from q) is that way round with odds p(y) q(y') / (q(y) p(y')), so the reward that explains all pairs best is
    r = log p/q, and DPO's optimum is p (p/q)^(1/beta) up to a constant (arXiv 2305.18290, eq. 4). Both distributions
    are known token by token, so nothing needs to be sampled from q: the target of a token is t = p (p/q)^strength up to
    a constant, strength in the place of 1/beta, and the loss is KL(t, p) with t held fixed. Its gradient, for a small
    strength, is that of -strength E_p[log p/q] with log p/q held fixed: the expected reward, without its variance over
    samples. p and q are those of the weights at hand; there is no reference, so learning rate and number of steps limit
    how far the model moves.

    Args:
        normal_BTV: Logits of the model.
        ablated_BTV: Logits of the same model with heads masked.
        strength: Exponent of p/q in the target.

    Returns:
        KL(t, p) in nats, for each position.
    """
    normal, ablated = (jax.nn.log_softmax(x, axis=-1) for x in (normal_BTV, jax.lax.stop_gradient(ablated_BTV)))
    start = jax.lax.stop_gradient(normal)
    target = jax.nn.log_softmax(start + strength * (start - ablated), axis=-1)
    return jnp.sum(jnp.exp(target) * (target - normal), axis=-1)


def _sigmoid(good: _Pairs, bad: _Pairs, beta: float, label_smoothing: float) -> _Pairs:
    return _wrong_by(beta * (good - bad), label_smoothing)


def _ipo(good: _Pairs, bad: _Pairs, beta: float) -> _Pairs:
    return jnp.square(good - bad - 1 / (2 * beta))


def _hinge(good: _Pairs, bad: _Pairs, beta: float) -> _Pairs:
    return jax.nn.relu(1 - beta * (good - bad))


def _simpo(good: _Pairs, bad: _Pairs, beta: float, label_smoothing: float, gamma: float) -> _Pairs:
    return _wrong_by(beta * (good - bad) - gamma, label_smoothing)


def _wrong_by(logit: _Pairs, share: float) -> _Pairs:
    """-log sigmoid(logit), where the preference of a share of the pairs is assumed to be the wrong way round."""
    return -(1 - share) * jax.nn.log_sigmoid(logit) - share * jax.nn.log_sigmoid(-logit)


LOSSES = {
    "sigmoid": Loss(_sigmoid, ("label_smoothing",)),
    "ipo": Loss(_ipo),
    "hinge": Loss(_hinge),
    "simpo": Loss(_simpo, ("label_smoothing", "gamma"), reference=False, per_token=True),
}
