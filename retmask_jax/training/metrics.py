"""Metrics of a training run: a line of JSON per step, TensorBoard and, if asked for, Weights & Biases."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TextIO

import jax

from retmask_jax.utils.files import write_atomically
from retmask_jax.utils.hosts import primary


class Metrics:
    """Writes the numbers of each step, to be used in a `with` statement."""

    def __init__(self, folder: Path, step: int, wandb: str = "", name: str = "train"):
        """Opens the files; where a run is resumed, the numbers of steps after `step` are dropped.

        Args:
            folder: Where metrics.jsonl and tensorboard/ are.
            wandb: Project in Weights & Biases, "" for none.
            name: Name of the run there.

        Raises:
            ValueError: wandb names a project, and the package is not installed.
        """
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _whole(line) and json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))
        self._lines: TextIO | None = None
        self._board: Any = None
        self._run: Any = None
        if primary():
            self._lines = open(path, "a")  # noqa: SIM115  (closed at the end of the run)
            self._board = _board(folder / "tensorboard", step)
            self._run = _wandb(wandb, name, folder) if wandb else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in (self._lines, self._board):
            if sink is not None:
                sink.close()
        if self._run is not None:
            self._run.finish()

    def add(self, row: Mapping[str, float]) -> None:
        """Writes a row of numbers, one of which is the "step"."""
        if self._lines is None:
            return
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        numbers = {name: value for name, value in row.items() if name != "step"}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, row["step"])
        if self._run is not None:
            self._run.log(numbers, step=row["step"])


def memory_in_use() -> float | None:
    """Returns the peak of memory in use, in GiB, of the fullest device of this host; None where devices do not report
    it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) / 2**30 if peaks else None


def _whole(line: str) -> bool:
    """Whether a line was written to its end: a killed run may leave a part of its last line."""
    return line.endswith("}")


def _board(folder: Path, step: int):
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _wandb(project: str, name: str, folder: Path):
    try:
        import wandb  # pyrefly: ignore[missing-import]  (not required)
    except ImportError as error:
        raise ValueError("train.wandb names a project, but wandb is not installed: pip install wandb") from error
    return wandb.init(project=project, name=name, dir=str(folder))
