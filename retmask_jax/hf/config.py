"""What families share of reading configs in the format of Hugging Face, and of writing them."""

import math
from collections.abc import Mapping
from typing import Any

from retmask_jax.hf.attributes import Reader
from retmask_jax.model.config import ModelConfig, Rope, shortest_pattern
from retmask_jax.model.rope import longrope_attention_scale, yarn_attention_scale

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_KINDS = {"full_attention": "full", "sliding_attention": "sliding"}
_WRITTEN = {ours: name for name, ours in _KINDS.items()}


def common(
    hf: Reader,
    *,
    tied: bool = False,
    act: str = "hidden_act",
    head_dim: int | None = None,
    default_act: str = "silu",
    norm_eps: float = 1e-6,
    theta: float = 1e4,
    partial_rotary: bool = False,
    **fields: Any,
) -> ModelConfig:
    """Returns the ModelConfig of a family that differs from the others in a few fields only.

    Args:
        tied: Whether embeddings are tied if the config does not say so.
        act: Name of the attribute that holds the activation.
        head_dim: Width of a head if the config does not say it; None for hidden size / heads.
        default_act: Activation if the config does not name one.
        norm_eps: Epsilon of the norms if the config does not say it.
        theta: Base of RoPE if the config does not say it.
        partial_rotary: Whether a part of a head may rotate.
        **fields: Fields of ModelConfig that the family sets itself.
    """
    heads, hidden = hf.size("num_attention_heads"), hf.size("hidden_size")
    max_length = hf.size("max_position_embeddings")
    width = hf.size("head_dim", head_dim or hidden // heads)
    eos = hf.get("eos_token_id", ())
    if "rope" not in fields:
        rope, rotary_share = read_rope(hf, max_length, theta)
        fields |= {"rope": rope}
        if rotary_share != 1:
            if not partial_rotary:
                raise ValueError(f"config.json has partial_rotary_factor={rotary_share}; only 1 is supported here")
            fields |= {"rotary_dim": int(width * rotary_share)}
    shared: dict[str, Any] = {
        "vocab_size": hf.size("vocab_size"),
        "hidden_size": hidden,
        "mlp_size": hf.size("intermediate_size"),
        "n_layers": hf.size("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": hf.size("num_key_value_heads", heads),
        "head_dim": width,
        "max_length": _context(max_length, fields["rope"]),
        "norm_eps": hf.get("rms_norm_eps", norm_eps),
        "activation": _activation(hf.get(act, default_act)),
        "tied_embeddings": hf.get("tie_word_embeddings", tied),
        "bos_id": hf.get("bos_token_id", None),
        "eos_ids": tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        "pad_id": max(0, hf.get("pad_token_id", 0)),
    }
    return ModelConfig(**shared | fields)


def one_window(hf: Reader) -> dict[str, Any]:
    """Returns the fields of a model all of whose layers slide if the config names a window."""
    window = hf.size("sliding_window", None)
    return {} if window is None else {"layer_pattern": ("sliding",), "window": window}


def layer_windows(hf: Reader, default_kinds: list[str]) -> dict[str, Any]:
    """Returns the fields of a model with full and sliding layers; default_kinds are those of the layers if the config
    has no list."""
    pattern = shortest_pattern(layer_kinds(hf, default_kinds))
    window = hf.size("sliding_window", None)
    return {"layer_pattern": pattern, "window": window if "sliding" in pattern else None}


def layer_kinds(hf: Reader, default_kinds: list[str]) -> tuple[str, ...]:
    """Returns our kind of each layer; default_kinds are those of the layers, by HF's names, if the config has no list."""
    kinds = hf.get("layer_types", default_kinds)
    layers = hf.size("num_hidden_layers")
    if len(kinds) != layers or not set(kinds) <= set(_KINDS):
        raise ValueError(
            f"config.json has layer_types={kinds!r}; it must name {' or '.join(_KINDS)} for each of {layers} layers"
        )
    return tuple(_KINDS[kind] for kind in kinds)


def every_nth_full(hf: Reader, n: int) -> list[str]:
    """Returns the types of layers of which each nth is full and the others slide."""
    layers = range(1, hf.size("num_hidden_layers") + 1)
    return ["sliding_attention" if layer % n else "full_attention" for layer in layers]


# --- RoPE ---

# The parameters of each RoPE type: HF name -> field of Rope.
_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor", "original_max_position_embeddings": "original_length"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "attention_factor": "attention_scale",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
    },
    "longrope": {
        "short_factor": "short_factors",
        "long_factor": "long_factors",
        "original_max_position_embeddings": "original_length",
        "attention_factor": "attention_scale",
    },
}
_OLD_NAMES = {"su": "longrope"}


def read_rope(hf: Reader, max_length: int, theta: float) -> tuple[Rope, float]:
    """Returns (RoPE, rotated share of a head), from `rope_theta` and `rope_scaling` or from `rope_parameters`.

    Args:
        max_length: Its max_position_embeddings.
        theta: Base if the config does not say it.
    """
    scaling = dict(hf.get("rope_scaling", None) or {})
    parameters = dict(hf.get("rope_parameters", None) or {})
    # Some families write this outside the RoPE parameters; it means the same.
    top = {
        "rope_theta": hf.get("rope_theta", None),
        "partial_rotary_factor": hf.get("partial_rotary_factor", None),
        "original_max_position_embeddings": hf.get("original_max_position_embeddings", None),
    }
    top = {name: value for name, value in top.items() if value is not None}
    merged: dict[str, Any] = {}
    for part in (top, scaling, parameters):
        for name, value in part.items():
            if name in merged and merged[name] != value:
                raise ValueError(f"config.json gives two values for {name}: {merged[name]!r} and {value!r}: keep one")
            merged[name] = value
    merged.setdefault("rope_theta", theta)
    share = float(merged.pop("partial_rotary_factor", 1.0))
    return make_rope(merged, max_length), share


def read_ropes(
    hf: Reader, *, theta: float, sliding_theta: float, sliding_key: str | None = None
) -> dict[str, Rope | None]:
    """Returns the fields `rope` and `sliding_rope` of a family that scales RoPE in its full layers only.

    Args:
        theta: Base of the full layers if the config does not say it.
        sliding_theta: Base of the sliding layers if the config does not say it.
        sliding_key: Attribute of the older form that holds the sliding layers' base; None if they share rope_theta.
    """
    max_length = hf.size("max_position_embeddings")
    nested = dict(hf.get("rope_parameters", None) or {})
    if not set(nested) <= set(_KINDS):
        raise ValueError(
            f"config.json has rope_parameters with {', '.join(sorted(nested))}; this family has them per layer type, "
            f"under {' and '.join(_KINDS)}"
        )
    top_theta = hf.get("rope_theta", None)
    local_theta = hf.get(sliding_key, None) if sliding_key else top_theta
    full = {"rope_theta": top_theta or theta} | dict(hf.get("rope_scaling", None) or {})
    sliding = {"rope_theta": local_theta or sliding_theta}
    full |= nested.get("full_attention") or {}
    sliding |= nested.get("sliding_attention") or {}
    rope, sliding_rope = make_rope(full, max_length), make_rope(sliding, max_length)
    return {"rope": rope, "sliding_rope": None if sliding_rope == rope else sliding_rope}


def make_rope(parameters: Mapping[str, Any], max_length: int) -> Rope:
    """Returns the Rope of HF's RoPE parameters; ValueError for one that is missing or not understood."""
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta")
    kinds = {parameters.pop("rope_type", None), parameters.pop("type", None)} - {None} or {"default"}
    if len(kinds) > 1:
        raise ValueError(f"config.json names two RoPE types: {', '.join(sorted(kinds))}")
    kind = _OLD_NAMES.get(name := kinds.pop(), name)
    if kind not in _FIELDS:
        raise ValueError(f"RoPE type {kind!r} is not supported (supported: {', '.join(_FIELDS)})")
    wanted = _FIELDS[kind]
    parameters = {name: value for name, value in parameters.items() if value is not None}
    if "original_max_position_embeddings" in wanted:
        parameters.setdefault("original_max_position_embeddings", max_length)
    else:
        parameters.pop("original_max_position_embeddings", None)  # some configs have it, but this type does not use it
    if kind == "dynamic" and parameters["original_max_position_embeddings"] != max_length:
        raise ValueError("RoPE type 'dynamic' starts from max_position_embeddings; config.json names another length")
    if "attention_factor" in wanted:
        _settle_attention_scale(kind, parameters, max_length)
    missing, unknown = set(wanted) - set(parameters), set(parameters) - set(wanted)
    missing -= {"beta_fast", "beta_slow", "truncate"}
    if missing or unknown:
        raise ValueError(f"RoPE type {kind!r} takes {sorted(wanted)}, config.json has {sorted(parameters)}")
    given = {field: parameters[name] for name, field in wanted.items() if name in parameters}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    numbers = [theta, *(n for value in values.values() for n in (value if isinstance(value, tuple) else (value,)))]
    if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise ValueError(f"RoPE parameters must be numbers, config.json has {dict(parameters) | {'rope_theta': theta}}")
    return Rope(kind=kind, theta=float(theta), **values)


def _settle_attention_scale(kind: str, parameters: dict[str, Any], max_length: int) -> None:
    """Replaces the attributes that determine the attention scale by its value, `attention_factor`."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor", max_length / original)
    mscales = parameters.pop("mscale", None), parameters.pop("mscale_all_dim", None)
    if kind == "yarn":
        parameters["factor"] = factor
        parameters.setdefault("attention_factor", yarn_attention_scale(factor, *mscales))
    else:
        parameters.pop("factor", None)
        parameters.setdefault("attention_factor", longrope_attention_scale(factor, original))


def _context(max_length: int, rope: Rope) -> int:
    """Longest context in tokens. Where RoPE is stretched, configs give the context before or after stretching."""
    stretched = rope.kind in ("dynamic", "yarn")
    return max(max_length, int(rope.factor * rope.original_length)) if stretched else max_length


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"config.json has activation {name!r}; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def write_plain(config: ModelConfig) -> dict[str, Any]:
    """Returns the attributes of config.json that all families share, for a model made here; `families.to_hf` adds the
    rest."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation),
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else _scaling(config.rope),
        "attention_bias": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "pad_token_id": config.pad_id,
        "torch_dtype": "float32",
    }


def write_kinds(config: ModelConfig) -> dict[str, Any]:
    """Returns the attributes that `layer_windows` reads."""
    kinds = [_WRITTEN[config.layer_pattern[i % len(config.layer_pattern)]] for i in range(config.n_layers)]
    return {"layer_types": kinds, "sliding_window": config.window}


def write_ropes(config: ModelConfig) -> dict[str, Any]:
    """Returns the attribute that `read_ropes` reads."""
    ropes = {"full": config.rope, "sliding": config.sliding_rope or config.rope}
    parameters = {_WRITTEN[kind]: {"rope_theta": rope.theta} | _scaling(rope) for kind, rope in ropes.items()}
    return {"rope_parameters": parameters}


def _scaling(rope: Rope) -> dict[str, Any]:
    values = {name: getattr(rope, field) for name, field in _FIELDS[rope.kind].items()}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"rope_type": rope.kind} | values
