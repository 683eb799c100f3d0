"""How a call of attention is split over the mesh that is set: its rows, heads and queries."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Shares:
    """How a call is split over the mesh that is set.

    Attributes:
        free: The axes that no surrounding shard_map has split already.
        row_axes, head_axes, query_axes: The axes that rows, heads and queries are split over.
        repeats: How often kv heads are repeated, where there are too few of them to split the heads.
    """

    mesh: Any
    free: frozenset[str]
    row_axes: tuple[str, ...]
    head_axes: tuple[str, ...]
    query_axes: tuple[str, ...]
    repeats: int

    @classmethod
    def of_call(cls, batch: int, heads: int, kv_heads: int) -> "Shares":
        """The shares by the rules of the logical axes "batch", "heads" and "length"."""
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        free = frozenset(name for name, kind in kinds if kind != AxisType.Manual)
        rows, head_axes = _axes(mesh, free, batch, heads, kv_heads)
        queries = tuple(axis for axis in _rule("length") if axis in free and mesh.shape[axis] > 1)
        shards = math.prod(mesh.shape[axis] for axis in head_axes)
        return cls(mesh, free, rows, head_axes, queries, math.lcm(kv_heads, shards) // kv_heads)

    @property
    def heads(self) -> int:
        """In how many shares the heads are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.head_axes)

    @property
    def queries(self) -> int:
        """In how many shares the queries are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.query_axes)

    def repeated(self, x: jax.Array, axis: int) -> jax.Array:
        """Keys or values with their heads, on this axis, repeated so that they can be split."""
        return x if self.repeats == 1 else jnp.repeat(x, self.repeats, axis=axis)

    def over_devices(
        self, function: Callable[..., jax.Array], in_specs: Any, out_specs: Any
    ) -> Callable[..., jax.Array]:
        """The function of what each device has of its arguments."""
        options: Any = {"axis_names": set(self.free), "check_vma": False}
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, **options)


def _rule(logical: str) -> tuple[str, ...]:
    """Mesh axes of a logical one, by the rules that are set."""
    (axes,) = nn.logical_to_mesh_axes((logical,)) or (None,)
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _axes(
    mesh: AbstractMesh, free: frozenset[str], batch: int, heads: int, kv_heads: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes of the rows and of the heads, by the rules of "batch" and "heads".

    Axes that the rows leave free go to the heads, so that one long row is still split over the whole mesh. On an axis that
    divides neither, all devices compute the same.
    """
    for_rows, for_heads = (tuple(axis for axis in _rule(name) if axis in free) for name in ("batch", "heads"))
    rows = _fitting(mesh, for_rows, lambda shards: batch % shards == 0)
    left = tuple(axis for axis in for_rows if axis not in rows)
    split = _fitting(mesh, for_heads + left, lambda shards: heads % math.lcm(kv_heads, shards) == 0)
    idle = [axis for axis in for_heads + left if axis not in split]
    if idle:
        log.info("%d rows and %d heads are not split over %s of the mesh", batch, heads, ", ".join(idle))
    return rows, split


def _fitting(mesh: AbstractMesh, axes: Iterable[str], fits: Callable[[int], bool]) -> tuple[str, ...]:
    """The axes in order, without those with which the number of shards no longer fits."""
    chosen, shards = (), 1
    for axis in axes:
        if fits(shards * mesh.shape[axis]):
            chosen, shards = (*chosen, axis), shards * mesh.shape[axis]
    return chosen
