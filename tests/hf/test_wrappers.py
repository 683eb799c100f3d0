"""Language models inside wrappers: defaults of their class, names of both forms, what is left out, what is saved."""

import json
import shutil

import numpy as np
import pytest
import transformers
from conftest import GOLDEN, WITH_IMAGES
from hub_fine_tunes import FINE_TUNES
from safetensors.numpy import load_file, save_file

from retmask_jax.generation.language_model import load, save
from retmask_jax.hf.families import from_hf
from retmask_jax.hf.weights import source_of
from retmask_jax.hf.wrappers import _CLASS_DEFAULTS, _CLASSES, WRAPPERS, text_config, text_tensors

GEMMA, MISTRAL = WITH_IMAGES


def _hf(name, **changes):
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def test_defaults_are_those_of_transformers_classes():
    for kind, defaults in _CLASS_DEFAULTS.items():
        of_class = transformers.CONFIG_MAPPING[kind]()
        assert {name: getattr(of_class, name) for name in defaults} == defaults
        bare = text_config({"model_type": next(w for w in WRAPPERS if WRAPPERS[w].text == kind), "text_config": {}})
        assert from_hf(bare) == from_hf(of_class.to_dict() | {"model_type": kind})


def test_written_checkpoints_name_transformers_classes():
    pytest.importorskip("torch")
    from transformers.models.auto import modeling_auto

    for wrapper in WRAPPERS.values():
        assert _CLASSES[wrapper.text] in str(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_attributes_of_the_wrapper_are_images_or_the_language_models():
    plain = text_config(_hf(GEMMA, eos_token_id=[2, 9], torch_dtype="bfloat16"))
    assert plain["model_type"] == "gemma3_text" and plain["architectures"] == ["Gemma3ForCausalLM"]
    assert plain["eos_token_id"] == [2, 9] and plain["torch_dtype"] == "bfloat16" and plain["vocab_size"] == 61
    assert not plain.keys() & {"vision_config", "text_config", "image_token_index", "mm_tokens_per_image"}
    assert text_config(plain) == plain
    assert from_hf(plain) == from_hf(_hf(GEMMA, eos_token_id=[2, 9]))


def test_a_null_counts_and_is_not_replaced_by_the_class():
    """Mistral's class has a window of 4096; the config says that there is none."""
    hf = FINE_TUNES["mistralai/Mistral-Small-3.1-24B-Instruct-2503"]
    text = {name: value for name, value in hf["text_config"].items() if name != "sliding_window"}
    assert from_hf(hf).window is None and from_hf(hf | {"text_config": text}).window == 4096


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_config": None}, "config.json of a gemma3 model has no text_config"),
        (
            {"text_config": {"model_type": "gemma3n_text"}},
            "model_type 'gemma3n_text' of the text model in 'gemma3' is not",
        ),
        ({"audio_config": {"layers": 2}}, "not understood.*audio_config={'layers': 2}"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
        ({"tie_word_embeddings": "yes", "text_config": {}}, "tied_embeddings is 'yes'"),
    ],
)
def test_what_is_not_understood_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(_hf(GEMMA, **changes))


def test_an_attribute_of_either_level_may_be_ignored():
    hf = _hf(GEMMA, audio_config={"layers": 2})
    hf["text_config"] |= {"clip_qkv": 8.0}
    assert from_hf(hf, ("audio_config", "clip_qkv")) == from_hf(_hf(GEMMA))


@pytest.fixture
def rewritten(tmp_path):
    """A copy of a golden checkpoint with its tensors under other names; None leaves one out."""

    def rewrite(name, rename, **changes):
        folder = tmp_path / "copy"
        shutil.copytree(GOLDEN / name, folder)
        tensors = load_file(folder / "model.safetensors")
        named = {new: tensor for old, tensor in tensors.items() if (new := rename(old)) is not None}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_hf(name, **changes)))
        return folder

    return rewrite


def _newer(name):
    name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
    return f"model.{name}" if name.startswith(("vision_tower", "multi_modal_projector")) else name


def _older(name):
    name = name.replace("model.language_model.", "language_model.model.").replace("lm_head", "language_model.lm_head")
    return name.removeprefix("model.")


@pytest.mark.parametrize("name, rename", [(GEMMA, _newer), (MISTRAL, _older)])
def test_both_forms_of_names_are_one_model(read_golden, rewritten, name, rename):
    folder = rewritten(name, rename)
    stored = [set(load_file(path / "model.safetensors")) for path in (folder, GOLDEN / name)]
    assert not stored[0] & stored[1]
    lm, same = load(folder), read_golden(name).lm
    assert lm.config == same.config
    np.testing.assert_array_equal(lm.params["embed"]["embedding"], same.params["embed"]["embedding"])
    assert source_of(folder).dtypes == same.source.dtypes


def test_what_is_left_out_is_said_once_with_its_size(caplog):
    with caplog.at_level("INFO", "retmask_jax"):
        load(GOLDEN / GEMMA)
    tensors = load_file(GOLDEN / GEMMA / "model.safetensors")
    images = [tensor for name, tensor in tensors.items() if not name.startswith("language_model")]
    (line,) = (record.message for record in caplog.records if "left out" in record.message)
    size = sum(tensor.nbytes for tensor in images) / 1e9
    assert f"left out {len(images)} tensors about images, {size:.3g} GB" in line


@pytest.mark.parametrize(
    "rename, message",
    [
        (lambda name: name.replace("vision_tower", "audio_tower"), r"has unknown .* tensors: audio_tower\."),
        (lambda name: None if name.endswith("model.norm.weight") else name, "lacks 1 tensors: model.norm.weight"),
    ],
)
def test_tensors_that_are_neither_text_nor_images_and_lost_ones_are_refused(rewritten, rename, message):
    with pytest.raises(ValueError, match=message):
        load(rewritten(GEMMA, rename))


def test_a_tensor_in_both_forms_is_refused():
    tensors = dict.fromkeys(["language_model.model.norm.weight", "model.language_model.norm.weight"], 0)
    with pytest.raises(ValueError, match="tensor model.norm.weight of the language model is stored twice"):
        text_tensors({"model_type": "gemma3"}, tensors)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_what_is_saved_is_a_checkpoint_of_the_language_model_alone(read_golden, tmp_path, name):
    """Its config says all that the wrapper's left to the class; transformers' own reader of it agrees."""
    transformers = pytest.importorskip("transformers")
    golden = read_golden(name)
    save(golden.lm, tmp_path, dtype="bfloat16")
    hf = json.loads((tmp_path / "config.json").read_text())
    wrapper = _hf(name)
    assert hf["model_type"] == wrapper["text_config"]["model_type"] and hf["dtype"] == "bfloat16"
    written = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    theirs = transformers.CONFIG_MAPPING[wrapper["model_type"]](**wrapper).text_config.to_dict()
    others = ("dtype", "architectures", "_name_or_path")
    same = {key: value for key, value in theirs.items() if key not in others}
    assert {key: written[key] for key in same} == same
    assert load(tmp_path).config == golden.lm.config
