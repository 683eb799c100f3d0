"""Files that are either whole or not there: written under a temporary name, then renamed; by the first of several
hosts."""

import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retmask_jax.hosts import primary


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text or bytes so that a killed process leaves the old file or the new one, never a part."""
    if not primary():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def write_array(path: Path, array) -> None:
    """One NumPy array in .npy format, which can be memory-mapped."""
    import numpy as np

    stream = io.BytesIO()
    np.save(stream, array)
    write_atomically(path, stream.getvalue())


def write_json(path: Path, value: Any) -> None:
    """One JSON document; NaN and infinity are refused."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """One JSON value a line; compressed where the name ends in .gz."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    # No time stamp in the archive: equal records give equal bytes.
    write_atomically(path, gzip.compress(data, mtime=0) if Path(path).suffix == ".gz" else data)


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


def digest(value: Any) -> str:
    """Hash of a JSON value or of bytes, 16 hex digits."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]
