"""Data files that come with the package, by the names that a config gives them: "builtin:essays", "bundled/..."."""

from collections.abc import Callable, Sequence
from pathlib import Path

from retmask_jax.data.needles import read_sentences

DATA = Path(__file__).parent.parent / "assets" / "data"

BUILTIN, _BUNDLED = "builtin:", "bundled/"
_SENTENCES = "sentences"
# English texts for any model; assets/data/english/README.md says how each was made.
_FILES = {
    "essays": "essays.txt",
    "needles": "needles.jsonl",
    "codes": "codes.jsonl",
    "facts": "facts.jsonl",
    "closed_book": "closed_book.jsonl",
    "common_knowledge": "common_knowledge.jsonl",
    "indirect": "indirect.jsonl",
    "prompts": "prompts.jsonl.gz",
    _SENTENCES: "sentence_parts.json",  # what the sentences are made from
}
_TOKENS_PER_SENTENCE = 8  # at least, of the sentences without end


def path_of(name: str) -> Path:
    """Returns the path of a data file of a config.

    Args:
        name: "builtin:NAME" of an English text of the package, "bundled/FILE" of the tiny model's data, or a path.

    Raises:
        ValueError: There is no built-in text of that name; the message lists them.

    >>> path_of("builtin:needles").name, path_of("data/my_needles.jsonl").name
    ('needles.jsonl', 'my_needles.jsonl')
    """
    if name.startswith(BUILTIN):
        chosen = name.removeprefix(BUILTIN)
        if chosen not in _FILES:
            known = ", ".join(f"{BUILTIN}{known}" for known in _FILES)
            raise ValueError(f"there is no built-in text {name!r}; there are {known}")
        return DATA / "english" / _FILES[chosen]
    return DATA / name.removeprefix(_BUNDLED) if name.startswith(_BUNDLED) else Path(name)


def haystack(name: str, lengths: Sequence[int], resolve: Callable[[str], Path] = path_of) -> list[str]:
    """Returns the sentences of a haystack; of "builtin:sentences" as many as the longest of these lengths (tokens) needs.

    Raises:
        ValueError: As of `path_of` and `read_sentences`.
    """
    if name != BUILTIN + _SENTENCES:
        return read_sentences(resolve(name))
    from retmask_jax.data.builtin import sentences

    return sentences(max(lengths, default=0) // _TOKENS_PER_SENTENCE + 1)
