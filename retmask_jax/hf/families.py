"""The supported families: one entry each, with a reader of its HF config and the table of its tensor names.

A family that differs from the others in existing fields of `ModelConfig` only needs an entry here and nothing else;
CONTRIBUTING.md shows one being added.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.hf.attributes import Reader
from retmask_jax.hf.config import (
    common,
    every_nth_full,
    layer_kinds,
    layer_windows,
    one_window,
    read_ropes,
    write_kinds,
    write_plain,
    write_ropes,
)
from retmask_jax.hf.wrappers import WRAPPERS, text_config
from retmask_jax.model.config import ModelConfig, shortest_pattern

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Family:
    """How the config of a family is read, and what its tensors are called.

    Attributes:
        read: Turns an HF config into a ModelConfig.
        names: {name of a stored tensor: our parameter, or several that are stored as one tensor}. {layer} in a name is
            the absolute layer, {expert} the expert; a layer's parameters are named without their block. Entries whose
            parameter a model does not have are skipped.
    """

    read: Callable[[Reader], ModelConfig]
    names: Mapping[str, str | tuple[str, ...]]


def from_hf(hf: Mapping[str, Any], ignore: Sequence[str] = ()) -> ModelConfig:
    """Reads an HF config, the content of config.json; of a wrapper that of its text model.

    Args:
        ignore: Names of attributes that are not understood and of which the caller knows that they change nothing.

    Raises:
        ValueError: The model type is not supported, or an attribute is not understood; the message names it. Also for a
            name to ignore that the config does not have, or that is understood.
    """
    reader, config = _read(hf)
    if isinstance(ignore, str):
        raise ValueError(f"ignore is {ignore!r}; give a tuple of names, ({ignore!r},)")
    reader.finish(ignore)
    return config


def ignorable(hf: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Returns those of the names that are attributes of an HF config which are not understood.

    For several models that are read with one list of names, of which not each has all attributes.
    """
    reader, _ = _read(hf)
    reader.settle()
    return tuple(name for name in names if name in reader.unread())


@functools.cache
def report_ignored(folder: Path, names: tuple[str, ...]) -> None:
    """Logs once for each model which attributes of its config.json are ignored at the caller's wish."""
    if names:
        log.warning("%s: ignored in config.json, as was asked for: %s", folder, ", ".join(names))


def _read(hf: Mapping[str, Any]) -> tuple[Reader, ModelConfig]:
    reader = Reader(text_config(hf))
    return reader, family(hf).read(reader)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the HF config of a model made here, in the form of the first of a few families that can express it.

    Raises:
        ValueError: No family can.
    """
    config = dataclasses.replace(config, kernel=ModelConfig.kernel)  # how attention is computed is no part of a model
    lost = {}
    for name, own in _forms(config).items():
        hf = {"model_type": name} | write_plain(config) | own
        # A config in which a part of a head rotates could not be read again.
        lost[name] = ["rotary_dim"] if config.rotary_dim is not None else _differing(config, from_hf(hf))
        if not lost[name]:
            return hf
    cannot = "; ".join(f"{name}'s form, which cannot say {fields}" for name, fields in lost.items())
    raise ValueError(f"a model made here is written in {cannot}")


def _forms(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """For each family that models made here are written in, what it adds to the plain form."""
    return {
        "llama": {"architectures": ["LlamaForCausalLM"], "mlp_bias": False},
        "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
        "olmo3": {"architectures": ["Olmo3ForCausalLM"]} | write_kinds(config) | write_ropes(config),
        "granite": {"architectures": ["GraniteForCausalLM"], "mlp_bias": False} | _write_scales(config),
        "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "mlp_bias": False} | _write_rotating(config),
    }


def _write_scales(config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": config.embed_scale or 1.0,
        "attention_multiplier": config.attention_scale,
        "residual_multiplier": config.residual_scale or 1.0,
        "logits_scaling": 1 / (config.logit_scale or 1.0),
    }


def _write_rotating(config: ModelConfig) -> dict[str, Any]:
    still = config.layers_without_rope
    rotating = [int(layer not in still) for layer in range(config.n_layers)]
    return {"no_rope_layers": rotating, "use_sliding_window": config.window is not None} | write_kinds(config)


def _differing(a: ModelConfig, b: ModelConfig) -> list[str]:
    return [field.name for field in dataclasses.fields(a) if getattr(a, field.name) != getattr(b, field.name)]


def family(hf: Mapping[str, Any]) -> Family:
    """Returns the family of an HF config by its model_type, or that of its text model; ValueError, which lists the
    supported types, for another one."""
    name = text_config(hf).get("model_type")
    if name not in FAMILIES:
        of = f" of the text model in {hf['model_type']!r}" if hf.get("model_type") in WRAPPERS else ""
        raise ValueError(
            f"model_type {name!r}{of} is not supported (supported: {', '.join(sorted([*FAMILIES, *WRAPPERS]))}); "
            "CONTRIBUTING.md says how to add a family"
        )
    return FAMILIES[name]


# --- tensor names ---

_ENDS = {
    "model.embed_tokens.weight": "embed/embedding",
    "model.norm.weight": "norm/scale",
    "lm_head.weight": "lm_head/kernel",
}
_ATTENTION = {
    f"model.layers.{{layer}}.self_attn.{hf}_proj.{kind}": f"attn/{hf}/{ours}"
    for hf in "qkvo"
    for kind, ours in (("weight", "kernel"), ("bias", "bias"))
}
_QK_NORMS = {f"model.layers.{{layer}}.self_attn.{x}_norm.weight": f"attn/{x}_norm/scale" for x in "qk"}
_MLP = {f"model.layers.{{layer}}.mlp.{x}_proj.weight": f"mlp/{x}/kernel" for x in ("gate", "up", "down")}
_FUSED = {
    "model.layers.{layer}.self_attn.qkv_proj.weight": ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"),
    "model.layers.{layer}.self_attn.o_proj.weight": "attn/o/kernel",
    "model.layers.{layer}.mlp.gate_up_proj.weight": ("mlp/gate/kernel", "mlp/up/kernel"),
    "model.layers.{layer}.mlp.down_proj.weight": "mlp/down/kernel",
}


def _norms(**names: str) -> dict[str, str]:
    return {f"model.layers.{{layer}}.{hf}_layernorm.weight": f"{ours}/scale" for hf, ours in names.items()}


def _experts(block: str, gate: str, up: str, down: str) -> dict[str, str]:
    stored = {"gate": gate, "up": up, "down": down}
    return {f"model.layers.{{layer}}.{block}.gate.weight": "experts/router/kernel"} | {
        f"model.layers.{{layer}}.{block}.experts.{{expert}}.{hf}.weight": f"experts/{ours}"
        for ours, hf in stored.items()
    }


_PRE_NORMS = _norms(input="attn_norm", post_attention="mlp_norm")
_POST_NORMS = _norms(post_attention="attn_post_norm", post_feedforward="mlp_post_norm")
_BOTH_NORMS = _POST_NORMS | _norms(input="attn_norm", pre_feedforward="mlp_norm")
_PLAIN = _ENDS | _ATTENTION | _MLP


# --- readers ---


def _llama(hf: Reader) -> ModelConfig:
    hf.expect(attention_bias=False, mlp_bias=False)
    return common(hf)


def _mistral(hf: Reader) -> ModelConfig:
    hf.expect(attention_bias=False)
    return common(hf, **one_window(hf))


def _qwen2(hf: Reader, **fields: Any) -> ModelConfig:
    hf.expect(use_mrope=False)
    full_first = hf.get("max_window_layers", 28)
    slides = hf.get("use_sliding_window", False)
    if not slides:
        hf.ignore("sliding_window")
        if "sliding_attention" in hf.get("layer_types", ()):
            raise ValueError("config.json has sliding layers in layer_types but use_sliding_window=False: mend one")
        return common(hf, **fields)
    kinds = ["sliding_attention" if i >= full_first else "full_attention" for i in range(hf.size("num_hidden_layers"))]
    return common(hf, **layer_windows(hf, kinds), **fields)


def _qwen3(hf: Reader) -> ModelConfig:
    hf.expect(attention_bias=False)
    return _qwen2(hf, head_dim=128, qkv_bias=False, qk_norm="head")


def _olmo2(hf: Reader, **fields: Any) -> ModelConfig:
    hf.expect(attention_bias=False)
    return common(hf, norm_eps=1e-5, norm_placement="post", qk_norm="projection", **fields)


def _olmo3(hf: Reader) -> ModelConfig:
    windows = layer_windows(hf, every_nth_full(hf, 4))
    return _olmo2(hf, **windows, **read_ropes(hf, theta=5e5, sliding_theta=5e5))


def _gemma(hf: Reader, **fields: Any) -> ModelConfig:
    hf.expect(attention_bias=False, use_bidirectional_attention=False)
    hidden = hf.size("hidden_size")
    return common(
        hf,
        tied=True,
        act="hidden_activation",
        head_dim=256,
        default_act="gelu_pytorch_tanh",
        norm_placement="both",
        norm_offset=1.0,
        embed_scale=hidden**0.5,
        query_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        **fields,
    )


def _gemma2(hf: Reader) -> ModelConfig:
    hf.ignore("hidden_act")  # hidden_activation is the one that is used
    window = hf.get("sliding_window_size", None)
    if window is not None:
        hf.expect(sliding_window=window)
    return _gemma(
        hf,
        attention_softcap=hf.get("attn_logit_softcapping", None),
        logit_softcap=hf.get("final_logit_softcapping", None),
        **layer_windows(hf, every_nth_full(hf, 2)),
    )


def _gemma3(hf: Reader) -> ModelConfig:
    hf.expect(attn_logit_softcapping=None)
    nth = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6))
    return _gemma(
        hf,
        qk_norm="head",
        logit_softcap=hf.get("final_logit_softcapping", None),
        **layer_windows(hf, every_nth_full(hf, nth)),
        **read_ropes(hf, theta=1e6, sliding_theta=1e4, sliding_key="rope_local_base_freq"),
    )


def _phi3(hf: Reader) -> ModelConfig:
    hf.expect(attention_bias=False, mlp_bias=False, lm_head_bias=False, full_attn_mod=1, interpolate_factor=1)
    return common(hf, norm_eps=1e-5, partial_rotary=True, **one_window(hf))


def _mixtral(hf: Reader) -> ModelConfig:
    experts: dict[str, Any] = {
        "expert_pattern": (True,),
        "n_experts": hf.size("num_local_experts"),
        "normalise_router": True,
        "experts_per_token": hf.size("num_experts_per_tok"),
        "expert_size": hf.size("intermediate_size"),
    }
    return common(hf, norm_eps=1e-5, theta=1e6, **one_window(hf), **experts)


def _qwen3_moe(hf: Reader) -> ModelConfig:
    hf.expect(attention_bias=False)
    hf.ignore("max_window_layers")
    layers = hf.size("num_hidden_layers")
    dense, step = hf.get("mlp_only_layers", ()), hf.get("decoder_sparse_step", 1)
    pattern = shortest_pattern(tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)))
    windows = one_window(hf) if hf.get("use_sliding_window", False) else {}
    hf.ignore("sliding_window")
    kind = windows.get("layer_pattern", ("full",))
    number = "num_local_experts" if hf.get("num_local_experts", None) else "num_experts"
    experts: dict[str, Any] = {
        "layer_pattern": kind * len(pattern),
        "expert_pattern": pattern,
        "n_experts": hf.size(number),
        "experts_per_token": hf.size("num_experts_per_tok"),
        "expert_size": hf.size("moe_intermediate_size"),
        "normalise_router": hf.get("norm_topk_prob", False),
    }
    return common(hf, qk_norm="head", **windows | experts)


def _granite(hf: Reader) -> ModelConfig:
    hf.expect(attention_bias=False, mlp_bias=False)
    names = "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"
    embed, residual, query, divisor = (hf.factor(name) for name in names)
    config = common(
        hf,
        embed_scale=None if embed == 1 else embed,
        residual_scale=None if residual == 1 else residual,
        query_scale=query,
        logit_scale=None if divisor == 1 else 1 / divisor,
    )
    return dataclasses.replace(config, query_scale=None) if query == config.head_dim**-0.5 else config


def _smollm3(hf: Reader) -> ModelConfig:
    hf.expect(attention_bias=False, mlp_bias=False)
    hf.ignore("max_window_layers", "sliding_window")
    layers, window = hf.size("num_hidden_layers"), None
    nth = hf.size("no_rope_layer_interval", 4)
    rotating = hf.get("no_rope_layers", [int((layer + 1) % nth != 0) for layer in range(layers)])
    if not isinstance(rotating, list) or len(rotating) < layers or not set(rotating) <= {0, 1}:
        raise ValueError(
            f"config.json has no_rope_layers={rotating!r}; it must have 1 (RoPE) or 0 for each of {layers} layers"
        )
    if hf.get("use_sliding_window", False):
        window = hf.size("sliding_window", None)
    still = "full_attention" if window is None else "sliding_attention"
    kinds = layer_kinds(hf, ["full_attention" if rotates else still for rotates in rotating[:layers]])
    if window is None and "sliding" in kinds:
        raise ValueError("config.json has sliding layers in layer_types but no window in use: mend one")
    pattern = shortest_pattern(tuple(zip(kinds, map(bool, rotating), strict=False)))
    return common(
        hf,
        tied=True,
        theta=2e6,
        window=window if "sliding" in kinds else None,
        layer_pattern=tuple(kind for kind, _ in pattern),
        rope_pattern=(True,) if all(rotating[:layers]) else tuple(rotates for _, rotates in pattern),
    )


FAMILIES = {
    "llama": Family(_llama, _PLAIN | _PRE_NORMS),
    "mistral": Family(_mistral, _PLAIN | _PRE_NORMS),
    "qwen2": Family(lambda hf: _qwen2(hf, qkv_bias=True), _PLAIN | _PRE_NORMS),
    "qwen3": Family(_qwen3, _PLAIN | _PRE_NORMS | _QK_NORMS),
    "olmo2": Family(_olmo2, _PLAIN | _POST_NORMS | _QK_NORMS),
    "olmo3": Family(_olmo3, _PLAIN | _POST_NORMS | _QK_NORMS),
    "gemma2": Family(_gemma2, _PLAIN | _BOTH_NORMS),
    "gemma3_text": Family(_gemma3, _PLAIN | _BOTH_NORMS | _QK_NORMS),
    "phi3": Family(_phi3, _ENDS | _FUSED | _PRE_NORMS),
    "granite": Family(_granite, _PLAIN | _PRE_NORMS),
    "smollm3": Family(_smollm3, _PLAIN | _PRE_NORMS),
    "mixtral": Family(_mixtral, _ENDS | _ATTENTION | _PRE_NORMS | _experts("block_sparse_moe", "w1", "w3", "w2")),
    "qwen3_moe": Family(
        _qwen3_moe, _PLAIN | _PRE_NORMS | _QK_NORMS | _experts("mlp", "gate_proj", "up_proj", "down_proj")
    ),
}
