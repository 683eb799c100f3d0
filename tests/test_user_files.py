"""Files that users give, damaged in every way: each reader refuses them in one line that names the file."""

import json

import pytest
from helpers_tiny import WIDE

from retmask_jax.cli.main import main
from retmask_jax.data.needles import read_needles, read_sentences
from retmask_jax.data.pair_formats import read_pairs
from retmask_jax.data.prompts import read_prompts
from retmask_jax.evals.suites.questions import read_questions
from retmask_jax.evals.suites.rerank import read_queries
from retmask_jax.heads.lists.formats import read_heads
from retmask_jax.heads.scores import HeadScores
from retmask_jax.reports.panel.sources import read_models
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.utils.files import read_json

NEEDLE = {"needle": "The lamp is red.", "question": "What is the lamp?", "answer": "red", "key": "lamp"}
QUESTION = {"question": "Where?", "answers": ["here"], "context": ["It is here."]}
QUERY = {"query": "lamps", "passages": [{"id": "a", "text": "A lamp.", "relevance": 1}]}
PROMPT = {"id": "1", "messages": [{"role": "user", "content": "Hello"}]}
PAIR = {"prompt": "Hello", "chosen": "Hi", "rejected": "No"}
# reader: (function, name of a file for it, a record)
LINES = {
    "needles": (read_needles, "x.jsonl", NEEDLE),
    "questions": (read_questions, "x.jsonl", QUESTION),
    "queries": (read_queries, "x.jsonl", QUERY),
    "prompts": (lambda path: read_prompts(str(path)), "x.jsonl", PROMPT),
    "pairs": (read_pairs, "x.jsonl", PAIR),
}
READERS = LINES | {
    "haystack": (read_sentences, "x.txt", None),
    "scores": (HeadScores.load, "x.json", {"0-0": [1.0]}),
    "heads": (lambda path: read_heads(path, WIDE), "x.json", [[2, 7], [0, 1]]),
    "question document": (read_questions, "x.json", [QUESTION]),
    "recipe": (lambda path: load_recipe(str(path)), "x.py", None),
    "result": (read_json, "x.json", {}),
    "profile": (lambda path: read_models([path], [1]), "x.json", {"0-0": [1.0]}),
}


def _refused(read, path, *words):
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (path.name, *words)), message
    return message


@pytest.mark.parametrize("name", READERS)
def test_what_is_fine_is_read(name, tmp_path):
    read, file, record = READERS[name]
    texts = {
        "haystack": "A lamp. A door.",
        "recipe": "from retmask_jax.configs import tiny\nget_config = tiny.get_config",
    }
    (tmp_path / file).write_text(texts.get(name) or json.dumps(record) + "\n")
    assert read(tmp_path / file) is not None


@pytest.mark.parametrize("name", READERS)
def test_a_folder_is_no_file(name, tmp_path):
    read, file, _ = READERS[name]
    (tmp_path / file).mkdir()
    if name == "profile":  # a folder may be a work directory
        _refused(lambda path: read_models([path]), tmp_path / file, "has no result")
    else:
        _refused(read, tmp_path / file)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000], ids=["not UTF-8", "deep"])
def test_what_is_no_text_or_never_ends_is_refused(name, content, tmp_path):
    read, file, _ = READERS[name]
    if name == "haystack" and content.startswith(b"["):
        return
    (tmp_path / file).write_bytes(content)
    _refused(read, tmp_path / file)


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_is_named(name, tmp_path):
    read, file, _ = READERS[name]
    _refused(read, tmp_path / file)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("line", ["[1]", "3", '"text"', "null", "true", "{}", "{", "1" * 5000])
def test_a_line_that_is_no_such_record_is_refused_with_its_number(name, line, tmp_path):
    read, file, record = LINES[name]
    (tmp_path / file).write_text(f"{json.dumps(record)}\n\n{line}\n")
    message = _refused(read, tmp_path / file)
    assert "line 3" in message or line == "{}" and "record 2" in message


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_an_archive_that_is_none_is_refused(name, tmp_path):
    read, _, record = LINES[name]
    (tmp_path / "x.jsonl.gz").write_text(json.dumps(record))
    _refused(read, tmp_path / "x.jsonl.gz", "cannot be read")


@pytest.mark.parametrize("field", ["needle", "question", "answer", "real_needle", "key", "memory"])
@pytest.mark.parametrize("value", [3, 2.5, True, ["red"], {"a": 1}])
def test_a_needle_is_made_of_texts(field, value, tmp_path):
    record = {name: text for name, text in NEEDLE.items() if (field, name) != ("real_needle", "answer")} | {
        field: value
    }
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    _refused(read_needles, tmp_path / "x.jsonl", "line 1", "not a text")


def test_a_needle_may_say_that_it_has_no_key(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(NEEDLE | {"key": None, "memory": None, "needle": None}))
    (needle,) = read_needles(tmp_path / "x.jsonl")
    assert (needle.needle, needle.key, needle.memory) == ("", None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"question": 3},
        {"answers": 3},
        {"answers": [3]},
        {"answers": [["here"]]},
        {"answers": {"text": 3}},
        {"context": 3},
        {"context": [3]},
        {"context": [[]]},
        {"context": [["title", 3]]},
        {"context": {"title": 3, "sentences": 4}},
        {"context": {"title": ["a"], "sentences": []}},
        {"context": [["title", [3]]]},
    ],
)
def test_a_question_is_made_of_texts(change, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(QUESTION | change))
    _refused(read_questions, tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "document",
    [
        3,
        "text",
        None,
        {},
        {"data": 3},
        {"data": [3]},
        {"data": [{"paragraphs": [{"context": 3, "qas": [{"question": "Where?", "answers": [{"text": "here"}]}]}]}]},
        {"data": [{"paragraphs": [{"context": "It.", "qas": [{"question": "Where?", "answers": [{"text": 4}]}]}]}]},
    ],
)
def test_a_document_of_questions_in_no_known_form_is_refused(document, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(document))
    _refused(read_questions, tmp_path / "x.json")


@pytest.mark.parametrize(
    "change",
    [
        {"query": 3},
        {"passages": 3},
        {"passages": [3]},
        {"passages": ["a"]},
        {"passages": []},
        {"passages": {}},
        {"passages": [{"id": "a", "text": "A lamp.", "relevance": "high"}]},
    ],
)
def test_a_query_with_other_values_is_refused(change, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(QUERY | change))
    _refused(read_queries, tmp_path / "x.jsonl", "line 1")


@pytest.mark.parametrize(
    "messages",
    [
        3,
        [3],
        [[]],
        {},
        {"role": 3, "content": 4},
        {"role": ["user"], "content": 4},
        {"role": ["user"], "content": []},
        [{"role": "user", "content": 3}],
        [{"role": 3, "content": "Hello"}],
        [{"role": ["user"], "content": "Hello"}],
    ],
)
def test_a_conversation_is_made_of_turns(messages, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}))
    _refused(lambda path: read_prompts(str(path)), tmp_path / "x.jsonl", "line 1")
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages, "chosen": "a", "rejected": "b"}))
    _refused(read_pairs, tmp_path / "x.jsonl", "line 1")


@pytest.mark.parametrize(
    "change", [{"chosen": 3}, {"chosen": []}, {"rejected": [{"role": "assistant"}]}, {"chosen_finished": 3}]
)
def test_a_pair_is_made_of_answers(change, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(PAIR | change))
    _refused(read_pairs, tmp_path / "x.jsonl", "line 1")


@pytest.mark.parametrize(
    "arguments, file, content",
    [
        (["--config.tasks.detect.needles=./x.jsonl"], "x.jsonl", b'{"question": "a", "answer": 3}'),
        (["--config.tasks.detect.needles=./x.jsonl"], "x.jsonl", b"[1]"),
        (["--config.tasks.detect.needles=./x.jsonl"], "x.jsonl", None),
        (["--config.tasks.detect.haystack=./x.txt"], "x.txt", b"\xff\xfe"),
        (["--config.tasks.detect.haystack=./x.txt"], "x.txt", None),
        (["--config.text.file=./x.txt"], "x.txt", None),
        (["--config.detect.scores=./x.json"], "x.json", None),
        (["--config.pairs.prompts=./x.jsonl"], "x.jsonl", None),
        (["--config=x.py"], "x.py", None),
        (["--config=x.py"], "x.py", b"\xff"),
    ],
)
def test_the_command_refuses_such_files_in_one_line(tmp_path, monkeypatch, capsys, arguments, file, content):
    """None: a folder of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).mkdir() if content is None else (tmp_path / file).write_bytes(content)
    assert main(["detect", "--workdir=work", *arguments]) == 2
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith("retmask: ") and file in line and "Traceback" not in error
