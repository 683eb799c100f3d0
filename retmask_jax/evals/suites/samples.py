"""Samples that fill a length in the tokens of the model at hand, its greedy answers to them, and their scores."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from retmask_jax.data.prompter import Prompter
from retmask_jax.evals import scoring
from retmask_jax.evals.measured import Measured
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.progress import track
from retmask_jax.utils.store import Store

_FIRST_GUESS = 32  # units: a prompt that is cheap to tokenize, and enough to tell how long the others are


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample before its length is known.

    text(n): the user's message with n units of haystack (a sentence, a line, a word, ...); from `least` on, at which
    all references are in it, to `most` units. prefix: how the answer begins, behind the chat template. needles: parts of
    the message, each there once, whose places are wanted.
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
    """A prompt, what a right answer holds, and room for it.

    tokens: i32[prompt], the answer's prefix included. spans: token span [start, end) of each needle. units: of haystack
    in the prompt.
    """

    id: str
    tokens: np.ndarray
    references: tuple[str, ...]
    max_new_tokens: int
    spans: tuple[tuple[int, int], ...] = ()
    units: int = 0


def fill(
    prompter: Prompter, drafts: Sequence[Draft], length: int, max_new_tokens: int, what: str, *, whole: bool = False
) -> list[Sample]:
    """Each draft with as many units of haystack as leave room for max_new_tokens in `length` tokens, all that the model
    sees counted.

    whole: a draft may end before the length does. Raises ValueError where one has no room or, unless whole, too little
    haystack to be within a unit of the length.
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
    """The whole prompt with so many units, as the model sees it, before tokenization."""
    text = prompter.render_messages([{"role": "user", "content": draft.text(units)}])
    return text + (draft.prefix if text[-1:].isspace() or not draft.prefix else f" {draft.prefix}")


def most_units(size: Callable[[int], int], room: int, least: int, most: int, guess: int) -> int:
    """The most units in least..most with size(units) <= room, given size(least) <= room and a first guess.

    Each size is a tokenization of a whole prompt: nearly proportional, it is found by interpolation in a few steps, and
    every sixth one halves what is left.
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
    kept: Store | None = None,
    what: str = "answer",
) -> list[str]:
    """Greedy answers, without their prefix. Raises ValueError for samples of different max_new_tokens."""
    limits = {sample.max_new_tokens for sample in samples}
    if len(limits) != 1:
        raise ValueError(f"{what}: samples allow {sorted(limits)} new tokens; answer those of one limit at a time")
    return scoring.answers(
        lm,
        [sample.tokens for sample in samples],
        interventions,
        batch_size=batch_size,
        max_new_tokens=limits.pop(),
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
    **options,
) -> Measured:
    """score(answer, references) of each sample's answer; options of `answer`, further arguments as in `Measured`."""
    answers = answer(lm, samples, what=f"{suite} {task} {length}", **options)
    values = [score(said, sample.references) for said, sample in zip(answers, samples, strict=True)]
    ids = tuple(sample.id for sample in samples)
    return Measured(suite, task, metric, ids, np.array(values, float), binary, length)


def check_lengths(lm: LanguageModel, lengths: Sequence[int], what: str) -> None:
    """Raise ValueError where a length exceeds the model's context."""
    longest = max(lengths, default=0)
    if longest > lm.config.max_length:
        raise ValueError(
            f"{what} needs {longest} tokens, the model's context is {lm.config.max_length}: shorten its lengths"
        )


def places(rng: np.random.Generator, n: int) -> np.ndarray:
    """f64[n], ascending, uniform in [0, 1): where n needles stand in a haystack of any size."""
    return np.sort(rng.random(n))


def planted(hay: list[str], needles: Sequence[str], places_N: np.ndarray) -> list[str]:
    """The haystack with each needle behind the share places_N of its units."""
    hay, units = list(hay), len(hay)
    for place, needle in reversed(list(zip(places_N, needles, strict=True))):
        hay.insert(int(place * (units + 1)), needle)
    return hay


def in_words(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _units(prompter: Prompter, draft: Draft, length: int, max_new_tokens: int, what: str, guess: int) -> int:
    """Units of haystack that fit; the number that fits a draft is a good guess for the next."""
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
    """Units that should fill the room, on the line from the most that fit to the fewest that do not, or where those are
    not known to the next fewer ones."""
    other = high if high in sizes else max(units for units in sizes if units < low)
    slope = (sizes[other] - sizes[low]) / (other - low)
    return low + int((room - sizes[low]) / max(slope, 1e-3))


def _sample(prompter: Prompter, draft: Draft, units: int, max_new_tokens: int) -> Sample:
    text = prompt_text(prompter, draft, units)
    tokens, offsets = prompter.encode(text)
    offsets_T2 = np.array(offsets)
    spans = tuple(_span(text, offsets_T2, needle) for needle in draft.needles)
    return Sample(draft.id, np.array(tokens, np.int32), draft.references, max_new_tokens, spans, units)


def _span(text: str, offsets_T2: np.ndarray, needle: str) -> tuple[int, int]:
    """Token span of a needle; ValueError where a template has changed its text."""
    first = text.find(needle)
    if first < 0:
        raise ValueError(
            f"the chat template changes the text {needle[:60]!r}: use another, or set the config key chat to False"
        )
    inside = np.flatnonzero((offsets_T2[:, 0] < first + len(needle)) & (offsets_T2[:, 1] > first))
    return int(inside[0]), int(inside[-1]) + 1
