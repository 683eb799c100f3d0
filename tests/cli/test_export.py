"""`retmask export`: the card beside an exported model, and the model on a hub."""

import dataclasses
import json
import re

import numpy as np
import pytest
from helpers_documents import tables
from helpers_results import UP, make_results, stored

import retmask_jax as rm
from retmask_jax.cli.main import main
from retmask_jax.hf import hub
from retmask_jax.reports.card.model_card import Origin, masked_card, trained_card

NAME, TOKEN = "owner/without-heads", "hf_aSecretOfMine"
VERSIONS = {"retmask_jax": "0.2.0", "jax": "0.10"}
ORIGIN = Origin("some/model", "some/model", "v1", "0123456789abcdef", (4, 8), NAME, VERSIONS)


def front_matter(card):
    """What the hub reads of a card, by its own library."""
    from huggingface_hub import ModelCard

    return ModelCard(card).data.to_dict()


def results():
    return stored(make_results(tasks=("needle", "closed"), arms=("retmask", "sft_filtered"), changes={"needle": UP}))


def settings(**changes):
    from retmask_jax.configs import default

    return default.get_config().train.to_dict() | changes


# --- the card ---


def test_the_card_of_a_masked_model_has_its_heads_and_what_masking_them_does():
    made = results()
    heads = made["detect"].heads
    card = masked_card(ORIGIN, heads, made["detect"], made["knockout"])
    assert front_matter(card) == {
        "base_model": "some/model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["retmask_jax", "retrieval-heads", "masked-heads"],
    }
    assert "# without-heads\n\nsome/model with 3 of its 32 attention heads masked in the weights" in card
    assert "1-0, 1-1, 1-2 (layer-head, from 0)." in card and "a score of 0.1 or more; the best head has 0.900" in card
    assert f"rm.mask_heads(lm.config, {[tuple(head) for head in heads]})" in card
    (table,) = tables(card)
    assert table[0] == ["task", "base model", "this model", "change", "n"]
    rows = {row[0]: row[1:] for row in table[1:]}
    measured = {(row.task, row.kind): row for row in made["knockout"].rows if row.draw == 0}
    for task in ("needle", "closed"):
        untouched, masked = measured[task, "none"], measured[task, "retrieval"]
        assert rows[task] == [
            *(f"{number.value:.3f} [{number.low:.3f}, {number.high:.3f}]" for number in (untouched, masked)),
            f"{masked.change.value:+.3f} [{masked.change.low:+.3f}, {masked.change.high:+.3f}]",
            str(masked.n),
        ]
    assert rows["text loss (nats per token)"][2] == "–" and "None" not in card


def test_the_card_of_a_trained_model_says_how_it_was_trained_and_what_changed():
    made = results()
    run = made["train"].runs["retmask-0"]
    card = trained_card(ORIGIN, "retmask-0", run, settings(lora_rank=8), made["detect"], made["pairs"], made["eval"])
    assert front_matter(card)["tags"] == ["retmask_jax", "retrieval-heads", "dpo"]
    training, effects = tables(card)
    said = {row[0]: row[1] for row in training[1:]}
    assert said["loss"] == "sigmoid" and said["learning rate"] == "5e-07" and said["lora rank"] == "8"
    assert said["arm"].startswith("`retmask`: normal answers rather than")
    assert said["trained"] == "adapters of all weights, merged into them"
    assert said["training examples"] == str(run.examples) and said["seed"] == "0"
    rows = {row[0]: row[1:] for row in effects[1:]}
    ours = {row.task: row for row in made["eval"].rows if row.model == "retmask-0"}
    assert {name.split(" (")[0] for name in rows} == set(ours)
    change = ours["needle"].change
    assert rows["needle"][2] == f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" and change.value > 0
    for heads, words in (
        ([(1, 0), (1, 1), (1, 2)], "they"),
        ([(2, 3)], "other heads than these, 2-3 (layer-head, from 0),"),
    ):
        pairs = dataclasses.replace(made["pairs"], heads={"retmask-0": heads})
        card = trained_card(ORIGIN, "retmask-0", run, settings(), made["detect"], pairs, None)
        assert f"While the rejected answers were sampled, {words} were masked." in card
    other = trained_card(
        ORIGIN, "sft_filtered-0", made["train"].runs["sft_filtered-0"], settings(), made["detect"], None, None
    )
    assert (
        "Nothing was measured of this model" in other
        and "lora" not in other
        and "dpo" not in front_matter(other)["tags"]
    )


def test_what_lies_on_this_machine_has_no_base_on_the_hub():
    origin = dataclasses.replace(ORIGIN, base="model.Q4.gguf", hub_id=None, revision=None)
    card = masked_card(origin, [(1, 0)], None, None)
    assert "base_model" not in front_matter(card) and "license" not in front_matter(card)
    assert (
        "Base model: `model.Q4.gguf`; hash of its files `0123456789abcdef`. The licence is that of the base model."
        in card
    )
    assert "They were chosen by hand." in card and 'rm.load("model.Q4.gguf")' in card
    assert hub.hub_id("bundled") is None and hub.hub_id("owner/name") == "owner/name" and hub.hub_id("/no/such") is None


# --- the command ---


@pytest.fixture
def export(tmp_path):
    """Heads 1-0 and 1-2 masked in the bundled model, in the folder `masked`."""

    def run(*flags):
        flags = (*("--heads", "1-0", "1-2"), f"--out={tmp_path / 'masked'}", f"--workdir={tmp_path / 'work'}", *flags)
        return main(["export", "--config=tiny", *flags])

    return run


def refused(capsys, code):
    error = capsys.readouterr().err
    assert code == 2 and error.count("retmask: ") == 1 and error.strip().splitlines()[-1].startswith("retmask: ")
    assert TOKEN not in error
    return error.strip().splitlines()[-1]


def test_the_exported_folder_has_a_card_and_loads_as_the_card_says(export, tmp_path, monkeypatch):
    assert export() == 0
    card = (tmp_path / "masked/README.md").read_text()
    assert "bundled with 2 of its 32 attention heads masked" in card and str(tmp_path) not in card
    here, masked = re.findall(r"```python\n(import retmask_jax.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    loaded, base = {}, {}
    exec(here, loaded)
    exec(masked, base)
    kernel, expected = (
        np.array(scope["lm"].params["blocks"]["0"]["attn"]["o"]["kernel"]).reshape(4, 8, -1) for scope in (loaded, base)
    )
    expected[np.asarray(base["mask"].head_mask)] = 0
    np.testing.assert_array_equal(kernel, expected)


def test_a_card_is_loaded_in_transformers_as_it_says(export, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    assert export() == 0
    card = (tmp_path / "masked/README.md").read_text()
    (code,) = re.findall(r"```python\n(from transformers.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    tokens = scope["tokenizer"](["<bos> the home of emma : rome ."], return_tensors="np")["input_ids"]
    with torch.no_grad():
        theirs = scope["model"].float()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(rm.load(tmp_path / "masked").logits(tokens), theirs, atol=1e-4)


def test_a_model_is_pushed_as_it_was_written_and_only_if_asked(export, tmp_path, upload_hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert export() == 0 and upload_hub.requests == []
    for path in (tmp_path / "masked").iterdir():
        path.rename(tmp_path / path.name)
    assert export(f"--push={NAME}") == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "masked").iterdir()}
    assert upload_hub.models == {NAME: written} and {"README.md", "model.safetensors", "config.json"} <= written.keys()
    sent = {authorization for path, authorization, _ in upload_hub.requests if re.search("/(models|repos)/", path)}
    assert sent == {f"Bearer {TOKEN}"}
    assert f'rm.load("{NAME}")' in written["README.md"].decode()
    assert f"pushed to {upload_hub.url}/{NAME}" in capsys.readouterr().out
    create = next(json.loads(body) for path, _, body in upload_hub.requests if path.endswith("/create"))
    assert (create["organization"], create["name"]) == tuple(NAME.split("/"))


def test_what_cannot_be_pushed_is_kept_and_said_in_one_line(export, tmp_path, upload_hub, monkeypatch, capsys):
    from huggingface_hub import constants

    def again():
        for path in (tmp_path / "masked").iterdir():
            path.unlink()
        line = refused(capsys, export(f"--push={NAME}"))
        assert (tmp_path / "masked/README.md").exists() and (tmp_path / "masked/model.safetensors").exists()
        assert line.endswith(f"; then `hf upload {NAME} {tmp_path / 'masked'}`") and "is written and kept" in line
        return line

    (tmp_path / "masked").mkdir()
    assert "nobody is logged in: set HF_TOKEN or run `hf auth login`" in again()
    assert upload_hub.requests == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    upload_hub.refusal = 403
    assert "refused the token (403): make one that may write there" in again()
    upload_hub.refusal = 503
    assert "could not take it (503): try again later" in again()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network" in again()


def test_offline_is_said(tmp_path, upload_hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set: unset it; then `hf upload"):
        hub.push(tmp_path, NAME)
    assert upload_hub.requests == []


@pytest.mark.parametrize("name", ["name", "owner/na me", "a/b/c", "owner/--name"])
def test_a_name_that_the_hub_has_not_is_refused_before_anything_is_written(export, tmp_path, capsys, name):
    assert "is no name of a model on the hub, owner/name" in refused(capsys, export(f"--push={name}"))
    assert not (tmp_path / "masked").exists()


def test_pairs_are_no_model_to_push(export, tmp_path, capsys):
    line = refused(capsys, export("--what=pairs-retmask-0", f"--push={NAME}"))
    assert f"--push={NAME} goes with a model, and --what is 'pairs-retmask-0'" in line
