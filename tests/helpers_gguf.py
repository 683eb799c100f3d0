"""GGUF files made from checkpoint folders as llama.cpp's converter makes them, with the names of the package `gguf`."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {"gemma3_text": "gemma3"}  # by model_type; the others have the same name
BLOCKS = 32  # numbers to a block of the simple quantised types


def write_gguf(folder: Path, target: Path, kind: str = "F32", *, keys=(), without=(), extra=(), tokenizer=()) -> Path:
    """Writes the model of a folder as a GGUF file.

    Args:
        kind: Type of the matrices; vectors are F32.
        keys: {key without the architecture: value} besides or instead of those that the converter writes.
        without: Keys, without the architecture, and tensors that are left out.
        extra: {name: array} of tensors that are added.
        tokenizer: {key: value} of the tokenizer; the ids of config.json by default.
    """
    hf = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES.get(hf["model_type"], hf["model_type"])
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_name(f"Golden {folder.name}")
    for key, value in (_keys(hf, architecture) | dict(keys)).items():
        if key not in without:
            _add(writer, f"{architecture}.{key}", value)
    for key, value in (tokenizer or token_ids(hf)).items():
        _add(writer, key, value)
    for name, tensor in (converted(hf, architecture, read_tensors(folder)) | _rope_tensors(hf) | dict(extra)).items():
        if name not in without:
            _add_tensor(writer, name, tensor, kind)
    return finish(writer, target)


def write_vocabulary(target: Path, keys: dict, rows: int | None = None) -> Path:
    """Writes a GGUF file that has a tokenizer, its keys without `tokenizer.ggml.`, and embeddings of so many rows."""
    writer = gguf.GGUFWriter(target, "llama")
    for key, value in keys.items():
        _add(writer, key if "." in key else f"tokenizer.ggml.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((rows or len(keys["tokens"]), 1), np.float32))
    return finish(writer, target)


def finish(writer, target: Path) -> Path:
    """Writes what a writer was given into its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def converted(hf, architecture: str, tensors) -> dict[str, np.ndarray]:
    """Returns tensors under the names of GGUF, rows of q and k and weights of norms as llama.cpp wants them."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, hf["num_hidden_layers"])
    found = {}
    for name, tensor in tensors.items():
        if architecture == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            heads = hf["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + np.ones((), tensor.dtype)
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    return found


def token_ids(hf) -> dict[str, int]:
    """Returns the keys of the special ids of a config; of several EOS ids the first."""
    ids = {"bos": hf["bos_token_id"], "eos": np.ravel(hf["eos_token_id"])[0].item(), "padding": hf["pad_token_id"]}
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}


def quantised(tensor: np.ndarray, kind: str) -> np.ndarray:
    """Returns what is left of a matrix after quantisation."""
    number = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(tensor.astype(np.float32), number), number)


def _keys(hf, architecture: str) -> dict:
    rope = _rope(hf)
    full = rope.get("full_attention", rope)
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    keys = {
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(full["rope_theta"]),
        "rope.dimension_count": int(head_dim * full.get("partial_rotary_factor", 1)),
    }
    kind = full["rope_type"]
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind in ("yarn", "longrope"):
        keys |= {"rope.scaling.original_context_length": full["original_max_position_embeddings"]}
    if kind == "longrope":
        stretch = hf["max_position_embeddings"] / full["original_max_position_embeddings"]
        factor = 1 + np.log(stretch) / np.log(full["original_max_position_embeddings"])
        keys |= {"rope.scaling.attn_factor": float(np.sqrt(factor))}
    own = {
        "llama": {"vocab_size": hf["vocab_size"]},
        "gemma2": {name: hf.get(name) for name in ("attn_logit_softcapping", "final_logit_softcapping")},
        "gemma3": {"final_logit_softcapping": hf.get("final_logit_softcapping")},
    }
    keys |= own.get(architecture, {})
    if architecture in ("gemma2", "gemma3", "phi3"):
        keys |= {"attention.sliding_window": hf.get("sliding_window") or 0}
    return {key: value for key, value in keys.items() if value is not None}


def _rope(hf) -> dict:
    return hf.get("rope_parameters") or {"rope_type": "default", "rope_theta": hf["rope_theta"]}


def _rope_tensors(hf) -> dict[str, np.ndarray]:
    rope = _rope(hf)
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{x}.weight": np.float32(rope[f"{x}_factor"]) for x in ("long", "short")}
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, hf["head_dim"])}
    return {}


def llama3_factors(rope, width: int) -> np.ndarray:
    """Returns by how much Llama-3's scaling slows each rotary pair, f32[R]."""
    factors = []
    for pair in range(width // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / width)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.float32(factors)


def _add(writer, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _add_tensor(writer, name: str, tensor: np.ndarray, kind: str) -> None:
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor if tensor.dtype.kind == "i" else tensor.astype(np.float32))
        return
    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(tensor.astype(np.float32), number), raw_dtype=number)
