"""Attributes of config.json: inert ones, ones that must be at their default, and those that a user takes upon them."""

import json
import logging
import shutil

import numpy as np
import pytest
from conftest import GOLDEN

from retmask_jax.cli.main import main
from retmask_jax.generation.language_model import load, outline, save
from retmask_jax.hf import families
from retmask_jax.hf.attributes import _AT_DEFAULT, _INERT
from retmask_jax.hf.families import FAMILIES, from_hf, ignorable
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.runs.context import Context
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.runs.workdir import Workdir, settings_of

LLAMA = json.loads((GOLDEN / "mha" / "config.json").read_text())
# One golden checkpoint of each family.
OF_FAMILY = {
    json.loads((path / "config.json").read_text())["model_type"]: path
    for path in sorted(GOLDEN.iterdir())
    if path.name != "example"
}


# --- inert ---


def test_what_transformers_base_class_writes_is_inert():
    """All of a config of the current version, and its settings of generation, in every family."""
    transformers = pytest.importorskip("transformers")
    plain = {name: value for name, value in transformers.PretrainedConfig().to_dict().items() if name != "model_type"}
    generation = transformers.GenerationConfig._get_default_generation_params()
    written = plain | {name: 1 if value is None else value for name, value in generation.items()}
    assert {"return_dict", "id2label", "chunk_size_feed_forward", "temperature", "top_k"} <= written.keys()
    for family in FAMILIES:
        hf = json.loads((OF_FAMILY[family] / "config.json").read_text())
        assert from_hf(hf | {name: value for name, value in written.items() if name not in hf}) == from_hf(hf), family


def test_what_is_inert_may_have_any_value():
    for name in _INERT - {"model_type"}:
        assert from_hf(LLAMA | {name: {"any": ["value", 3]}}) == from_hf(LLAMA)


def test_what_could_matter_is_in_no_list_of_inert_names():
    """Neither what a reader asks for, nor what must be at its default."""
    assert not _INERT & _AT_DEFAULT.keys()
    for path in OF_FAMILY.values():
        hf = json.loads((path / "config.json").read_text())
        reader = families.Reader(families.text_config(hf))
        reader._seen.clear()
        families.family(hf).read(reader)
        assert not reader._seen & _INERT


@pytest.mark.parametrize("name", _AT_DEFAULT)
def test_what_could_change_the_model_is_only_taken_at_its_default(name):
    assert from_hf(LLAMA | {name: _AT_DEFAULT[name]}) == from_hf(LLAMA)
    for other in (not _AT_DEFAULT[name], "other"):
        with pytest.raises(ValueError, match=f"{name}={other!r}; only .* is supported for llama"):
            from_hf(LLAMA | {name: other})


# --- ignored at the caller's wish ---


def test_an_unknown_attribute_says_how_it_is_ignored():
    with pytest.raises(ValueError, match=r"ignore=\('clip_qkv',\) to rm.load, or --config.ignore=clip_qkv$"):
        from_hf(LLAMA | {"clip_qkv": 8.0})
    both = LLAMA | {"clip_qkv": 8.0, "window": [3]}
    with pytest.raises(ValueError) as error:
        from_hf(both, ["window"])
    assert str(error.value).endswith("""--config.ignore='("window", "clip_qkv")'""") and "window=" not in str(
        error.value
    )
    assert from_hf(both, ("window", "clip_qkv")) == from_hf(LLAMA)
    assert ignorable(both, ("clip_qkv", "hidden_size", "other")) == ("clip_qkv",)


@pytest.mark.parametrize(
    "ignore, message",
    [
        (("clip",), "config.json has no 'clip', which is to be ignored: leave it out"),
        (("head_dim",), "config.json's 'head_dim' is understood, so it is not ignored: leave it out"),
        (("torch_dtype",), "'torch_dtype'"),
        (("clip_qkv", "mlp_bias"), "config.json's 'mlp_bias' is understood"),
        ("clip_qkv", r"ignore is 'clip_qkv'; give a tuple of names, \('clip_qkv',\)"),
    ],
)
def test_a_name_that_cannot_be_ignored_is_refused(ignore, message):
    hf = LLAMA | {"clip_qkv": 8.0, "mlp_bias": False}
    hf.pop("torch_dtype", None)
    with pytest.raises(ValueError, match=message):
        from_hf(hf, ignore)


@pytest.fixture
def clipped(tmp_path):
    """A model whose config.json has an attribute that nothing reads."""

    def make(name="clipped", source=GOLDEN / "mha", **attributes):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        hf = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(hf | (attributes or {"clip_qkv": 8.0})))
        return folder

    return make


def test_a_model_is_loaded_without_regard_to_what_is_ignored_and_keeps_it_when_saved(
    clipped, tmp_path, caplog, read_golden
):
    folder = clipped()
    with pytest.raises(ValueError, match="clip_qkv=8.0"):
        load(folder)
    with caplog.at_level(logging.WARNING, "retmask_jax"):
        lm = load(folder, ignore=("clip_qkv",))
        load(folder, ignore=("clip_qkv",))
    assert caplog.text.count("clip_qkv") == 1 and "ignored in config.json" in caplog.text
    assert outline(folder, ignore=["clip_qkv"]).config == lm.config == read_golden("mha").lm.config
    with pytest.raises(ValueError, match="config.json has no 'clip'"):
        load(folder, ignore=("clip",))
    save(lm, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["clip_qkv"] == 8.0
    with pytest.raises(ValueError, match="clip_qkv=8.0"):
        load(tmp_path / "saved")
    again = load(tmp_path / "saved", ignore=("clip_qkv",)).params
    np.testing.assert_array_equal(again["norm"]["scale"], lm.params["norm"]["scale"])


def test_inspect_ignores_what_it_is_told_to(clipped, capsys):
    folder = clipped(clip_qkv=8.0, window=3)
    assert main(["inspect", str(folder), "--ignore=clip_qkv"]) == 2
    error = capsys.readouterr().err
    assert "window=3" in error and "clip_qkv=8.0" not in error
    assert main(["inspect", str(folder), "--ignore=clip_qkv,window", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "llama"
    assert main(["inspect", str(folder), "--ignore", "clip_qkv,window,wnidow"]) == 2
    assert "config.json has no 'wnidow'" in capsys.readouterr().err


# --- in a run ---


def _context(root, *overrides):
    config = load_recipe("tiny", overrides)
    return Context(config, Workdir.open(root, config))


def test_a_run_ignores_what_its_config_says_in_the_models_that_have_it(clipped, tmp_path):
    folder = clipped(source=BUNDLED)
    with pytest.raises(ValueError, match="clip_qkv=8.0"):
        _ = _context(tmp_path / "work", ("model", str(folder))).outline
    context = _context(tmp_path / "work", ("model", str(folder)), ("ignore", "clip_qkv"))
    assert context.config.ignore == ("clip_qkv",)
    assert context.outline.config.n_layers == 4 and context.lm.config.eos_ids == context.outline.config.eos_ids
    assert context.start_params("float32")["norm"]["scale"].shape == (128,)
    assert context.load(BUNDLED).config == context.outline.config  # which has nothing to ignore
    two = _context(tmp_path / "work", ("model", str(folder)), ("ignore", "('clip_qkv', 'typo')"))
    with pytest.raises(ValueError, match="config.json has no 'typo'"):
        _ = two.outline


def test_what_is_ignored_is_a_part_of_what_a_result_rests_on(tmp_path):
    from retmask_jax.pipeline import registry
    from retmask_jax.runs.stage import settings_read

    plain, ignoring = (_context(tmp_path / name, *more) for name, more in (("a", ()), ("b", (("ignore", "clip_qkv"),))))
    for stage in registry.STAGES.values():
        read = [settings_read(context, stage) for context in (plain, ignoring)]
        assert [settings.get("ignore") for settings in read] == (
            [[], ["clip_qkv"]] if stage.needs_model else [None] * 2
        )
    assert settings_of(ignoring.workdir.config)["ignore"] == ["clip_qkv"]


def test_a_name_to_ignore_is_text(capsys, tmp_path):
    assert main(["detect", "--config=tiny", "--config.ignore=(3,)", f"--workdir={tmp_path / 'work'}"]) == 2
    assert "ignore" in (line := capsys.readouterr().err) and "text" in line
