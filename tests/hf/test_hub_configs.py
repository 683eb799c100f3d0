"""The hub's configs of fine-tunes, conversions and wrappers are read as they are: sizes, fields, the form of transformers 5."""

import json

import jax
import pytest
from hub_fine_tunes import FINE_TUNES, MEMORY, PARAMETERS, READ

from retmask_jax.hf.families import from_hf
from retmask_jax.hf.hub import config_folder
from retmask_jax.hf.summary import count_parameters, describe, rows
from retmask_jax.hf.wrappers import WRAPPERS
from retmask_jax.model.sharding import param_shapes


def test_the_file_says_of_each_config_where_it_is_from():
    assert len(FINE_TUNES) >= 20
    assert FINE_TUNES.keys() == PARAMETERS.keys() == {*READ, *MEMORY}


@pytest.mark.parametrize("model", FINE_TUNES)
def test_parameters_are_as_published(model):
    config = from_hf(FINE_TUNES[model])
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config))) == PARAMETERS[model]
    assert count_parameters(config)[0] == PARAMETERS[model]


@pytest.mark.parametrize("model", FINE_TUNES)
def test_the_form_that_transformers_writes_now_is_the_same_model(model):
    transformers = pytest.importorskip("transformers")
    hf = FINE_TUNES[model]
    written = transformers.CONFIG_MAPPING[hf["model_type"]](**json.loads(json.dumps(hf))).to_diff_dict()
    text = written.get("text_config", written)
    assert "rope_parameters" in text and "rope_theta" not in text
    assert from_hf(written) == from_hf(hf)


# Of each model what makes it another than the plain one of its family.
FIELDS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {"n_heads": 9, "n_kv_heads": 3, "head_dim": 64, "tied_embeddings": True},
    "HuggingFaceTB/SmolLM3-3B": {
        "layer_pattern": ("full",) * 4,
        "rope_pattern": (True, True, True, False),
        "repeats": 9,
        "layers_without_rope": tuple(range(3, 36, 4)),
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {"layer_pattern": ("full",), "window": None, "qkv_bias": True},
    "tiiuae/Falcon3-7B-Instruct": {"head_dim": 256, "eos_ids": (11,)},
    "microsoft/Phi-4-mini-instruct": {"head_dim": 128, "n_pairs": 48, "rotary_dim": 96, "max_length": 131072},
    "ibm-granite/granite-3.3-2b-instruct": {
        "embed_scale": 12.0,
        "residual_scale": 0.22,
        "logit_scale": 0.125,
        "attention_scale": 1 / 64,
        "head_dim": 64,
    },
    "HuggingFaceH4/zephyr-7b-beta": {"layer_pattern": ("sliding",), "window": 4096},
    "google/gemma-3-4b-it": {
        "n_heads": 8,
        "n_kv_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_length": 131072,
        "window": 1024,
        "repeats": 5,
        "tail": ("sliding",) * 4,
        "eos_ids": (1, 106),
        "tied_embeddings": True,
        "attention_scale": 1 / 16,
    },
    "google/gemma-3-27b-it": {"attention_scale": 168**-0.5, "head_dim": 128, "tail": ("sliding",) * 2},
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": {
        "layer_pattern": ("full",),
        "head_dim": 128,
        "tied_embeddings": False,
        "max_length": 131072,
    },
}


@pytest.mark.parametrize("model", FIELDS)
def test_fields_are_those_of_the_model(model):
    config = from_hf(FINE_TUNES[model])
    assert {name: getattr(config, name) for name in FIELDS[model]} == FIELDS[model]


def test_rope_of_a_wrappers_text_model():
    gemma = from_hf(FINE_TUNES["google/gemma-3-4b-it"])
    assert (gemma.ropes["full"].theta, gemma.ropes["full"].factor, gemma.ropes["sliding"].theta) == (1e6, 8.0, 1e4)
    assert gemma == from_hf(FINE_TUNES["unsloth/gemma-3-4b-it"] | {"bos_token_id": 2})
    assert from_hf(FINE_TUNES["mistralai/Mistral-Small-3.1-24B-Instruct-2503"]).rope.theta == 1e9


@pytest.mark.parametrize("model", FINE_TUNES)
def test_what_inspect_shows(tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps(FINE_TUNES[model]))
    facts = describe(config_folder(tmp_path))
    table, wrapper = dict(rows(facts)), FINE_TUNES[model]["model_type"]
    assert facts["parameters"] == PARAMETERS[model]
    assert table["family"] == facts["family"] + (f", the text part of {wrapper}" if wrapper in WRAPPERS else "")


def test_scales_and_layers_without_rope_are_shown(tmp_path):
    def table(model):
        (tmp_path / "config.json").write_text(json.dumps(FINE_TUNES[model]))
        return dict(rows(describe(tmp_path)))

    granite, smollm3 = table("ibm-granite/granite-3.3-2b-instruct"), table("HuggingFaceTB/SmolLM3-3B")
    assert granite["scales"] == "embeddings by 12, scores by 0.015625, residual by 0.22, logits by 0.125"
    assert "without RoPE" not in granite
    assert smollm3["scales"] == "none" and smollm3["without RoPE"] == "9 of 36 layers, so no rotary masks"


def test_a_conversion_to_four_bits_is_refused_as_such():
    hf = FINE_TUNES["microsoft/Phi-4-mini-instruct"]
    bits = {"group_size": 64, "bits": 4}
    for changes in ({"quantization": bits}, {"quantization": bits, "quantization_config": bits}):
        with pytest.raises(ValueError, match=r"the checkpoint is quantised .*'bits': 4.*use the unquantised one"):
            from_hf(hf | changes)
    assert from_hf(hf | {"quantization": None, "quantization_config": {}}) == from_hf(hf)
