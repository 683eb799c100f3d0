"""TPU topologies that this machine need not have: the chips as the compiler describes them, and what a chip can do."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, in bytes, operations and seconds.

    accelerator, units: n chips are called "{accelerator}-{units * n}" by Cloud TPU, which counts chips or cores.
    memory: what the compiler lets a program use, a little less than the chip has. sending: over all links at once.
    """

    accelerator: str
    units: int
    memory: float
    flops: float
    bandwidth: float
    sending: float


_GB, _TERA = 1e9, 1e12
# Peaks in bfloat16, of memory and of the interconnect, from the page of each generation in Cloud TPU's documentation.
# It gives both directions of the interconnect together, of which a chip sends half. memory is the limit in the messages
# with which the compiler refuses programs.
CHIPS = {
    "v5e": Chip("v5litepod", 1, 15.75 * GIB, 197 * _TERA, 819 * _GB, 200 * _GB),
    "v5p": Chip("v5p", 2, 95.74 * GIB, 459 * _TERA, 2765 * _GB, 600 * _GB),
    "v6e": Chip("v6e", 1, 31.25 * GIB, 918 * _TERA, 1638 * _GB, 400 * _GB),
}
# Shares of the peaks that we assume are reached. A collective rarely uses the links of all axes at once.
ASSUMED = {"arithmetic": 0.5, "memory": 0.7, "interconnect": 0.5}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4".

    Raises:
        ValueError: the generation is unknown, or the grid is not written as in the example.
    """
    kind, _, grid = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", grid):
        known = ", ".join(CHIPS)
        gpu = "; GPUs are not supported" if kind in ("gpu", "cuda") else ""
        raise ValueError(
            f"topology is {topology!r}; it must be a generation of TPUs ({known}) and a grid of chips, such as "
            f"v5e:4x4{gpu}"
        )
    return CHIPS[kind]


def devices_of(topology: str) -> list[jax.Device]:
    """The topology's chips, as libtpu describes them on any machine.

    Call it before JAX has run anything; after it this process computes on the CPU.

    Raises:
        ValueError: the topology does not exist, or libtpu is not installed.
    """
    chip, grid = chip_of(topology), topology.partition(":")[2]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for TPUs needs libtpu: pip install 'retmask_jax[tpu]'")
    chips = math.prod(int(side) for side in grid.split("x"))
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": f"{chip.accelerator}-{chip.units * chips}",
    }
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu knows no topology {topology!r}: {str(error).splitlines()[0]}") from error


def estimate(chip: Chip, flops: float, memory: float, sent: float) -> dict[str, float]:
    """Seconds that operations, memory traffic and sent bytes of one chip take, at the shares ASSUMED of its peaks."""
    amounts = {"arithmetic": flops / chip.flops, "memory": memory / chip.bandwidth, "interconnect": sent / chip.sending}
    return {name: seconds / ASSUMED[name] for name, seconds in amounts.items()}
