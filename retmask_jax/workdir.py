"""The work directory: one folder per stage, results with provenance, stages skipped while their inputs are the same."""

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.files import digest, read_json, write_json
from retmask_jax.hosts import primary, wait_for_all
from retmask_jax.recipes import as_json, differences

log = logging.getLogger(__name__)

_RESULT = "result.json"
_STARTED = "started.json"
_LOCK = ".lock"
# How servers are reached: no part of what a work directory is of, since servers move.
_REACHED_BY = ("endpoints", "concurrency", "timeout", "retries")
_PACKAGES = ("retmask_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A folder that belongs to one config."""

    root: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, root: str | Path, config) -> "Workdir":
        """Open; ValueError if the folder belongs to another config, naming the first differences.

        Nothing is written before the first stage runs, so a mistake found until then leaves no folder behind.
        """
        root, ours = Path(root), as_json(config)
        path = root / "config.json"
        if path.exists():
            changed = differences(_identity(read_json(path)), _identity(ours))
            if changed:
                more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
                raise ValueError(
                    f"work directory {root} belongs to another config ({'; '.join(changed[:2])}{more}): "
                    "choose another --workdir or delete it"
                )
        elif root.exists() and (not root.is_dir() or any(p.name != _LOCK for p in root.iterdir())):
            raise ValueError(f"work directory {root} exists and is not one of ours: choose another --workdir")
        return cls(root, ours)

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its files."""
        return self.root / stage

    def result(self, stage: str) -> dict[str, Any]:
        """A finished stage's result; ValueError if it has not run."""
        path = self.folder(stage) / _RESULT
        if not path.exists():
            raise ValueError(
                f"stage {stage} has no result in {self.root}: run `retmask {stage}` or `retmask run` first"
            )
        return read_json(path)

    def run(self, stage: str, upstream: Sequence[str], inputs: dict[str, Any],
            function: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], bool]:  # fmt: skip
        """(result, skipped): run a stage unless it has finished on the same inputs.

        What an interrupted run left is kept if its inputs were the same, so that the stage can resume; else it goes.
        A rerun has a new id, which makes the stages that depend on it run again. Raises ValueError while another
        process runs a stage here.
        """
        with locked(self.root) if primary() else contextlib.nullcontext():
            return self._run(stage, upstream, inputs, function)

    def _run(self, stage, upstream, inputs, function) -> tuple[dict[str, Any], bool]:
        folder = self.folder(stage)
        write_json(self.root / "config.json", self.config)
        wait_for_all(f"{stage} begins")
        if not (self.root / "config.json").exists():
            raise ValueError(f"this host does not see what the first one wrote into {self.root}: use storage that all share")
        wanted = {
            "stage": stage, "config": digest(_identity(self.config)), "inputs": inputs, "versions": versions(),
            "upstream": {name: self.result(name)["provenance"]["run_id"] for name in upstream},
        }  # fmt: skip
        if (folder / _RESULT).exists():
            result = self.result(stage)
            if {name: result["provenance"][name] for name in wanted} == wanted:
                return result, True
        self._clear(folder, wanted)
        begin = time.time()
        result = function(folder)
        seconds = round(time.time() - begin, 1)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        provenance = wanted | {"run_id": uuid.uuid4().hex, "created": created}
        write_json(folder / _RESULT, {"provenance": provenance, "seconds": seconds, **result})
        wait_for_all(f"{stage} ends")
        return self.result(stage), False

    def _clear(self, folder: Path, wanted: dict[str, Any]) -> None:
        """Keep what an interrupted run on the same inputs left, and nothing else."""
        started = folder / _STARTED
        wait_for_all("what was left is seen by all")
        if primary():
            if not started.exists() or read_json(started) != wanted:
                shutil.rmtree(folder, ignore_errors=True)
                write_json(started, wanted)
            (folder / _RESULT).unlink(missing_ok=True)
        wait_for_all("the folder is as it has to be")


@contextlib.contextmanager
def locked(root: str | Path) -> Iterator[None]:
    """Hold a folder for this process, as long as it lives; ValueError naming host and process where another does."""
    path = Path(root) / _LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        _lock(file)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_free(root: str | Path) -> None:
    """ValueError if another process is writing a folder; creates nothing."""
    if (Path(root) / _LOCK).exists():
        with open(Path(root) / _LOCK, "a+") as file:
            _lock(file)


def fingerprint(path: str | Path) -> str:
    """Hash of a file or of the files directly in a folder; of large files the size and the first megabyte count."""
    path = Path(path)
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    parts = []
    for file in files:
        with open(file, "rb") as stream:
            parts.append((file.name, file.stat().st_size, digest(stream.read(2**20))))
    return digest(parts)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


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


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config all results depend on: of endpoints, who is answered by one; not which suites and models are
    measured at the end, which only the stages that do so depend on."""
    config = {name: value for name, value in config.items() if name != "suites"}
    if "eval" in config:
        config["eval"] = {name: value for name, value in config["eval"].items() if name != "models"}
    if "pairs" not in config:
        return config
    pairs = {name: value for name, value in config["pairs"].items() if name not in _REACHED_BY}
    return config | {"pairs": pairs | {"endpoints": sorted(config["pairs"].get("endpoints", ()))}}
