"""config.json of much used fine-tunes, conversions and wrappers of the supported families, as the hub has them.

Read in public copies of the files (`READ`): SmolLM2-135M-Instruct in a log of transformers that prints it, TinyLlama,
Falcon3-7B, Phi-4-mini, granite-3.3-8b and gemma-3-12b whole, Mistral-Small-3.1 in a test of another project (with 4 of its
40 layers), granite-3.3-2b and SmolLM3-3B in several excerpts that together name every attribute that matters. Written
from memory of the same files, and of the published numbers of parameters (`MEMORY`): the others.
"""

from hub_configs import _SHARED, _llama3, _phi3, _qwen2, _size

# Unique parameters; of wrappers those of the language model.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "01-ai/Yi-1.5-9B-Chat": 8_829_407_232,
    "tiiuae/Falcon3-7B-Instruct": 7_455_550_464,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": 494_032_768,
    "ibm-granite/granite-3.3-2b-instruct": 2_533_539_840,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "NousResearch/Hermes-3-Llama-3.1-8B": 8_030_261_248,
    "allenai/Llama-3.1-Tulu-3-8B": 8_030_326_784,
    "unsloth/Llama-3.2-1B-Instruct": 1_235_814_400,
    "HuggingFaceH4/zephyr-7b-beta": 7_241_732_096,
    "google/gemma-3-4b-it": 3_880_263_168,
    "unsloth/gemma-3-4b-it": 3_880_263_168,
    "google/gemma-3-12b-it": 11_766_034_176,
    "google/gemma-3-27b-it": 27_009_346_304,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 23_572_403_200,
}

READ = """HuggingFaceTB/SmolLM2-135M-Instruct HuggingFaceTB/SmolLM3-3B TinyLlama/TinyLlama-1.1B-Chat-v1.0
    tiiuae/Falcon3-7B-Instruct microsoft/Phi-4-mini-instruct ibm-granite/granite-3.3-2b-instruct
    ibm-granite/granite-3.3-8b-instruct google/gemma-3-12b-it mistralai/Mistral-Small-3.1-24B-Instruct-2503""".split()
MEMORY = sorted(PARAMETERS.keys() - set(READ))


def _llama(**changes) -> dict:
    return _SHARED | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-05} | changes


def _smollm2(**changes) -> dict:
    return _llama(
        attention_bias=False,
        bos_token_id=1,
        eos_token_id=2,
        is_llama_config=True,
        mlp_bias=False,
        pad_token_id=2,
        pretraining_tp=1,
        rope_interleaved=False,
        rope_scaling=None,
        tie_word_embeddings=True,
    ) | {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}}, **changes}


def _granite(**changes) -> dict:
    return (
        _SHARED
        | {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            "attention_bias": False,
            "bos_token_id": 0,
            "embedding_multiplier": 12.0,
            "eos_token_id": 0,
            "mlp_bias": False,
            "pad_token_id": 0,
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000000.0,
            "tie_word_embeddings": True,
            "transformers_version": "4.49.0",
        }
        | changes
    )


def _gemma3(**text) -> dict:
    """The text part has little more than what differs from its class."""
    vision = {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }
    scaling = {"factor": 8.0, "rope_type": "linear"}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "rope_scaling": scaling, "sliding_window": 1024} | text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": vision,
    }


_GEMMA3_4B = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
# As transformers writes the whole of it.
_GEMMA3_4B_WHOLE = _GEMMA3_4B | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262208,
}
_LONG_TO_32 = """1 1.118320672 1.250641126 1.398617824 1.564103225 1.74916897 1.956131817 2.187582649 2.446418898 2.735880826
    3.059592084 3.421605075 3.826451687 4.279200023 4.785517845 5.351743533 5.984965424 6.693110555 7.485043894 8.370679318
    9.36110372 10.4687158 11.70738129 13.09260651 14.64173252 16.37415215 18.31155283 20.47818807 22.90118105 25.61086418
    28.64115884 32.03 32.1 32.13 32.23 32.6 32.61 32.64 32.66 32.7 32.71 32.93 32.97 33.28 33.49 33.5 44.16 47.77"""

FINE_TUNES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _smollm2(
        rope_theta=100000, initializer_range=0.041666666666666664, transformers_version="4.42.3"
    )
    | _size(576, 1536, 30, 9, 3, 49152, 8192),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _smollm2(rope_theta=130000, transformers_version="4.42.3")
    | _size(2048, 8192, 24, 32, 32, 49152, 8192),
    "HuggingFaceTB/SmolLM3-3B": _SHARED
    | _size(2048, 11008, 36, 16, 4, 128256, 65536)
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128012,
        "layer_types": ["full_attention"] * 36,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "pad_token_id": 128004,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "transformers_version": "4.54.0.dev0",
        "use_cache": False,
        "use_sliding_window": False,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(
        attention_bias=False,
        bos_token_id=1,
        eos_token_id=2,
        pretraining_tp=1,
        rope_scaling=None,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        transformers_version="4.35.0",
    )
    | _size(2048, 5632, 22, 32, 4, 32000, 2048),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _qwen2(
        max_window_layers=28, rms_norm_eps=1e-06, rope_theta=10000, sliding_window=4096, transformers_version="4.44.0"
    )
    | _size(3584, 18944, 28, 28, 4, 152064, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama3(8.0, tie_word_embeddings=False, eos_token_id=128001)
    | _size(4096, 14336, 32, 32, 8, 128256, 131072),
    "01-ai/Yi-1.5-9B-Chat": _llama(
        attention_bias=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        pretraining_tp=1,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=5000000.0,
        tie_word_embeddings=False,
        transformers_version="4.40.0",
    )
    | _size(4096, 11008, 48, 32, 4, 64000, 4096),
    "tiiuae/Falcon3-7B-Instruct": _llama(
        attention_bias=False,
        bos_token_id=11,
        eos_token_id=11,
        head_dim=256,
        mlp_bias=False,
        pretraining_tp=1,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000042,
        tie_word_embeddings=False,
        transformers_version="4.46.1",
    )
    | _size(3072, 23040, 28, 12, 4, 131072, 32768),
    "microsoft/Phi-4-mini-instruct": _phi3(
        bos_token_id=199999,
        eos_token_id=200020,
        pad_token_id=199999,
        full_attn_mod=1,
        interpolate_factor=1,
        lm_head_bias=False,
        mlp_bias=False,
        partial_rotary_factor=0.75,
        rope_scaling={
            "long_factor": [float(number) for number in _LONG_TO_32.split()],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        sliding_window=262144,
        tie_word_embeddings=True,
        transformers_version="4.45.0",
    )
    | _size(3072, 8192, 32, 24, 8, 200064, 131072),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": _qwen2(
        eos_token_id=151645,
        max_window_layers=24,
        rms_norm_eps=1e-06,
        sliding_window=32768,
        tie_word_embeddings=True,
        transformers_version="4.44.0",
    )
    | _size(896, 4864, 24, 14, 2, 151936, 32768),
    "ibm-granite/granite-3.3-2b-instruct": _granite(attention_multiplier=0.015625, logits_scaling=8.0)
    | _size(2048, 8192, 40, 32, 8, 49159, 131072),
    "ibm-granite/granite-3.3-8b-instruct": _granite(attention_multiplier=0.0078125, logits_scaling=16.0)
    | _size(4096, 12800, 40, 32, 8, 49159, 131072),
    "NousResearch/Hermes-3-Llama-3.1-8B": _llama3(
        8.0,
        _name_or_path="meta-llama/Meta-Llama-3.1-8B",
        tie_word_embeddings=False,
        eos_token_id=128040,
        use_cache=False,
    )
    | _size(4096, 14336, 32, 32, 8, 128256, 131072),
    "allenai/Llama-3.1-Tulu-3-8B": _llama3(
        8.0, _name_or_path="/model", head_dim=128, pad_token_id=128256, tie_word_embeddings=False, eos_token_id=128001
    )
    | _size(4096, 14336, 32, 32, 8, 128264, 131072),
    "unsloth/Llama-3.2-1B-Instruct": _llama3(
        32.0,
        head_dim=64,
        eos_token_id=128009,
        pad_token_id=128004,
        tie_word_embeddings=True,
        unsloth_fixed=True,
        unsloth_version="2024.9",
    )
    | _size(2048, 8192, 16, 32, 8, 128256, 131072),
    "HuggingFaceH4/zephyr-7b-beta": _SHARED
    | _size(4096, 14336, 32, 32, 8, 32000, 32768)
    | {
        "_name_or_path": "mistralai/Mistral-7B-v0.1",
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "transformers_version": "4.35.0",
    },
    "google/gemma-3-4b-it": _gemma3(**_GEMMA3_4B),
    "unsloth/gemma-3-4b-it": _gemma3(**_GEMMA3_4B_WHOLE)
    | {"bos_token_id": 2, "pad_token_id": 0, "unsloth_fixed": True, "tie_word_embeddings": True},
    "google/gemma-3-12b-it": _gemma3(
        hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_hidden_layers=48, num_key_value_heads=8
    ),
    "google/gemma-3-27b-it": _gemma3(
        head_dim=128,
        hidden_size=5376,
        intermediate_size=21504,
        num_attention_heads=32,
        num_hidden_layers=62,
        num_key_value_heads=16,
        query_pre_attn_scalar=168,
    ),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "model_type": "mistral",
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "use_cache": True,
        }
        | _size(5120, 32768, 40, 32, 8, 131072, 131072),
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "attention_dropout": 0.0,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "image_size": 1540,
            "initializer_range": 0.02,
            "intermediate_size": 4096,
            "model_type": "pixtral",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "rope_theta": 10000.0,
        },
        "vision_feature_layer": -1,
    },
}
