"""HF configs of every family: both forms, windows and RoPE per layer kind, and what is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import GOLDEN, VARIANTS

from retmask_jax.hf.families import FAMILIES, from_hf, to_hf
from retmask_jax.model.config import ModelConfig, Rope, shortest_pattern
from retmask_jax.model.interventions import mask_rope
from retmask_jax.model.rope import inverse_frequencies, rope_pairs


def _hf(name, *without, **changes):
    hf = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    return {key: value for key, value in hf.items() if key not in without}


def test_every_family_has_two_checkpoints():
    families = [_hf(name)["model_type"] for name in VARIANTS]
    assert {family: families.count(family) >= 2 for family in FAMILIES} == dict.fromkeys(FAMILIES, True)


# The form of configs on the hub: RoPE at the top, windows by rule instead of by list.
HUB_FORMS = {
    "olmo3": (
        ("rope_parameters", "layer_types"),
        {
            "rope_theta": 900.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "mscale": 1.2,
                "mscale_all_dim": 0.7,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "gemma3": (
        ("rope_parameters", "layer_types"),
        {
            "rope_theta": 3e4,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 6,
            "cache_implementation": "hybrid",
        },
    ),
    "gemma2": (
        ("rope_parameters", "layer_types"),
        {
            "rope_theta": 1e4,
            "hidden_act": "gelu_pytorch_tanh",
            "sliding_window_size": 9,
            "cache_implementation": "hybrid",
        },
    ),
    "qwen2_window_yarn": (
        ("rope_parameters", "layer_types"),
        {
            "rope_theta": 300.0,
            "use_mrope": False,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
    "phi3_longrope": (
        ("rope_parameters",),
        {
            "rope_theta": 700.0,
            "partial_rotary_factor": 0.5,
            "auto_map": {"AutoConfig": "x"},
            "embd_pdrop": 0.0,
            "rope_scaling": {"type": "su", "short_factor": [1.131, 1.149], "long_factor": [7.7, 2.643]},
        },
    ),
    "qwen3_moe": (("rope_parameters", "num_local_experts"), {"rope_theta": 1e4, "num_experts": 7}),
}


@pytest.mark.parametrize("name", HUB_FORMS)
def test_the_form_on_the_hub_reads_the_same(name):
    without, added = HUB_FORMS[name]
    assert from_hf(_hf(name, *without) | added) == from_hf(_hf(name))


def test_layers_are_a_pattern_its_repeats_and_a_tail():
    olmo3, gemma3 = from_hf(_hf("olmo3")), from_hf(_hf("gemma3"))
    assert (olmo3.layer_pattern, olmo3.repeats, olmo3.tail) == (("sliding",) * 3 + ("full",), 1, ("sliding",) * 2)
    assert (len(gemma3.layer_pattern), gemma3.repeats, gemma3.tail) == (6, 1, ("sliding",) * 2)
    assert from_hf(_hf("qwen2_window_yarn")).layer_pattern == ("full", "full", "sliding", "sliding")
    assert from_hf(_hf("mistral_window")).layer_pattern == ("sliding",)
    smollm3, windowed = from_hf(_hf("smollm3")), from_hf(_hf("smollm3_window"))
    assert (smollm3.rope_pattern, smollm3.repeats, smollm3.tail) == ((True, True, False), 1, ("full",) * 2)
    assert smollm3.layers_without_rope == (2,)
    assert windowed.layer_pattern == ("sliding", "full", "full") and windowed.rope_pattern == (False, True, True)
    assert windowed.layers_without_rope == (0, 3) and windowed.ropes.keys() == {"full"}
    assert from_hf(_hf("smollm3", "layer_types", "no_rope_layers")) == smollm3
    assert from_hf(_hf("smollm3", no_rope_layers=[1] * 7)).rope_pattern == (True,)
    moe = from_hf(_hf("qwen3_moe"))
    assert (moe.expert_pattern, moe.repeats, moe.tail) == ((False, True), 1, ("full",))


@pytest.mark.parametrize(
    "layers, pattern",
    [("aaaa", "a"), ("ababa", "ab"), ("aabaab", "aab"), ("aab", "aab"), ("abb", "abb"), ("aabaa", "aab")],
)
def test_the_shortest_pattern(layers, pattern):
    assert shortest_pattern(tuple(layers)) == tuple(pattern)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("olmo3", {"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\]; .* each of 6 layers"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 6}, "must name full_attention or sliding_attention"),
        ("olmo3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters with rope_type; .* per layer type"),
        ("olmo3", {"sliding_window": None}, "window is None"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "sliding layers .* use_sliding_window=False"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True; only False is supported for qwen2"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True; only False"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"sliding_window_size": 5}, "sliding_window=9; only 5"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0; only None"),
        (
            "phi3_shortrope",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0, 2.0],
                    "long_factor": [1.0, 2.0, 3.0],
                    "original_max_position_embeddings": 48,
                }
            },
            "longrope has 2 factors, a head 3 rotary pairs",
        ),
        ("phi3_shortrope", {"original_max_position_embeddings": 32}, "two values for original_max_position_embeddings"),
        ("phi3_longrope", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' takes"),
        (
            "dynamic",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 8,
                }
            },
            "starts from max_position_embeddings",
        ),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier=0; it must be a positive number"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling='8'; it must be a positive number"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]; .* for each of 5 layers"),
        ("smollm3", {"no_rope_layers": [2, 1, 1, 1, 1]}, r"it must have 1 \(RoPE\) or 0"),
        ("smollm3", {"no_rope_layers": [0] * 5}, "at least one layer must have RoPE"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5}, "sliding layers in layer_types but no window in use"),
        ("smollm3", {"attention_bias": True}, "attention_bias=True; only False"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 experts per token of only 5"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts=0; it must be a whole number"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 3}, "not understood.*shared_expert_intermediate_size=3"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(name, changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(_hf(name) | changes)


def test_a_context_stretched_by_rope_counts():
    """Configs name the context before stretching or behind it."""
    assert from_hf(_hf("dynamic")).max_length == 48
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    qwen = _hf("qwen3", rope_parameters=yarn, max_position_embeddings=40960)
    assert from_hf(qwen).max_length == 131072
    assert from_hf(qwen | {"max_position_embeddings": 200000}).max_length == 200000


# Golden checkpoint: the form in which a model of its config that was made here is written.
WRITTEN = {
    "gqa_tied": "llama",
    "llama3_mqa": "llama",
    "qwen3": "qwen3",
    "qwen3_mqa_yarn": "qwen3",
    "olmo2": "olmo3",
    "olmo3": "olmo3",
    "olmo3_full": "olmo3",
    "granite": "granite",
    "granite_mqa": "granite",
    "smollm3": "smollm3",
    "smollm3_window": "smollm3",
    "mistral_window": "smollm3",  # whose layers may all slide, and all have RoPE
}


@pytest.mark.parametrize("name", ["gemma3", "phi3_longrope", "qwen3_moe", "mixtral_window"])
def test_a_model_that_no_written_form_can_say_is_not_written(name):
    with pytest.raises(ValueError, match="written in llama's form, which cannot say"):
        to_hf(from_hf(_hf(name)))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_config_made_here_is_written_in_a_form_that_can_say_it(name):
    config = from_hf(_hf(name))
    hf = to_hf(config)
    assert from_hf(hf) == config and hf["model_type"] == WRITTEN[name]


def test_scales_and_layers_without_rope_together_are_in_no_form():
    config = dataclasses.replace(from_hf(_hf("smollm3")), residual_scale=0.5)
    with pytest.raises(
        ValueError,
        match=r"granite's form, which cannot say \['layer_pattern', 'rope_pattern'\]; smollm3's form.*residual",
    ):
        to_hf(config)


def test_frequencies_that_depend_on_the_length_follow_the_longest_row(read_golden, close):
    golden = read_golden("phi3_longrope")  # 16 tokens are short, more are long
    tokens = golden.tokens[:, :20]
    short = golden.lm.logits(tokens, lengths=np.array([16, 9]))
    long = golden.lm.logits(tokens, lengths=np.array([16, 17]))
    close(long, golden.lm.logits(tokens), 0)
    assert np.abs(short - long).max() > 1e-2
    close(short[:, :16], golden.lm.logits(tokens[:, :16]), 1e-6)
    out = golden.lm.generate(tokens, np.array([5, 4]), 12, stop_ids=())
    alone = golden.lm.generate(tokens[[1, 1]], np.array([4, 4]), 12, stop_ids=())
    assert not np.array_equal(out.tokens[1], alone.tokens[0])  # 17 tokens there, 16 here


def test_dynamic_frequencies_grow_with_the_text(read_golden):
    config = read_golden("dynamic").lm.config
    plain = inverse_frequencies(dataclasses.replace(config, rope=Rope(theta=500.0)))
    np.testing.assert_allclose(inverse_frequencies(config, length=16), plain, rtol=1e-6)
    longer = np.asarray(inverse_frequencies(config, length=40))
    assert longer[0] == plain[0] and (longer[1:] < plain[1:]).all()


def test_pairs_are_those_that_rotate():
    config = from_hf(_hf("phi3_longrope"))
    assert (config.head_dim, config.n_pairs) == (8, 2)
    assert rope_pairs(config, 1, "low") == [1]
    assert mask_rope(config, [(0, 0)], [1]).rope_mask.shape == (3, 4, 2)
    with pytest.raises(ValueError, match="rotary pair 2 is out of range"):
        mask_rope(config, [(0, 0)], [2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm_placement": "around"}, "norm_placement is 'around'; it must be one of pre, post, both"),
        ({"layer_pattern": ("local",)}, "layer kind 'local' is unknown"),
        ({"layer_pattern": ("sliding",)}, "window is None"),
        (
            {
                "layer_pattern": ("full",) * 3,
                "expert_pattern": (True, False),
                "n_experts": 2,
                "experts_per_token": 1,
                "expert_size": 3,
            },
            "expert_pattern has 2 entries, layer_pattern 3",
        ),
        ({"attention_softcap": -1.0}, "attention_softcap is -1.0; it must be a positive number"),
        ({"residual_scale": 0.0}, "residual_scale is 0.0; it must be a positive number"),
        (
            {"layer_pattern": ("full",) * 3, "rope_pattern": (True, False)},
            "rope_pattern has 2 entries, layer_pattern 3",
        ),
        ({"rope_pattern": (False,)}, r"rope_pattern is \(False,\); at least one layer must have RoPE"),
        ({"rotary_dim": 12}, "rotary width 12 must be even and at most head_dim 8"),
        ({"qkv_bias": 1}, "qkv_bias is 1; it must be one of False, True"),
    ],
)
def test_a_config_is_checked_when_it_is_made(changes, message):
    sizes = dict(vocab_size=61, hidden_size=32, mlp_size=40, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=message):
        ModelConfig(**sizes, max_length=300, **changes)
