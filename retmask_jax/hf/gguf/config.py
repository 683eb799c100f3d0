"""The HF config of a GGUF file, from its metadata; a key that is not understood raises an error.

What the format does not say is taken as llama.cpp takes it, where that is also how the models of the family were trained.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from retmask_jax.hf.gguf.file import GgufFile, whole_number
from retmask_jax.hf.gguf.keys import Keys
from retmask_jax.hf.gguf.rope import rope

_EMBEDDINGS = "token_embd.weight"
_SPECIAL_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_STOPS = ("eos", "eot", "eom")  # end of a text, of a turn, of a message
_PARTLY_ROTATED = {"phi3"}  # where a part of a head may rotate
_SLIDING, _FULL = "sliding_attention", "full_attention"


def hf_config(file: GgufFile) -> dict[str, Any]:
    """Returns the content of the config.json that the model would have.

    Raises:
        ValueError: The architecture is not supported, or a key, which is named, is missing or not understood.
    """
    if file.architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{file.path} has the architecture {file.architecture!r}; supported in GGUF files are "
            f"{', '.join(_ARCHITECTURES)}"
        )
    model_type, class_name, own = _ARCHITECTURES[file.architecture]
    keys = Keys(file)
    config = _common(keys)
    config |= own(keys, config)
    keys.finish()
    dtype = file.blocks[_EMBEDDINGS].dtype
    config |= {"architectures": [class_name], "model_type": model_type, "torch_dtype": dtype}
    return {name: value for name, value in config.items() if value is not None}


def kv_heads(keys: Keys) -> int:
    """Returns the number of KV heads of a layer."""
    return keys.size("attention.head_count_kv", keys.size("attention.head_count"))


def stop_ids(file: GgufFile) -> tuple[int, ...]:
    """Returns the ids that the file names as the end of a text, of a turn and of a message."""
    ids = (token_id(file, name) for name in _STOPS)
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def token_id(file: GgufFile, name: str) -> int | None:
    """Returns the id of a special token, such as "bos" or "padding"; None if the file names none."""
    return whole_number(file.path, file.metadata, f"tokenizer.ggml.{name}_token_id", None)


def _common(keys: Keys) -> dict[str, Any]:
    """What all architectures have."""
    file, heads, hidden = keys.file, keys.size("attention.head_count"), keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", hidden // heads)
    if _EMBEDDINGS not in file.blocks:
        raise ValueError(f"{file.path} has no tensor {_EMBEDDINGS}: fetch it again")
    vocab = file.blocks[_EMBEDDINGS].shape[0]
    supported = {"attention.value_length": head_dim, "vocab_size": vocab, "expert_count": 0, "expert_used_count": 0}
    supported |= {"attention.causal": True, "tensor_data_layout": "Meta AI original pth"}
    if file.architecture not in _PARTLY_ROTATED:
        supported |= {"rope.dimension_count": head_dim}
    for name, value in supported.items():
        keys.expect(name, value)
    config = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads(keys),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.blocks,
    }
    ids = {name: token_id(file, own) for name, own in _SPECIAL_IDS.items()}
    return config | ids | rope(keys, head_dim)


# --- what an architecture adds: (keys, what all have) -> attributes ---


def _plain(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu"}


def _qwen2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": False}


def _phi3(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    # llama.cpp leaves the window out (a warning says so), but the models were trained with it. Phi-4 has none, written as 0.
    return {"hidden_act": "silu", "sliding_window": keys.number("attention.sliding_window", 0) or None}


def _gemma2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    keys.expect("rope.freq_base_swa", config["rope_theta"])
    return {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "sliding_window": keys.size("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, 2),
        "query_pre_attn_scalar": _query_scalar(config, largest=46),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma3(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    window = keys.number("attention.sliding_window", 0) or None  # absent where every layer is full
    return {
        "final_logit_softcapping": keys.number("final_logit_softcapping", None),
        "sliding_window": window,
        "layer_types": _layer_types(keys, 6 if window else 1),
        "query_pre_attn_scalar": _query_scalar(config, largest=62),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 1e4),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _layer_types(keys: Keys, period: int) -> list[str]:
    """The type of each layer: one in `period` is full, unless the file has another number, or says it for each layer."""
    pattern, layers = keys.get("attention.sliding_window_pattern", period), keys.size("block_count")
    slides = pattern if isinstance(pattern, np.ndarray) else np.arange(1, layers + 1) % max(int(pattern), 1) != 0
    return [_SLIDING if one else _FULL for one in slides]


def _query_scalar(config: dict[str, Any], largest: int) -> int:
    """The width by whose root q.k is divided: of a head, but in the model of so many layers, where hidden size / heads."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return hidden // heads if config["num_hidden_layers"] == largest else config["head_dim"]


# {general.architecture: (model_type, class of transformers, what it adds)}
_ARCHITECTURES: dict[str, tuple[str, str, Callable[[Keys, dict[str, Any]], dict[str, Any]]]] = {
    "llama": ("llama", "LlamaForCausalLM", _plain),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _qwen2),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _qwen2),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", _plain),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _gemma2),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _gemma3),
    "phi3": ("phi3", "Phi3ForCausalLM", _phi3),
}
