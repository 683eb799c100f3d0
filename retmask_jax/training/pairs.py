"""Contrastive responses: the model's answer against that of an ablated model or prompt (arXiv 2601.11020)."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from retmask_jax.data.pair_formats import SIDES
from retmask_jax.data.prompter import Prompter
from retmask_jax.generation.continuous import Request, generate_stream
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import NO_STOP
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.store import Key

KEPT = "kept"
OUTCOMES = (KEPT, "empty", "identical")
_AT_ONCE = 1024  # prompts per call of a tokenizer, which returns far more than their tokens

Variant = tuple[int, str]  # training seed and name of who answers
StoredAnswer = tuple[Key, dict[str, Any]]  # key and value of an answer in the store


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A conversation for one variant to answer. `draw` is the seed of the answer's random draws."""

    variant: Variant
    id: str | int
    messages: Sequence[Mapping[str, str]]
    tokens: Sequence[int]
    draw: int

    @property
    def key(self) -> tuple[int, str, str | int]:
        """Key of the answer in the store."""
        return (*self.variant, self.id)


def answer(text: str, finished: bool, tokens: int, stop: int | None = None) -> dict[str, Any]:
    """Returns an answer as it is stored.

    Args:
        text: What was answered.
        finished: Whether the answer ended by itself instead of being cut off.
        tokens: The number of its tokens.
        stop: The id that ended it, where one did and is known.
    """
    record = {"text": text, "finished": finished, "tokens": tokens}
    return record if stop is None else record | {"stop": stop}


def usable(
    prompter: Prompter, prompts: Sequence[dict], messages_keys: Sequence[str], max_tokens: int
) -> tuple[list[int], dict[str, list[list[int]]]]:
    """Selects the prompts that fit into the model's context.

    Args:
        messages_keys: Fields of a record that hold the conversations to be asked.
        max_tokens: Longest conversation; a prompt with a longer one is left out.

    Returns:
        The indices of the prompts that fit, and {field: tokens of each of these prompts}.

    Raises:
        ValueError: No prompt fits.
    """
    tokens = {key: _encode(prompter, [prompt[key] for prompt in prompts]) for key in messages_keys}
    numbers = [i for i in range(len(prompts)) if max(len(rows[i]) for rows in tokens.values()) <= max_tokens]
    if not numbers:
        raise ValueError(
            f"each of {len(prompts)} prompts has more than {max(max_tokens, 0)} tokens, which the model's context leaves "
            "besides pairs.max_new_tokens: take shorter prompts or fewer new tokens"
        )
    return numbers, {key: [rows[i] for i in numbers] for key, rows in tokens.items()}


def draws(seed: int, stream: int, n: int) -> np.ndarray:
    """Returns the seeds u32[n] of the draws for n prompts. Each stream has other seeds; the first ones do not depend
    on n."""
    return np.random.SeedSequence([seed, stream]).generate_state(n)


def sample(
    lm: LanguageModel,
    questions: Sequence[Question],
    masks: Mapping[Variant, Interventions],
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int | None,
) -> Iterator[StoredAnswer]:
    """Yields (key, answer) for each question, in the order in which the answers finish.

    All variants share batches. An answer depends on its question alone, not on what else is asked (up to rounding,
    where another batch is padded to another length).

    Args:
        masks: {variant: interventions under which it answers}.
        batch_size: Rows of a batch; None for as many as fit into the memory.
    """
    places = {variant: place for place, variant in enumerate(masks)}
    requests = [Request(q.tokens, places[q.variant], q.draw) for q in questions]
    stream = generate_stream(
        lm.config,
        lm.params,
        requests,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        masks=list(masks.values()),
        what="sample",
    )
    for i, result in stream:
        tokens, stop = np.asarray(result.tokens), int(np.asarray(result.stops))
        text, n = lm.tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)
        finished, stop = n < max_new_tokens, None if stop == NO_STOP else stop
        yield questions[i].key, answer(text, finished, n, stop)


def make_pairs(
    prompts: Iterable[dict], chosen: Iterable[dict], rejected: Iterable[dict], counts: collections.Counter
) -> Iterator[dict]:
    """Yields a record {id, messages, chosen, ...} for each pair of answers that differ and are not empty.

    Args:
        chosen: For each prompt its chosen answer, as stored.
        rejected: For each prompt its rejected answer.
        counts: Counts all pairs by OUTCOMES.
    """
    for prompt, good, bad in zip(prompts, chosen, rejected, strict=True):
        outcome = _outcome(good["text"], bad["text"])
        counts[outcome] += 1
        if outcome == KEPT:
            yield _record(prompt, good, bad)


def make_demonstrations(prompts: Iterable[dict], chosen: Iterable[dict], counts: collections.Counter) -> Iterator[dict]:
    """Yields the model's answers as records for supervised training, in which rejected repeats chosen and is not
    used."""
    for prompt, good in zip(prompts, chosen, strict=True):
        counts[KEPT if good["text"].strip() else "empty"] += 1
        if good["text"].strip():
            yield _record(prompt, good, good)


def _encode(prompter: Prompter, conversations: Sequence) -> list[list[int]]:
    rows = []
    for start in range(0, len(conversations), _AT_ONCE):
        part = conversations[start : start + _AT_ONCE]
        rows += prompter.encode_many([prompter.render_messages(messages) for messages in part])
    return rows


def _outcome(good: str, bad: str) -> str:
    if not good.strip() or not bad.strip():
        return "empty"
    return "identical" if good == bad else KEPT


def _record(prompt: dict, good: dict, bad: dict) -> dict:
    stops = {
        f"{side}_stop": answer["stop"] for side, answer in zip(SIDES, (good, bad), strict=True) if "stop" in answer
    }
    return {
        "id": prompt["id"],
        "messages": prompt["messages"],
        "chosen": good["text"],
        "chosen_finished": good["finished"],
        "rejected": bad["text"],
        "rejected_finished": bad["finished"],
    } | stops
