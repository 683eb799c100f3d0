"""Hugging Face safetensors <-> parameters, both ways, by one table of names per family; closed-world."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from retmask_jax.files import write_atomically
from retmask_jax.model.config import ModelConfig, from_hf
from retmask_jax.sharding import param_shapes, param_shardings

log = logging.getLogger(__name__)

_LLAMA = {
    "model.embed_tokens.weight": "embed/embedding",
    "model.norm.weight": "norm/scale",
    "lm_head.weight": "lm_head/kernel",
    "model.layers.{}.input_layernorm.weight": "{}/attn_norm/scale",
    "model.layers.{}.self_attn.q_proj.weight": "{}/attn/q/kernel",
    "model.layers.{}.self_attn.k_proj.weight": "{}/attn/k/kernel",
    "model.layers.{}.self_attn.v_proj.weight": "{}/attn/v/kernel",
    "model.layers.{}.self_attn.o_proj.weight": "{}/attn/o/kernel",
    "model.layers.{}.post_attention_layernorm.weight": "{}/mlp_norm/scale",
    "model.layers.{}.mlp.gate_proj.weight": "{}/mlp/gate/kernel",
    "model.layers.{}.mlp.up_proj.weight": "{}/mlp/up/kernel",
    "model.layers.{}.mlp.down_proj.weight": "{}/mlp/down/kernel",
}
# HF tensor name -> our parameter, by model_type; "{}" is the absolute layer there and the block's place here.
NAMES = {"llama": _LLAMA}

_INPUT = "model.embed_tokens.weight"
_OUTPUT = "lm_head.weight"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from: its HF config, the dtype of each stored tensor, and the folder (None: made here)."""

    hf_config: dict[str, Any]
    dtypes: dict[str, str]
    folder: Path | None = None


def read(folder: Path, dtype: str, mesh=None) -> tuple[ModelConfig, Any, Source]:
    """(config, params, source) of an HF checkpoint folder, cast to dtype, placed by the mesh's shardings if given.

    Raises ValueError naming the file, attribute or tensor that is missing, extra, misshapen or unreadable.
    """
    hf_config = _read_json(folder / "config.json", "not a Hugging Face checkpoint folder")
    config = from_hf(hf_config)
    table = _entries(config, hf_config["model_type"])
    tensors = _open_all(folder)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    _drop_known_extras(config, tensors)
    _check_names({entry.name for entry in table}, set(tensors), folder)

    shapes = flatten_dict(nn.unbox(param_shapes(config)), sep="/")
    shardings = flatten_dict(param_shardings(config, mesh), sep="/") if mesh else {}
    params = {}
    for path, leaf in shapes.items():
        host = np.empty(leaf.shape, jnp.dtype(dtype))
        for entry in (entry for entry in table if entry.path == path):
            _fill(host if entry.repeat is None else host[entry.repeat], entry, tensors[entry.name].read())
        params[path] = jax.device_put(host, shardings.get(path))
    kept = {name: dtype for name, dtype in dtypes.items() if not name.endswith(_INV_FREQ)}
    return config, unflatten_dict(params, sep="/"), Source(hf_config, kept, folder)


def write(folder: Path, config: ModelConfig, params, source: Source, head_mask=None, dtype: str | None = None) -> None:
    """Write config.json and safetensors (with an index when there are several files) in HF names.

    Each tensor gets the dtype it was read in unless `dtype` is given. head_mask bool[L,H] zeroes the columns of
    o_proj that read the masked heads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    leaves = flatten_dict(params, sep="/")
    table = {entry.name: entry for entry in _entries(config, source.hf_config["model_type"])}
    shards: list[dict[str, np.ndarray]] = [{}]
    for name in source.dtypes or table:
        tied_copy = name == _OUTPUT and config.tied_embeddings
        tensor = _export(table[_INPUT if tied_copy else name], leaves, config, head_mask)
        tensor = np.ascontiguousarray(tensor.astype(jnp.dtype(dtype or source.dtypes.get(name, tensor.dtype))))
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > _MAX_SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    _write_shards(folder, shards)
    _remove_stale(folder, {file for file, _ in _shard_names(shards)})
    hf_config = dict(source.hf_config)
    if dtype is not None:
        hf_config["dtype" if "dtype" in hf_config else "torch_dtype"] = str(jnp.dtype(dtype))
    write_atomically(folder / "config.json", json.dumps(hf_config, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class _Entry:
    name: str  # in the checkpoint
    path: str  # of the parameter
    layer: int | None  # absolute
    repeat: int | None  # index into the stacked parameter; None where it is not stacked

    @property
    def transposed(self) -> bool:
        return self.path.endswith("/kernel")


def _entries(config: ModelConfig, family: str) -> list[_Entry]:
    period = len(config.layer_pattern)
    entries = []
    for name, path in NAMES[family].items():
        if name == _OUTPUT and config.tied_embeddings:
            continue
        if "{}" not in name:
            entries.append(_Entry(name, path, None, None))
            continue
        for layer in range(config.n_layers):
            repeat, place = divmod(layer, period)
            in_tail = repeat == config.repeats
            block = f"tail/{place}" if in_tail else f"blocks/{place}"
            entries.append(_Entry(name.format(layer), path.format(block), layer, None if in_tail else repeat))
    return entries


def _fill(target: np.ndarray, entry: _Entry, tensor: np.ndarray) -> None:
    wanted = target.shape[::-1] if entry.transposed else target.shape
    if tensor.shape != wanted:
        raise ValueError(f"tensor {entry.name} has shape {tensor.shape}; config.json asks for {wanted}")
    target[...] = (tensor.T if entry.transposed else tensor).astype(target.dtype)


def _export(entry: _Entry, leaves, config: ModelConfig, head_mask) -> np.ndarray:
    leaf = leaves[entry.path]
    tensor = np.asarray(leaf if entry.repeat is None else leaf[entry.repeat])
    if head_mask is not None and entry.path.endswith("attn/o/kernel"):
        columns = np.repeat(np.asarray(head_mask)[entry.layer], config.head_dim)
        tensor = np.where(columns[:, None], np.zeros((), tensor.dtype), tensor)
    return tensor.T if entry.transposed else tensor


# --- files ---


class _Tensor:
    """One tensor of an open safetensors file, read when asked for."""

    def __init__(self, handle, name: str):
        self._handle, self._name = handle, name
        self.dtype = _DTYPES.get(handle.get_slice(name).get_dtype())
        if self.dtype is None:
            kind = handle.get_slice(name).get_dtype()
            raise ValueError(f"tensor {name} has type {kind}: quantised checkpoints are not supported, use a float one")

    def read(self) -> np.ndarray:
        return self._handle.get_tensor(self._name)


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_INV_FREQ = ".rotary_emb.inv_freq"


def _open_all(folder: Path) -> dict[str, _Tensor]:
    import safetensors

    tensors: dict[str, _Tensor] = {}
    for path in _weight_files(folder):
        try:
            handle = safetensors.safe_open(path, framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): fetch it again") from error
        for name in handle.keys():  # noqa: SIM118  (a file, not a dict)
            if name in tensors:
                raise ValueError(f"tensor {name} is stored twice, again in {path}")
            tensors[name] = _Tensor(handle, name)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        weight_map = _read_json(folder / _INDEX, "").get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / _INDEX} has no weight_map: fetch it again")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{folder / _INDEX} names {', '.join(missing)}, which is not there: fetch it again")
        return [folder / name for name in names]
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if any(folder.glob("*.bin")):
        raise ValueError(f"{folder} holds pickled weights (.bin), which are never opened: convert them to safetensors")
    raise ValueError(f"{folder} holds no {_WEIGHTS} and no {_INDEX}")


def _drop_known_extras(config: ModelConfig, tensors: dict[str, _Tensor]) -> None:
    """Two extras are known: stored rotary frequencies, and an output matrix beside tied embeddings."""
    for name in [name for name in tensors if name.endswith(_INV_FREQ)]:
        log.info("dropped %s: frequencies are computed", name)
        del tensors[name]
    if config.tied_embeddings and {_OUTPUT, _INPUT} <= set(tensors):
        output, table = tensors.pop(_OUTPUT).read(), tensors[_INPUT].read()
        if output.shape != table.shape or output.tobytes() != table.tobytes():
            raise ValueError(f"{_OUTPUT} differs from the embeddings it is tied to: set tie_word_embeddings to false")


def _check_names(wanted: set[str], found: set[str], folder: Path) -> None:
    for what, names in (("lacks", wanted - found), ("has unknown", found - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise ValueError(f"{folder} {what} {len(names)} tensors: {shown}{' ...' if len(names) > 5 else ''}")


def _write_shards(folder: Path, shards: list[dict[str, np.ndarray]]) -> None:
    from safetensors.numpy import save_file

    for file, tensors in _shard_names(shards):
        temporary = folder / (file + ".part")
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.rename(folder / file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
            "weight_map": {name: file for file, shard in _shard_names(shards) for name in shard},
        }
        write_atomically(folder / _INDEX, json.dumps(index, indent=2) + "\n")


def _remove_stale(folder: Path, written: set[str]) -> None:
    """Weights of an earlier checkpoint in the same folder, which a reader would take for these."""
    for path in [*folder.glob("model-*-of-*.safetensors"), folder / _WEIGHTS]:
        if path.name not in written:
            path.unlink(missing_ok=True)
    if _WEIGHTS in written:
        (folder / _INDEX).unlink(missing_ok=True)


def _shard_names(shards) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for number, shard in enumerate(shards):
        file = _WEIGHTS if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        yield file, shard


def _read_json(path: Path, otherwise: str) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} does not exist: {otherwise}")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
