"""What a statistic returns: numbers with their intervals, tests and correlations."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Self


class _Keyed:
    """Access by key, for callers that are not yet written for attributes."""

    def keys(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    __iter__ = keys

    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)

    def __contains__(self, key: str) -> bool:
        return key in self.__dataclass_fields__

    def __or__(self, other) -> dict:
        return dict(self) | dict(other)

    def __ror__(self, other) -> dict:
        return dict(other) | dict(self)

    def __eq__(self, other) -> bool:
        return dict(self) == (dict(other) if hasattr(other, "keys") else other)

    def __hash__(self) -> int:
        return hash(tuple(dict(self).items()))


@dataclasses.dataclass(frozen=True, eq=False)
class Number(_Keyed):
    """A measured number with its interval.

    value: None where it is undefined. low, high: bounds of the 95% interval, None where the number is counted and not
    estimated. n: how many independent samples it rests on.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, number: "Number", **fields: Any) -> Self:
        """A row of this type: a number, and the other fields of the row."""
        return cls(value=number.value, low=number.low, high=number.high, n=number.n, **fields)

    @property
    def number(self) -> "Number":
        """The number of a row without its other fields."""
        return Number(self.value, self.low, self.high, self.n)

    @property
    def estimate(self) -> float:
        """The value; nan, which no picture shows, where it is undefined."""
        return math.nan if self.value is None else self.value


def _typed(number: Any) -> Number:
    """The number of a caller whose results are not typed yet."""
    if isinstance(number, Number):
        return number
    return Number(*(number.get(name) for name in ("value", "low", "high", "n")))


@dataclasses.dataclass(frozen=True, eq=False)
class McNemar(_Keyed):
    """McNemar's exact two-sided test of conditions a and b on the same samples.

    b: samples that only condition a gets right; c: samples that only condition b gets right; n_discordant: b + c; p_value:
    1.0 where n_discordant is 0.
    """

    b: int
    c: int
    n_discordant: int
    p_value: float


@dataclasses.dataclass(frozen=True, eq=False)
class Correlation(_Keyed):
    """A rank correlation; nan if a side is constant."""

    value: float
    p_value: float
    n: int


@dataclasses.dataclass(frozen=True, eq=False)
class Permutation(_Keyed):
    """A permutation test within layers.

    value: mean of the labelled heads minus mean of the others; expected: its mean under the permutations, which is what
    layers alone explain; p_value: share of permutations at least as far from `expected`; n: labelled heads.
    """

    value: float
    expected: float
    p_value: float
    n: int
