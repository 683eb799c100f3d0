"""The arms, one entry of `ARMS` each: what is trained, and on which answers."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from retmask_jax.heads.knockout import activity_matched
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head, layer_matched, random_heads


@dataclasses.dataclass(frozen=True)
class Given:
    """What the heads of an arm are chosen from: the retrieval heads, the activity of all heads, which is measured when first
    asked for, and the training seed."""

    config: ModelConfig
    heads: list[Head]
    activity: Callable[[], Float[np.ndarray, "L H"]]
    seed: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """A variant of the model, or of the prompts, that answers.

    Attributes:
        name: Under which its answers are stored.
        stream: Number of its random draws, so that its answers are the same whichever arms are trained.
        heads: Chooses the heads that are masked while it answers; None: the model is not masked.
        messages: The key of the prompts that it answers.
        server: Its name in `pairs.endpoints`; None: "NAME-SEED", since its heads differ between seeds.
    """

    name: str
    stream: int
    heads: Callable[[Given], list[Head]] | None = None
    messages: str = "messages"
    server: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train. The chosen answers are always those of the normal model.

    Attributes:
        label: The answers it is trained on, in words.
        colour: Of the arm in every picture.
        rejected: Who gives its rejected answers; None: it needs only the chosen ones.
        objective: As of `training.settings.Settings`.
        heads: Which heads are trained, in the words of `train.heads`; None: those that `train.heads` says.
    """

    label: str
    colour: str
    rejected: Answers | None = None
    objective: str = "dpo"
    heads: str | None = None


NORMAL = Answers("normal", 0, server="normal")
_RETMASK = Answers("retmask", 1, lambda given: given.heads, server="retmask")


def _random(given: Given) -> list[Head]:
    return random_heads(given.config, n=len(given.heads), seed=given.seed)


def _any_layer(given: Given) -> list[Head]:
    return random_heads(given.config, n=len(given.heads), exclude=given.heads, seed=given.seed)


def _layer_matched(given: Given) -> list[Head]:
    return layer_matched(given.config, given.heads, given.seed)


def _activity_matched(given: Given) -> list[Head]:
    return activity_matched(given.heads, given.activity(), seed=given.seed)


ARMS = {
    "retmask": Arm(
        label="normal answers rather than those with the retrieval heads masked", colour="#D55E00", rejected=_RETMASK
    ),
    "retmask_retrieval": Arm(
        label="as retmask, with the retrieval heads alone trained",
        colour="#882255",
        rejected=_RETMASK,
        heads="retrieval",
    ),
    "retmask_others": Arm(
        label="as retmask, with all other heads trained instead of the retrieval heads",
        colour="#999933",
        rejected=_RETMASK,
        heads="others",
    ),
    "retmask_matched": Arm(
        label="as retmask, with as many other heads as there are retrieval heads alone trained, of the same layers",
        colour="#44AA99",
        rejected=_RETMASK,
        heads="matched",
    ),
    "random": Arm(
        label="normal answers rather than those with as many heads masked, drawn from all heads",
        colour="#56B4E9",
        rejected=Answers("random", 6, _random),
    ),
    "any_layer": Arm(
        label="normal answers rather than those with as many other heads masked, of any layer",
        colour="#56B4E9",
        rejected=Answers("any_layer", 3, _any_layer),
    ),
    "layer_matched": Arm(
        label="normal answers rather than those with as many other heads masked, of the same layers",
        colour="#0072B2",
        rejected=Answers("layer_matched", 4, _layer_matched),
    ),
    "activity_matched": Arm(
        label="normal answers rather than those with as many other heads masked, of similar activity",
        colour="#009E73",
        rejected=Answers("activity_matched", 2, _activity_matched),
    ),
    "no_fact": Arm(
        label="normal answers rather than those to the prompt without the stated fact",
        colour="#CC79A7",
        rejected=Answers("no_fact", 5, messages="messages_without", server="normal"),
    ),
    "sft_filtered": Arm(
        label="normal answers alone, of the prompts that retmask keeps",
        colour="#E69F00",
        rejected=_RETMASK,
        objective="sft",
    ),
    "sft_unfiltered": Arm(label="normal answers alone", colour="#000000", objective="sft"),
    "contrast": Arm(
        label="normal answers, away from the predictions with the retrieval heads masked",
        colour="#8C510A",
        objective="contrast",
    ),
}


def answering(arms: Iterable[str]) -> list[Answers]:
    """Who answers each prompt for these arms: the normal model first, then the others in the order of `ARMS`."""
    wanted = {ARMS[name].rejected for name in arms}
    known = dict.fromkeys(arm.rejected for arm in ARMS.values() if arm.rejected is not None)
    return [NORMAL, *(answers for answers in known if answers in wanted)]
