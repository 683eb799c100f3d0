"""Hashes of files and checkpoints, over every byte. The hash of a large file is cached until the file changes."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from retmask_jax.utils.compiled import user_cache, waiting
from retmask_jax.utils.files import digest
from retmask_jax.utils.progress import track

_REMEMBERED = 2**24  # bytes; smaller files are hashed again each time, which is faster than looking up their hashes
_SETTLED = 2 * 10**9  # ns: a file changed within this time of its hashing could change again under the same time stamp
_BLOCK = 2**22
_READERS = 4  # threads; hashing does not hold the interpreter's lock


@waiting()
def fingerprint(*files: Path) -> str:
    """Returns a hash of the names, sizes and contents of some files.

    Hashing a sample of each tensor would be faster, but models may differ in a single expert or adapter, and taking one
    for another costs results. A core hashes 1 to 2 GB/s, so 16 GB in four files take some 10 s the first time. The hash
    of a large file is then cached in the user's cache folder under the file's path, size, modification time and inode.
    """
    sizes = [file.stat().st_size for file in files]
    with (
        track(None, sum(sizes), f"fingerprint {files[0].parent.name}", "B") as bar,
        concurrent.futures.ThreadPoolExecutor(_READERS) as pool,
    ):
        hashes = pool.map(lambda file: _hash(file, bar.update), files)
        return digest([[file.name, size, found] for file, size, found in zip(files, sizes, hashes, strict=True)])


def _hash(file: Path, progress: Callable[[int], object]) -> str:
    """SHA-256 of a file's content, from the cache if it is there; progress(n) is called for each n bytes."""
    before = file.stat()
    identity = [str(file.resolve()), before.st_size, before.st_mtime_ns, before.st_ino]
    if before.st_size < _REMEMBERED:
        return _read(file, progress)
    known = _cache() / f"{digest(identity)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # missing or damaged: the file is read
        stored = json.loads(known.read_text())
        if stored["identity"] == identity:
            progress(before.st_size)
            return stored["sha256"]
    found = _read(file, progress)
    if time.time_ns() - before.st_mtime_ns > _SETTLED:
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            _remember(known, {"identity": identity, "sha256": found})
    return found


def _read(file: Path, progress: Callable[[int], object]) -> str:
    hashed = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            hashed.update(block)
            progress(len(block))
    return hashed.hexdigest()


def _remember(known: Path, record: dict) -> None:
    known.parent.mkdir(parents=True, exist_ok=True)
    part = known.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record))
    part.replace(known)


def _cache() -> Path:
    return user_cache() / "fingerprints"
