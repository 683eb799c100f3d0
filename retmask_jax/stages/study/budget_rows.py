"""What a model still does on budgets of keys: a row per list and budget, lists against random ones, and what is enough."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from retmask_jax.heads.lists.keys_kept import KVHead
from retmask_jax.stages.study.listed_heads import RANDOM
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import Number

TEXT = "text loss"  # what is measured besides recall on tasks
ENOUGH = 0.9  # of the untouched model's recall


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetSet:
    """KV heads of a list that keep all keys.

    Attributes:
        draw: Of a random list, of which there may be several.
        k: How many of the list's best query heads they are kept for; 0 in random lists, which are of KV heads.
        kv_heads: (layer, KV head), best first.
    """

    name: str
    draw: int
    k: int
    kv_heads: list[KVHead]

    @property
    def kept(self) -> int:
        """How many KV heads keep all keys."""
        return len(self.kv_heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetRow(Number):
    """What the model still does with `kept` KV heads of a list: the share of a task's cases that are right, or the loss on
    plain text in nats per token; means over draws.

    Attributes:
        measure: The task, or `TEXT`.
        share: The share of keys that is kept of a prompt, or of a text, at its end; mean over cases and draws.
        change: Against the untouched model, paired by case or text.
    """

    name: str
    measure: str
    kept: int
    share: float
    change: Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margin(Number):
    """How much more a list keeps of a measure than random lists do with as many KV heads, mean over the budgets between
    nothing and everything, paired by case or text. Of a loss less is better."""

    name: str
    measure: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Enough:
    """The smallest budget from which on recall stays at `ENOUGH` of the untouched model's; None where none does."""

    name: str
    task: str
    kept: int | None
    share: float | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measure of the untouched model and under each of some sets, by case or by text.

    Attributes:
        shares_S: The share of keys that each set keeps.
    """

    measure: str
    sets: Sequence[BudgetSet]
    untouched_N: Float64[np.ndarray, " N"]
    values_SN: Float64[np.ndarray, "S N"]
    shares_S: Sequence[float]

    @property
    def untouched(self) -> Number:
        return self._number(self.untouched_N[None])

    def rows(self) -> list[BudgetRow]:
        """A row per list and number of KV heads."""
        groups: dict[tuple[str, int], list[int]] = {}
        for i, one in enumerate(self.sets):
            groups.setdefault((one.name, one.kept), []).append(i)
        return [
            BudgetRow.of(
                self._number(self.values_SN[drawn]),
                name=name,
                measure=self.measure,
                kept=kept,
                share=float(np.mean([self.shares_S[i] for i in drawn])),
                change=stats.paired_bootstrap(self.values_SN[drawn], self.untouched_N),
            )
            for (name, kept), drawn in groups.items()
        ]

    def margins(self, total: int) -> list[Margin]:
        """Each list against random lists, over the budgets that it has between nothing and all `total` KV heads."""
        margins = []
        for name in dict.fromkeys(one.name for one in self.sets if one.name != RANDOM):
            sizes = {one.kept for one in self.sets if one.name == name} - {0, total}
            ours, others = (
                [i for i, one in enumerate(self.sets) if one.name == who and one.kept in sizes]
                for who in (name, RANDOM)
            )
            if ours and others:
                number = stats.paired_bootstrap(self.values_SN[ours], self.values_SN[others])
                margins.append(Margin.of(number, name=name, measure=self.measure))
        return margins

    def enough(self) -> list[Enough]:
        """From which budget on each list keeps enough of recall."""
        found, rows, least = [], self.rows(), ENOUGH * self.untouched.estimate
        for name in dict.fromkeys(row.name for row in rows):
            downwards = sorted((row for row in rows if row.name == name), key=lambda row: -row.kept)
            good = list(itertools.takewhile(lambda row: row.estimate >= least, downwards))
            kept, share = (good[-1].kept, good[-1].share) if good else (None, None)
            found.append(Enough(name=name, task=self.measure, kept=kept, share=share))
        return found

    def _number(self, values_DN: np.ndarray) -> Number:
        """Mean over draws, with its interval over cases or texts."""
        if self.measure != TEXT and len(values_DN) == 1:
            return stats.proportion(values_DN[0] == 1)
        return stats.bootstrap_mean(values_DN)
