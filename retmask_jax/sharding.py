"""The device mesh and the one table that maps logical axes (declared at the parameters) to mesh axes."""

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.transformer import Transformer

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Batches are split over data and fsdp, weights over fsdp and tensor.
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("norm", None),
    ("length", None),
    ("embed_act", None),
)


def make_mesh(sizes, devices=None) -> Mesh:
    """A mesh of {"data": n, "fsdp": n, "tensor": n}; -1 for one axis takes what the other axes leave.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [int(sizes[axis]) for axis in AXES]
    if shape.count(-1) == 1:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = len(devices) // known if known and len(devices) % known == 0 else 0
    if min(shape) < 1 or int(np.prod(shape)) != len(devices):
        wanted = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise ValueError(f"a mesh of {wanted} does not fit {len(devices)} devices: the product must be {len(devices)}")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def param_shapes(config: ModelConfig):
    """The parameter tree as jax.ShapeDtypeStruct, boxed with the logical axes; nothing is computed."""
    model, tokens = Transformer(config), np.zeros((1, 2), np.int32)
    shapes = jax.eval_shape(lambda seed: model.init(jax.random.key(seed), tokens, Interventions.none(config)), 0)
    return shapes["params"]


def param_shardings(config: ModelConfig, mesh: Mesh):
    """A NamedSharding per parameter."""
    logical = nn.get_partition_spec(param_shapes(config))
    return nn.logical_to_mesh_sharding(logical, mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
