"""Memory: how ours grows with the length (there is no peer), and the peak of one piece of work, measured in a new
process by `python -m retmask_jax.benchmarks.memory JSON`."""

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from retmask_jax.benchmarks import models
from retmask_jax.benchmarks.harness import Bound, Report, Row
from retmask_jax.benchmarks.peers import TrlPeer
from retmask_jax.benchmarks.programs import PROGRAMS, OurTrainer, dpo_settings, random_pairs

_GROWTH = 2.2  # largest growth that is allowed when the length doubles
_LENGTHS = tuple(2**power for power in range(13, 18))
_MEASURED = (4096, 8192)
_FORWARD_ONLY = 16384
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def run(size: str, length: int | None, layers: int | None, measured: bool) -> Report:
    """Temporary memory of prefill, detection and DPO at 8K tokens and its doublings up to `length`, by the compiler.

    Args:
        length: longest row in tokens; None for 64K.
        layers: layers of the model; None for two.
        measured: also run every program at 4K and 8K tokens, and prefill at 16K, and measure the peak resident memory.
    """
    longest = length or 2**16
    lengths = [n for n in _LENGTHS if n <= longest]
    if len(lengths) < 2:
        raise ValueError(f"--length={longest} leaves no doubling from {_LENGTHS[0]}: give at least {_LENGTHS[1]}")
    layers = layers or 2
    config = models.shape(size, n_layers=layers)
    rows = []
    for name, program in PROGRAMS.items():
        reported = [program(config, n).temporary_bytes() for n in lengths]
        rows += growth_rows(f"{size}, {name}, compiler", lengths, reported)
    for name in PROGRAMS if measured else ():
        run_at = [*_MEASURED, *([_FORWARD_ONLY] if name == "prefill" else [])]
        peaks = [measure("program", name=name, size=size, layers=layers, length=n)["peak"] for n in run_at]
        rows += growth_rows(f"{size}, {name}, measured", run_at, peaks)
    return Report("memory", {"size": size, "layers": layers, "lengths": lengths, "measured": measured}, rows)


def growth_rows(name: str, lengths: Sequence[int], sizes: Sequence[int]) -> list[Row]:
    """One row for each length; every row but the first has a bound on the growth since the length before it."""
    rows = [Row(f"{name}, {lengths[0]}", "bytes", sizes[0])]
    for length, size, before in zip(lengths[1:], sizes[1:], sizes, strict=False):
        rows.append(Row(f"{name}, {length}", "bytes", size, bounds=(Bound("growth", size / before, "<=", _GROWTH),)))
    return rows


def measure(what: str, **options: Any) -> dict[str, int]:
    """Run one piece of work in a new process and return its peaks in bytes.

    Args:
        what: "program" (options name, size, layers, length), or "ours" or "trl" (folder, length, pairs) for DPO
            training.

    Raises:
        ValueError: the process failed; the message ends with the last line it wrote.
    """
    command = [sys.executable, "-m", "retmask_jax.benchmarks.memory", json.dumps({"what": what} | options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = "it was killed, as for lack of memory" if done.returncode < 0 else done.stderr.strip().splitlines()[-1]
        raise ValueError(f"measuring {what} {options} failed: {why}")
    return json.loads(done.stdout.splitlines()[-1])


class Peak:
    """The highest resident memory within a `with` block, in bytes above that at its start (Linux only)."""

    bytes: int

    def __enter__(self) -> "Peak":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # otherwise freed memory that is still resident would be reused and not counted
        _RESET.write_text("5")
        self._start = _kilobytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = (_kilobytes("VmHWM") - self._start) * 1024


def program_peak(name: str, size: str, layers: int | None, length: int) -> dict[str, int]:
    """The peak of one run of a program of PROGRAMS, beyond its arguments."""
    program = PROGRAMS[name](models.shape(size, n_layers=layers), length)
    compiled = program.compile()
    arguments = jax.block_until_ready(program.arguments())
    with Peak() as peak:
        jax.block_until_ready(compiled(*arguments))
    return {"peak": peak.bytes}


def our_training(folder: str, length: int, pairs: int) -> dict[str, int]:
    """Peaks of our DPO training from a checkpoint.

    Returns:
        whole: everything beyond the bare process; step: what one step takes beyond parameters and moments.
    """
    settings = dpo_settings(pairs, "float32")
    vocab_size = models.read_shape(Path(folder)).vocab_size
    rows = random_pairs(vocab_size, length, pairs)
    given = Path(folder), rows, settings, models.mesh(1), np.zeros((pairs, 2), np.float32)
    OurTrainer(*given).step()  # compiling takes memory, too, and is no part of training
    with Peak() as whole:
        ours = OurTrainer(*given)
        ours.step()
    with Peak() as alone:
        ours.step()
    return {"whole": whole.bytes, "step": alone.bytes}


def trl_training(folder: str, length: int, pairs: int) -> dict[str, int]:
    """The same peaks of TRL's training with its frozen reference model."""
    settings = dpo_settings(pairs, "float32")
    vocab_size = models.read_shape(Path(folder)).vocab_size
    with tempfile.TemporaryDirectory() as work:
        with Peak() as whole:
            rows = random_pairs(vocab_size, length, pairs)
            peer = TrlPeer(Path(folder), rows, settings, Path(work), precomputed=False)
            peer.step(1e-5)
        with Peak() as alone:
            peer.step(1e-5)
    return {"whole": whole.bytes, "step": alone.bytes}


def _kilobytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


_WORK = {"program": program_peak, "ours": our_training, "trl": trl_training}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(_WORK[request.pop("what")](**request)))
