"""The work directory: one folder per stage, results with provenance, stages skipped while their inputs are the same."""

import dataclasses
import importlib.metadata
import json
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.files import digest, write_json
from retmask_jax.recipes import as_json, differences

_RESULT = "result.json"
_STARTED = "started.json"
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
            changed = differences(json.loads(path.read_text()), ours)
            if changed:
                more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
                raise ValueError(
                    f"work directory {root} belongs to another config ({'; '.join(changed[:2])}{more}): "
                    "choose another --workdir or delete it"
                )
        elif root.exists() and (not root.is_dir() or any(root.iterdir())):
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
        return json.loads(path.read_text())

    def run(self, stage: str, upstream: Sequence[str], inputs: dict[str, Any],
            function: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], bool]:  # fmt: skip
        """(result, skipped): run a stage unless it has finished on the same inputs.

        What an interrupted run left is kept if its inputs were the same, so that the stage can resume; else it goes.
        A rerun has a new id, which makes the stages that depend on it run again.
        """
        folder = self.folder(stage)
        write_json(self.root / "config.json", self.config)
        wanted = {
            "stage": stage, "config": digest(self.config), "inputs": inputs, "versions": versions(),
            "upstream": {name: self.result(name)["provenance"]["run_id"] for name in upstream},
        }  # fmt: skip
        if (folder / _RESULT).exists():
            result = self.result(stage)
            if {name: result["provenance"][name] for name in wanted} == wanted:
                return result, True
        started = folder / _STARTED
        if not started.exists() or json.loads(started.read_text()) != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(started, wanted)
        (folder / _RESULT).unlink(missing_ok=True)
        begin = time.time()
        result = function(folder)
        seconds = round(time.time() - begin, 1)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        provenance = wanted | {"run_id": uuid.uuid4().hex, "created": created}
        result = {"provenance": provenance, "seconds": seconds, **result}
        write_json(folder / _RESULT, result)
        return result, False


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
