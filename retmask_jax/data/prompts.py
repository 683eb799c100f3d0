"""Prompts without labels, read from JSONL, plain text or TFDS into one form: {"id", "messages"}."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from retmask_jax.data.chat import record_id, turns
from retmask_jax.utils.files import iter_jsonl, iter_lines, matching

KEPT = "kept"
# Where the prompt of a record is, unless the user names a field.
_FIELDS = ("messages", "conversation", "prompt")
# A record in which one of these is true is left out, as in RetMask's code; they occur in LMSYS-Chat-1M and its Synth.
_MARKS = {"redacted": "redacted", "empty_user_instruction_ja": "empty", "duplicate_user_instruction_ja": "duplicate"}
_TFDS = "tfds:"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts that were read, and how many were not.

    Attributes:
        records: {"id", "messages"}, and "messages_without" where the source has it.
        counts: How many records were kept, and how many were left out for which reason.
    """

    records: list[dict]
    counts: dict[str, int]


def read_prompts(
    source: str,
    *,
    n: int | None = None,
    split: str = "train",
    field: str | None = None,
    having: Sequence[str] = (),
    resolve: Callable[[str], Path] = Path,
) -> Prompts:
    """Reads the first n prompts of a source, and nothing after them.

    The prompt of a record is a text, or a conversation whose turns before the first assistant turn are taken. A record
    without an id is called by its file and line. Its other fields are not read.

    Args:
        source: A file or glob of .jsonl or .txt (a prompt per paragraph), compressed (.gz) or not; or "tfds:NAME", or
            "tfds:FOLDER" of a set that was prepared as ArrayRecord.
        n: How many prompts; None for all.
        split: Split of a TFDS set.
        field: Field of a record that holds the prompt, such as "question/text" for a field within a field; None for the
            first of messages, conversation and prompt.
        having: Fields of `Prompts.records` that a prompt must have; others are left out and counted.
        resolve: Turns the name of a file into its path.

    Raises:
        ValueError: A record, named by file and line, has no prompt, or two records, both named, have the same id.
    """
    if n is not None and n < 1:
        raise ValueError(f"{n} prompts of {source} were asked for: ask for 1 or more")
    counts = collections.Counter({KEPT: 0} | dict.fromkeys(_MARKS.values(), 0))
    places: dict[str, str] = {}
    records = []
    for place, default_id, stored in _stored(source, split, resolve):
        mark = _mark(place, stored)
        prompt = None if mark else _prompt(place, default_id, stored, field)
        lacking = next((name for name in having if prompt and name not in prompt), None)
        counts[f"without {lacking}" if lacking else KEPT if prompt else mark or "empty"] += 1
        if not prompt or lacking:
            continue
        if (first := places.setdefault(prompt["id"], place)) != place:
            raise ValueError(f"{first} and {place} have the same id {prompt['id']!r}: give each prompt its own")
        records.append(prompt)
        if len(records) == n:
            break
    if not records:
        raise ValueError(f"{source} has no prompts ({', '.join(f'{why} {count}' for why, count in counts.items())})")
    return Prompts(records, dict(counts))


def source_files(source: str, resolve: Callable[[str], Path] = Path) -> list[Path]:
    """Returns the files of a source of `read_prompts`, none for a TFDS set; ValueError where no file matches."""
    return [] if source.startswith(_TFDS) else matching(resolve(source))


def _mark(place: str, stored: Any) -> str | None:
    """Why a record says that it is to be left out, None if it does not."""
    if not isinstance(stored, dict):
        raise ValueError(f"{place}: a {type(stored).__name__} is no record: each line must be {{field: value, ...}}")
    return next((why for mark, why in _MARKS.items() if stored.get(mark)), None)


def _prompt(place: str, default_id: str, stored: dict, field: str | None) -> dict | None:
    """The prompt of a stored record, None if there is no text in it."""
    try:
        messages = _first_turns(_value(stored, field))
        if not any(turn["role"] == "user" and turn["content"].strip() for turn in messages):
            return None
        prompt = {"id": record_id(stored, default_id), "messages": messages}
        if stored.get("messages_without") is not None:
            prompt["messages_without"] = _first_turns(stored["messages_without"])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return prompt


def _value(stored: dict, field: str | None) -> Any:
    if field is None:
        field = next((name for name in _FIELDS if stored.get(name) is not None), None)
    value: Any = stored
    for name in (field or "").split("/"):
        if not isinstance(value, dict) or value.get(name) is None:
            lacks = f"field {field!r}" if field else f"prompt: {', '.join(_FIELDS)} or a field of your choice is needed"
            raise ValueError(f"no {lacks}; the record has {', '.join(stored)}")
        value = value[name]
    return value


def _first_turns(stored: Any) -> list[dict[str, str]]:
    return list(itertools.takewhile(lambda turn: turn["role"] != "assistant", turns(stored)))


def _stored(source: str, split: str, resolve) -> Iterator[tuple[str, str, Any]]:
    """(where it is, the id it gets if it has none, record) for every record."""
    if source.startswith(_TFDS):
        yield from _stored_tfds(source, split)
        return
    if split != "train":
        raise ValueError(f"{source} is no TFDS set and has no split {split!r}: name the files you want")
    paths = source_files(source, resolve)
    readers = [_reader(path) for path in paths]
    root = os.path.commonpath([path.parent for path in paths])
    for path, read in zip(paths, readers, strict=True):
        name = path.relative_to(root).as_posix()
        for number, stored in read(path):
            yield f"{path}, line {number}", f"{name}:{number}", stored


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[int, Any]]]:
    kind = Path(path.name.removesuffix(".gz")).suffix
    readers = {".jsonl": iter_jsonl, ".txt": _paragraphs}
    if kind not in readers:
        raise ValueError(f"{path}: prompts are read from .jsonl and .txt files, compressed (.gz) or not, and tfds:NAME")
    return readers[kind]


def _paragraphs(path: Path) -> Iterator[tuple[int, dict]]:
    """(number of its first line, {"prompt": text}) of each paragraph; blank lines stand between them."""
    for filled, lines in itertools.groupby(iter_lines(path), lambda line: bool(line[1].strip())):
        if filled:
            numbers, texts = zip(*lines, strict=True)
            yield numbers[0], {"prompt": "".join(texts).strip()}


def _stored_tfds(source: str, split: str) -> Iterator[tuple[str, str, Any]]:
    import tensorflow_datasets as tfds

    name = source.removeprefix(_TFDS)
    try:
        if Path(name).is_dir():
            builder: Any = tfds.builder_from_directory(name)
            records = builder.as_data_source(split)
        else:
            records = cast(Any, tfds.data_source(name, split=split))
    # The code of the data set and clients of its hosts run here; their errors have no base class in common.
    except Exception as error:
        raise ValueError(f"{source}, split {split}: {_why(error)}") from error
    for number in range(len(records)):
        yield f"{source}, split {split}, record {number}", f"{split}:{number}", records[number]


def _why(error: Exception) -> str:
    if isinstance(error, ImportError) and "tensorflow" in str(error).lower():
        return (
            "this set can only be made with TensorFlow: make it where that is installed, with "
            "download_and_prepare(file_format='array_record'), and pass tfds:FOLDER"
        )
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
    return (
        f"cannot be read ({type(error).__name__}: {reason}): check name, split and network, or pass tfds:FOLDER of a "
        "set that was prepared as ArrayRecord"
    )
