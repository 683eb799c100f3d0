"""Questions about documents, read from a simple form or from the published files of SQuAD and HotpotQA."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.utils.files import iter_records, parse_json, read_text

_Row = tuple[str, list[str], list[str], list[str]]  # question, answers, its documents, others of the same article


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, any of whose answers is right.

    Attributes:
        documents: Indices of the documents that come with the question.
        near: Indices of other documents from the same article.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of a file, and all its documents, each once."""

    items: tuple[Question, ...]
    documents: tuple[str, ...]


def read_questions(path: str | Path) -> Questions:
    """Reads the questions of a JSON, JSONL or JSONL.gz file in one of three forms.

    - Simple: records {"question", "answers" (or "answer"): text or list, "context": text or list of documents}.
    - SQuAD: {"data": [{"paragraphs": [{"context", "qas": [...]}]}]}, or its rows with answers {"text": [...]}.
      Impossible questions are left out.
    - HotpotQA: records whose context is [[title, [sentences]], ...] or {"title", "sentences"}.

    Raises:
        ValueError: A record, which the message names, has none of these forms, or the file has no questions.
    """
    records = _records(Path(path))
    try:
        rows = list(_squad(records, path) if isinstance(records, dict) else _rows(records, path))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} has none of the known forms of questions (wrong at {error}): see read_questions"
        ) from error
    if not rows:
        raise ValueError(f"{path} holds no questions: give records of question, answers and context")
    for question, answers, documents, near in rows:
        for value in (question, *answers, *documents, *near):
            if not isinstance(value, str):
                raise ValueError(
                    f"{path}: {value!r:.40} is no text, in the question {question!r:.60}: write it in quotes"
                )
    index: dict[str, int] = {}
    for _, _, documents, near in rows:
        for document in (*documents, *near):
            index.setdefault(document, len(index))
    items = [
        Question(
            question,
            tuple(answers),
            tuple(dict.fromkeys(index[d] for d in documents)),
            tuple(dict.fromkeys(index[d] for d in near)),
        )
        for question, answers, documents, near in rows
    ]
    return Questions(tuple(items), tuple(index))


def _records(path: Path) -> Any:
    """Returns a JSON document, or the records of JSON lines."""
    if path.suffixes[-1:] != [".json"]:
        return [record for _, record in iter_records(path)]
    return parse_json(read_text(path), f"{path} is not JSON, as which its name ends: name a file of JSON lines .jsonl")


def _squad(document: dict[str, Any], path: str | Path) -> Iterator[_Row]:
    if "data" not in document:
        raise ValueError(
            f"{path} is neither a list of records nor SQuAD's {{'data': [...]}}; it has {sorted(document)}"
        )
    for article in document["data"]:
        paragraphs = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = [answer["text"] for answer in asked["answers"]]
                if answers and not asked.get("is_impossible"):
                    yield asked["question"], list(dict.fromkeys(answers)), [paragraph["context"]], paragraphs


def _rows(records: list[dict[str, Any]], path: str | Path) -> Iterator[_Row]:
    for number, record in enumerate(records, 1):
        answers = record.get("answers", record.get("answer"))
        answers = answers.get("text") if isinstance(answers, dict) else answers
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(record.get("question"), str) or not answers or not record.get("context"):
            raise ValueError(
                f"{path}, record {number}: it must have question, answers and context, it has {sorted(record)}"
            )
        yield record["question"], list(dict.fromkeys(answers)), _documents(record["context"]), []


def _documents(context: str | dict | Sequence) -> list[str]:
    if isinstance(context, str):
        return [context]
    if isinstance(context, dict):
        titles, sentences = context["title"], context["sentences"]
        if len(titles) != len(sentences):
            raise TypeError(f"{len(titles)} titles of {len(sentences)} lists of sentences")
        context = list(zip(titles, sentences, strict=True))
    return [part if isinstance(part, str) else f"{part[0]}\n{''.join(part[1])}" for part in context]
