"""How our memory grows with the length, by the compiler's report and as measured; there is no peer."""

from collections.abc import Sequence

from retmask_jax.benchmarks import models
from retmask_jax.benchmarks.harness import Bound, Report, Row
from retmask_jax.benchmarks.peak import measure
from retmask_jax.benchmarks.programs import PROGRAMS

_GROWTH = 2.2  # bound for twice the length
_LENGTHS = tuple(2**power for power in range(13, 18))
_MEASURED = (4096, 8192)
_FORWARD_ONLY = 16384


def run(size: str, length: int | None, layers: int | None, measured: bool) -> Report:
    """Bytes of temporary memory at 8K tokens and its doublings up to `length` (64K), for prefill, detection and DPO.

    measured: also the peak of resident memory of runs at 4K and 8K, of prefill at 16K too.
    """
    longest = length or 2**16
    lengths = [n for n in _LENGTHS if n <= longest]
    if len(lengths) < 2:
        raise ValueError(f"--length={longest} leaves no doubling from {_LENGTHS[0]}: give at least {_LENGTHS[1]}")
    layers = layers or 2
    config = models.shape(size, n_layers=layers)
    rows = []
    for name, program in PROGRAMS.items():
        reported = [program(config, n).compile().memory_analysis().temp_size_in_bytes for n in lengths]
        rows += growth_rows(f"{size}, {name}, compiler", lengths, reported)
    for name in PROGRAMS if measured else ():
        run_at = [*_MEASURED, *([_FORWARD_ONLY] if name == "prefill" else [])]
        peaks = [measure("program", name=name, size=size, layers=layers, length=n)["peak"] for n in run_at]
        rows += growth_rows(f"{size}, {name}, measured", run_at, peaks)
    return Report("memory", {"size": size, "layers": layers, "lengths": lengths, "measured": measured}, rows)


def growth_rows(name: str, lengths: Sequence[int], sizes: Sequence[int]) -> list[Row]:
    """A row per length; from the second on, the growth since half of it."""
    rows = [Row(f"{name}, {lengths[0]}", "bytes", sizes[0])]
    for n, size, before in zip(lengths[1:], sizes[1:], sizes, strict=False):
        rows.append(Row(f"{name}, {n}", "bytes", size, bounds=(Bound("growth", size / before, "<=", _GROWTH),)))
    return rows
