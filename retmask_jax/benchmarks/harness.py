"""What all benchmarks share: runs in turn, rows with a ratio, bounds that must hold, reports as table and as JSON."""

import dataclasses
import gc
import math
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from retmask_jax.utils.files import write_json
from retmask_jax.utils.versions import installed_versions

_RELATIONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}
_PACKAGES = ("retmask_jax", "jax", "jaxlib", "flax", "numpy", "torch", "transformers", "trl", "accelerate")


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of one contender's runs: the first, with compilation and set-up, and the others. result: of the first."""

    first: float
    runs: tuple[float, ...]
    result: Any = None

    @property
    def median(self) -> float:
        """Seconds, without the first run."""
        return statistics.median(self.runs)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A measured value and what it must be: <=, >= or == the limit. NaN violates every bound."""

    name: str
    value: float
    relation: str
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the value is as it must be."""
        return bool(_RELATIONS[self.relation](self.value, self.limit))

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} {'' if self.holds else 'VIOLATES '}{self.relation} {self.limit:g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    ours, peer: amounts in `unit`. The peer may be what the machine can do at most; it is None where there is no peer.
    target: what the ratio should be. Times depend on the machine, so a missed target is shown and fails nothing.
    bounds: equality of results and the like. The benchmark fails where a bound does not hold.
    facts: further values for the JSON.
    """

    name: str
    unit: str
    ours: float
    peer: float | None = None
    ratio: float | None = None
    target: Bound | None = None
    bounds: tuple[Bound, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a benchmark: its name, the settings it ran with, its rows."""

    benchmark: str
    setting: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def violated(self) -> list[str]:
        """The bounds that do not hold, each with the name of its row."""
        return [f"{row.name}: {bound}" for row in self.rows for bound in row.bounds if not bound.holds]


def alternate(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timed]:
    """Run each contender once, then in turn for `repeats` rounds, so that slow moments of the machine meet all of them.

    A contender returns host values, so that its work is done when it returns. Only those of the first run are kept.
    """
    first = {name: _timed(run) for name, run in contenders.items()}
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            runs[name].append(_timed(run)[0])
    return {name: Timed(first[name][0], tuple(runs[name]), first[name][1]) for name in contenders}


def speed_row(
    name: str,
    ours: Timed,
    peer: Timed | None,
    *,
    work: float,
    what: str,
    target: float | None = None,
    bounds: Sequence[Bound] = (),
    facts: Mapping[str, Any] | None = None,
) -> Row:
    """A row in seconds of a run; its ratio says how many times faster ours is.

    Args:
        work: how many units of `what` a run does, for the rates among the facts.
        target: least ratio; None for none.
    """
    ratio = None if peer is None else peer.median / ours.median
    rates = _rates(ours, work, what) | ({} if peer is None else _rates(peer, work, what, " of peer"))
    return Row(
        name,
        "s",
        ours.median,
        None if peer is None else peer.median,
        ratio,
        None if target is None or ratio is None else Bound("ratio", ratio, ">=", target),
        tuple(bounds),
        rates | dict(facts or {}),
    )


def environment() -> dict[str, Any]:
    """Returns what the times depend on: versions of packages, the machine and its devices."""
    return {
        "versions": installed_versions(_PACKAGES),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": cores(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_report(report: Report, path: Path) -> None:
    """Write the report as JSON, with versions and devices."""
    write_json(
        path,
        {
            "benchmark": report.benchmark,
            "setting": dict(report.setting),
            "environment": environment(),
            "rows": [_row_json(row) for row in report.rows],
            "violated": report.violated,
        },
    )


def table_rows(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Returns header and rows of the table as texts; columns without entries are left out."""
    header = (report.benchmark, "ours", "peer", "ratio", "target", "first runs", "must hold")
    texts = [_texts(row) for row in report.rows]
    used = [i for i in range(len(header)) if any(row[i] for row in texts)]
    return [header[i] for i in used], [[row[i] for i in used] for row in texts]


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def _rates(timed: Timed, work: float, what: str, side: str = "") -> dict[str, Any]:
    return {f"{what}/s{side}": work / timed.median, f"first run s{side}": timed.first, f"runs s{side}": timed.runs}


def _row_json(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row) | {
        "target": row.target and _bound_json(row.target),
        "bounds": [_bound_json(bound) for bound in row.bounds],
        "facts": dict(row.facts),
    }


def _bound_json(bound: Bound) -> dict[str, Any]:
    value = bound.value if math.isfinite(bound.value) else str(bound.value)
    return dataclasses.asdict(bound) | {"value": value, "holds": bound.holds}


def _texts(row: Row) -> Sequence[str]:
    target = "" if row.target is None else f"{row.target.relation} {row.target.limit:g}"
    missed = row.target is not None and not row.target.holds
    first = [row.facts[name] for name in ("first run s", "first run s of peer") if name in row.facts]
    return (
        row.name,
        _amount(row.ours, row.unit),
        "" if row.peer is None else _amount(row.peer, row.unit),
        "" if row.ratio is None else f"{row.ratio:.3g}x",
        target + (" (missed)" if missed else ""),
        ", ".join(_amount(seconds, "s") for seconds in first),
        "; ".join(map(str, row.bounds)),
    )


def _amount(value: float, unit: str) -> str:
    return f"{value / 2**20:.0f} MiB" if unit == "bytes" else f"{value:.3g} {unit}"
