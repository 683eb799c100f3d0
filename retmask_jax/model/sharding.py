"""The device mesh and the one table that maps logical axes (declared at the parameters) to mesh axes."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import logging
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import PyTree

from retmask_jax.model.config import ModelConfig, Rope
from retmask_jax.model.masking import normalise
from retmask_jax.model.transformer import transformer

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

AXES = ("data", "fsdp", "tensor", "context")
ROW_AXES = ("data", "fsdp")  # what the rows of a batch are split over
# While tokens are decoded, weights take at most this fraction (one third) of a device's memory and the rest holds caches:
# a step reads both once, so more room for caches means more rows, and more tokens per second. Where the weights do not
# fit into that, they may take nearly all of the memory.
_SHARES_OF_MEMORY, _FULL = 3, 0.9

# Logical axis -> mesh axes. Batches are split over data and fsdp, weights over fsdp, context and tensor, the positions of
# long rows over context; log-probabilities over the vocabulary instead of the rows.
RULES = (
    ("batch", ROW_AXES),
    ("embed", ("fsdp", "context")),  # devices that share a row's positions share the weights as well
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("experts", None),
    ("layers", None),
    ("norm", None),
    ("length", "context"),
    ("embed_act", None),
    ("unembed_rows", "data"),
    ("unembed_vocab", ("tensor", "fsdp")),  # in this order a part of what a device has of "vocab"
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of {"data": n, "fsdp": n, "tensor": n, "context": n}.

    An axis that is not named is 1; one axis may be -1 and then takes the devices that the others leave.

    Raises:
        ValueError: The sizes do not multiply to the number of devices, or an axis is unknown.
    """
    devices = jax.devices() if devices is None else devices
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f"a mesh has no axis {unknown.pop()!r}; it has {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if shape.count(-1) == 1:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = len(devices) // known if known and len(devices) % known == 0 else 0
    if min(shape) < 1 or int(np.prod(shape)) != len(devices):
        wanted = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES if axis in sizes)
        raise ValueError(f"a mesh of {wanted} does not fit {len(devices)} devices: the product must be {len(devices)}")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def decoding_mesh(mesh: Mesh, config: ModelConfig, dtype: str, device_bytes: float) -> Mesh:
    """The mesh for generation: the same devices, with none on the fsdp axis, so that no token waits for weights.

    Where a copy of the weights takes at most a third of a device's memory, each device has a whole copy and rows of its
    own. Otherwise heads and MLPs are split over the fewest devices with which it does. The mesh stays as it is where it has
    no fsdp axis, or where the weights fit in no other way.
    """
    split, devices = mesh.shape["fsdp"], mesh.devices
    if split == 1:
        return mesh
    least = None
    for shares in (n for n in range(1, split + 1) if split % n == 0):
        tensor = shares * mesh.shape["tensor"]
        if config.n_heads % tensor or config.mlp_size % tensor:
            continue
        # In the order of the old one: what lies on the one then moves to the other.
        shape = mesh.shape["data"] * split // shares, 1, tensor, mesh.shape["context"]
        found = Mesh(devices.reshape(shape), AXES, axis_types=mesh.axis_types)
        held = held_bytes(placed_shapes(config, found, dtype))
        if held <= device_bytes / _SHARES_OF_MEMORY:
            return found
        if least is None or held < least[0]:
            least = held, found
    return mesh if least is None or least[0] > _FULL * device_bytes else least[1]


def held_bytes(tree: PyTree) -> int:
    """Bytes on one device of all arrays (or their shapes) in a pytree that have a sharding."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def placed(config: ModelConfig, params: PyTree, mesh: Mesh) -> PyTree:
    """The parameters as `param_shardings` lays them out; the arrays that were given are given up."""
    shardings = param_shardings(config, mesh)
    return jax.tree.map(lambda x, at: x if x.sharding == at else jax.device_put(x, at, donate=True), params, shardings)


def plain_shapes(config: ModelConfig) -> PyTree:
    """The parameter tree as jax.ShapeDtypeStruct; nothing is computed."""
    return jax.tree.map(
        lambda boxed: boxed.unbox(apply_constraint=False),
        param_shapes(config),
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )


def param_shapes(config: ModelConfig) -> PyTree:
    """The parameter tree as jax.ShapeDtypeStruct, boxed with the logical axes; nothing is computed."""
    return _traced_shapes(_simplest(config))


def param_shardings(config: ModelConfig, mesh: Mesh) -> PyTree:
    """A NamedSharding per parameter; an axis that the mesh does not divide evenly stays whole on every device."""
    boxed = param_shapes(config)
    wanted = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    return jax.tree.map_with_path(
        lambda path, sharding, leaf: divided(sharding, leaf.shape, jax.tree_util.keystr(path)),
        wanted,
        plain_shapes(config),
    )


def placed_shapes(config: ModelConfig, mesh: Mesh, dtype: DTypeLike) -> PyTree:
    """The parameter tree in a dtype as jax.ShapeDtypeStruct with the shardings of `param_shardings`."""
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, dtype, sharding=at),
        plain_shapes(config),
        param_shardings(config, mesh),
    )


def divided(sharding: NamedSharding, shape: tuple[int, ...], what: str) -> NamedSharding:
    """The sharding of an array of this shape, with axes that the mesh does not divide evenly left whole."""
    parts = []
    for size, axes in itertools.zip_longest(shape, sharding.spec):
        names = (axes,) if isinstance(axes, str) else axes or ()
        shares = math.prod(sharding.mesh.shape[name] for name in names)
        if size % shares:
            log.info("%s: %d does not divide by %s=%d and stays whole", what, size, axes, shares)
        parts.append(None if size % shares else axes)
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))


@contextlib.contextmanager
def using(mesh: Mesh) -> Generator[None, None, None]:
    """Within this context the mesh and the rules are set, as kernels and constraints need them."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def mesh_of(params: PyTree) -> contextlib.AbstractContextManager:
    """`using` the mesh of the parameters; a context that does nothing where they have no mesh, or there are none."""
    leaf: Any = next(iter(jax.tree.leaves(params)), None)
    placed = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    on_mesh = placed and isinstance(leaf.sharding, NamedSharding)
    return using(leaf.sharding.mesh) if on_mesh else contextlib.nullcontext()


# Where the results of a `row_parallel` function lie: arrays [B, ...]; arrays [X, B, ...]; the sum over all rows.
ROWS, STACKED_ROWS, SUM_OF_ROWS = PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()


def row_parallel(
    *rows: str, stacked: Sequence[str] = (), results: Any = ROWS
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function of arrays in which no row depends on another, so that each device computes some of the rows.

    This happens where the mesh that is set has devices on its data axis alone, and their number divides the rows. Loops then
    end on each device as soon as the rows of that device are done. Elsewhere the compiler splits the work. Arguments that
    are not arrays, such as a config, are passed on as they are.

    Args:
        rows: Names of the arguments whose arrays are [B, ...]. The first must have all B rows; in the others an axis of 1
            marks an array that all rows share.
        stacked: Names of the arguments whose arrays are [X, B, ...].
        results: ROWS, STACKED_ROWS or SUM_OF_ROWS, or a prefix of the results' pytree with the first two.
    """
    row_axes = dict.fromkeys(rows, 0) | dict.fromkeys(stacked, 1)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        by_name: Callable[..., R] = function

        @functools.wraps(function)
        def spread(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            n_rows = len(jax.tree.leaves(given[rows[0]])[0])
            if row_shares(n_rows) == 1:
                return function(*args, **kwargs)
            arrays = {name: value for name, value in given.items() if _holds_arrays(value)}
            fixed = {name: value for name, value in given.items() if name not in arrays}

            def part(arrays: dict[str, Any]) -> R:
                with nn.logical_axis_rules(()):
                    out = by_name(**fixed, **arrays)
                return jax.lax.psum(out, "data") if results == SUM_OF_ROWS else out

            specs = {name: _row_specs(value, row_axes.get(name), n_rows) for name, value in arrays.items()}
            return jax.shard_map(part, in_specs=(specs,), out_specs=results, check_vma=False)(arrays)

        return spread

    return decorate


def row_shares(rows: int) -> int:
    """Over how many devices of the mesh that is set `row_parallel` splits this many rows; 1 where it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = mesh.shape.get("data", 1)
    return 1 if devices != mesh.size or rows % devices else devices


def split_vocab(table_EV: jax.Array) -> jax.Array:
    """The output matrix with its vocabulary over the tensor and fsdp axes, and whole columns."""
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        # Step by step: in one, the compiler finds no other way than to copy the matrix to all devices.
        table_EV = nn.with_logical_constraint(table_EV, (None, "vocab"))
    return nn.with_logical_constraint(table_EV, (None, "unembed_vocab"))


def full_share(rows: int, axes: Sequence[str] = ("data",)) -> int:
    """The number of rows, at least `rows`, that divides over these axes of the mesh that is set."""
    sizes = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(sizes.get(axis, 1) for axis in axes)
    return -(-rows // devices) * devices


def constrain(tree: PyTree, logical_axes: tuple[str | None, ...]) -> PyTree:
    """The arrays of a pytree, laid out on the mesh that is set by their first logical axes.

    A result of one program that is an argument of the next then always has the same layout, and the next program is compiled
    once.
    """
    if not nn.get_logical_axis_rules():
        return tree
    mesh = jax.sharding.get_abstract_mesh()
    wanted = NamedSharding(mesh, nn.logical_to_mesh_axes(logical_axes) or PartitionSpec())
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, divided(wanted, x.shape, "state")), tree)


def split_cpu(most: int) -> None:
    """Make devices of a CPU's cores, a power of two and at most `most`, for the data axis of a mesh.

    Cores that each work on different rows are twice as fast as cores that share every operation. A number that
    JAX_NUM_CPU_DEVICES or XLA_FLAGS sets is kept, and so is that of a JAX that is already in use.
    """
    devices = jax.config.jax_num_cpu_devices  # pyrefly: ignore[missing-attribute]  JAX adds its options when it is imported
    chosen = devices != -1 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    cores = min(most, len(os.sched_getaffinity(0)))
    if chosen or cores < 2:
        return
    try:
        jax.config.update("jax_num_cpu_devices", 2 ** (cores.bit_length() - 1))
    except RuntimeError:
        log.info("JAX is in use already, with %d devices", jax.device_count())


def row_shards(mesh: Mesh) -> int:
    """Over how many shares the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def place_rows(mesh: Mesh, n: int, make: Callable[[slice], PyTree]) -> PyTree:
    """A batch of n rows on the mesh; rows that do not divide are whole on every device.

    Args:
        make: Gives the arrays [rows, ...] for a slice of the rows: the part that this host's devices hold.
    """
    split = divided(batch_sharding(mesh), (n,), "rows of a batch")
    held = [index[0].indices(n)[:2] for index in split.addressable_devices_indices_map((n,)).values() if index]
    part = make(slice(min(begin for begin, _ in held), max(end for _, end in held)))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x, (n, *x.shape[1:])), part)


# Fields that no parameter's shape depends on, each with the value that is traced fastest.
_NO_SHAPE: dict[str, Any] = {
    "max_length": 2,
    "norm_eps": 1e-5,
    "norm_offset": 0.0,
    "activation": "silu",
    "embed_scale": None,
    "residual_scale": None,
    "logit_scale": None,
    "query_scale": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "window": None,
    "rope": Rope(),
    "sliding_rope": None,
    "rotary_dim": 2,
    "rope_pattern": (True,),
    "normalise_router": False,
    "bos_id": None,
    "eos_ids": (),
    "pad_id": 0,
    "kernel": "plain",
}


def _simplest(config: ModelConfig) -> ModelConfig:
    """The config with the same parameters that is traced fastest; models that differ in other fields share it."""
    return dataclasses.replace(config, layer_pattern=("full",) * len(config.layer_pattern), **_NO_SHAPE)


@functools.cache  # tracing the model takes a tenth of a second
def _traced_shapes(config: ModelConfig) -> PyTree:
    model, tokens = transformer(config), np.zeros((1, 2), np.int32)
    shapes = jax.eval_shape(lambda seed: model.init(jax.random.key(seed), tokens, normalise(config)), 0)
    return shapes["params"]


def _holds_arrays(value: Any) -> bool:
    """Whether a value is a pytree of arrays, and not something static such as a config or a Python number."""
    return all(isinstance(leaf, (jax.Array, np.ndarray, np.generic)) for leaf in jax.tree.leaves(value))


def _row_specs(value: Any, axis: int | None, n_rows: int) -> Any:
    """The specs that split a pytree of arrays along their row axis; None: all devices have them whole."""

    def spec(array: jax.Array) -> PartitionSpec:
        whole = axis is None or (array.shape[axis] == 1 and n_rows > 1)
        return PartitionSpec() if whole else (ROWS, STACKED_ROWS)[axis]

    return jax.tree.map(spec, value)
