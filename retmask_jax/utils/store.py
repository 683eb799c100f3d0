"""What long work has brought so far, kept as it comes: one keyed store of JSON records that is only added to.

It is a folder of JSONL shards to which whole lines are appended. Unlike the files of files.py, a shard may end in a torn
line: the one a killed process was writing. It is not read, and nothing is written after it, since every opening starts a
shard of its own.
"""

import contextlib
import json
import os
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.utils.files import digest
from retmask_jax.utils.hosts import primary, wait_for_all

_SYNC_SECONDS = 5.0


class Records:
    """JSON objects with a "key" (a list), each stored once: `add` one, `key in` it, `records[key]`.

    A killed process loses nothing that was added, a lost machine the last few seconds. One process writes at a time.
    Raises ValueError where a line other than the last of a shard is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._shards = self._find_shards()
        self._open = contextlib.ExitStack()
        self._readers: dict[Path, Any] = {}
        self._places: dict[Hashable, tuple[Path, int]] = {}
        self._writer: Any = None
        self._synced = 0.0
        for shard in self._shards:
            for start, key in _keys(shard):
                self._places.setdefault(key, (shard, start))

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._places)

    def __getitem__(self, key: Hashable) -> dict[str, Any]:
        shard, start = self._places[key]
        if shard not in self._readers:
            self._readers[shard] = self._open.enter_context(open(shard, "rb"))  # noqa: SIM115
        reader = self._readers[shard]
        reader.seek(start)
        return json.loads(reader.readline())

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; ValueError if its key is stored."""
        key = _key(record)
        if key in self._places:
            raise ValueError(f"a record with key {list(key)} is stored in {self._folder} already")
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self._writer is None:
            self._start_shard()
        self._places[key] = (self._shards[-1], self._writer.tell())
        self._writer.write(line)
        self._writer.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Everything added is on the disk; the records stay readable, and adding starts a new shard."""
        if self._writer is not None:
            self._sync()
            self._writer = None
        self._readers.clear()
        self._open.close()

    def _find_shards(self) -> list[Path]:
        """In order, each asked for by its name: a shared disk may list a new file late."""
        listed = max((int(path.stem) for path in self._folder.glob("[0-9]*.jsonl")), default=-1)
        shards = [path for path in map(self._shard, range(listed + 1)) if path.exists()]
        while (path := self._shard(listed + 1)).exists():
            shards.append(path)
            listed += 1
        return shards

    def _shard(self, number: int) -> Path:
        return self._folder / f"{number:06d}.jsonl"

    def _start_shard(self) -> None:
        path = self._shard(int(self._shards[-1].stem) + 1 if self._shards else 0)
        self._writer = self._open.enter_context(open(path, "xb"))  # noqa: SIM115
        self._shards.append(path)

    def _sync(self) -> None:
        os.fsync(self._writer.fileno())
        self._synced = time.monotonic()


def _key(record: dict[str, Any]) -> Hashable:
    return tuple(record["key"])


def _keys(shard: Path) -> Iterator[tuple[int, Hashable]]:
    """(where it starts, key) of each whole line; one that nothing follows may be torn."""
    start, damage = 0, None
    with open(shard, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if damage is not None:
                raise ValueError(f"{shard}, line {number - 1}: not a record ({damage!r}): delete the line or the file")
            if not line.endswith(b"\n"):
                return
            try:
                key = _key(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:  # a lost machine may leave zeros in place of text
                damage = error
            else:
                yield start, key
            start += len(line)


Key = tuple[Hashable, ...]


class Kept:
    """Values of requests by key: in memory and, where a folder is given, in records that each value reaches as it comes.

    Use it in a `with` statement. Values are plain JSON. All hosts hold all values; the first one writes.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self._records = None if folder is None else Records(folder)
        self._values: dict[Key, Any] = {}
        if self._records is not None:
            self._values = {key: self._records[key]["value"] for key in self._records}
            wait_for_all("what is kept is known")

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_) -> None:
        if self._records is not None:
            self._records.close()
            wait_for_all("what was measured is kept")

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __getitem__(self, key: Key) -> Any:
        return self._values[key]

    def missing(self, keys: Sequence[Key]) -> list[int]:
        """Places of the keys that have no value yet; of equal ones the first."""
        firsts = {key: i for i, key in reversed(list(enumerate(keys)))}
        return sorted(i for key, i in firsts.items() if key not in self._values)

    def add(self, key: Key, value: Any) -> None:
        """Keep a value; one whose key is there stays as it is."""
        if key in self._values:
            return
        self._values[key] = value
        if self._records is not None and primary():
            self._records.add({"key": list(key), "value": value})


def request_key(what: str, *rows: Sequence[int], **options: Any) -> Key:
    """The key of a request: its kind, the tokens of its rows and whatever else decides its value."""
    return what, *(digest(np.asarray(row, np.int32).tobytes()) for row in rows), digest(options)
