"""A training step compiled for a TPU topology without a TPU: whether it fits, what the chips exchange, about how long
it takes, before anyone pays for a pod."""

import dataclasses
import datetime
import importlib.metadata
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from retmask_jax.aot.advice import Step, advise
from retmask_jax.aot.hlo import Work, read_work
from retmask_jax.aot.topology import ASSUMED, Chip, chip_of, devices_of, estimate
from retmask_jax.data.pair_rows import SIDES
from retmask_jax.hf.checkpoint_files import read_config
from retmask_jax.hf.families import from_hf
from retmask_jax.hf.hub import config_folder
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.flops import executed_flops
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.sharding import RULES, divided, make_mesh, placed_shapes, using
from retmask_jax.pipeline.registry import check_batch, check_config
from retmask_jax.stages.arms import ARMS
from retmask_jax.stages.train import train_settings
from retmask_jax.training.objective import metric_names
from retmask_jax.training.settings import Settings
from retmask_jax.training.step import make_programs

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with its arguments; arrays are shapes with shardings.

    runs: how often in a step. beside: what else lies in the chips' memory while it runs. options: arguments by name.
    """

    function: Any
    arguments: tuple
    runs: int = 1
    beside: Any = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fixed(self) -> int:
        """Bytes per chip that do not depend on the microbatch, or hardly."""
        return _size((self.arguments, self.beside))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """memory: bytes per chip, None if the program was refused; refused: the compiler's words on that, else None."""

    memory: dict[str, int] | None
    refused: str | None
    work: Work
    seconds: float

    @property
    def needed(self) -> float:
        """Bytes per chip, by the compiler's report or by its refusal."""
        if self.memory is not None:
            return self.memory["peak"]
        number, unit = re.search(r"([\d.]+)([KMGT])", self.refused).groups()
        return float(number) * 2 ** (10 * (1 + "KMGT".index(unit)))


def check_training(config, topology: str) -> dict[str, Any]:
    """What the training step of a recipe takes on a topology, as JSON values; bytes and operations are per chip.

    Needs the model's config.json, no weights and no data. Raises ValueError for a topology or mesh that cannot be,
    for settings that do not go together, and without libtpu. Call it before JAX has run anything.
    """
    chip = chip_of(topology)
    model = from_hf(read_config(config_folder(config.model, revision=config.revision or None)))
    devices = devices_of(topology)
    check_config(config, devices)
    check_batch(config, devices)
    mesh, settings = make_mesh(config.mesh, devices), _settings(config)
    # The fastest for the device would be chosen for this machine's.
    model = dataclasses.replace(model, kernel="splash" if config.kernel == "auto" else config.kernel)
    programs = training_programs(model, settings, mesh, config.train.max_tokens)
    compiled = {name: compile_program(program, mesh) for name, program in programs.items()}
    step = _step(settings, mesh, chip, programs, compiled)
    trained = dataclasses.replace(model, lora=settings.lora)
    flops = step.rows * executed_flops(trained, config.train.max_tokens, remat=settings.remat) / mesh.size
    return (
        {
            "what": "train",
            "topology": topology,
            "mesh": step.mesh,
            "batch": step.batch,
            "microbatch": step.microbatch,
            "length": config.train.max_tokens,
            "steps": settings.steps,
        }
        | _memory_facts(step, programs, compiled)
        | _time_facts(chip, flops, compiled)
        | stamp(compiled)
    )


def training_programs(config: ModelConfig, settings: Settings, mesh: Mesh, length: int) -> dict[str, Program]:
    """{name: Program} of what one step of `train` runs, on rows of `length` tokens."""
    # As `train` makes them: the seed is no part of an update.
    programs = make_programs(config, dataclasses.replace(settings, seed=0), mesh)
    frozen = {} if settings.lora is None else placed_shapes(config, mesh, settings.compute_dtype)
    grads = programs.state.params  # of the same shapes and places, in float32 as well
    sums = grads, {name: array(mesh, (), jnp.float32) for name in metric_names(settings)}
    batch, rows = {"weight": array(mesh, (settings.microbatch_size,), jnp.float32, "batch")}, settings.microbatch_size
    for side in SIDES:
        batch[side] = array(mesh, (rows, length), jnp.int32, "batch")
        batch[f"{side}_mask"] = array(mesh, (rows, length), jnp.bool_, "batch")
        if settings.has_reference:
            batch[f"ref_{side}"] = array(mesh, (rows,), jnp.float32, "batch")
    ablated = None
    if settings.objective == "contrast":
        masks = jax.eval_shape(lambda: Interventions.none(config))
        ablated = jax.tree.map(lambda x: array(mesh, x.shape, x.dtype), masks)
    state, runs = programs.state, settings.batch_size // rows
    if runs == 1:
        function, arguments = programs.gradients, (state.params, frozen, batch, ablated)
    else:
        function, arguments = programs.accumulate, (state.params, frozen, sums, batch, ablated)
    return {
        "gradients": Program(function, arguments, runs=runs, beside=state.opt_state),
        "update": Program(programs.apply, (state, sums), beside=frozen),
    }


def compile_program(program: Program, mesh: Mesh) -> Compiled:
    """Compile for the mesh's chips; a program that needs more memory than they have is an outcome, no error."""
    begun = time.monotonic()
    with using(mesh):
        lowered = program.function.lower(*program.arguments, **program.options)
    try:
        compiled = lowered.compile()
        memory, refused, work = _memory(compiled), None, read_work(compiled.as_text()).times(program.runs)
    except jax.errors.JaxRuntimeError as error:
        memory, refused, work = None, _refused(error), Work({}, {}, 0)
    return Compiled(memory, refused, work, time.monotonic() - begun)


def describe(row: dict[str, Any], what: str) -> str:
    """A row of `check_training` for people; the last line is the verdict. what: the recipe."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1)
    lines = [
        f"{what} on {row['topology']} ({mesh or '1 chip'}): {row['batch']} pairs of up to {row['length']} tokens a step, "
        f"{row['microbatch']} at a time; compiled in {row['compile_seconds']} s"
    ]
    for name, program in row["programs"].items():
        if program["refused"]:
            lines.append(f"{name}: refused by the compiler: {program['refused']}")
            continue
        parts = [f"{part} {program['bytes'][part] / _GIB:.2f}" for part in ("arguments", "temporary", "peak")]
        times = f", {program['runs']} times a step" if program["runs"] > 1 else ""
        lines.append(f"{name}{times}: {', '.join(parts)}, beside it {program['beside'] / _GIB:.2f} GiB per chip")
    lines.append(f"memory: {row['needed'] / _GIB:.2f} of {row['limit'] / _GIB:.2f} GiB per chip")
    if row["seconds"]:
        lines += [_exchanged(row), *_duration(row)]
    verdict = "fits" if row["fits"] else "does not fit"
    return "\n".join([*lines, ": ".join([verdict, "; or ".join(row["advice"])]) if row["advice"] else verdict])


def array(mesh: Mesh, shape: Sequence[int], dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
    """An argument split as the rules of its logical axes say, where the mesh divides it."""
    wanted = NamedSharding(mesh, nn.logical_to_mesh_axes(axes, RULES))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=divided(wanted, shape, "argument"))


def sizes_of(mesh: Mesh) -> dict[str, int]:
    """{axis: devices}"""
    return {axis: int(n) for axis, n in mesh.shape.items()}


def stamp(compiled: Mapping[str, Compiled]) -> dict[str, Any]:
    """How long compiling took, when it was and with which versions."""
    return {
        "compile_seconds": round(sum(one.seconds for one in compiled.values())),
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax")},
    }


def _settings(config) -> Settings:
    """Of the arm that takes most: preferences have two rows to a pair, demonstrations one."""
    arms = config.train.arms
    return train_settings(config, next((arm for arm in arms if ARMS[arm].objective != "sft"), arms[0]), seed=0)


def _step(settings, mesh: Mesh, chip: Chip, programs: Mapping[str, Program], compiled: Mapping[str, Compiled]) -> Step:
    return Step(
        batch=settings.batch_size,
        microbatch=settings.microbatch_size,
        rows_per_pair=2 if settings.objective == "dpo" else 1,
        remat=settings.remat,
        mesh=sizes_of(mesh),
        needed=max(one.needed + _size(programs[name].beside) for name, one in compiled.items()),
        fixed=max(program.fixed for program in programs.values()),
        limit=chip.memory,
        lora=settings.lora is not None,
        narrow_moment=settings.first_moment_dtype == "bfloat16",
    )


def _memory_facts(step: Step, programs: Mapping[str, Program], compiled: Mapping[str, Compiled]) -> dict[str, Any]:
    fits = step.needed <= step.limit and all(one.refused is None for one in compiled.values())
    facts = {
        name: {
            "runs": programs[name].runs,
            "bytes": one.memory,
            "beside": _size(programs[name].beside),
            "refused": one.refused,
        }
        for name, one in compiled.items()
    }
    return {"fits": fits, "advice": advise(step, fits), "needed": step.needed, "limit": step.limit, "programs": facts}


def _time_facts(chip: Chip, flops: float, compiled: Mapping[str, Compiled]) -> dict[str, Any]:
    """None for what a refused program would have told."""
    if any(one.refused for one in compiled.values()):
        return {"flops": flops, "collectives": None, "loops_of_unknown_length": None, "seconds": None}
    work = sum((one.work for one in compiled.values()), Work({}, {}, 0))
    return {
        "flops": flops,
        "collectives": {kind: {"count": n, "sent": work.sent[kind]} for kind, n in sorted(work.counts.items())},
        "loops_of_unknown_length": work.unknown,
        "seconds": estimate(chip, flops, work.memory, sum(work.sent.values())),
    }


def _size(tree) -> int:
    """Bytes on one chip of all arrays in a pytree."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    shards = [jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves]
    return sum(shard.size * shard.dtype.itemsize for shard in shards)


def _memory(compiled) -> dict[str, int]:
    """peak: what a chip must have free; the others overlap in it."""
    report = compiled.memory_analysis()
    return {
        "arguments": report.argument_size_in_bytes,
        "outputs": report.output_size_in_bytes,
        "aliased": report.alias_size_in_bytes,
        "temporary": report.temp_size_in_bytes,
        "code": report.generated_code_size_in_bytes,
        "peak": report.peak_memory_in_bytes,
    }


def _refused(error: Exception) -> str:
    """The compiler's words on memory; an error about anything else is raised again."""
    found = re.search(
        r"Used [\d.]+\w of [\d.]+\w hbm|total memory required .*? exceeds available HBM \S+\)", str(error)
    )
    if found is None:
        raise error
    return found.group()


def _exchanged(row: dict[str, Any]) -> str:
    parts = [f"{kind} {one['count']:,} ({one['sent'] / 1e9:,.1f} GB)" for kind, one in row["collectives"].items()]
    unknown = row["loops_of_unknown_length"]
    note = f"; {unknown} loops of unknown length count once" if unknown else ""
    return f"collectives of a step, bytes sent per chip: {', '.join(parts) or 'none'}{note}"


def _duration(row: dict[str, Any]) -> list[str]:
    seconds = row["seconds"]
    least, most, steps = max(seconds.values()), sum(seconds.values()), row["steps"]
    parts = ", ".join(f"{name} {value:.1f} s at {ASSUMED[name]:.0%} of peak" for name, value in seconds.items())
    return [
        f"time of a step, an estimate, not measured: {least:.1f} s if all overlaps, {most:.1f} s if nothing does ({parts}; "
        f"{row['flops'] / 1e12:,.0f} TFLOP per chip, counted from the shapes)",
        f"{steps:,} steps: {hours(steps * least)} to {hours(steps * most)}",
    ]


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
