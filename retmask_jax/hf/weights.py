"""Parameters read from Hugging Face safetensors or a GGUF file, and written to safetensors, by each family's table of names.

Weights are streamed, and every stored tensor must be known.
"""

import concurrent.futures
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Bool, PyTree

from retmask_jax.hf.checkpoint_files import Shards, Tensor, config_name, open_tensors, read_config
from retmask_jax.hf.families import family, from_hf, to_hf
from retmask_jax.hf.wrappers import text_config, text_tensors
from retmask_jax.model import lora
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.sharding import param_shardings, plain_shapes
from retmask_jax.utils.compiled import waiting
from retmask_jax.utils.files import write_atomically
from retmask_jax.utils.hosts import primary, to_host
from retmask_jax.utils.progress import track

log = logging.getLogger(__name__)

_INPUT = "model.embed_tokens.weight"
_OUTPUT = "lm_head.weight"
_INV_FREQ = ".rotary_emb.inv_freq"
_STRIPE = 128  # rows read at a time
_READERS = 4  # threads
_ALIGNMENT = 64  # bytes


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model was read from: its HF config, the dtype of each stored tensor, and the folder or GGUF file.

    Of a wrapper, config and tensors are those of its language model alone. For a model made here all are None or empty.
    """

    hf_config: dict[str, Any] | None
    dtypes: dict[str, str]
    folder: Path | None = None


@waiting()
def read(
    folder: Path, dtype: str, mesh: Mesh | Callable[[ModelConfig], Mesh] | None = None, ignore: Sequence[str] = ()
) -> tuple[ModelConfig, PyTree, Source]:
    """Reads an HF checkpoint folder or a GGUF file.

    Of each tensor only the part that a device holds is read, so that host memory, beyond the parameters, stays near one
    device's shard of one parameter. Of a wrapper (`wrappers.WRAPPERS`) only the language model is read.

    Args:
        dtype: Dtype of the parameters.
        mesh: Devices over which the parameters are split, or a function that gives them for the model's config; None
            for the first device.
        ignore: Attributes of config.json that are not understood and change nothing, as for `from_hf`.

    Returns:
        Config, parameters, and where they were read from.

    Raises:
        ValueError: A file, attribute or tensor, which is named, is missing, extra, of the wrong shape or unreadable.
            Nothing has been loaded then.
    """
    hf_config, tensors, left_out = _open(folder)
    source = _source(folder, tensors, hf_config)
    config = from_hf(hf_config, ignore)
    shapes: dict[str, Any] = flatten_dict(plain_shapes(config), sep="/")
    table = _table(config, hf_config, shapes)
    _report_left_out(folder, left_out)
    _drop_known_extras(config, tensors)
    _check_names(set(table), set(tensors), folder)
    for name, pieces in table.items():
        if tensors[name].shape != (wanted := _stored_shape(pieces)):
            raise ValueError(f"tensor {name} has shape {tensors[name].shape}; {config_name(folder)} asks for {wanted}")

    mesh = mesh if mesh is None or isinstance(mesh, Mesh) else mesh(config)  # a Mesh is callable, too
    shardings = flatten_dict(param_shardings(config, mesh), sep="/") if mesh else {}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    of_path: dict[str, list[_Piece]] = {path: [] for path in shapes}
    for piece in (piece for pieces in table.values() for piece in pieces):
        of_path[piece.path].append(piece)
    params, begin = {}, time.perf_counter()
    size = sum(leaf.size for leaf in shapes.values()) * jnp.dtype(dtype).itemsize
    with track(None, size, f"load {folder.name}", "B") as bar:
        for path, leaf in shapes.items():
            fill = functools.partial(_fill, of_path[path], tensors)
            params[path] = _place(leaf.shape, jnp.dtype(dtype), shardings.get(path, here), fill)
            bar.update(params[path].nbytes)
    rate = size / (time.perf_counter() - begin) / 1e9
    log.info("%s: %.3g GB of parameters at %.2g GB/s", folder, size / 1e9, rate)
    return config, unflatten_dict(params, sep="/"), source


def source_of(folder: Path) -> Source:
    """Returns the Source of a checkpoint without loading its weights; errors are those of `read`."""
    hf_config, tensors, _ = _open(folder)
    return _source(folder, tensors, hf_config)


def write(
    folder: Path,
    config: ModelConfig,
    params: PyTree,
    source: Source,
    head_mask: Bool[ArrayLike, "L H"] | None = None,
    dtype: str | None = None,
) -> None:
    """Writes config.json and safetensors, with an index if there are several files, under HF names.

    A weight that has not changed since it was read is written as it is stored in the source's folder, even where the
    parameters are narrower; adapters are added to it in float32. The tensors of one file are in host memory at a time.
    All hosts take part, and the first one writes. A model that was read from a wrapper is written as the language model
    alone, with that model's config and names.

    Args:
        params: Its parameters, with adapters or without.
        head_mask: Heads whose columns of o_proj are written as zeros.
        dtype: Dtype of all tensors; None for the dtype each was read in.
    """
    hf_config = dict(source.hf_config or to_hf(dataclasses.replace(config, lora=None)))
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    table = _table(config, hf_config, leaves)
    stored = _wider(source, table, leaves) if primary() else {}
    shards = Shards(folder)
    for name in source.dtypes or table:
        pieces = table[_INPUT if name == _OUTPUT and config.tied_embeddings else name]
        kind = jnp.dtype(dtype or source.dtypes.get(name, leaves[pieces[0].path].dtype))
        parts = [_export(piece, leaves, config, head_mask, stored).astype(kind) for piece in pieces]
        shards.add(name, np.concatenate(parts) if len(parts) > 1 else parts[0])
    shards.finish()
    if dtype is not None:
        hf_config["dtype" if "dtype" in hf_config else "torch_dtype"] = str(jnp.dtype(dtype))
    write_atomically(folder / "config.json", json.dumps(hf_config, indent=2) + "\n")


def _open(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(HF config of the language model, its tensors, the tensors that are left out) of a checkpoint."""
    hf_config = read_config(folder)
    return text_config(hf_config), *text_tensors(hf_config, open_tensors(folder))


def _source(folder: Path, tensors: dict[str, Tensor], hf_config: dict[str, Any]) -> Source:
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if not name.endswith(_INV_FREQ)}
    return Source(hf_config, dtypes, folder)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """The part of a parameter that a stored tensor holds: leaf[lead], which in HF's axes are the rows from `row` on."""

    name: str
    path: str
    lead: tuple[int, ...]  # repeat of the layer pattern and expert; empty if the parameter is not stacked
    shape: tuple[int, ...]  # of leaf[lead], in HF's order of axes
    row: int
    layer: int | None

    @property
    def transposed(self) -> bool:
        return len(self.shape) == 2 and self.path != "embed/embedding"


def _table(config: ModelConfig, hf_config, leaves) -> dict[str, list[_Piece]]:
    """{stored tensor: its pieces} for every tensor of a model with these parameters."""
    table = {}
    for name, paths in family(hf_config).names.items():
        paths = (paths,) if isinstance(paths, str) else paths
        for layer, block, repeat in _blocks(config) if "{layer}" in name else [(None, "", ())]:
            full = [f"{block}{path}" for path in paths]
            if not all(path in leaves for path in full):
                continue
            for expert in range(config.n_experts) if "{expert}" in name else [None]:
                lead = repeat if expert is None else (*repeat, expert)
                stored = name.format(layer=layer, expert=expert)
                table[stored] = _below_each_other(stored, full, lead, leaves, layer)
    return table


def _blocks(config: ModelConfig):
    """(absolute layer, prefix of its parameters, index in their stack) of each layer."""
    period = len(config.layer_pattern)
    for layer in range(config.n_layers):
        repeat, place = divmod(layer, period)
        in_tail = repeat == config.repeats
        yield layer, f"tail/{place}/" if in_tail else f"blocks/{place}/", () if in_tail else (repeat,)


def _below_each_other(name: str, paths, lead, leaves, layer) -> list[_Piece]:
    """The pieces of a stored tensor, in the order of its rows."""
    pieces, row = [], 0
    for path in paths:
        shape = leaves[path].shape[len(lead) :]
        stored = shape if path == "embed/embedding" else shape[::-1]
        pieces.append(_Piece(name, path, lead, stored, row, layer))
        row += stored[0]
    return pieces


def _stored_shape(pieces: list[_Piece]) -> tuple[int, ...]:
    return (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])


def _place(shape, dtype, sharding, fill) -> jax.Array:
    """A parameter on its devices, one part at a time; fill(host array, bounds) reads the part of one device."""
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    shards = []
    for bounds, holders in devices.items():
        host = _aligned([end - begin for begin, end in bounds], dtype)
        fill(host, bounds)
        shards += [jax.device_put(host, device) for device in holders]
        jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _aligned(shape: Sequence[int], dtype) -> np.ndarray:
    """An empty array that begins where JAX uses it as it lies: the devices of a CPU then share it, where each would copy it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


def _fill(pieces: list[_Piece], tensors, host: np.ndarray, bounds) -> None:
    """Reads the part of a parameter within bounds, (begin, end) along each axis, stripe by stripe."""

    def fill(piece: _Piece) -> None:
        stacked = list(zip(piece.lead, bounds, strict=False))
        if not all(begin <= i < end for i, (begin, end) in stacked):
            return
        target = host[tuple(i - begin for i, (begin, _) in stacked)]
        rest = bounds[len(stacked) :]
        (first, last), *columns = rest[::-1] if piece.transposed else rest
        turned = target.T if piece.transposed else target
        for begin, end in _stripes(first, last):
            block = tensors[piece.name].read((piece.row + begin, piece.row + end), *columns)
            turned[begin - first : end - first] = block.astype(target.dtype)

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(fill, pieces))


def _stripes(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of stripes of a few rows that cover the rows from first to last."""
    for begin in range(first, last, _STRIPE):
        yield begin, min(begin + _STRIPE, last)


def _wider(source: Source, table, leaves) -> dict[str, Tensor]:
    """The stored tensors that are more precise than the parameters read from them; none, with a warning, if the source
    is gone or has other shapes."""
    names = [name for name, dtype in source.dtypes.items() if name in table and _narrows(dtype, leaves, table[name])]
    if not names or source.folder is None:
        return {}
    try:
        _, tensors, _ = _open(source.folder)
        if all(name in tensors and tensors[name].shape == _stored_shape(table[name]) for name in names):
            return {name: tensors[name] for name in names}
        problem = f"{source.folder} holds another model than was read from it"
    except (ValueError, OSError) as error:
        problem = str(error)
    dtype = leaves[table[names[0]][0].path].dtype
    log.warning("%s: the weights are written as they were read, rounded to %s", problem, dtype)
    return {}


def _narrows(dtype: str, leaves, pieces: list[_Piece]) -> bool:
    """Whether a value of this dtype may change when it is cast to the dtype of these parameters."""
    return any(jnp.promote_types(dtype, leaves[piece.path].dtype) != leaves[piece.path].dtype for piece in pieces)


def _export(piece: _Piece, leaves, config: ModelConfig, head_mask, stored: dict[str, Tensor]) -> np.ndarray:
    names = [piece.path, *(f"{piece.path}{end}" for end in lora.SUFFIXES if f"{piece.path}{end}" in leaves)]
    tensor, *low_rank = to_host([leaves[name][piece.lead] for name in names])
    if piece.name in stored:
        tensor = _as_stored(tensor, piece, stored[piece.name])
    if low_rank and config.lora is not None:
        a, b = low_rank
        tensor = lora.add(tensor, a, b, config.lora)
    if head_mask is not None and piece.path.endswith("attn/o/kernel"):
        columns = np.repeat(np.asarray(head_mask)[piece.layer], config.head_dim)
        tensor = np.where(columns[:, None], np.zeros((), tensor.dtype), tensor)
    return tensor.T if piece.transposed else tensor


def _as_stored(tensor: np.ndarray, piece: _Piece, stored: Tensor) -> np.ndarray:
    """A piece of a parameter in the stored dtype: the stored value wherever the parameter has not changed since it
    was read."""
    rows = (piece.row, piece.row + piece.shape[0])
    block = stored.read(rows, *((0, n) for n in piece.shape[1:]))
    block = block.T if piece.transposed else block
    bits = f"u{tensor.dtype.itemsize}"
    unchanged = block.astype(tensor.dtype).view(bits) == tensor.view(bits)
    return np.where(unchanged, block, tensor.astype(block.dtype))


def _report_left_out(folder: Path, left_out: dict[str, Tensor]) -> None:
    if left_out:
        size = sum(math.prod(tensor.shape) * jnp.dtype(tensor.dtype).itemsize for tensor in left_out.values())
        log.info("%s: left out %d tensors about images, %.3g GB: text alone is read", folder, len(left_out), size / 1e9)


def _drop_known_extras(config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Drops the two known extras: rotary frequencies, and an output matrix where embeddings are tied."""
    for name in [name for name in tensors if name.endswith(_INV_FREQ)]:
        log.info("dropped %s: frequencies are computed", name)
        del tensors[name]
    if config.tied_embeddings and {_OUTPUT, _INPUT} <= set(tensors):
        output, table = tensors.pop(_OUTPUT), tensors[_INPUT]
        if output.shape != table.shape or output.dtype != table.dtype or not _same_bits(output, table):
            raise ValueError(f"{_OUTPUT} differs from the embeddings it is tied to: set tie_word_embeddings to false")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    rows, columns = a.shape
    return all(
        a.read(part, (0, columns)).tobytes() == b.read(part, (0, columns)).tobytes() for part in _stripes(0, rows)
    )


def _check_names(wanted: set[str], found: set[str], folder: Path) -> None:
    for what, names in (("lacks", wanted - found), ("has unknown", found - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise ValueError(f"{folder} {what} {len(names)} tensors: {shown}{' ...' if len(names) > 5 else ''}")
