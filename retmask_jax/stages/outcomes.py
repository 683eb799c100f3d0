"""A task's answers under conditions, counted as right or wrong, for all stages that measure answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64

from retmask_jax.data.needles import Case
from retmask_jax.evals.perplexity import Windows, losses_under
from retmask_jax.evals.scoring import mask_hash
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.heads import knockout
from retmask_jax.heads.conditions import Condition, answers, hits
from retmask_jax.model.interventions import all_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import SHOWN
from retmask_jax.runs.workdir import Example
from retmask_jax.utils.store import Store, request_key

FROM_MEMORY = ": from memory"  # what the name of a task ends with where answers from the model's memory are counted


def check_choices(name: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError unless the choices begin with the first known one and all of them are known."""
    if not chosen or chosen[0] != known[0] or not set(chosen) <= set(known):
        raise ValueError(
            f"{name} is {tuple(chosen)}; it must begin with {known[0]}, and may have {', '.join(known[1:])}"
        )


@dataclasses.dataclass(frozen=True)
class Answered:
    """What became of the cases of some tasks under conditions.

    Attributes:
        outcomes: Right or wrong, by task. Where all needles of a task say what the model remembers instead, answers from
            memory are counted as another task.
        cases: By task.
        texts: The answers [condition][case] by task.
    """

    outcomes: dict[str, Bool[np.ndarray, "conditions cases"]] = dataclasses.field(default_factory=dict)
    cases: dict[str, list[Case]] = dataclasses.field(default_factory=dict)
    texts: dict[str, list[list[str]]] = dataclasses.field(default_factory=dict)

    def examples(self, conditions: Mapping[str, int]) -> list[Example]:
        """The first cases of the first task with a context, as answered under conditions, {name to show: place}."""
        with_context = [task for task, cases in self.cases.items() if cases[0].statement != (0, 0)]
        return [
            Example.of(case.needle, {name: self.texts[task][place][i] for name, place in conditions.items()})
            for task in with_context[:1]
            for i, case in enumerate(self.cases[task][:SHOWN])
        ]


def task_outcomes(
    context: Context, tasks: Sequence[str], conditions: Sequence[Condition], contrast: ContrastDecoding | None = None
) -> Answered:
    """Answers the cases of tasks under conditions; contrast: as of `conditions.answers`."""
    answered = Answered()
    for task in tasks:
        cases = answered.cases[task] = context.cases(task)
        texts = answered.texts[task] = task_answers(context, task, cases, conditions, contrast)
        answered.outcomes[task] = np.stack([hits(text, cases) for text in texts])
        if all(case.needle.memory for case in cases):
            answered.outcomes[task + FROM_MEMORY] = np.stack([hits(text, cases, "memory") for text in texts])
    return answered


def task_answers(
    context: Context,
    task: str,
    cases: Sequence[Case],
    conditions: Sequence[Condition],
    contrast: ContrastDecoding | None = None,
) -> list[list[str]]:
    """The model's answers [condition][case] to the cases of a task; contrast: as of `conditions.answers`.

    Answers are kept in the work directory as they come, so that a stage that was interrupted goes on.
    """
    config, new = context.lm.config, context.config.tasks[task].max_new_tokens
    masks = [condition.interventions for condition in conditions]
    hashes = [mask_hash(config, mask, contrast) for mask in masks]
    keys = {
        (m, c): request_key("answer", case.tokens, mask=of_mask, max_new_tokens=new)
        for m, of_mask in enumerate(hashes)
        for c, case in enumerate(cases)
    }
    with Store(kept_in(context, "answers")) as kept:
        return answers(
            context.lm,
            cases,
            masks,
            max_new_tokens=new,
            batch_size=context.config.batch_size,
            contrast=contrast,
            known={place: kept[key] for place, key in keys.items() if key in kept},
            done=lambda place, tokens: kept.add(keys[place], tokens),
            what=task,
        )


def head_activity(context: Context) -> Float32[np.ndarray, "L H"]:
    """`knockout.activity` on the first `knockout.activity_windows` texts; kept as answers are, each head as it comes.

    Weights are not loaded where all of it is kept.
    """
    rows = context.windows()[: context.config.knockout.activity_windows].tolist()
    heads = all_heads(context.outline.config)
    keys = {(text, head): request_key("activity", row, head=head) for text, row in enumerate(rows) for head in heads}
    with Store(kept_in(context, "activity")) as kept:
        known = {place: kept[key] for place, key in keys.items() if key in kept}
        return knockout.activity(
            context.outline if len(known) == len(keys) else context.lm,
            rows,
            batch_size=context.config.batch_size,
            known=known,
            done=lambda place, total: kept.add(keys[place], total),
        )


def text_losses(
    context: Context, windows: Windows, conditions: Sequence[Condition]
) -> Float64[np.ndarray, "conditions windows"]:
    """The loss of each window of text under conditions, in nats per token; kept as answers are."""
    masks = [condition.interventions for condition in conditions]
    hashes = [mask_hash(context.lm.config, mask) for mask in masks]
    keys = {
        (m, w): request_key("text loss", window, mask=of_mask)
        for m, of_mask in enumerate(hashes)
        for w, window in enumerate(windows)
    }
    with Store(kept_in(context, "losses")) as kept:
        return losses_under(
            context.lm,
            windows,
            masks,
            batch_size=context.config.batch_size,
            known={place: kept[key] for place, key in keys.items() if key in kept},
            done=lambda place, loss: kept.add(keys[place], loss),
        )


def kept_in(context: Context, what: str) -> Path:
    """The folder of what is measured of a model, next to the stages; the RoPE base is not in the files of a model."""
    model = context.outline.config
    identity = [context.model_fingerprint, context.config.dtype, repr((model.rope, model.sliding_rope))]
    return context.measured(what, identity)


def mask_name(kind: str, how: str) -> str:
    """The name of a kind of mask, with how its heads are ablated unless they write zero."""
    return kind if how == "zero" else f"{kind}, {how}"
