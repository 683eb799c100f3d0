"""A training step compiled for a TPU topology without a TPU, before anyone pays for a pod: whether it fits, what the
chips exchange, about how long it takes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from retmask_jax.aot.advice import Step, advise
from retmask_jax.aot.hlo import Work
from retmask_jax.aot.program import (
    Compiled,
    Program,
    array,
    compile_program,
    duration,
    mesh_text,
    model_of,
    shares_text,
    sizes_of,
    stamp,
)
from retmask_jax.aot.topology import GIB, Chip, chip_of, devices_of, estimate
from retmask_jax.data.pair_rows import PairRows
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.flops import executed_flops
from retmask_jax.model.masking import normalise
from retmask_jax.model.sharding import held_bytes, make_mesh, placed_shapes
from retmask_jax.pipeline.registry import check_config
from retmask_jax.stages.arms import ARMS
from retmask_jax.stages.train import check_batch, train_settings
from retmask_jax.training.settings import Settings
from retmask_jax.training.step import make_programs


def check_training(config: ConfigDict, topology: str) -> dict[str, Any]:
    """What the training step of a recipe takes on a topology, as JSON values; bytes and operations are per chip.

    Needs the model's config.json, but no weights and no data. Call it before JAX has run anything.

    Raises:
        ValueError: the topology does not exist, the mesh does not fit it, settings contradict each other, or libtpu is
            not installed.
    """
    chip, model = chip_of(topology), model_of(config)
    devices = devices_of(topology)
    check_config(config, devices)
    check_batch(config, devices)
    mesh, settings = make_mesh(config.mesh, devices), _settings(config)
    # "auto" would choose the fastest kernel for this machine instead of the topology.
    model = dataclasses.replace(model, kernel="splash" if config.kernel == "auto" else config.kernel)
    prompt, answer = config.train.max_prompt_tokens, config.train.max_tokens - config.train.max_prompt_tokens
    programs = training_programs(model, settings, mesh, prompt, answer)
    compiled = {name: compile_program(program, mesh) for name, program in programs.items()}
    step = _step(settings, mesh, chip, programs, compiled)
    trained = dataclasses.replace(model, lora=settings.lora)
    answers = (answer,) * (2 if settings.objective == "dpo" else 1)
    flops = step.batch * executed_flops(trained, prompt, answers, remat=settings.remat) / mesh.size
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


def training_programs(
    config: ModelConfig, settings: Settings, mesh: Mesh, prompt: int, answer: int
) -> dict[str, Program]:
    """Returns {name: Program} of what one step of `train` runs on prompts and answers of so many tokens."""
    # The seed is no part of an update; `train` leaves it out in the same way.
    programs = make_programs(config, dataclasses.replace(settings, seed=0), mesh)
    frozen = {} if settings.lora is None else placed_shapes(config, mesh, settings.compute_dtype)
    batch = {name: array(mesh, x.shape, x.dtype, "batch") for name, x in _batch(settings, prompt, answer).items()}
    ablated = None
    if settings.objective == "contrast":
        masks = jax.eval_shape(lambda: normalise(config))
        ablated = jax.tree.map(lambda x: array(mesh, x.shape, x.dtype), masks)
    state, sums, runs = programs.state, programs.sums, settings.batch_size // settings.microbatch_size
    if runs == 1:
        function, arguments = programs.gradients, (state.params, frozen, batch, ablated)
    else:
        function, arguments = programs.accumulate, (state.params, frozen, sums, batch, ablated)
    return {
        "gradients": Program(function, arguments, runs=runs, resident=state.opt_state),
        "update": Program(programs.apply, (state, sums), resident=frozen),
    }


def describe(row: dict[str, Any], recipe: str) -> str:
    """A row of `check_training` as text; its last line says whether the step fits."""
    lines = [
        f"{recipe} on {row['topology']} ({mesh_text(row['mesh'])}): {row['batch']} pairs of up to {row['length']} "
        f"tokens a step, {row['microbatch']} at a time; compiled in {row['compile_seconds']} s"
    ]
    for name, program in row["programs"].items():
        if program["refused"]:
            lines.append(f"{name}: refused by the compiler: {program['refused']}")
            continue
        parts = [f"{part} {program['bytes'][part] / GIB:.2f}" for part in ("arguments", "temporary", "peak")]
        times = f", {program['runs']} times a step" if program["runs"] > 1 else ""
        lines.append(f"{name}{times}: {', '.join(parts)}, other arrays {program['beside'] / GIB:.2f} GiB per chip")
    lines.append(f"memory: {row['needed'] / GIB:.2f} of {row['limit'] / GIB:.2f} GiB per chip")
    if row["seconds"]:
        lines += [_exchanged(row), *_duration(row)]
    verdict = "fits" if row["fits"] else "does not fit"
    return "\n".join([*lines, ": ".join([verdict, "; or ".join(row["advice"])]) if row["advice"] else verdict])


def _settings(config: ConfigDict) -> Settings:
    """The settings of the arm that takes most memory: preferences have two answers to a prompt, demonstrations one."""
    arms = config.train.arms
    return train_settings(config, next((arm for arm in arms if ARMS[arm].objective != "sft"), arms[0]), seed=0)


def _batch(settings: Settings, prompt: int, answer: int) -> dict[str, np.ndarray]:
    """A part of a batch as `part_loss` takes it, of the same pair again and again."""
    bounds = np.cumsum([[0, prompt, answer, answer]], axis=1)
    pair, n = PairRows(["a pair"], np.zeros(bounds[0, -1], np.int32), bounds), settings.microbatch_size
    dpo = settings.objective == "dpo"
    batch = pair.forked([0] * n, (prompt, answer), 0) if dpo else pair.chosen([0] * n, (prompt + answer,), 0)
    if settings.has_reference:
        batch["reference"] = np.zeros((n, 2), np.float32)
    return batch | {"weight": np.ones(n, np.float32)}


def _step(
    settings: Settings, mesh: Mesh, chip: Chip, programs: Mapping[str, Program], compiled: Mapping[str, Compiled]
) -> Step:
    return Step(
        batch=settings.batch_size,
        microbatch=settings.microbatch_size,
        remat=settings.remat,
        mesh=sizes_of(mesh),
        needed=max(outcome.needed + held_bytes(programs[name].resident) for name, outcome in compiled.items()),
        fixed=max(program.fixed for program in programs.values()),
        limit=chip.memory,
        lora=settings.lora is not None,
        narrow_moment=settings.first_moment_dtype == "bfloat16",
    )


def _memory_facts(step: Step, programs: Mapping[str, Program], compiled: Mapping[str, Compiled]) -> dict[str, Any]:
    fits = step.needed <= step.limit and all(outcome.refused is None for outcome in compiled.values())
    facts = {
        name: {
            "runs": programs[name].runs,
            "bytes": outcome.memory,
            "beside": held_bytes(programs[name].resident),
            "refused": outcome.refused,
        }
        for name, outcome in compiled.items()
    }
    return {"fits": fits, "advice": advise(step, fits), "needed": step.needed, "limit": step.limit, "programs": facts}


def _time_facts(chip: Chip, flops: float, compiled: Mapping[str, Compiled]) -> dict[str, Any]:
    """All but the operations is None where the compiler refused a program."""
    if any(outcome.refused for outcome in compiled.values()):
        return {"flops": flops, "collectives": None, "loops_of_unknown_length": None, "seconds": None}
    work = sum((outcome.work for outcome in compiled.values()), Work({}, {}, 0))
    return {
        "flops": flops,
        "collectives": {kind: {"count": n, "sent": work.sent[kind]} for kind, n in sorted(work.counts.items())},
        "loops_of_unknown_length": work.unknown,
        "seconds": estimate(chip, flops, work.memory, sum(work.sent.values())),
    }


def _exchanged(row: dict[str, Any]) -> str:
    kinds = [f"{kind} {each['count']:,} ({each['sent'] / 1e9:,.1f} GB)" for kind, each in row["collectives"].items()]
    unknown = row["loops_of_unknown_length"]
    note = f"; {unknown} loops of unknown length count once" if unknown else ""
    return f"collectives of a step, bytes sent per chip: {', '.join(kinds) or 'none'}{note}"


def _duration(row: dict[str, Any]) -> list[str]:
    seconds = row["seconds"]
    least, most, steps = max(seconds.values()), sum(seconds.values()), row["steps"]
    return [
        f"time of a step, an estimate, not measured: {least:.1f} s if all overlaps, {most:.1f} s if nothing does "
        f"({shares_text(seconds, 1, 's')}; {row['flops'] / 1e12:,.0f} TFLOP per chip, counted from the shapes)",
        f"{steps:,} steps: {duration(steps * least)} to {duration(steps * most)}",
    ]
