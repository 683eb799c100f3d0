"""What was measured of one model, request by request, so that a run that was cut off goes on with what is missing."""

import os
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from retmask_jax.files import digest
from retmask_jax.hosts import primary, wait_for_all
from retmask_jax.records import Records

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
