"""The measurement of one task on one model: a value per sample, so that models can be compared sample by sample."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Float64


@dataclasses.dataclass(frozen=True)
class Measured:
    """One task of a suite on one model.

    Attributes:
        metric: What the values are, such as "string match" or "nats per token".
        ids: Names of the samples, all different.
        values: f64, one for each of `ids`.
        binary: Whether each value is 0 or 1.
        length: Tokens of each prompt with its answer; None if the task has no length.
        missing: {reason: number} of the samples that could not be scored. They are in neither `ids` nor `values`.
    """

    suite: str
    task: str
    metric: str
    ids: tuple[str, ...]
    values: np.ndarray
    binary: bool
    length: int | None = None
    missing: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.values) or len(set(self.ids)) != len(self.ids):
            given = f"{len(self.values)} values and {len(set(self.ids))} different ids of {len(self.ids)}"
            raise ValueError(f"{self.suite} {self.task} has {given}: each value needs its own id")

    @property
    def name(self) -> str:
        """Suite/task, with the length if the task has one."""
        return f"{self.suite}/{self.task}" + (f" {self.length}" if self.length else "")


def paired(measured: Sequence[Measured]) -> tuple[list[str], Float64[np.ndarray, "models samples"]]:
    """Returns the ids that all models have of one task, in the order of the first model, and the values of these."""
    values = [dict(zip(of_model.ids, of_model.values, strict=True)) for of_model in measured]
    ids = [name for name in measured[0].ids if all(name in of_model for of_model in values)]
    return ids, np.array([[of_model[name] for name in ids] for of_model in values])


def as_json(measured: Measured) -> dict[str, Any]:
    """Returns the fields as JSON values."""
    return msgspec.to_builtins(measured, enc_hook=lambda values: np.asarray(values, float).tolist())


def from_json(record: Mapping[str, Any]) -> Measured:
    """Returns the Measured that `as_json` was given."""
    return msgspec.convert(record, Measured, dec_hook=lambda _, values: np.array(values, float))
