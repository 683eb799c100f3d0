"""The keyed store: values of long work by key, each written once, as soon as it is known, and never changed.

The stage `pairs` stores its answers in one, an evaluation the results of its requests, and training the reference's
log-probabilities. The other two ways to keep something are a stage's result in the work directory and, for the state of
a training run, Orbax. Three words are kept apart: a key names one value of a store; an identity, {name: value}, lists
what the values were made from (hashes of model, data and template, lengths, ...); a fingerprint is the hash of a file's
bytes.

A store is a folder of JSONL shards to which whole lines are appended. Unlike the files of files.py, a shard may end in
a torn line, which a killed process was writing. Readers skip it, and nothing is written after it, because each opening
of the store starts a new shard.
"""

import contextlib
import json
import os
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from retmask_jax.utils.files import digest, read_object, write_json
from retmask_jax.utils.hosts import primary, wait_for_all

Key = tuple[Hashable, ...]

_SYNC_SECONDS = 5.0
_IDENTITY = "identity.json"


class Store:
    """JSON values by key: `store.add(key, value)`, `key in store`, `store[key]`; iteration gives the keys.

    Use it in a `with` statement. A killed process loses nothing that was added, a lost machine the last few seconds.
    Values that were there at the opening are read from disk when asked for; those added since then are also in memory.
    All hosts of a program open a store together and add the same values, and the first host writes them.

    >>> with Store() as store:
    ...     store.add(("answer", 3), "oslo")
    ...     store["answer", 3], store.missing([("answer", 2), ("answer", 3)])
    ('oslo', [0])
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, identity: Mapping[str, Any] | None = None):
        """Opens a store, or begins one.

        Args:
            folder: Folder of the store; None keeps the values in memory only.
            identity: What the values are made from, {name: JSON value}. None where the place already says it: a folder
                of a stage, which the work directory checks, or a folder with a hash as its name.

        Raises:
            ValueError: The store there has another identity, or a line other than the last one of a shard is damaged.
        """
        self._folder = None if folder is None else Path(folder)
        self._identity = identity
        self._shards: list[Path] = []
        self._places: dict[Key, tuple[Path, int]] = {}  # of the values that were there when the store was opened
        self._added: dict[Key, Any] = {}
        self._open = contextlib.ExitStack()
        self._readers: dict[Path, BinaryIO] = {}
        self._writer: BinaryIO | None = None
        self._synced = 0.0
        if self._folder is not None:
            self._read(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None and self._folder is not None:
            wait_for_all(f"{self._folder.name} is stored")

    def __contains__(self, key: Key) -> bool:
        return key in self._places or key in self._added

    def __iter__(self) -> Iterator[Key]:
        yield from self._places
        yield from self._added

    def __getitem__(self, key: Key) -> Any:
        if key in self._added:
            return self._added[key]
        shard, start = self._places[key]
        if shard not in self._readers:
            self._readers[shard] = self._open.enter_context(open(shard, "rb"))  # noqa: SIM115  (closed by `close`)
        reader = self._readers[shard]
        reader.seek(start)
        record = json.loads(reader.readline())
        if "value" in record:
            return record["value"]
        return {name: value for name, value in record.items() if name != "key"}  # how answers were once stored

    def missing(self, keys: Sequence[Key]) -> list[int]:
        """Returns the indices of the keys that have no value yet; where keys are equal, the first of their indices."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        return sorted(i for key, i in first.items() if key not in self)

    def add(self, key: Key, value: Any) -> None:
        """Stores a JSON value. Where the key has a value already, that one stays."""
        if key in self:
            return
        if self._folder is not None and primary():
            line = json.dumps({"key": list(key), "value": value}, allow_nan=False).encode() + b"\n"
            writer = self._writer or self._start_shard(self._folder)
            writer.write(line)
            writer.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync(writer)
        self._added[key] = value

    def close(self) -> None:
        """Makes sure that all values are on the disk. They stay readable, and adding starts a new shard."""
        if self._writer is not None:
            self._sync(self._writer)
            self._writer = None
        self._readers.clear()
        self._open.close()

    def _read(self, folder: Path) -> None:
        """Finds what the folder holds; the hosts go on when all of them know it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._shards = _find_shards(folder)
        if self._identity is not None and self._shards:
            stored = read_object(folder / _IDENTITY) if (folder / _IDENTITY).exists() else {}
            check_identity(folder, stored, self._identity)
        for shard in self._shards:
            for start, key in _keys(shard):
                self._places.setdefault(key, (shard, start))
        wait_for_all(f"{folder.name} is read")

    def _start_shard(self, folder: Path) -> BinaryIO:
        if self._identity is not None and not self._shards:
            write_json(folder / _IDENTITY, dict(self._identity))
        path = _shard(folder, int(self._shards[-1].stem) + 1 if self._shards else 0)
        self._writer = self._open.enter_context(open(path, "xb"))  # noqa: SIM115  (closed by `close`)
        self._shards.append(path)
        return self._writer

    def _sync(self, writer: BinaryIO) -> None:
        os.fsync(writer.fileno())
        self._synced = time.monotonic()


def check_identity(place: str | os.PathLike[str], stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError where what is stored was made from something else than is wanted, naming each difference.

    Args:
        place: File or folder that holds what was made, for the message.
        stored: The identity it was made with.
        wanted: The identity it must have.
    """
    changed = [name for name in wanted if stored.get(name) != wanted[name]]
    if changed:
        shown = ", ".join(f"{name} {stored.get(name)}, now {wanted[name]}" for name in changed)
        raise ValueError(f"{place} was made with another {shown}: delete it or move it away to make it again")


def request_key(what: str, *rows: Sequence[int], **options: Any) -> Key:
    """Returns the key of a request: its kind, and hashes of its rows of tokens and of all else that decides its
    value."""
    return what, *(digest(np.asarray(row, np.int32).tobytes()) for row in rows), digest(options)


def _find_shards(folder: Path) -> list[Path]:
    """The shards in order, each looked up by its name: a shared disk may list a new file late."""
    listed = max((int(path.stem) for path in folder.glob("[0-9]*.jsonl")), default=-1)
    shards = [path for number in range(listed + 1) if (path := _shard(folder, number)).exists()]
    while (path := _shard(folder, listed + 1)).exists():
        shards.append(path)
        listed += 1
    return shards


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.jsonl"


def _keys(shard: Path) -> Iterator[tuple[int, Key]]:
    """(position of its first byte, key) of each whole line; the last line may be torn."""
    start, damage = 0, None
    with open(shard, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if damage is not None:
                raise ValueError(f"{shard}, line {number - 1}: not a record ({damage!r}): delete the line or the file")
            if not line.endswith(b"\n"):
                return
            try:
                key = tuple(json.loads(line)["key"])
            except (ValueError, KeyError, TypeError) as error:  # a lost machine may leave zeros in place of text
                damage = error
            else:
                yield start, key
            start += len(line)
