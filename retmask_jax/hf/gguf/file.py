"""The header of a GGUF file: its metadata, and where each tensor lies.

The reader of the package `gguf` makes several arrays for every token of the vocabulary, ten seconds of work for Gemma's. This
one takes half a second; the types and sizes of blocks come from the package.
"""

import dataclasses
import functools
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.utils.files import check_file

SUFFIX = ".gguf"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, unless the file says otherwise
# The numbers that the format gives to types of values.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Block:
    """Where a tensor lies in a file.

    Attributes:
        kind: Name of its type, such as "F32" or "Q4_K".
        shape: In the order of Hugging Face, rows first.
        offset: Of its first byte in the file.
        row_bytes: Bytes of a row, which is the last axis.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def dtype(self) -> str:
        """The dtype of its values: that of a float tensor as stored, "float32" of a quantised one."""
        return FLOATS.get(self.kind, "float32")

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file: `metadata` by key, arrays as lists or NumPy arrays; `blocks` by tensor; `data`, all bytes of the file,
    mapped and not read."""

    path: Path
    metadata: dict[str, Any]
    blocks: dict[str, Block]
    data: np.ndarray

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def is_gguf(path: Path) -> bool:
    """Returns whether a path names a GGUF file rather than a checkpoint folder; it need not exist."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def open_file(path: Path) -> GgufFile:
    """Returns the header of a GGUF file; of the last file, unless it has changed, the one that was read before.

    Config, tensors, tokenizer and stop ids of a model are each read from it.

    Raises:
        ValueError: The file is missing, of another format or version, one of several parts, cut short or damaged.
    """
    now = check_file(path).stat()
    if now.st_size < len(_MAGIC):
        raise ValueError(f"{path} is not a GGUF file: it has {now.st_size} bytes")
    return _read_header(path, now.st_size, now.st_mtime_ns, now.st_ino)


@functools.lru_cache(maxsize=1)
def _read_header(path: Path, *_version: int) -> GgufFile:
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    try:
        metadata, tensors, end = _header(data, path)
    except (IndexError, struct.error, RecursionError) as error:
        raise ValueError(
            f"{path} is cut short: its header goes beyond its {data.size:,} bytes: fetch it again"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: its header has a text that is not UTF-8: fetch it again") from error
    _check_kind(path, metadata, tensors)
    alignment = whole_number(path, metadata, "general.alignment", _ALIGNMENT) or 1
    start = -(-end // alignment) * alignment
    blocks = {name: _block(path, name, shape, kind, start + at) for name, (shape, kind, at) in tensors.items()}
    for name, block in blocks.items():
        if (last := block.offset + block.n_bytes) > data.size:
            raise ValueError(
                f"{path} is cut short: tensor {name} ends at byte {last:,} and the file at {data.size:,}: fetch it again"
            )
    return GgufFile(path, metadata, blocks, data)


def whole_number(path: Path, metadata: dict[str, Any], key: str, default: Any) -> Any:
    """Returns the value of a key, the default where it is absent; ValueError unless it is a whole number."""
    value = metadata.get(key, default)
    if value is not default and type(value) is not int:
        raise ValueError(f"{path} has {key}={value!r}; it must be a whole number")
    return value


def _header(data: np.ndarray, path: Path) -> tuple[dict[str, Any], dict[str, tuple], int]:
    """(metadata, {tensor: (shape, number of its type, offset)}, position after them)."""
    cursor = _Cursor(data)
    if cursor.take(4) != _MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it begins with {bytes(data[:4])!r}, not {_MAGIC!r}")
    if (version := cursor.number("I")) not in _VERSIONS:
        raise ValueError(
            f"{path} has version {version} of GGUF; versions {_VERSIONS[0]} and {_VERSIONS[1]} are supported"
        )
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    metadata, tensors = {}, {}
    for _ in range(n_keys):
        _add(metadata, cursor.text(), cursor.value(cursor.number("I")), path)
    for _ in range(n_tensors):
        name = cursor.text()
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))
        _add(tensors, name, (shape[::-1], cursor.number("I"), cursor.number("Q")), path)
    return metadata, tensors, cursor.at


def _add(table: dict[str, Any], name: str, value: Any, path: Path) -> None:
    if name in table:
        raise ValueError(f"{path} is damaged: it has {name} twice: fetch it again")
    table[name] = value


def _check_kind(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    """ValueError unless the file holds a whole model."""
    if (parts := whole_number(path, metadata, "split.count", 1)) > 1:
        raise ValueError(f"{path} is one of {parts} parts: join them with llama-gguf-split --merge and pass that file")
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"{path} holds no model but {kind!r} (general.type): pass the model's file")
    if not tensors:
        raise ValueError(f"{path} holds a vocabulary and no tensors: pass the model's file")


def _block(path: Path, name: str, shape: tuple[int, ...], number: int, offset: int) -> Block:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise ValueError(f"{path}: tensor {name} has type {number}, which the package gguf does not know") from error
    block, size = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise ValueError(
            f"{path} is damaged: tensor {name} of shape {shape} has type {kind.name}, in blocks of {block}"
        )
    return Block(kind.name, shape, offset, shape[-1] // block * size)


class _Cursor:
    """Reads one value after the other; IndexError or struct.error beyond the end of the file."""

    def __init__(self, data: np.ndarray):
        self._data, self.at = data.data, 0

    def take(self, n: int) -> memoryview:
        part = self._data[self.at : self.at + n]
        if len(part) < n:
            raise IndexError(f"{n} bytes wanted, {len(part)} left")
        self.at += n
        return part

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_code(kind))
        kind, n = self.number("I"), self.number("Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(n)]
        dtype = np.dtype(f"<{_code(kind)}") if kind != 7 else np.dtype(bool)
        return np.frombuffer(self.take(n * dtype.itemsize), dtype)


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise IndexError(f"values have no type {kind}")
    return _SCALARS[kind]
