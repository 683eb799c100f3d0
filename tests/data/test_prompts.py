"""Prompts from files and TFDS sets: what is taken, what is left out, and what is said of records that have none."""

import gzip
import itertools
import json

import pytest

from retmask_jax.data import prompts
from retmask_jax.data.prompts import read_prompts, source_files
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.utils import files
from retmask_jax.utils.files import read_jsonl


def _user(text):
    return {"role": "user", "content": text}


def _reply(text):
    return {"role": "assistant", "content": text}


def _write(path, *records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def _texts(found):
    return [record["messages"][-1]["content"] for record in found.records]


# --- chat records ---


def test_the_prompt_is_all_before_the_first_answer(tmp_path):
    system = {"role": "system", "content": "be brief"}
    source = _write(
        tmp_path / "chats.jsonl.gz",
        {"conversation_id": "a", "conversation": [_user("one"), _reply("1"), _user("two"), _reply("2")]},
        {"id": 7, "messages": [system, _user("three"), _reply("3")], "language": "English"},
        {"prompt": [_user("four")]},
        {"prompt": "five", "messages_without": [_user("fi"), _reply("5")]},
    )
    assert read_prompts(source).records == [
        {"id": "a", "messages": [_user("one")]},
        {"id": "7", "messages": [system, _user("three")]},
        {"id": "chats.jsonl.gz:3", "messages": [_user("four")]},
        {"id": "chats.jsonl.gz:4", "messages": [_user("five")], "messages_without": [_user("fi")]},
    ]


def test_our_own_files_come_back_as_they_are():
    path = BUNDLED.parent / "data" / "prompts.jsonl.gz"
    stored = read_jsonl(path)
    found = read_prompts("bundled", resolve=lambda name: path)
    assert found.records == stored and "messages_without" in stored[0]
    assert found.counts["kept"] == len(stored)


def test_marked_and_empty_records_are_left_out_and_counted(tmp_path):
    chat = {"conversation": [_user("x"), _reply("y")]}
    source = _write(
        tmp_path / "lmsys.jsonl",
        chat | {"conversation_id": "a", "redacted": False, "duplicate_user_instruction_ja": None},
        chat | {"conversation_id": "b", "redacted": True},
        chat | {"conversation_id": "c", "duplicate_user_instruction_ja": "a"},
        chat | {"conversation_id": "d", "empty_user_instruction_ja": True},
        {"conversation_id": "e", "conversation": [_user(" \n"), _reply("y")]},
        {"conversation_id": "f", "conversation": [_reply("y"), _user("x")]},
    )
    found = read_prompts(source)
    assert [record["id"] for record in found.records] == ["a"]
    assert found.counts == {"kept": 1, "redacted": 1, "duplicate": 1, "empty": 3}


# --- files ---


def test_prompts_that_lack_a_field_are_left_out_and_counted(tmp_path):
    without = {"messages_without": [_user("no")]}
    source = _write(tmp_path / "p.jsonl", *({"prompt": f"p{i}"} | (without if i % 3 else {}) for i in range(9)))
    found = read_prompts(source, n=4, having=("messages_without",))
    assert _texts(found) == ["p1", "p2", "p4", "p5"]
    assert found.counts["kept"] == 4 and found.counts["without messages_without"] == 2
    assert _texts(read_prompts(source, n=4)) == ["p0", "p1", "p2", "p3"]
    with pytest.raises(ValueError, match="has no prompts .*without other 9"):
        read_prompts(source, having=("other",))


def test_a_glob_is_read_in_order_and_names_records_by_their_files(tmp_path):
    for name in ("b/x", "a/y", "a/x", "c/z", "a/w", "c/a", "b/q", "a/b"):
        _write(tmp_path / f"{name}.jsonl", {"prompt": name})
    found = read_prompts(str(tmp_path / "*" / "*.jsonl"))
    assert _texts(found) == ["a/b", "a/w", "a/x", "a/y", "b/q", "b/x", "c/a", "c/z"]
    assert [record["id"] for record in found.records] == [f"{name}.jsonl:1" for name in _texts(found)]
    assert source_files("*/x.jsonl", lambda name: tmp_path / name) == [tmp_path / f"{part}/x.jsonl" for part in "ab"]
    assert source_files("tfds:squad") == []


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_a_paragraph_of_plain_text_is_a_prompt(tmp_path, name):
    text = "\n\none\ntwo\n\n  \n\nthree\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = read_prompts(str(tmp_path / name))
    assert found.records == [
        {"id": f"{name}:3", "messages": [_user("one\ntwo")]},
        {"id": f"{name}:8", "messages": [_user("three")]},
    ]


def test_nothing_is_read_beyond_n(tmp_path):
    source = _write(tmp_path / "p.jsonl", {"prompt": "one"}, {"prompt": "x", "redacted": True}, {"prompt": "two"})
    with open(source, "a") as file:
        file.write("not JSON\n")
    assert _texts(read_prompts(source, n=2)) == ["one", "two"]
    with pytest.raises(ValueError, match="p.jsonl, line 4: not JSON"):
        read_prompts(source, n=3)


def test_lines_are_read_as_they_are_asked_for(tmp_path):
    """Of a compressed file larger than the buffers, the first lines come before its damaged end is met."""
    data = gzip.compress(b"".join(json.dumps({"prompt": "x", "n": n}).encode() + b"\n" for n in range(20_000)))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    assert [number for number, _ in itertools.islice(files.iter_jsonl(path), 3)] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"cut.jsonl.gz cannot be read beyond line \d{4,} .*fetch or write it again"):
        files.read_jsonl(path)


def test_a_field_is_named_by_the_user(tmp_path):
    source = _write(tmp_path / "q.jsonl", {"prompt": "no", "question": {"text": "yes"}})
    assert _texts(read_prompts(source, field="question/text")) == ["yes"]


# --- what is refused ---


@pytest.mark.parametrize(
    "record, options, words",
    [
        ({"text": "x", "id": 1}, {}, "no prompt: messages, conversation, prompt .*; the record has text, id$"),
        ({"text": "x", "id": 1}, {"field": "body"}, "no field 'body'; the record has text, id$"),
        ({"text": "x"}, {"field": "text/deep"}, "no field 'text/deep'; the record has text$"),
        ({"prompt": {"text": "x"}}, {}, "a dict with text is no text and no list of turns"),
        ({"messages": [{"from": "human", "value": "x"}]}, {}, r"turn 1 of the conversation is not \{role, content\}"),
        ({"messages": [{"role": "human", "content": "x"}]}, {}, "turn 1 .* the role 'human'; roles are system, user"),
        ({"messages": [{"role": "user", "content": None}]}, {}, "turn 1 .* no text as its content but None"),
        ([1], {}, "a list is no record"),
    ],
)
def test_a_record_without_a_prompt_is_named(tmp_path, record, options, words):
    source = _write(tmp_path / "bad.jsonl", {"prompt": "fine", "body": "fine", "text": {"deep": "fine"}}, record)
    with pytest.raises(ValueError, match=rf"^\S*bad\.jsonl, line 2: {words}") as error:
        read_prompts(source, **options)
    assert "\n" not in str(error.value)


def test_an_id_that_occurs_twice_is_named_with_both_places(tmp_path):
    _write(tmp_path / "a.jsonl", {"id": "one", "prompt": "x"}, {"id": "two", "prompt": "x"})
    _write(tmp_path / "b.jsonl", {"id": 3, "prompt": "x"}, {"id": "two", "prompt": "y"})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 and \S*b\.jsonl, line 2 have the same id 'two'"):
        read_prompts(str(tmp_path / "*.jsonl"))


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("no.jsonl", {}, "no file matches"),
        ("empty.jsonl", {}, r"has no prompts \(kept 0, redacted 1, empty 0, duplicate 0\)"),
        ("table.csv", {}, r"table.csv: prompts are read from .jsonl and .txt"),
        ("empty.jsonl", {"n": 0}, "0 prompts of .* were asked for"),
        ("empty.jsonl", {"split": "test"}, "is no TFDS set and has no split 'test'"),
    ],
)
def test_sources_without_prompts_are_refused(tmp_path, name, options, words):
    _write(tmp_path / "empty.jsonl", {"prompt": "x", "redacted": True})
    _write(tmp_path / "table.csv")
    with pytest.raises(ValueError, match=words):
        read_prompts(str(tmp_path / name), **options)


# --- TFDS ---


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A set in TFDS's form of chats, of nested fields and of plain ones, made without TensorFlow."""
    import numpy as np
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class TinyChats(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "conversation_id": text,
                "redacted": tfds.features.Scalar(np.bool_),
                "question": {"text": text},
                "conversation": tfds.features.Sequence({"role": text, "content": text}),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("a", 4), "test": self._generate_examples("b", 2)}

        def _generate_examples(self, name, n):
            for i in range(n):
                chat = [_user(f"ask {name}{i} é"), _reply("answer"), _user("more")]
                yield (
                    i,
                    {
                        "conversation_id": f"{name}{i}",
                        "redacted": i == 1,
                        "question": {"text": f"what {i}"},
                        "conversation": chat,
                    },
                )

    builder = TinyChats(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def test_a_tfds_set_is_read_by_its_folder(tfds_folder):
    found = read_prompts(f"tfds:{tfds_folder}")
    assert found.records == [{"id": f"a{i}", "messages": [_user(f"ask a{i} é")]} for i in (0, 2, 3)]
    assert found.counts["redacted"] == 1
    assert _texts(read_prompts(f"tfds:{tfds_folder}", split="test", n=1)) == ["ask b0 é"]
    assert _texts(read_prompts(f"tfds:{tfds_folder}", split="train[2:]", field="question/text")) == ["what 2", "what 3"]


def test_a_tfds_set_is_read_by_its_name(tfds_folder, monkeypatch):
    import functools

    import tensorflow_datasets as tfds

    root = tfds_folder.parent.parent
    monkeypatch.setattr(tfds, "data_source", functools.partial(tfds.data_source, data_dir=root))
    assert _texts(read_prompts("tfds:tiny_chats", split="test", field="question/text")) == ["what 0"]


def test_what_tfds_cannot_give_is_said_in_one_line(tfds_folder, tmp_path):
    for source, split, words in (
        ("tfds:no_such_set", "train", "DatasetNotFoundError"),
        (f"tfds:{tfds_folder}", "valid", "Unknown split 'valid'"),
        (f"tfds:{tmp_path}", "train", "dataset_info.json"),
    ):
        with pytest.raises(ValueError, match=f"split {split}: cannot be read .*{words}.* check name, split") as error:
            read_prompts(source, split=split)
        assert str(error.value).startswith(source) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="split train, record 0: no field 'text'; the record has conversation"):
        read_prompts(f"tfds:{tfds_folder}", field="text")


def test_a_set_that_needs_tensorflow_says_so():
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        assert "can only be made with TensorFlow" in prompts._why(error)
    else:
        pytest.skip("TensorFlow is installed")
