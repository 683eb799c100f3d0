"""Checkpoints in which the language model is one part beside a vision tower: they are read as the language model alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A model type whose config.json has the language model's config in `text_config`.

    Attributes:
        text: The model type of a text_config that does not name its own.
        images: Attributes that say how images are read and put between the tokens.
    """

    text: str
    images: frozenset[str]


WRAPPERS = {
    "gemma3": Wrapper(
        "gemma3_text",
        frozenset(
            "boi_token_index boi_token_id eoi_token_index eoi_token_id image_token_index image_token_id "
            "mm_tokens_per_image".split()
        ),
    ),
    "mistral3": Wrapper(
        "mistral",
        frozenset(
            "image_token_index image_token_id multimodal_projector_bias projector_hidden_act spatial_merge_size "
            "vision_feature_layer".split()
        ),
    ),
}

# What transformers' class of the language model stands for where a text_config, of which only what differs from its class
# is written, lacks an attribute that the family's reader asks for.
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
}
_CLASSES = {"gemma3_text": "Gemma3ForCausalLM", "mistral": "MistralForCausalLM"}
# The ids that the wrapper's generation uses are its own, where it has any.
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Where the parts of the language model are stored, in the older and in the newer form, and where they are in a checkpoint
# of the language model alone.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the HF config of a checkpoint of the language model alone; of no wrapper, a copy of the config as it is.

    Attributes of the wrapper that do not speak of images are kept beside those of the language model, so that none is
    overlooked.

    Raises:
        ValueError: The config of a wrapper has no text_config.
    """
    wrapper = WRAPPERS.get(hf.get("model_type", ""))
    if wrapper is None:
        return dict(hf)
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"config.json of a {hf['model_type']} model has no text_config: fetch it again")
    left_out = {"text_config", "vision_config", "model_type", "architectures", *wrapper.images}
    around = {name: value for name, value in hf.items() if name not in left_out}
    kind = text.get("model_type") or wrapper.text
    ids = {name: around[name] for name in _IDS if around.get(name) is not None}
    named = {"model_type": kind} | ({"architectures": [_CLASSES[kind]]} if kind in _CLASSES else {})
    return _CLASS_DEFAULTS.get(kind, {}) | around | dict(text) | ids | named


def text_tensors(hf: Mapping[str, Any], tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Returns the tensors of the language model under the names that they have without a wrapper, and those left out.

    Args:
        hf: The checkpoint's HF config, as it is stored.

    Raises:
        ValueError: A tensor is stored in both forms.
    """
    if hf.get("model_type") not in WRAPPERS:
        return dict(tensors), {}
    left_out = {name: tensor for name, tensor in tensors.items() if name.startswith(_VISION)}
    text: dict[str, T] = {}
    for name, tensor in tensors.items():
        if name in left_out:
            continue
        if (plain := _plain(name)) in text:
            raise ValueError(f"tensor {plain} of the language model is stored twice, again as {name}")
        text[plain] = tensor
    return text, left_out


def _plain(name: str) -> str:
    for prefix, without in _PREFIXES.items():
        if name.startswith(prefix):
            return without + name.removeprefix(prefix)
    return name
