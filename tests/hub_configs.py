"""config.json of published models as the hub has it (`rope_theta` and `rope_scaling` at the top), and their sizes."""

# Unique parameters: tied embeddings count once.
PARAMETERS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
    "allenai/Olmo-3-7B-Think": 7_298_011_136,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
}
# Parameters that work on one token: all but the experts it is not sent to.
ACTIVE = {"mistralai/Mixtral-8x7B-v0.1": 12_879_925_248, "Qwen/Qwen3-30B-A3B": 3_353_032_704}

_SHARED = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def _size(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


def _llama3(factor: float, **changes) -> dict:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return (
        _SHARED
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": scaling,
            "rope_theta": 500000.0,
            "transformers_version": "4.42.3",
        }
        | changes
    )


def _qwen2(**changes) -> dict:
    return (
        _SHARED
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_mrope": False,
            "use_sliding_window": False,
            "transformers_version": "4.40.1",
        }
        | changes
    )


def _qwen3(**changes) -> dict:
    return (
        _SHARED
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
            "transformers_version": "4.51.0",
        }
        | changes
    )


def _olmo(**changes) -> dict:
    return (
        _SHARED
        | {
            "attention_bias": False,
            "eos_token_id": 100257,
            "pad_token_id": 100277,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
        }
        | changes
    )


def _phi3(**changes) -> dict:
    return (
        _SHARED
        | {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "attention_bias": False,
            "bos_token_id": 1,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "embd_pdrop": 0.0,
            "eos_token_id": 32000,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }
        | changes
    )


_OLMO3 = _size(4096, 11008, 32, 32, 32, 100278, 65536) | _olmo(
    architectures=["Olmo3ForCausalLM"],
    model_type="olmo3",
    sliding_window=4096,
    use_cache=False,
    layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 8,
    rope_scaling={
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
)

# LongRoPE's factors of Phi-3.5-mini, 48 each, to the two digits that they have behind float32's noise.
_LONG = [
    1.08,
    1.11,
    1.14,
    1.34,
    1.59,
    1.6,
    1.62,
    2.62,
    3.23,
    3.23,
    4.79,
    7.4,
    7.7,
    9.09,
    12.2,
    17.67,
    24.46,
    28.57,
    30.42,
    30.84,
    32.59,
    32.93,
    42.32,
    44.96,
    50.34,
    50.45,
    57.55,
    57.93,
    58.21,
    60.14,
    62.61,
    62.62,
    62.71,
    63.14,
    63.14,
    63.77,
    63.93,
    63.96,
    63.97,
    64.03,
    64.07,
    64.08,
    64.12,
    64.41,
    64.48,
    64.51,
    64.53,
    64.84,
]
_SHORT = [
    1.0,
    1.02,
    1.03,
    1.03,
    1.05,
    1.05,
    1.05,
    1.05,
    1.05,
    1.07,
    1.1,
    1.11,
    1.16,
    1.16,
    1.17,
    1.29,
    1.34,
    1.68,
    1.79,
    1.82,
    1.85,
    1.88,
    1.91,
    1.94,
    1.99,
    2.02,
    2.02,
    2.02,
    2.02,
    2.02,
    2.02,
    2.03,
    2.03,
    2.03,
    2.03,
    2.03,
    2.03,
    2.03,
    2.03,
    2.03,
    2.08,
    2.09,
    2.19,
    2.22,
    2.59,
    2.73,
    2.75,
    2.84,
]

CONFIGS = {
    "meta-llama/Llama-3.1-8B-Instruct": _llama3(8.0, tie_word_embeddings=False)
    | _size(4096, 14336, 32, 32, 8, 128256, 131072),
    "meta-llama/Llama-3.2-1B-Instruct": _llama3(32.0, tie_word_embeddings=True, head_dim=64)
    | _size(2048, 8192, 16, 32, 8, 128256, 131072),
    "meta-llama/Llama-2-7b-hf": _SHARED
    | _size(4096, 11008, 32, 32, 32, 32000, 4096)
    | {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
    },
    "mistralai/Mistral-7B-v0.3": _SHARED
    | _size(4096, 14336, 32, 32, 8, 32768, 32768)
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.42.0.dev0",
    },
    "Qwen/Qwen2.5-7B": _qwen2(max_window_layers=28, rms_norm_eps=1e-06) | _size(3584, 18944, 28, 28, 4, 152064, 131072),
    "Qwen/Qwen2.5-14B": _qwen2(max_window_layers=48, rms_norm_eps=1e-05)
    | _size(5120, 13824, 48, 40, 8, 152064, 131072),
    "Qwen/Qwen3-0.6B": _qwen3(max_window_layers=28, tie_word_embeddings=True)
    | _size(1024, 3072, 28, 16, 8, 151936, 40960),
    "Qwen/Qwen3-8B": _qwen3(max_window_layers=36, tie_word_embeddings=False)
    | _size(4096, 12288, 36, 32, 8, 151936, 40960),
    "Qwen/Qwen3-30B-A3B": _qwen3(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        max_window_layers=48,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_experts=128,
        num_experts_per_tok=8,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
        tie_word_embeddings=False,
    )
    | _size(2048, 6144, 48, 32, 4, 151936, 40960),
    "allenai/OLMo-2-1124-7B": _olmo(architectures=["Olmo2ForCausalLM"], model_type="olmo2")
    | _size(4096, 11008, 32, 32, 32, 100352, 4096),
    "allenai/Olmo-3-7B-Instruct": _OLMO3,
    "allenai/Olmo-3-7B-Think": _OLMO3,
    "google/gemma-2-9b": _SHARED
    | _size(3584, 14336, 42, 16, 8, 256000, 8192)
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "transformers_version": "4.42.0.dev0",
    },
    "google/gemma-3-1b-it": _size(1152, 6912, 26, 4, 1, 262144, 32768)
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "use_cache": True,
    },
    "microsoft/Phi-3-mini-4k-instruct": _phi3(rope_scaling=None, sliding_window=2047)
    | _size(3072, 8192, 32, 32, 32, 32064, 4096),
    "microsoft/Phi-3.5-mini-instruct": _phi3(
        rope_scaling={"long_factor": _LONG, "short_factor": _SHORT, "type": "longrope"}, sliding_window=262144
    )
    | _size(3072, 8192, 32, 32, 32, 32064, 131072),
    "mistralai/Mixtral-8x7B-v0.1": _SHARED
    | _size(4096, 14336, 32, 32, 8, 32000, 32768)
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.36.0.dev0",
    },
}


if __name__ == "__main__":  # python tests/hub_configs.py FOLDER: FOLDER/NAME/config.json of every model, for --models
    import json
    import sys
    from pathlib import Path

    for model, config in CONFIGS.items():
        folder = Path(sys.argv[1]) / model.split("/")[-1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
