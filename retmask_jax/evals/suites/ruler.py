"""The 13 tasks of RULER (arXiv 2404.06654), generated from the words of `words` and the user's texts.

Structure, sizes, answer prefixes and metrics are the paper's. Prompts and word lists are not, so scores are close to the
published ones, not equal. Needles in an essay are at any place, not at one of 40 depths, and a prompt is less than one
unit of haystack shorter than its length. The contents of a sample depend only on its seed and number, its size on the
tokenizer.
"""

import dataclasses
import functools
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from retmask_jax.data.prompter import Prompter
from retmask_jax.evals.measured import Measured
from retmask_jax.evals.suites.questions import Questions
from retmask_jax.evals.suites.samples import (
    Draft,
    Sample,
    check_lengths,
    contained_share,
    fill,
    in_words,
    measure,
    places,
    planted,
)
from retmask_jax.evals.suites.words import COMPOUNDS, NOISE, compound, word_order
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.store import Store


@dataclasses.dataclass(frozen=True)
class Material:
    """What a task is made of besides random numbers: the wanted length in tokens, the sentences of an essay, and
    questions; the latter are empty or None for tasks that do not need them."""

    length: int
    essay: Sequence[str] = ()
    questions: Questions | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of RULER.

    Attributes:
        draft: draft(rng, number of the sample, material) makes a Draft, whose id is set later.
        max_new_tokens: RULER's.
        any_reference: Whether one reference in the answer is enough. Otherwise the share of references in it counts.
        needs: The field of Material that the task needs.
    """

    draft: Callable[[np.random.Generator, int, Material], Draft]
    max_new_tokens: int
    any_reference: bool = False
    needs: str | None = None


def ruler_samples(
    task: str,
    prompter: Prompter,
    length: int,
    n: int,
    seed: int = 0,
    *,
    haystack: Sequence[str] | None = None,
    qa: Questions | None = None,
    first: int = 0,
) -> list[Sample]:
    """Makes samples first..first + n - 1 of a task, of `length` tokens as of `samples.fill`.

    Args:
        haystack: Sentences of an essay, which is repeated as needed.
        qa: Questions of qa_1 or qa_2.

    Raises:
        ValueError: The task is unknown, a text that it needs is not given, or the length has no room.
    """
    entry, material = _task(task), Material(length, haystack or (), qa)
    if entry.needs and not getattr(material, entry.needs):
        raise ValueError(f"RULER's {task} needs {_SOURCE[entry.needs]}")
    drafts = []
    for number in range(first, first + n):
        rng = np.random.default_rng([seed, zlib.crc32(task.encode()), number])
        drafts.append(dataclasses.replace(entry.draft(rng, number, material), id=f"{seed}-{number}"))
    return fill(prompter, drafts, length, entry.max_new_tokens, f"RULER {task}")


def score(task: str, answer: str, references: Sequence[str]) -> float:
    """Returns the share of references that are in the answer, in upper or lower case; for qa 1 if any is, else 0."""
    entry, share = _task(task), contained_share(answer, references)
    return float(share > 0) if entry.any_reference else share


def run_ruler(
    lm: LanguageModel,
    prompter: Prompter,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    n: int = 500,
    seed: int = 0,
    haystack: Sequence[str] | None = None,
    questions: Mapping[str, Questions] | None = None,
    batch_size: int = 1,
    interventions: Interventions | None = None,
    contrast: ContrastDecoding | None = None,
    kept: Store | None = None,
) -> list[Measured]:
    """Measures the string match of greedy answers, for each task and length; further options as of `scoring.answered`.

    Args:
        n: Samples of each task and length.
        haystack: Sentences of an essay.
        questions: Of qa_1 and qa_2, by task.

    Raises:
        ValueError: As of `ruler_samples`, or if a length exceeds the model's context; before anything is generated.
    """
    check_lengths(lm.config.max_length, lengths, "RULER")
    measured = []
    for task in tasks:
        for length in lengths:
            samples = ruler_samples(task, prompter, length, n, seed, haystack=haystack, qa=(questions or {}).get(task))
            binary = _task(task).any_reference or len(samples[0].references) == 1
            measured.append(
                measure(
                    lm,
                    samples,
                    functools.partial(score, task),
                    suite="ruler",
                    task=task,
                    metric="string match",
                    binary=binary,
                    length=length,
                    batch_size=batch_size,
                    interventions=interventions,
                    contrast=contrast,
                    kept=kept,
                )
            )
    return measured


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"RULER has no task {name!r}; it has {', '.join(TASKS)}")
    return TASKS[name]


# --- needles in a haystack ---


@dataclasses.dataclass(frozen=True)
class _Niah:
    """The tasks with needles in a haystack (hay: "noise", "essay" or "needles", which are needles with other keys).

    key and value are kinds of `_distinct`. There are `keys` keys with `values` values each; `asked` keys are asked for.
    """

    hay: str
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, rng: np.random.Generator, number: int, material: Material) -> Draft:
        names = _distinct(rng, self.key, self.keys)
        answers = _distinct(rng, self.value, self.keys * self.values)
        needles = [_needle(self.value, names[i // self.values], value) for i, value in enumerate(answers)]
        order, places_N = rng.permutation(len(needles)), places(rng, len(needles))
        asked = needles[: self.asked * self.values]  # their order in the text is random
        hay = self._hay(rng, material, names)
        kind, plural = f"{self.value}s", len(asked) > 1
        query = in_words(names[: self.asked])

        def text(units: int) -> str:
            lines = planted(hay(units), [needles[i] for i in order], places_N)
            context = (" " if self.hay == "essay" else "\n").join(lines)
            what = f"What are all the secret {kind}" if plural else f"What is the secret {self.value}"
            return (
                f"The text below hides {'some' if plural else 'one'} secret {kind if plural else self.value} that you have "
                f"to remember: you will be asked about it.\n{context}\n{what} for {query} stated in the text above?"
            )

        prefix = f"The secret {kind if plural else self.value} for {query} stated in the text above {'are' if plural else 'is'}"
        most = material.length  # a unit has at least one token
        return Draft("", text, tuple(answers[: len(asked)]), most, prefix=prefix, needles=tuple(asked))

    def _hay(self, rng: np.random.Generator, material: Material, names: Sequence[str]) -> Callable[[int], list[str]]:
        """Returns a function that gives the first n units of the haystack."""
        if self.hay == "noise":
            return lambda n: [NOISE] * n
        if self.hay == "essay":
            return lambda n: [material.essay[i % len(material.essay)] for i in range(n)]
        most = max(1, material.length // 8)  # a needle has more than 8 tokens
        others = [name for name in _distinct(rng, self.key, most) if name not in names]
        needles = [
            _needle(self.value, *pair) for pair in zip(others, _distinct(rng, self.value, len(others)), strict=True)
        ]
        return lambda n: needles[:n]


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the secret {kind}s for {key} is: {value}."


def _distinct(rng: np.random.Generator, kind: str, n: int) -> list[str]:
    """Draws n different words ("adjective-noun"), seven-digit numbers or UUIDs; of words at most all `COMPOUNDS`."""
    if kind == "word":
        return [compound(int(i)) for i in rng.permutation(COMPOUNDS)[:n]]
    if kind == "uuid":
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(n)]
    return [str(10**6 + i) for i in rng.choice(9 * 10**6, n, replace=False, shuffle=True)]


# --- tracing and counting ---


def _variable_tracking(rng: np.random.Generator, number: int, material: Material, hops: int = 4) -> Draft:
    """Drafts a chain of hops among noise, after a short example with its answer."""
    names = [_variables(rng, hops + 1, 5), _variables(rng, hops + 1, 3)]  # the example's are shorter, as in RULER
    values = [str(value) for value in rng.choice(90_000, 2, replace=False) + 10_000]
    chains = [_chain(*pair) for pair in zip(names, values, strict=True)]
    shown, asked = places(rng, hops + 1), places(rng, hops + 1)

    def question(units: int, i: int, places_N: np.ndarray) -> str:
        lines = planted([NOISE] * units, chains[i], places_N)
        return (
            "The text below hides assignments of variables. Remember them and follow them.\n\n"
            + "\n".join(lines)
            + f"\nQuestion: Which variables have the value {values[i]} by the text above? Name all of them."
        )

    def prefix(i: int) -> str:
        return f"Answer: Following the assignments in the text above, {hops + 1} variables have the value {values[i]}, namely:"

    example = f"{question(4, 1, shown)} {prefix(1)} {' '.join(names[1])}\n\n"
    return Draft(
        "",
        lambda n: example + question(n, 0, asked),
        tuple(names[0]),
        material.length,
        prefix=prefix(0),
        needles=tuple(chains[0]),
    )


def _variables(rng: np.random.Generator, n: int, letters: int) -> list[str]:
    """Draws n different names of variables."""
    names = dict.fromkeys("".join(row) for row in rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), (2 * n + 8, letters)))
    return list(names)[:n]


def _chain(names: Sequence[str], value: str) -> list[str]:
    """Returns statements that assign a value to the first name, and to each other name the name before it."""
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]


def _common_words(rng: np.random.Generator, number: int, material: Material, n_common: int = 10) -> Draft:
    """Drafts a list in which ten words occur more often than the others, after a short example with its answer.

    A unit is a word with all its occurrences. Counts are RULER's, which are smaller below 4096 tokens.
    """
    short = material.length < 4096
    often, rare = (6, 1) if short else (30, 3)
    shown_often, shown_rare, shown = (3, 1, 20) if short else (10, 3, 40)
    example_words = word_order(rng, n_common, shown - n_common)
    example_keys = rng.random(n_common * shown_often + (shown - n_common) * shown_rare)
    words = word_order(rng, n_common, material.length // rare)
    keys = rng.random(n_common * often + len(words[1]) * rare)

    def question(words, often: int, rare: int, keys) -> str:
        return (
            "A numbered list of words follows. Some of them occur more often than the others: remember those.\n"
            + _numbered(words, often, rare, keys)
            + f"\nQuestion: Which {n_common} words are the most common in the list above?"
        )

    prefix = f"Answer: The {n_common} words that occur most often in the list are:"
    example = question(example_words, shown_often, shown_rare, example_keys)
    example += f" {prefix} {_numbered((example_words[0], []), 1, 0, example_keys)}\n\n"

    def text(units: int) -> str:
        return example + question((words[0], words[1][:units]), often, rare, keys)

    return Draft("", text, tuple(words[0]), len(words[1]), prefix=prefix)


def _numbered(words: tuple[list[str], list[str]], often: int, rare: int, keys: np.ndarray) -> str:
    """Returns "1. this 2. that ...": the (common, other) words with their repeats, in the order of the keys."""
    entries = words[0] * often + [word for word in words[1] for _ in range(rare)]
    order = np.argsort(keys[: len(entries)], kind="stable")
    return " ".join(f"{place}. {entries[i]}" for place, i in enumerate(order, 1))


def _frequent_words(rng: np.random.Generator, number: int, material: Material, alpha: float = 2.0) -> Draft:
    """Drafts a text of random words whose frequencies follow a zeta distribution.

    The most frequent word is noise; the next three are asked for.
    """
    ranks = _zeta_order(material.length, alpha)
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), (2 * ranks.max() + 16, 6))
    words = np.array(["...", *dict.fromkeys("".join(word) for word in letters)])
    keys = rng.random(len(ranks))
    least = int(np.flatnonzero(ranks == 5)[0])  # all three occur, and more often than the next

    def text(units: int) -> str:
        context = " ".join(words[ranks[:units]][np.argsort(keys[:units], kind="stable")])
        return (
            "Read the coded text below and count how often each coded word occurs, to find the three most frequent ones. "
            f"{context}\nQuestion: Which three coded words occur most often in the text above? Leave the dots '...' out "
            "and explain nothing."
        )

    prefix = "Answer: By the coded text above, the three words that occur most often are:"
    return Draft("", text, tuple(map(str, words[1:4])), len(ranks), least, prefix)


@functools.lru_cache(maxsize=16)
def _zeta_order(n: int, alpha: float) -> Int[np.ndarray, " n"]:
    """Returns ranks (from 0) of the words of a text in the order in which it grows.

    Among the first m, rank r occurs about m (r + 1) ** -alpha / zeta(alpha) times, rounded down.
    """
    from scipy.special import zeta

    total = n + 8 * n**0.5 + 64  # the number lost by rounding down grows with the square root
    share_R = np.arange(1, int(total) + 1) ** -float(alpha) / zeta(alpha)
    count_R = (total * share_R).astype(int)
    ranks = np.repeat(np.arange(len(count_R)), count_R)
    nth = np.arange(len(ranks)) - np.repeat(np.cumsum(count_R) - count_R, count_R)
    return ranks[np.argsort((nth + 1) / share_R[ranks], kind="stable")][:n]


# --- questions on documents ---


def _questions(rng: np.random.Generator, number: int, material: Material) -> Draft:
    """Drafts a question, with its documents and others in random order. Questions are taken in turn, as in RULER."""
    assert material.questions is not None  # the task's `needs` says so
    asks, documents = material.questions.items, material.questions.documents
    asked = asks[number % len(asks)]
    own = list(asked.documents)
    near = [i for i in rng.permutation(np.array(asked.near, int)) if i not in own]
    far = rng.permutation(len(documents))
    order = list(dict.fromkeys([*own, *near, *far]))
    keys = rng.random(len(order))

    def text(units: int) -> str:
        shown = [order[i] for i in np.argsort(keys[: len(own) + units], kind="stable")]
        texts = "\n\n".join(f"Document {i}:\n{documents[j]}" for i, j in enumerate(shown, 1))
        task = "Answer the question from the documents. Give the answer alone, without any other words."
        return f"{task}\n\nThe documents:\n\n{texts}\n\n{task}\n\nQuestion: {asked.question}"

    needles = tuple(documents[i] for i in own)
    return Draft("", text, asked.answers, len(order) - len(own), prefix="Answer:", needles=needles)


_SOURCE = {
    "essay": "a text: set suites.ruler.essay to a file",
    "questions": "a file of questions: set suites.ruler.qa_1, qa_2",
}

TASKS = {
    "niah_single_1": Task(_Niah("noise"), 128),
    "niah_single_2": Task(_Niah("essay"), 128, needs="essay"),
    "niah_single_3": Task(_Niah("essay", value="uuid"), 128, needs="essay"),
    "niah_multikey_1": Task(_Niah("essay", keys=4), 128, needs="essay"),
    "niah_multikey_2": Task(_Niah("needles"), 128),
    "niah_multikey_3": Task(_Niah("needles", key="uuid", value="uuid"), 128),
    "niah_multivalue": Task(_Niah("essay", values=4), 128, needs="essay"),
    "niah_multiquery": Task(_Niah("essay", keys=4, asked=4), 128, needs="essay"),
    "vt": Task(_variable_tracking, 30),
    "cwe": Task(_common_words, 120),
    "fwe": Task(_frequent_words, 50),
    "qa_1": Task(_questions, 32, any_reference=True, needs="questions"),
    "qa_2": Task(_questions, 32, any_reference=True, needs="questions"),
}
