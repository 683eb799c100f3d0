"""Files that are either complete or absent: written under a temporary name, then renamed, by the first of several hosts."""

import contextlib
import glob
import gzip
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from retmask_jax.utils.hosts import primary, wait_for_all

_WITHIN, _LOOK_AGAIN = 60.0, 0.5  # seconds


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text or bytes so that a killed process leaves the old file or the new one, never a part."""
    with _whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """One JSON document of plain values and dataclasses; NaN and infinity are refused."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False, default=msgspec.to_builtins) + "\n")


def read_text(path: Path, what: str = "file") -> str:
    """The text of a file.

    Args:
        what: What the file is, for messages.

    Raises:
        ValueError: It is missing, a folder, not readable or not UTF-8.
    """
    path = check_file(path, what)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not UTF-8 ({error}): convert it") from error
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read ({error.strerror})") from error


def check_file(path: Path, what: str = "file") -> Path:
    """The path; ValueError unless it is a file."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{what} {path} does not exist")
    if not path.is_file():
        raise ValueError(f"{what} {path} is a folder, not a file" if path.is_dir() else f"{what} {path} is not a file")
    return path


def read_json(path: Path) -> Any:
    """The value of a JSON file; ValueError if it cannot be read or is not JSON."""
    return parse_json(read_text(path), f"{path} is not valid JSON")


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; ValueError as for `read_json`, and for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def parse_json(text: str, problem: str) -> Any:
    """The value of a JSON text. The ValueError for anything else begins with `problem`, which names the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{problem} ({error})") from error


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """One JSON value per line, written as they come; compressed where the name ends in .gz."""
    lines = (json.dumps(record, default=msgspec.to_builtins).encode() + b"\n" for record in records)
    with _whole(path) as file:
        for block in _packed(lines) if Path(path).suffix == ".gz" else lines:
            file.write(block)


def read_jsonl(path: Path) -> list[Any]:
    """The records of a JSONL file, compressed or not; ValueError naming file and line where one is not JSON."""
    return [record for _, record in iter_jsonl(path)]


def iter_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, record) of a JSONL file, read as they are asked for; errors as for `read_jsonl`."""
    for number, line in iter_lines(path):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}: not JSON")


def iter_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `iter_jsonl`; also ValueError naming file and line for a value that is no object."""
    for number, record in iter_jsonl(path):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number}: a {type(record).__name__} is no record: each line must be {{field: value, ...}}"
            )
        yield number, record


def iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of a text file, compressed or not; ValueError if it is missing, damaged or not UTF-8."""
    path = check_file(path)
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line
    except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:  # OSError: also what is no gzip archive
        raise ValueError(f"{path} cannot be read beyond line {number} ({error}): fetch or write it again") from error


def matching(pattern: Path) -> list[Path]:
    """The file of that name, else the files that match it as a glob, sorted; ValueError if there is none."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    files = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if Path(name).is_file()]
    if not files:
        raise ValueError(f"no file matches {pattern}: name a file, or a pattern such as folder/*.jsonl.gz")
    return files


def mark_whole(folder: Path) -> None:
    """Record that a folder is completely written, by a file next to it.

    Folders are not renamed, because object stores cannot do that.
    """
    write_json(_mark(folder), {"whole": True})
    wait_for_all(f"{folder.name} is whole")


def is_whole(folder: Path) -> bool:
    """Whether this folder is there and `mark_whole` was called for it."""
    return _mark(folder).exists() and folder.is_dir()


def wait_until_listed(paths: Iterable[Path]) -> None:
    """Wait until each of these paths that exists is listed in its folder: the mount of a bucket may list new files late.

    Raises:
        ValueError: A path is not listed within a minute.
    """
    for path in filter(Path.exists, paths):
        if not _comes_true(lambda path=path: path.name in os.listdir(path.parent)):
            raise ValueError(f"{path} exists, but its folder does not list it: wait until it does, and run this again")


def wait_until_seen(path: Path) -> None:
    """Wait until this host sees a file that the first host wrote.

    A mount remembers for some seconds that a file was absent.

    Raises:
        ValueError: The file is not seen within a minute.
    """
    if not _comes_true(path.exists):
        raise ValueError(f"this host does not see {path}, which the first one wrote: use storage that all share")


def digest(value: Any) -> str:
    """The hash of a JSON value or of bytes, 16 hex digits."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, all 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds now, or begins to hold within a minute."""
    end = time.monotonic() + _WITHIN
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(_LOOK_AGAIN)
    return holds


def _mark(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.whole")


def _packed(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """A gzip archive without name and time stamp, so that equal records give equal bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    yield from map(packer.compress, blocks)
    yield packer.flush()


@contextlib.contextmanager
def _whole(path: Path) -> Generator[BinaryIO, None, None]:
    """A file to write into, which takes its name, and the place of an older file, once it is completely written.

    Of several hosts only the first one writes.
    """
    if not primary():
        with open(os.devnull, "wb") as nothing:
            yield nothing
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
