"""The files of a checkpoint folder: their names, tensors read from safetensors, shards written."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.files import write_atomically
from retmask_jax.hosts import primary

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


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


class Tensor:
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


def open_tensors(folder: Path) -> dict[str, Tensor]:
    import safetensors

    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            handle = safetensors.safe_open(path, framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): fetch it again") from error
        for name in handle.keys():  # noqa: SIM118  (a file, not a dict)
            if name in tensors:
                raise ValueError(f"tensor {name} is stored twice, again in {path}")
            tensors[name] = Tensor(handle, name)
    return tensors


class Shards:
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
