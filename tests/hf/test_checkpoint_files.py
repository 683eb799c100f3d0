"""Files of a checkpoint folder: named, not listed; no path leads out of it; tokenizers run no code."""

import json
import shutil

import pytest

from retmask_jax.cli.main import main
from retmask_jax.generation.language_model import load, save
from retmask_jax.hf.checkpoint_files import CHECKPOINT_TEXTS, checkpoint_files, weight_names
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.hf.tokenizer import load_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path):
    """A copy of the bundled model."""
    return shutil.copytree(BUNDLED, tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(model, name):
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    for call in (weight_names, load, checkpoint_files):
        with pytest.raises(ValueError, match="index.json names .*, which is no file next to it") as caught:
            call(model)
        assert "\n" not in str(caught.value)


def test_the_files_of_a_checkpoint_are_known_by_name(model, read_golden):
    (model / "notes.json").write_text("{}")
    (model / "generation_config.json").write_text("{}")
    assert [path.name for path in checkpoint_files(model)] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ]
    sharded = [path.name for path in checkpoint_files(read_golden("sharded").folder)]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sharded == ["config.json", INDEX, *shards, "generation_config.json"]


def test_only_known_files_are_copied(model, tmp_path):
    for name in ("secrets.json", "notes.txt", "trainer_state.json", "code.model"):
        (model / name).write_text("{}")
    save(load(model), tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_what_a_link_brings_in_from_outside_is_not_copied(model, tmp_path, caplog):
    outside = tmp_path / "secret"
    outside.write_text('{"secret": "xyzzy"}')
    for name in ("generation_config.json", "vocab.txt"):
        (model / name).symlink_to(outside)
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (model / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    lm = load(model)
    save(lm, tmp_path / "new")
    assert {"generation_config.json", "vocab.txt"}.isdisjoint(path.name for path in (tmp_path / "new").iterdir())
    assert not any(b"xyzzy" in path.read_bytes() for path in (tmp_path / "new").iterdir())
    assert f"{model / 'vocab.txt'} is a link out of the model's folder, to {outside}" in caplog.text
    # The tokenizer was read: it is written as it is in memory.
    text = "the home of emma : rome ."
    assert load(tmp_path / "new").tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]


def test_a_snapshot_in_the_cache_of_the_hub_is_made_of_links_and_is_copied(tmp_path):
    repo = tmp_path / "models--a--b"
    snapshot, blobs = repo / "snapshots" / "0123", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(path for path in BUNDLED.iterdir() if path.is_file()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    save(load(snapshot), tmp_path / "new")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        assert (tmp_path / "new" / name).read_bytes() == (BUNDLED / name).read_bytes()
        assert not (tmp_path / "new" / name).is_symlink()


def test_links_within_the_folder_and_to_the_folder_are_followed(model, tmp_path):
    (model / "tokenizer.json").rename(model / "mine.json")
    (model / "tokenizer.json").symlink_to("mine.json")
    (tmp_path / "link").symlink_to(model)
    save(load(tmp_path / "link"), tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (BUNDLED / "tokenizer.json").read_bytes()


def test_links_in_the_target_are_replaced_and_not_written_through(model, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        (tmp_path / f"other {name}").write_text("untouched")
        (new / name).symlink_to(tmp_path / f"other {name}")
    save(load(model), new)
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        assert (tmp_path / f"other {name}").read_text() == "untouched"
        assert not (new / name).is_symlink()


def test_a_tokenizer_that_needs_code_is_refused_and_nothing_of_it_runs(model, tmp_path):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    auto = {"AutoTokenizer": ["tokenization_own.Own", None]}
    (model / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": auto}))
    assert load_tokenizer(model)  # transformers has a class for it
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": auto, "tokenizer_class": "Own"}))
    with pytest.raises(ValueError, match="needs code of its own .auto_map in tokenizer_config.json., which") as caught:
        load_tokenizer(model)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def _folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, *CHECKPOINT_TEXTS])
def test_a_folder_in_the_place_of_a_file_is_refused_in_one_line(model, name):
    _folder(model / name)
    with pytest.raises(ValueError, match=f"{name} is a.*(folder|file)") as caught:
        load(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("config.json", b"\xff"),
        ("config.json", b"[" * 100_000),
        (INDEX, b"[]"),
        (INDEX, b"\xff"),
    ],
)
def test_damaged_files_of_a_model_are_refused_in_one_line(model, name, content):
    (model / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}|tokenizer of .* cannot be read") as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_export_onto_a_link_that_leads_nowhere_or_below_a_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    for out, message in (
        ("link", "is a link to nowhere, which is not there"),
        ("file/new", "is a file: choose another"),
    ):
        assert main(["export", "--heads", "1-0", f"--out={out}", "--workdir=work"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
    (tmp_path / "real").mkdir()
    (tmp_path / "to real").symlink_to("real")
    assert main(["export", "--heads", "1-0", "--out=to real", "--workdir=work"]) == 0
    assert (tmp_path / "real" / "model.safetensors").is_file()
