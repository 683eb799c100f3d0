"""Samples that fill a length in the tokens of any model, the model's greedy answers to them, and their scores."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Int32

from retmask_jax.data.prompter import Prompter
from retmask_jax.evals import scoring
from retmask_jax.evals.measured import Measured
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.progress import track
from retmask_jax.utils.store import Store

_FIRST_GUESS = 32  # units; such a prompt is cheap to tokenize, and its length lets those of others be estimated


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample whose length is not fixed yet.

    Attributes:
        text: text(n) is the user's message with n units of haystack: a sentence, a line, a word, ...
        most: The most units.
        least: The fewest units; with these all references are in the text.
        prefix: The beginning of the answer, which follows the chat template.
        needles: Parts of the message, each in it once, whose token spans are wanted.
    """

    id: str
    text: Callable[[int], str]
    references: tuple[str, ...]
    most: int
    least: int = 0
    prefix: str = ""
    needles: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A prompt, the references that a right answer has in its text, and the room for an answer.

    Attributes:
        tokens: The prompt, including the answer's prefix.
        spans: Token span [start, end) of each needle.
        units: Units of haystack in the prompt.
    """

    id: str
    tokens: Int32[np.ndarray, " T"]
    references: tuple[str, ...]
    max_new_tokens: int
    spans: tuple[tuple[int, int], ...] = ()
    units: int = 0


def fill(
    prompter: Prompter, drafts: Sequence[Draft], length: int, max_new_tokens: int, what: str, *, whole: bool = False
) -> list[Sample]:
    """Gives each draft as much haystack as leaves room for max_new_tokens in `length` tokens.

    Args:
        length: The most tokens of a prompt with its answer, the chat template included.
        max_new_tokens: The longest answer.
        what: The suite and task, for messages and the progress bar.
        whole: Whether a sample with all units of its draft may be shorter than `length` by more than one unit.

    Raises:
        ValueError: A draft has no room or, unless `whole`, too little haystack.
    """
    samples, guess = [], _FIRST_GUESS
    for draft in track(drafts, len(drafts), f"{what}: prompts of {length} tokens", "prompt"):
        units = guess = _units(prompter, draft, length, max_new_tokens, what, draft.most if whole else guess)
        if units == draft.most and not whole:
            raise ValueError(
                f"{what}: all {units} units of haystack do not fill {length} tokens: give a longer text or "
                "shorter lengths"
            )
        samples.append(_sample(prompter, draft, units, max_new_tokens))
    return samples


def prompt_text(prompter: Prompter, draft: Draft, units: int) -> str:
    """Returns the whole prompt with `units` units of haystack, before tokenization."""
    text = prompter.render_messages([{"role": "user", "content": draft.text(units)}])
    return text + (draft.prefix if text[-1:].isspace() or not draft.prefix else f" {draft.prefix}")


def most_units(size: Callable[[int], int], room: int, least: int, most: int, guess: int) -> int:
    """Finds the most units in least..most with size(units) <= room, given size(least) <= room and a first guess.

    A size is the tokenization of a whole prompt. Sizes are nearly proportional to units, so a few steps of
    interpolation find the number; every sixth step bisects instead.
    """
    low, high, sizes = least, most + 1, {least: size(least)}
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        sizes[guess] = size(guess)
        low, high = (guess, high) if sizes[guess] <= room else (low, guess)
        halve = len(sizes) % 6 == 0 and high <= most
        guess = (low + high) // 2 if halve else _interpolated(sizes, low, high, room)
    return low


def answer(
    lm: LanguageModel,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    interventions: Interventions | None = None,
    contrast: ContrastDecoding | None = None,
    kept: Store | None = None,
    what: str = "answer",
) -> list[str]:
    """Returns the greedy answers, without their prefixes; options as of `scoring.answered`.

    Raises:
        ValueError: Samples have different max_new_tokens.
    """
    limits = {sample.max_new_tokens for sample in samples}
    if len(limits) != 1:
        raise ValueError(f"{what}: samples allow {sorted(limits)} new tokens; answer those of one limit at a time")
    return scoring.answers(
        lm,
        [sample.tokens for sample in samples],
        interventions,
        batch_size=batch_size,
        max_new_tokens=limits.pop(),
        contrast=contrast,
        kept=kept,
        what=what,
    )


def measure(
    lm: LanguageModel,
    samples: Sequence[Sample],
    score: Callable[[str, tuple[str, ...]], float],
    *,
    suite: str,
    task: str,
    metric: str,
    binary: bool,
    length: int,
    **options: Any,
) -> Measured:
    """Measures score(answer, references) of each sample; options as of `answer`, other arguments as of `Measured`."""
    answers = answer(lm, samples, what=f"{suite} {task} {length}", **options)
    values = [score(said, sample.references) for said, sample in zip(answers, samples, strict=True)]
    ids = tuple(sample.id for sample in samples)
    return Measured(suite, task, metric, ids, np.array(values, float), binary, length)


def contained_share(answer: str, references: Sequence[str]) -> float:
    """Returns the share of the references that are in the answer, in upper or lower case."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def check_lengths(max_length: int, lengths: Sequence[int], what: str) -> None:
    """Raises ValueError if a length exceeds the model's context of max_length tokens."""
    longest = max(lengths, default=0)
    if longest > max_length:
        raise ValueError(f"{what} needs {longest} tokens, the model's context is {max_length}: shorten its lengths")


def places(rng: np.random.Generator, n: int) -> Float64[np.ndarray, " N"]:
    """Draws places of n needles in a haystack of any size: uniform in [0, 1), in ascending order."""
    return np.sort(rng.random(n))


def planted(hay: list[str], needles: Sequence[str], places_N: Float64[np.ndarray, " N"]) -> list[str]:
    """Returns the haystack with each needle after the share places_N of its units."""
    hay, units = list(hay), len(hay)
    for place, needle in reversed(list(zip(places_N, needles, strict=True))):
        hay.insert(int(place * (units + 1)), needle)
    return hay


def in_words(items: Sequence[str]) -> str:
    """Returns "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _units(prompter: Prompter, draft: Draft, length: int, max_new_tokens: int, what: str, guess: int) -> int:
    """Returns how many units of haystack fit. The number that fits the previous draft is a good guess."""
    room = length - max_new_tokens

    def tokens(units: int) -> int:
        return prompter.count(prompt_text(prompter, draft, units))

    least = tokens(draft.least)
    if least > room:
        raise ValueError(
            f"{what}: {length} tokens, {max_new_tokens} of them new, have no room for the {least} that a prompt "
            "has without haystack: take longer lengths"
        )
    return most_units(tokens, room, draft.least, draft.most, guess)


def _interpolated(sizes: dict[int, int], low: int, high: int, room: int) -> int:
    """Returns the units that should fill the room, on the line through the most that fit (low) and the fewest that do
    not (high); while no size above low is known, through low and the next fewer units."""
    other = high if high in sizes else max(units for units in sizes if units < low)
    slope = (sizes[other] - sizes[low]) / (other - low)
    return low + int((room - sizes[low]) / max(slope, 1e-3))


def _sample(prompter: Prompter, draft: Draft, units: int, max_new_tokens: int) -> Sample:
    text = prompt_text(prompter, draft, units)
    tokens, offsets = prompter.encode(text)
    offsets_T2 = np.array(offsets)
    spans = tuple(_span(text, offsets_T2, needle) for needle in draft.needles)
    return Sample(draft.id, np.array(tokens, np.int32), draft.references, max_new_tokens, spans, units)


def _span(text: str, offsets_T2: Int[np.ndarray, "T 2"], needle: str) -> tuple[int, int]:
    """Returns the token span of a needle; raises ValueError if the chat template changed its text."""
    first = text.find(needle)
    if first < 0:
        raise ValueError(
            f"the chat template changes the text {needle[:60]!r}: use another, or set the config key chat to False"
        )
    inside = np.flatnonzero((offsets_T2[:, 0] < first + len(needle)) & (offsets_T2[:, 1] > first))
    return int(inside[0]), int(inside[-1]) + 1
