"""The lock of a work directory: one process at a time writes it."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Generator
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = ".lock"


@contextlib.contextmanager
def locked(root: str | Path) -> Generator[None, None, None]:
    """Hold a folder for this process, as long as it lives; ValueError naming host and process where another does."""
    path = Path(root) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        _lock(file)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_free(root: str | Path) -> None:
    """ValueError if another process is writing a folder; creates nothing."""
    if (Path(root) / LOCK).exists():
        with open(Path(root) / LOCK, "a+") as file:
            _lock(file)


def _lock(file) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read() or "another process"
        raise ValueError(
            f"work directory {Path(file.name).parent} is being written by {holder}: wait for it, stop it, or choose "
            "another --workdir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        log.warning("%s: this file system has no locks (%s): run one command at a time", file.name, error.strerror)
