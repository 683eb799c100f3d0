"""Peak memory of one piece of work in a process of its own: `python -m retmask_jax.benchmarks.peak JSON`."""

import ctypes
import gc
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from retmask_jax.benchmarks import models
from retmask_jax.benchmarks.by_hand import Ours
from retmask_jax.benchmarks.programs import PROGRAMS, dpo_settings, random_pairs

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def measure(what: str, **options) -> dict[str, Any]:
    """Run a piece of work in a new process and return its figures in bytes; ValueError with its last line if it fails.

    what: "program" (name, size, layers, length), "ours" or "trl" (folder, length, pairs): DPO training.
    """
    command = [sys.executable, "-m", "retmask_jax.benchmarks.peak", json.dumps({"what": what} | options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"measuring {what} {options} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


class Peak:
    """Bytes of resident memory above those at the start of a `with` block, at their highest (Linux)."""

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide what is taken again
        _RESET.write_text("5")
        self._start = _kilobytes("VmRSS")
        return self

    def __exit__(self, *_):
        self.bytes = (_kilobytes("VmHWM") - self._start) * 1024


def program_peak(name: str, size: str, layers: int | None, length: int) -> dict[str, int]:
    """One run of a program of `programs`, its arguments in place and donated where the program does so."""
    program = PROGRAMS[name](models.shape(size, n_layers=layers), length)
    compiled = program.compile()
    arguments = jax.block_until_ready(program.arguments())
    with Peak() as run:
        jax.block_until_ready(compiled(*arguments))
    return {"peak": run.bytes}


def our_training(folder: str, length: int, pairs: int) -> dict[str, int]:
    """DPO steps from a checkpoint. whole: all beyond the bare process; step: beyond parameters and moments."""
    settings = dpo_settings(pairs, "float32")
    vocab_size = models.read_shape(Path(folder)).vocab_size
    rows = random_pairs(vocab_size, length, pairs)
    given = Path(folder), rows, settings, models.mesh(1), np.zeros((2, pairs), np.float32)
    Ours(*given).step()  # compiling takes memory, too, and is no part of training
    with Peak() as whole:
        ours = Ours(*given)
        ours.step()
    with Peak() as alone:
        ours.step()
    return {"whole": whole.bytes, "step": alone.bytes}


def trl_training(folder: str, length: int, pairs: int) -> dict[str, int]:
    """The same by TRL with its frozen reference model."""
    from retmask_jax.benchmarks.trl_peer import TrlPeer

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
    return int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[1])


_WORK = {"program": program_peak, "ours": our_training, "trl": trl_training}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(_WORK[request.pop("what")](**request)))
