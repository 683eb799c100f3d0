"""RoPE of a GGUF file, from its keys and from the tensors that hold factors, as HF's attributes."""

from typing import Any

import numpy as np

from retmask_jax.hf.gguf.file import GgufFile
from retmask_jax.hf.gguf.keys import Keys, decimal
from retmask_jax.model.rope import longrope_attention_scale

_LLAMA3, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (_LLAMA3, _LONG, _SHORT)

_LLAMA3_LENGTH = 8192  # tokens before stretching: llama.cpp computes the factors from it
_LLAMA3_RANGE = (1.0, 4.0)  # low_freq_factor and high_freq_factor of Llama-3


def rope(keys: Keys, head_dim: int) -> dict[str, Any]:
    """Returns what a config says about RoPE: base, scaling, and the rotated share of a head where it is not all.

    Raises:
        ValueError: The scaling is of a type that is not supported, or is not fully described.
    """
    theta, width = keys.number("rope.freq_base", 1e4), keys.size("rope.dimension_count", head_dim)
    kind = keys.get("rope.scaling.type", None)
    keys.get("rope.scaling.finetuned", None)  # whether the model was trained so; llama.cpp does not use it
    tensors = tuple(name for name in ROPE_TENSORS if name in keys.file.blocks)
    if tensors == (_LONG, _SHORT) and kind in (None, "none", "longrope"):
        scaling = _longrope(keys)
    elif tensors == (_LLAMA3,) and kind in (None, "none"):
        scaling = {"rope_scaling": _llama3(keys.file, theta, width)}
    elif kind == "yarn" and not tensors:
        scaling = {"rope_scaling": _yarn(keys)}
    elif kind in (None, "linear", "none") and not tensors:
        scaling = {"rope_scaling": _linear(keys, kind)}
    else:
        beside = f" with the tensors {', '.join(tensors)}" if tensors else ""
        raise ValueError(f"{keys.file.path} has RoPE scaling of type {kind!r}{beside}, which is not supported")
    return {"rope_theta": theta, "partial_rotary_factor": None if width == head_dim else width / head_dim} | scaling


def _linear(keys: Keys, kind: str | None) -> dict[str, Any] | None:
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", None))
    keys.get("rope.scaling.original_context_length", None)  # Phi-3 has it even where nothing is scaled
    keys.expect("rope.scaling.attn_factor", 1.0)
    return None if kind == "none" or factor in (None, 0, 1) else {"rope_type": "linear", "factor": factor}


def _yarn(keys: Keys) -> dict[str, Any]:
    for name in ("attn_factor", "yarn_ext_factor", "yarn_attn_factor"):
        keys.expect(f"rope.scaling.{name}", 1.0)
    betas = {name: keys.number(f"rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
    return {
        "rope_type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.size("rope.scaling.original_context_length"),
    } | {name: beta for name, beta in betas.items() if beta is not None}


def _longrope(keys: Keys) -> dict[str, Any]:
    """The factors of each pair, and the attention scale where it is not the one that follows from the lengths."""
    length, original = keys.size("context_length"), keys.size("rope.scaling.original_context_length")
    scale, usual = keys.number("rope.scaling.attn_factor"), longrope_attention_scale(length / original, original)
    scaling: dict[str, Any] = {"type": "longrope"} | ({} if abs(scale - usual) < 1e-5 else {"attention_factor": scale})
    for name, tensor in (("short_factor", _SHORT), ("long_factor", _LONG)):
        scaling[name] = [decimal(factor) for factor in _vector(keys.file, tensor)]
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _llama3(file: GgufFile, theta: float, width: int) -> dict[str, Any] | None:
    """The settings from which llama.cpp's converter computed the factors; ValueError if no settings give them.

    Of a factor f between 1 and the largest F, the share (1 / f - 1 / F) / (1 - 1 / F) is linear in the pair's turns within the
    original context, and goes from 0 at low_freq_factor turns to 1 at high_freq_factor.
    """
    factors_R = _vector(file, _LLAMA3).astype(np.float64)
    turns_R = _LLAMA3_LENGTH * theta ** (-np.arange(0, width, 2) / width) / (2 * np.pi)
    largest = factors_R.max()
    if largest == 1:
        return None
    share_R = (1 / factors_R - 1 / largest) / (1 - 1 / largest)
    between_R = (share_R > 1e-4) & (share_R < 1 - 1e-4)
    low, high = _LLAMA3_RANGE
    if between_R.sum() > 1:
        slope, start = np.polyfit(turns_R[between_R], share_R[between_R], 1)
        low, high = (round(float(end), 3) for end in (-start / slope, (1 - start) / slope))
    expected_R = 1 / (1 / largest + np.clip((turns_R - low) / (high - low), 0, 1) * (1 - 1 / largest))
    if not np.allclose(factors_R, expected_R, rtol=1e-4):
        raise ValueError(f"{file.path} has {_LLAMA3} that are not those of Llama-3, so the model could be wrong")
    return {
        "rope_type": "llama3",
        "factor": decimal(largest),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_LENGTH,
    }


def _vector(file: GgufFile, name: str) -> np.ndarray:
    """A vector of float32; ValueError if the tensor is something else."""
    block = file.blocks[name]
    if block.kind != "F32" or len(block.shape) != 1:
        raise ValueError(
            f"{file.path} has {name} of type {block.kind} and shape {block.shape}; F32 of one axis is expected"
        )
    return file.data[block.offset : block.offset + block.n_bytes].view(np.float32)
