"""Files that are either whole or not there: written under a temporary name, then renamed."""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text or bytes so that a killed process leaves the old file or the new one, never a part."""
    with _atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """One JSON document; NaN and infinity are refused."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """One JSON value a line, written as they come; compressed where the name ends in .gz."""
    lines = (json.dumps(record).encode() + b"\n" for record in records)
    with _atomic(path) as file:
        file.writelines(_packed(lines) if Path(path).suffix == ".gz" else lines)


def read_jsonl(path: Path) -> list[Any]:
    """The records of a JSONL file, compressed or not; ValueError naming file and line where one is not JSON."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    opener = gzip.open if path.suffix == ".gz" else open
    records = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return records


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _packed(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts as a gzip archive; it has no time stamp, so equal parts give equal bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    for part in parts:
        yield packer.compress(part)
    yield packer.flush()
