"""What a suite of tasks says of one model: values per sample, so that models can be compared sample by sample."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Measured:
    """One task of a suite on one model.

    values: f64[samples] in the order of ids, which name the samples; 1 and 0 where binary. metric: what they are, such
    as "string match" or "exact match"; length: tokens of the prompts, where the task has one. missing: how many samples
    could not be scored and why, {reason: number}; they are in neither ids nor values.
    """

    suite: str
    task: str
    metric: str
    ids: tuple[str, ...]
    values: np.ndarray
    binary: bool
    length: int | None = None
    missing: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if len(self.ids) != len(self.values) or len(set(self.ids)) != len(self.ids):
            given = f"{len(self.values)} values and {len(set(self.ids))} different ids of {len(self.ids)}"
            raise ValueError(f"{self.suite} {self.task} has {given}: each value needs its own id")

    @property
    def name(self) -> str:
        """suite/task, with the length where there is one."""
        return f"{self.suite}/{self.task}" + (f" {self.length}" if self.length else "")


def paired(measured: Sequence[Measured]) -> tuple[list[str], np.ndarray]:
    """(ids that all have, f64[models, samples]) of one task on several models, in the first one's order."""
    common = set.intersection(*(set(one.ids) for one in measured))
    ids = [name for name in measured[0].ids if name in common]
    places = [{name: i for i, name in enumerate(one.ids)} for one in measured]
    return ids, np.array(
        [[one.values[place[name]] for name in ids] for one, place in zip(measured, places, strict=True)]
    )


def as_json(measured: Measured) -> dict[str, Any]:
    """Plain values, to be kept in a file."""
    return dataclasses.asdict(measured) | {
        "values": np.asarray(measured.values, float).tolist(),
        "ids": list(measured.ids),
    }


def from_json(record: Mapping[str, Any]) -> Measured:
    """The inverse of `as_json`."""
    return Measured(**(dict(record) | {"ids": tuple(record["ids"]), "values": np.array(record["values"], float)}))
