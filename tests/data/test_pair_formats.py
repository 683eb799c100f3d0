"""Pairs in three stored forms, and as a TFDS set that Grain reads: everything comes back as it was."""

import json
import sys

import grain
import pytest

from retmask_jax.data.pair_formats import (
    NAME,
    build_dataset,
    export_pairs,
    preference_source,
    read_pairs,
    write_released,
)
from retmask_jax.utils.files import write_jsonl


def _user(text):
    return {"role": "user", "content": text}


def _reply(text, **more):
    return {"role": "assistant", "content": text, **more}


def _pair(i=0, **changes):
    pair = {
        "id": f"p{i}",
        "messages": [_user(f"ask {i}")],
        "chosen": f"good {i} é",
        "chosen_finished": True,
        "rejected": f"bad\n{i}",
        "rejected_finished": i % 3 != 1,
    }
    return pair | changes


PAIRS = [_pair(i) for i in range(24)]
PAIRS[5]["messages"] = [{"role": "system", "content": "be “brief”"}, _user("one"), _reply("1"), _user("two 😀")]
PAIRS[6]["rejected"] = " "
PAIR = _pair()


def _read(tmp_path, *lines):
    write_jsonl(tmp_path / "pairs.jsonl", lines)
    return read_pairs(tmp_path / "pairs.jsonl")


# --- JSONL ---


def test_pairs_of_every_form_are_read_as_ours(tmp_path):
    ask, good, bad = [_user("ask 0")], _reply("good 0 é"), _reply("bad\n0")
    released = {"conversation_id": "p0", "chosen": [*ask, good], "rejected": [*ask, bad]}
    turns = {"id": "p0", "prompt": ask, "chosen": [good], "rejected": [bad]}
    texts = {"id": "p0", "prompt": "ask 0", "chosen": "good 0 é", "rejected": "bad\n0"}
    both = turns | {"prompt": "ask 0", "chosen": [*ask, good], "rejected": [*ask, bad]}
    assert _read(tmp_path, PAIR, released, turns, texts, both) == [PAIR] * 5


def test_a_pair_without_an_id_has_its_place(tmp_path):
    read = _read(tmp_path, PAIR, {"prompt": "x", "chosen": "a", "rejected": "b"})
    assert [pair["id"] for pair in read] == ["p0", "pairs.jsonl:2"]


def test_reasoning_goes_before_the_answer(tmp_path):
    ask = [_user("ask")]
    chosen, rejected = [*ask, _reply("\n\n4", reasoning_content="2 + 2\n")], [*ask, _reply("5", reasoning_content=None)]
    (pair,) = _read(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert pair["chosen"] == "<think>\n2 + 2\n</think>\n\n4" and pair["rejected"] == "5"


def test_the_released_form_is_written_and_read_back(tmp_path):
    write_released(tmp_path / "released.jsonl.gz", PAIRS)
    write_released(tmp_path / "released.jsonl", PAIRS)
    lines = [json.loads(line) for line in (tmp_path / "released.jsonl").read_text().splitlines()]
    assert lines[0]["conversation_id"] == "p0"
    assert lines[0]["chosen"] == [_user("ask 0"), _reply("good 0 é")]
    assert lines[0]["rejected"] == [_user("ask 0"), _reply("bad\n0")]
    assert read_pairs(tmp_path / "released.jsonl.gz") == read_pairs(str(tmp_path / "*.jsonl")) == PAIRS


@pytest.mark.slow
def test_trl_finds_the_same_prompts_and_answers_in_the_released_form(tmp_path):
    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    write_released(tmp_path / "released.jsonl", PAIRS)
    for pair, line in zip(PAIRS, (tmp_path / "released.jsonl").read_text().splitlines(), strict=True):
        found = extract_prompt(json.loads(line))
        assert found["prompt"] == pair["messages"]
        assert found["chosen"] == [_reply(pair["chosen"])] and found["rejected"] == [_reply(pair["rejected"])]


@pytest.mark.parametrize(
    "line, words",
    [
        ({"id": "x", "chosen": "a"}, "a pair needs chosen and rejected; the line has id, chosen$"),
        ([PAIR], "a pair needs chosen and rejected; the line has a list$"),
        ({"chosen": "a", "rejected": "b"}, "chosen holds the answer only: messages or prompt is needed"),
        (PAIR | {"rejected": [_user("x")]}, "rejected is no text and no conversation that ends with an assistant turn"),
        (PAIR | {"rejected": []}, "rejected is no text and no conversation that ends with an assistant turn"),
        (PAIR | {"messages": _user("x")}, "a dict with role, content is no text and no list of turns"),
        (PAIR | {"chosen": None}, "chosen is no text and no conversation"),
        (PAIR | {"chosen": [_user("other"), _reply("a")]}, "the prompt differs from the beginning .* in chosen"),
        (PAIR | {"messages": [{"role": "user"}]}, r"turn 1 of the conversation is not \{role, content\}"),
        (PAIR | {"chosen_finished": "yes"}, "chosen_finished is 'yes', not true or false"),
        (
            {"chosen": [_user("x"), _reply("a")], "rejected": [_user("y"), _reply("b")]},
            "chosen and rejected differ before their last turn",
        ),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line, words):
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 2: {words}"):
        _read(tmp_path, PAIR, line)


def test_demonstrations_are_not_written_as_pairs(tmp_path):
    """And a file that could not be written whole is the one of before."""
    with pytest.raises(ValueError, match="pair 'p1' has the same answer twice"):
        write_released(tmp_path / "out.jsonl.gz", [PAIR, _pair(1, rejected="good 1 é")])
    assert not list(tmp_path.iterdir())
    write_released(tmp_path / "out.jsonl.gz", PAIRS)
    before = (tmp_path / "out.jsonl.gz").read_bytes()
    assert before[3:8] == bytes(5)  # gzip's flags and time: no name, no date
    with pytest.raises(ValueError, match="same answer twice"):
        write_released(tmp_path / "out.jsonl.gz", [_pair(2), _pair(1, rejected="good 1 é")])
    write_released(tmp_path / "again.jsonl.gz", PAIRS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("out.jsonl.gz", "again.jsonl.gz"), before
    )


# --- TFDS ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    build_dataset(folder, iter(PAIRS))
    return folder


def test_pairs_come_back_from_tfds_as_they_were(folder):
    source = preference_source(folder)
    assert len(source) == len(PAIRS)
    assert [source[i] for i in range(len(source))] == PAIRS
    assert source[len(source) - 1] == PAIRS[-1]


def test_a_set_of_equal_pairs_has_equal_files(folder, tmp_path):
    build_dataset(tmp_path, PAIRS)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.array_record*"))
    assert files and all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_tfds_reads_the_set_without_this_package(folder):
    import tensorflow_datasets as tfds

    stored = tfds.data_source(NAME, split="train[4:]", data_dir=folder)
    assert [example["id"].decode() for example in stored] == [pair["id"] for pair in PAIRS[4:]]
    assert json.loads(stored[1]["messages"]) == PAIRS[5]["messages"]
    assert "tensorflow" not in sys.modules


def test_a_set_is_not_written_over(folder, tmp_path):
    with pytest.raises(ValueError, match="has pairs already"):
        build_dataset(folder, PAIRS)
    with pytest.raises(ValueError, match="has no pairs .*export them"):
        preference_source(tmp_path)


def test_export_writes_either_form(tmp_path):
    export_pairs(PAIRS, tmp_path / "out.jsonl.gz", "released")
    export_pairs(PAIRS, tmp_path / "set", "tfds")
    source = preference_source(tmp_path / "set")
    assert read_pairs(tmp_path / "out.jsonl.gz") == [source[i] for i in range(len(source))] == PAIRS
    with pytest.raises(ValueError, match="not written as 'csv': choose released or tfds"):
        export_pairs(PAIRS, tmp_path / "out.csv", "csv")


# --- Grain ---


def test_hosts_share_an_epoch_in_one_shuffled_order(folder):
    def order(seed):
        return grain.MapDataset.source(preference_source(folder)).seed(seed).shuffle()

    whole = list(order(1))
    assert whole == list(order(1))
    assert whole != PAIRS and whole != list(order(2))
    hosts = [list(order(1)[host::3]) for host in range(3)]
    assert [pair for row in zip(*hosts, strict=True) for pair in row] == whole
    assert sorted(pair["id"] for host in hosts for pair in host) == sorted(pair["id"] for pair in PAIRS)


def test_grain_batches_pairs_after_a_map(folder):
    data = grain.MapDataset.source(preference_source(folder)).map(lambda pair: len(pair["rejected"])).batch(6)
    assert [n for batch in data for n in batch.tolist()] == [len(pair["rejected"]) for pair in PAIRS]
