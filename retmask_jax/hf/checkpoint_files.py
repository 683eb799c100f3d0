"""The files of a checkpoint, a folder or a GGUF file: their names, tensors read, shards of safetensors written."""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retmask_jax.hf.gguf import tensors as gguf_tensors
from retmask_jax.hf.gguf.config import hf_config
from retmask_jax.hf.gguf.file import is_gguf, open_file
from retmask_jax.utils.files import check_file, read_object, write_atomically
from retmask_jax.utils.hosts import primary

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Files of a tokenizer in the forms that transformers reads: a folder with one of these has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# The files of a checkpoint that are read, copied and fetched besides config.json and weights.
CHECKPOINT_TEXTS = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def weight_names(folder: Path) -> list[str]:
    """Returns the names of the files with a checkpoint's weights, as its index lists them if it has one.

    Raises:
        ValueError: The index has no weight_map, or names a file outside the folder.
    """
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map: fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
            raise ValueError(f"{folder / INDEX} names {name!r}, which is no file next to it: fetch it again")
    return names


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the HF config of a checkpoint; ValueError if it is missing or cannot be read."""
    if is_gguf(folder):
        return hf_config(open_file(folder))
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder / CONFIG} does not exist: not a Hugging Face checkpoint folder")
    return read_object(folder / CONFIG)


def config_name(folder: Path) -> str:
    """Returns the name of the file that holds a checkpoint's config."""
    return folder.name if is_gguf(folder) else CONFIG


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint that exist: config.json, the index, the weights that it names, and the texts; of a
    GGUF file, itself.

    The folder is not listed. Errors are those of `weight_names` and `texts`.
    """
    if is_gguf(folder):
        return [check_file(folder)]
    weights = [folder / name for name in (CONFIG, INDEX, *weight_names(folder))]
    return [path for path in weights if path.is_file()] + texts(folder)


def texts(folder: Path) -> list[Path]:
    """Returns the files of tokenizer, templates and generation that exist; ValueError if one of them is a folder.

    A GGUF file has none besides itself.
    """
    if is_gguf(folder):
        return []
    return [check_file(folder / name) for name in CHECKPOINT_TEXTS if (folder / name).exists()]


def own_texts(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns (texts that lie in the folder, texts that are links out of it).

    In the cache of the hub, files are links to blobs of their repository; these count as lying in the folder.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    own = [path for path in texts(folder) if path.resolve().is_relative_to(root)]
    return own, [path for path in texts(folder) if path not in own]


def copy_files(paths: list[Path], target: Path) -> None:
    """Copies files into a folder under their names; a link of that name in the folder is replaced, not followed."""
    for path in paths:
        if path.resolve() != (target / path.name).resolve():
            write_atomically(target / path.name, path.read_bytes())


class Tensor(Protocol):
    """A stored tensor, of which nothing is read before `read`."""

    shape: tuple[int, ...]
    dtype: str

    def read(self, *bounds: tuple[int, int]) -> np.ndarray:
        """Returns the block between these bounds, (begin, end) along each axis."""
        ...


class SafeTensor:
    """A tensor of an open safetensors file; nothing is read before `read`."""

    def __init__(self, handle: Any, name: str):
        self._slice = handle.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        if (kind := self._slice.get_dtype()) not in _DTYPES:
            raise ValueError(f"tensor {name} has type {kind}: quantised checkpoints are not supported, use a float one")
        self.dtype = _DTYPES[kind]

    def read(self, *bounds: tuple[int, int]) -> np.ndarray:
        """Returns the block between these bounds, (begin, end) along each axis."""
        return self._slice[tuple(slice(begin, end) for begin, end in bounds)]


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by HF name; ValueError if a file is missing or damaged, or a name occurs
    twice."""
    if is_gguf(folder):
        return dict(gguf_tensors.open_tensors(open_file(folder)))
    import safetensors

    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            handle = safetensors.safe_open(check_file(path), framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): fetch it again") from error
        for name in handle.keys():  # noqa: SIM118  (a file, not a dict)
            if name in tensors:
                raise ValueError(f"tensor {name} is stored twice, again in {path}")
            tensors[name] = SafeTensor(handle, name)
    return tensors


class Shards:
    """Writes tensors into the files of a folder. The files get their names at the end, when their number is known."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, np.ndarray] = {}
        self._written: list[list[str]] = []
        self._size = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Adds a tensor, and writes a file if the tensors not yet written would exceed its size."""
        if self._open and sum(t.nbytes for t in self._open.values()) + tensor.nbytes > _MAX_SHARD_BYTES:
            self._write()
        self._open[name] = np.ascontiguousarray(tensor)
        self._size += tensor.nbytes

    def finish(self) -> None:
        """Writes the remaining tensors and the index, and removes weights of an earlier checkpoint from the folder."""
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
