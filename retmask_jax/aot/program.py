"""Programs compiled for the chips of a mesh that need not be here: the memory they need, what the chips exchange."""

import dataclasses
import datetime
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from retmask_jax.aot.hlo import Work, read_work
from retmask_jax.aot.topology import ASSUMED
from retmask_jax.hf.checkpoint_files import read_config
from retmask_jax.hf.families import from_hf
from retmask_jax.hf.hub import config_folder
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.sharding import RULES, divided, held_bytes, using
from retmask_jax.utils.versions import installed_versions


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with its arguments, whose arrays are shapes with shardings.

    runs: how often it runs in a step. resident: other arrays in the chips' memory while it runs. options: arguments by
    name.
    """

    function: Any
    arguments: tuple[Any, ...]
    runs: int = 1
    resident: Any = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fixed(self) -> int:
        """Bytes per chip of arguments and resident arrays, which hardly depend on the size of a microbatch."""
        return held_bytes((self.arguments, self.resident))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling a program gave.

    memory: bytes per chip, None if the compiler refused the program. refused: its message in that case, else None.
    seconds: how long compiling took.
    """

    memory: dict[str, int] | None
    refused: str | None
    work: Work
    seconds: float

    @property
    def needed(self) -> float:
        """Bytes per chip, by the compiler's report or by the message with which it refused."""
        if self.memory is not None:
            return self.memory["peak"]
        amount = re.search(r"([\d.]+)([KMGT])", self.refused or "")
        if amount is None:
            raise ValueError(f"the compiler refused a program without an amount of memory: {self.refused}")
        number, unit = amount.groups()
        return float(number) * 2 ** (10 * (1 + "KMGT".index(unit)))


def compile_program(program: Program, mesh: Mesh) -> Compiled:
    """Compile for the mesh's chips; a program that needs more memory than they have is a result, not an error."""
    begun = time.monotonic()
    with using(mesh):
        lowered = program.function.lower(*program.arguments, **program.options)
    try:
        compiled = lowered.compile()
        memory, refused, work = _memory(compiled), None, read_work(compiled.as_text()).times(program.runs)
    except jax.errors.JaxRuntimeError as error:
        memory, refused, work = None, _refused(error), Work({}, {}, 0)
    return Compiled(memory, refused, work, time.monotonic() - begun)


def model_of(config: ConfigDict) -> ModelConfig:
    """The model of a recipe, from its config.json alone."""
    folder = config_folder(config.model, revision=config.revision or None, ignore=config.ignore)
    return from_hf(read_config(folder), config.ignore)


def array(mesh: Mesh, shape: Sequence[int], dtype: DTypeLike, *axes: str | None) -> jax.ShapeDtypeStruct:
    """An array argument, split by the rules of its logical axes where the mesh divides it."""
    spec = nn.logical_to_mesh_axes(axes, RULES) or PartitionSpec()
    sharding = divided(NamedSharding(mesh, spec), tuple(shape), "argument")
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def sizes_of(mesh: Mesh) -> dict[str, int]:
    """Returns {axis: devices}."""
    return {axis: int(n) for axis, n in mesh.shape.items()}


def stamp(compiled: Mapping[str, Compiled]) -> dict[str, Any]:
    """How long compiling took, the date and the versions of the packages, for a row of results."""
    return {
        "compile_seconds": round(sum(outcome.seconds for outcome in compiled.values())),
        "date": datetime.date.today().isoformat(),
        "versions": installed_versions(("jax", "jaxlib", "libtpu", "flax")),
    }


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Axes and sizes of a mesh for people, such as "fsdp 8 x tensor 2"."""
    return " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "1 chip"


def shares_text(seconds: Mapping[str, float], scale: float, unit: str) -> str:
    """Estimated times with the shares of the peaks that are assumed for them. scale: units in a second."""
    return ", ".join(
        f"{name} {scale * value:.1f} {unit} at {ASSUMED[name]:.0%} of peak" for name, value in seconds.items()
    )


def duration(seconds: float) -> str:
    """A time for people, in hours or minutes."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """peak is what a chip must have free; the others overlap in it."""
    report: Any = compiled.memory_analysis()
    return {
        "arguments": report.argument_size_in_bytes,
        "outputs": report.output_size_in_bytes,
        "aliased": report.alias_size_in_bytes,
        "temporary": report.temp_size_in_bytes,
        "code": report.generated_code_size_in_bytes,
        "peak": report.peak_memory_in_bytes,
    }


def _refused(error: Exception) -> str:
    """The part of the compiler's message about memory; an error about anything else is raised again."""
    message = re.search(
        r"Used [\d.]+\w of [\d.]+\w hbm|total memory required .*? exceeds available HBM \S+\)", str(error)
    )
    if message is None:
        raise error
    return message.group()
