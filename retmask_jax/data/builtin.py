"""English texts of our own writing, composed from hand-written parts: sentences without end, and prompts without labels.

The parts lie in `assets/data/english/`. Templates have slots: {town} is a value of the list "town", {town#2} another value
of it, and {person.noun} a noun of the group of persons that was drawn for the sentence. Only `random.Random.random` is
used, whose numbers are the same in every version of Python.

`python -m retmask_jax.data.builtin` writes the file of prompts again.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.utils.files import read_object, write_jsonl

ENGLISH = Path(__file__).parent.parent / "assets" / "data" / "english"
PROMPTS = ENGLISH / "prompts.jsonl.gz"
MOST_SENTENCES = 1_000_000
MOST_WORDS = 14  # of a sentence

_SLOT = re.compile(r"\{([a-z_.]+(?:#\d)?)\}")
_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")
_GENERAL = 0.25  # share of the questions about a text that ask for no detail of it


def sentences(n: int, seed: int = 0) -> list[str]:
    """Returns different simple sentences of 6 to 14 words, such as "At noon, a red bus stopped near the bridge.".

    Args:
        n: How many; the first of them are the same for every n.
        seed: Seed of the draw.

    Raises:
        ValueError: n is negative or above a million.
    """
    if not 0 <= n <= MOST_SENTENCES:
        raise ValueError(f"{n} sentences were asked for: ask for 0 to {MOST_SENTENCES}")
    rng = random.Random(seed)
    frames = _frames(read_object(ENGLISH / "sentence_parts.json"))
    drawn: dict[str, None] = {}
    while len(drawn) < n:
        frame, lists = _choice(rng, _choice(rng, frames))
        text = _filled(frame, _draw(rng, lists))
        if text.count(" ") < MOST_WORDS:
            drawn[f"{text[0].upper()}{text[1:]}."] = None
    return list(drawn)


def prompts(n: int = 1200, seed: int = 0) -> list[dict]:
    """Returns different prompts of one user turn, {"id", "messages"}, as `read_prompts` reads them.

    Prompts of odd number stand alone. Those of even number carry a text of 50 to 130 words to answer from, and
    "messages_without" is their question without the text.

    Args:
        n: How many; the first of them are the same for every n.
        seed: Seed of the draw.

    Raises:
        ValueError: n is negative, or there are fewer prompts that stand alone.
    """
    parts = read_object(ENGLISH / "prompt_parts.json")
    most = 2 * sum(len(group["frames"]) * len(group["topics"]) for group in parts["requests"])
    if not 0 <= n <= most:
        raise ValueError(f"{n} prompts were asked for: ask for 0 to {most}")
    # A generator each, so that requests do not depend on the passages.
    alone = _requests(parts, random.Random(2 * seed))
    with_text = _readings(parts, random.Random(2 * seed + 1))
    return [{"id": f"english-{i:04d}", **next(alone if i % 2 else with_text)} for i in range(1, n + 1)]


def main() -> None:
    """Writes the prompts to the file that the package has."""
    write_jsonl(PROMPTS, prompts())
    print(PROMPTS)


def _frames(parts: dict[str, Any]) -> list[list[tuple[str, dict[str, list[str]]]]]:
    """For each frame, its forms: the frame and the lists of its slots, for every choice of a group of each kind."""
    frames = []
    for frame in parts["frames"]:
        slots = _SLOT.findall(frame)
        kinds = list(dict.fromkeys(slot.split(".")[0] for slot in slots))
        choices = itertools.product(*(parts["kinds"][kind] for kind in kinds))
        frames.append([(frame, _lists(slots, dict(zip(kinds, groups, strict=True)))) for groups in choices])
    return frames


def _lists(slots: Sequence[str], groups: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    names = {slot: slot.partition("#")[0].split(".") for slot in slots}
    return {slot: groups[kind][field] for slot, (kind, field) in names.items()}


def _requests(parts: dict[str, Any], rng: random.Random) -> Iterator[dict]:
    """Every frame with every topic of its group once, by turns of all frames."""
    frames = [
        (frame, _shuffled(rng, group["topics"]), group["endings"])
        for group in parts["requests"]
        for frame in group["frames"]
    ]
    for turn in range(max(len(topics) for _, topics, _ in frames)):
        for frame, topics, endings in _shuffled(rng, frames):
            if turn < len(topics):
                text = _filled(frame, {"topic": topics[turn]})
                yield {"messages": _user(_choice(rng, parts["openings"]) + text + _choice(rng, endings))}


def _readings(parts: dict[str, Any], rng: random.Random) -> Iterator[dict]:
    """Passages with a question, without end, by turns of all templates; none comes twice."""
    seen = set()
    while True:
        for passage in _shuffled(rng, parts["passages"]):
            text, question, layouts = _passage_and_question(passage, parts, rng)
            values = {"kind": passage["kind"], "text": text, "question": question}
            content = _filled(_choice(rng, layouts), values)
            if content not in seen:
                seen.add(content)
                yield {"messages": _user(content), "messages_without": _user(question)}


def _passage_and_question(passage: dict, parts: dict, rng: random.Random) -> tuple[str, str, list[str]]:
    """A passage, a question about it, and the layouts that suit the question."""
    template = "\n".join(passage["text"])
    slots = dict.fromkeys(_SLOT.findall(template))
    values = _draw(rng, {slot: parts["slots"][slot.partition("#")[0]] for slot in slots})
    if rng.random() < _GENERAL:
        use, question = "task", _choice(rng, [ask for name in passage["general"] for ask in parts["general"][name]])
    else:
        use, (question, _) = "question", _choice(rng, passage["questions"])
    return _filled(template, values), _filled(question, values | {"kind": passage["kind"]}), parts["layouts"][use]


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _draw(rng: random.Random, lists: dict[str, list[str]]) -> dict[str, str]:
    """A value for each slot; no two slots get the same."""
    values: dict[str, str] = {}
    for slot, options in lists.items():
        value = _choice(rng, options)
        while value in values.values():
            value = _choice(rng, options)
        values[slot] = value
    return values


def _filled(template: str, values: dict[str, str]) -> str:
    """The template with its slots filled, and "an" for "a" before a vowel."""
    return _BEFORE_VOWEL.sub(r"\1n ", _SLOT.sub(lambda slot: values[slot[1]], template))


def _choice(rng: random.Random, options: Sequence[Any]) -> Any:
    return options[int(rng.random() * len(options))]


def _shuffled(rng: random.Random, values: Sequence[Any]) -> list[Any]:
    return [value for _, _, value in sorted((rng.random(), i, value) for i, value in enumerate(values))]


if __name__ == "__main__":
    main()
