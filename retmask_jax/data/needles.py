"""Needle cases: a needle sentence in a haystack, a question, and the exact token span of the answer in the needle.

What a case is made of (`Spec`: order of the haystack, needle, depth, distractors) depends on the seed and never on a
tokenizer, so that all models get the same cases.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.answers import rouge_tokens
from retmask_jax.data.prompter import Prompter
from retmask_jax.utils.files import iter_records, read_text
from retmask_jax.utils.progress import track

_FIELDS = ("needle", "question", "answer", "key", "memory", "prefix")
_SENTENCE_END = re.compile(r"(?<=[.!?।॥۔؟])\s+|(?<=[。！？])\s*")  # also where no space follows


@dataclasses.dataclass(frozen=True)
class Needle:
    """A statement, the question that it answers, and the answer, which is a part of the statement.

    Attributes:
        key: What the statement is about; sentences of the haystack that mention it are left out.
        memory: The answer the model gives without the context, where that is known.
        prefix: How a reply may begin before it comes to the answer; None: as the statement does.
    """

    needle: str
    question: str
    answer: str
    key: str | None = None
    memory: str | None = None
    prefix: str | None = None

    @property
    def beginning(self) -> str:
        """How a reply begins before it comes to the answer, such as "The code of the blue door is".

        >>> Needle("The code of the blue door is 4719.", "What is the code of the blue door?", "4719").beginning
        'The code of the blue door is'
        """
        if self.prefix is not None:
            return self.prefix.strip()
        return self.needle[: max(0, self.needle.lower().find(self.answer.lower()))].strip()


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one case is made of, independent of any tokenizer. `length` is the number of tokens of the whole prompt."""

    length: int
    depth: float
    needle: int
    distractors: tuple[int, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt in tokens, with spans [start, end) of tokens.

    Attributes:
        span: Span of the answer in the needle, (0, 0) if the prompt has no needle.
        statement: Span of the whole needle, (0, 0) if the prompt has none.
        question: Span of the question, (0, 0) if the chat template has changed its text.
    """

    tokens: tuple[int, ...]
    span: tuple[int, int]
    needle: Needle
    spec: Spec
    statement: tuple[int, int] = (0, 0)
    question: tuple[int, int] = (0, 0)


def read_sentences(path: str | Path) -> list[str]:
    """Returns the sentences of a text file; ValueError if it is missing, not UTF-8 or empty."""
    sentences = [s.strip() for s in _SENTENCE_END.split(read_text(Path(path), "haystack file")) if s.strip()]
    if not sentences:
        raise ValueError(f"haystack file {path} has no text")
    return sentences


def read_needles(path: str | Path) -> list[Needle]:
    """Returns the needles of a JSONL file with needle, question and answer (or real_needle), and optionally key, memory
    and prefix.

    Raises:
        ValueError: A record, named by file and line, lacks question or answer, or a value is not a text.
    """
    needles = []
    for number, record in iter_records(Path(path)):
        texts: dict[str, Any] = {name: record.get(name) for name in _FIELDS}
        texts["answer"] = record.get("answer", record.get("real_needle"))
        if texts["question"] is None or texts["answer"] is None:
            raise ValueError(f"{path}, line {number}: a needle has question and answer, this one {sorted(record)}")
        for name, text in texts.items():
            if not isinstance(text, str | None):
                raise ValueError(f"{path}, line {number}: {name} is {text!r:.40}, not a text: write it in quotes")
        needles.append(Needle(**texts | {"needle": texts["needle"] or ""}))
        check_words(needles[-1], f"{path}, line {number}")
    if not needles:
        raise ValueError(f"{path} holds no needles")
    return needles


def can_write(tokenizer: Any, needle: Needle) -> bool:
    """Returns whether a tokenizer has tokens for all words of a needle and its question."""
    ids = tokenizer(f"{needle.needle} {needle.question}", add_special_tokens=False)["input_ids"]
    return tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def check_words(needle: Needle, where: str | None = None) -> None:
    """Raises ValueError for a needle whose answer has no letter or digit; `where` says where it is from, for the
    message."""
    for name, text in (("answer", needle.answer), ("memory", needle.memory or None)):
        if text is not None and not rouge_tokens(text):
            where = where or f"needle {needle.needle or needle.question!r}"
            raise ValueError(f"{where}: the {name} {text!r} has no letter or digit to compare with: give it words")


def draw_specs(
    needles: Sequence[Needle],
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    per_length: int | None,
    distractors: int = 0,
    seed: int = 0,
) -> list[Spec]:
    """Draws the specs of cases.

    Args:
        lengths: Tokens of a prompt.
        depths: Shares of the haystack before the needle.
        per_length: Cases for each length, with depths and needles in turn; None for all depths x needles.
        distractors: How many other needles are put into the same haystack.
    """
    rng = np.random.default_rng(seed)
    cells = []
    for length in lengths:
        if per_length is None:
            cells += [(length, depth, needle) for depth in depths for needle in range(len(needles))]
        else:
            order = np.resize(rng.permutation(len(needles)), per_length)
            cells += [(length, depths[i % len(depths)], int(needle)) for i, needle in enumerate(order)]
    return [
        Spec(length, float(depth), needle, _distractors(rng, needles, needle, distractors), int(rng.integers(2**31)))
        for length, depth, needle in cells
    ]


def build_cases(
    prompter: Prompter,
    sentences: Sequence[str],
    needles: Sequence[Needle],
    specs: Sequence[Spec],
    *,
    shuffle: bool = True,
    at_start: bool = False,
    prefix: bool = False,
) -> list[Case]:
    """Returns the cases of specs, each filled with whole sentences up to its length.

    Args:
        sentences: The haystack.
        shuffle: Whether the sentences are in random order, by the spec's seed, instead of the text's order.
        at_start: Whether the needle is put at the very start unless the depth is 1, as in the detector released with
            arXiv 2601.11020.
        prefix: Whether the prompt ends with the beginning of a reply (`Needle.beginning`), so that the model goes on with
            the answer.

    Raises:
        ValueError: A length has no room for needle and question, there is no needle, the answer is not found in it exactly
            once, or has no letter or digit.
    """
    _check_used(needles, specs)
    sizes = _sizes(prompter, sentences)
    naming = functools.cache(lambda key: np.array([key in sentence for sentence in sentences], bool))
    shown = track(specs, len(specs), "needle cases", "case")
    return [_build(prompter, sentences, sizes, naming, needles, spec, shuffle, at_start, prefix) for spec in shown]


def question_case(prompter: Prompter, needle: Needle, *, prefix: bool = False) -> Case:
    """Returns a case without context, which asks what the model answers from memory; errors as of `check_words`.

    prefix: As of `build_cases`.
    """
    check_words(needle)
    text, tokens, offsets = _prompt(prompter, "", needle, prefix)
    spec = Spec(len(tokens), 0.0, 0, (), 0)
    return Case(tuple(tokens), (0, 0), needle, spec, question=question_span(prompter, text, offsets, needle))


def answer_span(text: str, offsets: Sequence[tuple[int, int]], needle: Needle) -> tuple[int, int]:
    """Returns the span [start, end) of the tokens of the needle's answer in a prompt.

    The needle is looked up in the text, and the answer in the needle, without regard to case.

    Args:
        text: The rendered prompt.
        offsets: Range of characters of each token.

    Raises:
        ValueError: Needle or answer does not occur exactly once.
    """
    needle_at = _find_once(text, needle.needle, "the needle")
    answer_at = needle_at + _find_once(needle.needle, needle.answer, "the answer part")
    return _tokens_of(offsets, answer_at, len(needle.answer))


def question_span(prompter: Prompter, text: str, offsets: Sequence[tuple[int, int]], needle: Needle) -> tuple[int, int]:
    """Returns the span [start, end) of the question's tokens in a prompt, (0, 0) where a template has changed its text.

    If the context holds the same words, the prompt's format decides whether their first or last occurrence is the
    question.
    """
    question = needle.question.strip()
    last = prompter.prompt.rfind("{question}") > prompter.prompt.rfind("{context}")
    found = text.rfind(question) if last else text.find(question)
    return (0, 0) if found < 0 or not question else _tokens_of(offsets, found, len(question))


def _check_used(needles: Sequence[Needle], specs: Sequence[Spec]) -> None:
    for needle in (needles[i] for i in sorted({spec.needle for spec in specs})):
        check_words(needle)
        if not needle.needle:
            raise ValueError(f"{needle.question!r} has no needle, the statement that a text is to hold: give it one")


def _sizes(prompter: Prompter, sentences: Sequence[str]) -> np.ndarray:
    """Tokens of each sentence."""
    return np.array(prompter.counts([f" {sentence}" for sentence in sentences], special=False))


def _prompt(
    prompter: Prompter, context: str, needle: Needle, prefix: bool
) -> tuple[str, list[int], list[tuple[int, int]]]:
    """Returns (text, tokens, their ranges of characters) of a prompt that asks for a needle.

    With the beginning of a reply, the tokens are those before the answer's first one as the tokenizer splits both
    together: some tokenizers make the blank before a number a token of its own.
    """
    text = prompter.render(context, needle.question)
    if not prefix or not needle.beginning:
        return text, *prompter.encode(text)
    text = prompter.begun(text, needle.beginning)
    tokens, offsets = prompter.encode(f"{text} {needle.answer}")
    end = next(i for i, (_, last) in enumerate(offsets) if last > len(text) + 1)
    return text, tokens[:end], offsets[:end]


def _build(prompter, sentences, sizes, naming, needles, spec, shuffle, at_start, prefix) -> Case:
    """naming: which of the sentences hold a key."""
    needle = needles[spec.needle]
    rng = np.random.default_rng(spec.seed)
    planted = [needles[i].needle for i in spec.distractors]
    keys = [needles[i].key for i in (spec.needle, *spec.distractors) if needles[i].key]
    order = rng.permutation(len(sentences)) if shuffle else np.arange(len(sentences))
    for key in keys:
        order = order[~naming(key)[order]]
    places = np.sort(rng.random(len(planted)))
    _, fixed, _ = _prompt(prompter, " ".join([needle.needle, *planted]), needle, prefix)
    room = spec.length - len(fixed)
    if room < 0:
        raise ValueError(f"a case of {spec.length} tokens has no room for its {len(fixed)} of needles and question")
    count = int(np.searchsorted(np.cumsum(sizes[order]), room, side="right"))
    if count == len(order) and room > sizes[order].sum() + sizes.max():
        raise ValueError(f"the haystack has {sizes[order].sum()} tokens, too few for a case of {spec.length}")
    depth = 0.0 if at_start and spec.depth < 1 else spec.depth

    def build(count):
        context = _plant([sentences[i] for i in order[:count]], planted, places, needle.needle, depth)
        return _prompt(prompter, context, needle, prefix)

    # Tokens of sentences side by side may be some more or fewer than those of each alone.
    text, tokens, offsets = build(count)
    while len(tokens) > spec.length and count > 0:
        count -= 1
        text, tokens, offsets = build(count)
    while count < len(order) and len((longer := build(count + 1))[1]) <= spec.length:
        count += 1
        text, tokens, offsets = longer
    statement = _tokens_of(offsets, _find_once(text, needle.needle, "the needle"), len(needle.needle))
    question = question_span(prompter, text, offsets, needle)
    return Case(tuple(tokens), answer_span(text, offsets, needle), needle, spec, statement, question)


def _plant(hay: list[str], planted: list[str], places, needle: str, depth: float) -> str:
    """The haystack with distractors at their places and the needle after the share `depth` of its sentences."""
    for place, sentence in sorted(zip(places, planted, strict=True), reverse=True):
        hay.insert(int(place * (len(hay) + 1)), sentence)
    hay.insert(round(depth * len(hay)), needle)
    return " ".join(hay)


def _distractors(rng, needles, needle: int, n: int) -> tuple[int, ...]:
    """n other needles, no two of which have the same key."""
    chosen, keys = [], {needles[needle].key}
    for i in rng.permutation(len(needles)):
        if len(chosen) == n:
            break
        if i != needle and needles[i].key not in keys:
            chosen.append(int(i))
            keys.add(needles[i].key)
    if len(chosen) < n:
        raise ValueError(f"{n} distractors are wanted, only {len(chosen)} needles have other keys: add needles")
    return tuple(chosen)


def _tokens_of(offsets, first: int, length: int) -> tuple[int, int]:
    """Span of the tokens that hold any of `length` characters from `first` on."""
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < first + length and end > first]
    return inside[0], inside[-1] + 1


def _find_once(text: str, part: str, what: str) -> int:
    found = [match.start() for match in re.finditer(re.escape(part), text, re.IGNORECASE)] if part else []
    if len(found) != 1:
        raise ValueError(f"{what} {part!r} occurs {len(found)} times in {text[:80]!r}..., it must occur exactly once")
    return found[0]
