"""Hugging Face safetensors <-> parameters, both ways, by each family's table of names; closed-world, streamed."""

import concurrent.futures
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from retmask_jax.families import family, from_hf, to_hf
from retmask_jax.files import write_atomically
from retmask_jax.hosts import primary, to_host
from retmask_jax.model.config import ModelConfig
from retmask_jax.progress import track
from retmask_jax.sharding import param_shardings, plain_shapes

log = logging.getLogger(__name__)

_INPUT = "model.embed_tokens.weight"
_OUTPUT = "lm_head.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_SHARD_BYTES = 5 * 10**9
_STRIPE = 128  # rows read at a time
_READERS = 4  # threads


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from: its HF config, the dtype of each stored tensor, and the folder.

    Of a model made here there is none of these.
    """

    hf_config: dict[str, Any] | None
    dtypes: dict[str, str]
    folder: Path | None = None


def read(folder: Path, dtype: str, mesh=None) -> tuple[ModelConfig, Any, Source]:
    """(config, params, source) of an HF checkpoint folder, cast to dtype, placed by the mesh's shardings if given.

    mesh: a Mesh, or what gives one for the model's config.

    Tensors are read lazily, only the part each device holds, so host memory beyond the parameters stays near one
    device's shard of one parameter. Raises ValueError naming the file, attribute or tensor that is missing, extra,
    misshapen or unreadable before any weight is read.
    """
    hf_config = read_config(folder)
    config = from_hf(hf_config)
    shapes = flatten_dict(plain_shapes(config), sep="/")
    table = _table(config, hf_config, shapes)
    tensors = _open_all(folder)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if not name.endswith(_INV_FREQ)}
    _drop_known_extras(config, tensors)
    _check_names(set(table), set(tensors), folder)
    for name, pieces in table.items():
        if tensors[name].shape != (wanted := _stored_shape(pieces)):
            raise ValueError(f"tensor {name} has shape {tensors[name].shape}; config.json asks for {wanted}")

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
    return config, unflatten_dict(params, sep="/"), Source(hf_config, dtypes, folder)


def write(folder: Path, config: ModelConfig, params, source: Source, head_mask=None, dtype: str | None = None) -> None:
    """Write config.json and safetensors (with an index when there are several files) in HF names.

    Each tensor gets the dtype it was read in unless `dtype` is given. head_mask bool[L,H] zeroes the columns of
    o_proj that read the masked heads. One file's tensors are in host memory at a time; of several hosts all take part
    and the first one writes.
    """
    hf_config = dict(source.hf_config or to_hf(config))
    leaves = flatten_dict(params, sep="/")
    table = _table(config, hf_config, leaves)
    shards = _Shards(folder)
    for name in source.dtypes or table:
        tied_copy = name == _OUTPUT and config.tied_embeddings
        parts = [_export(piece, leaves, config, head_mask) for piece in table[_INPUT if tied_copy else name]]
        tensor = np.concatenate(parts) if len(parts) > 1 else parts[0]
        shards.add(name, tensor.astype(jnp.dtype(dtype or source.dtypes.get(name, tensor.dtype))))
    shards.finish()
    if dtype is not None:
        hf_config["dtype" if "dtype" in hf_config else "torch_dtype"] = str(jnp.dtype(dtype))
    write_atomically(folder / "config.json", json.dumps(hf_config, indent=2) + "\n")


def weight_names(folder: Path) -> list[str]:
    """The files a checkpoint's weights lie in, by its index if it has one; ValueError if that has no weight_map."""
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    weight_map = _read_json(folder / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map: fetch it again")
    return sorted(set(weight_map.values()))


def read_config(folder: Path) -> dict[str, Any]:
    """The HF config of a checkpoint folder; ValueError if it is missing or no JSON object."""
    return _read_json(folder / "config.json", "not a Hugging Face checkpoint folder")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """The part of a parameter that one stored tensor holds: leaf[lead], in HF's axes the rows from `row` on."""

    name: str
    path: str
    lead: tuple[int, ...]  # repeat of the layer pattern, expert; none where the parameter is not stacked
    shape: tuple[int, ...]  # of leaf[lead], in HF's order of axes
    row: int
    layer: int | None

    @property
    def transposed(self) -> bool:
        return len(self.shape) == 2 and self.path != "embed/embedding"


def _table(config: ModelConfig, hf_config, leaves) -> dict[str, list[_Piece]]:
    """Stored tensor -> its pieces, for every tensor a model with these parameters has."""
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
    """(absolute layer, prefix of its parameters, index into their stack) of each layer."""
    period = len(config.layer_pattern)
    for layer in range(config.n_layers):
        repeat, place = divmod(layer, period)
        in_tail = repeat == config.repeats
        yield layer, f"tail/{place}/" if in_tail else f"blocks/{place}/", () if in_tail else (repeat,)


def _below_each_other(name: str, paths, lead, leaves, layer) -> list[_Piece]:
    """The pieces of one stored tensor, in the order of its rows."""
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
    """A parameter on its devices; fill(host array, index) reads one device's part of it. One part at a time."""
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    shards = []
    for bounds, holders in devices.items():
        host = np.empty([end - begin for begin, end in bounds], dtype)
        fill(host, bounds)
        shards += [jax.device_put(host, device) for device in holders]
        jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(pieces: list[_Piece], tensors, host: np.ndarray, bounds) -> None:
    """Read what lies within bounds, (begin, end) along each axis of the parameter, stripe by stripe."""

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
    """Rows first to last in parts (begin, end) of a few at a time."""
    for begin in range(first, last, _STRIPE):
        yield begin, min(begin + _STRIPE, last)


def _export(piece: _Piece, leaves, config: ModelConfig, head_mask) -> np.ndarray:
    tensor = to_host(leaves[piece.path][piece.lead])
    if head_mask is not None and piece.path.endswith("attn/o/kernel"):
        columns = np.repeat(np.asarray(head_mask)[piece.layer], config.head_dim)
        tensor = np.where(columns[:, None], np.zeros((), tensor.dtype), tensor)
    return tensor.T if piece.transposed else tensor


# --- files ---


class _Tensor:
    """One tensor of an open safetensors file, read when asked for."""

    def __init__(self, handle, name: str):
        self._slice = handle.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = _DTYPES.get(self._slice.get_dtype())
        if self.dtype is None:
            kind = self._slice.get_dtype()
            raise ValueError(f"tensor {name} has type {kind}: quantised checkpoints are not supported, use a float one")

    def read(self, *bounds: tuple[int, int]) -> np.ndarray:
        """The block with these (begin, end) along each axis."""
        return self._slice[tuple(slice(begin, end) for begin, end in bounds)]


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
    names = weight_names(folder)
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return [folder / name for name in names]
    if (folder / INDEX).exists():
        raise ValueError(f"{folder / INDEX} names {', '.join(missing)}, which is not there: fetch it again")
    if any(folder.glob("*.bin")):
        raise ValueError(f"{folder} holds pickled weights (.bin), which are never opened: convert them to safetensors")
    raise ValueError(f"{folder} holds no {WEIGHTS} and no {INDEX}")


def _drop_known_extras(config: ModelConfig, tensors: dict[str, _Tensor]) -> None:
    """Two extras are known: stored rotary frequencies, and an output matrix beside tied embeddings."""
    for name in [name for name in tensors if name.endswith(_INV_FREQ)]:
        log.info("dropped %s: frequencies are computed", name)
        del tensors[name]
    if config.tied_embeddings and {_OUTPUT, _INPUT} <= set(tensors):
        output, table = tensors.pop(_OUTPUT), tensors[_INPUT]
        if output.shape != table.shape or output.dtype != table.dtype or not _same_bits(output, table):
            raise ValueError(f"{_OUTPUT} differs from the embeddings it is tied to: set tie_word_embeddings to false")


def _same_bits(a: _Tensor, b: _Tensor) -> bool:
    rows, columns = a.shape
    return all(
        a.read(part, (0, columns)).tobytes() == b.read(part, (0, columns)).tobytes() for part in _stripes(0, rows)
    )


def _check_names(wanted: set[str], found: set[str], folder: Path) -> None:
    for what, names in (("lacks", wanted - found), ("has unknown", found - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise ValueError(f"{folder} {what} {len(names)} tensors: {shown}{' ...' if len(names) > 5 else ''}")


class _Shards:
    """Tensors on their way into the files of a folder, which take their names when their number is known."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, np.ndarray] = {}
        self._written: list[list[str]] = []
        self._size = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        if self._open and sum(t.nbytes for t in self._open.values()) + tensor.nbytes > _MAX_SHARD_BYTES:
            self._write()
        self._open[name] = np.ascontiguousarray(tensor)
        self._size += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, the index, and remove weights of an earlier checkpoint in the folder."""
        self._write()
        if not primary():
            return
        n = len(self._written)
        files = [WEIGHTS] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        for number, file in enumerate(files):
            self._part(number).rename(self._folder / file)
        for path in [*self._folder.glob("model-*-of-*.safetensors"), self._folder / WEIGHTS]:
            if path.name not in files:
                path.unlink(missing_ok=True)  # a reader would take it for a part of these
        if n == 1:
            (self._folder / INDEX).unlink(missing_ok=True)
            return
        weight_map = {name: file for file, names in zip(files, self._written, strict=True) for name in names}
        index = {"metadata": {"total_size": self._size}, "weight_map": weight_map}
        write_atomically(self._folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        from safetensors.numpy import save_file

        if primary():
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(self._open, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._open))
        self._open = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"weights-{number:05d}.part"


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
