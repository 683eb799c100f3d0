"""Detection and sampling compiled for a TPU topology without a TPU: whether the rows fit, what the chips exchange for a
token, about how long it takes."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retmask_jax.aot.hlo import Work
from retmask_jax.aot.step import Program, array, compile_program, hours, sizes_of, stamp
from retmask_jax.aot.topology import ASSUMED, Chip, chip_of, devices_of, estimate
from retmask_jax.generation.batching import bucket
from retmask_jax.generation.continuous import programs, rows_that_fill
from retmask_jax.generation.decode import Draws, generate_batch
from retmask_jax.generation.prefill import usual_chunk
from retmask_jax.hf.families import from_hf
from retmask_jax.hf.hub import config_folder
from retmask_jax.hf.weights import read_config
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.flops import forward_flops
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kernels.blocked import compiled_for
from retmask_jax.model.kv_cache import empty_cache
from retmask_jax.model.sharding import ROW_AXES, decoding_mesh, full_share, held_bytes, make_mesh, placed_shapes, using
from retmask_jax.pipeline.registry import check_config
from retmask_jax.stages.arms import answering

_GIB = 2**30
_BUSY = 15 / 16  # of the rows that are sampled, on average: the others wait to be filled again


def check_decoding(config, topology: str, stage: str, mesh: Mesh | None = None) -> dict[str, Any]:
    """What "detect" or "pairs" of a recipe takes on a topology, as JSON values; bytes are per chip.

    mesh: another one than `decoding_mesh` gives. Needs the model's config.json, no weights and no data; otherwise as
    `step.check_training`.
    """
    chip, begun = chip_of(topology), time.monotonic()
    model = from_hf(read_config(config_folder(config.model, revision=config.revision or None)))
    devices = devices_of(topology)
    check_config(config, devices)
    model = dataclasses.replace(model, kernel=config.kernel)
    mesh = mesh or decoding_mesh(make_mesh(config.mesh, devices), model, config.dtype, chip.memory)
    with using(mesh), compiled_for("tpu"):
        job = {"pairs": _sampling, "detect": _detection}[stage](config, model, mesh, chip)
    compiled = {name: _compiled(program, mesh) for name, program in job.programs.items()}
    fits = all(one.refused is None and one.needed <= chip.memory for one in compiled.values())
    return (
        {
            "what": stage,
            "topology": topology,
            "mesh": sizes_of(mesh),
            "rows": job.rows,
            "length": job.length,
            "new_tokens": job.new_tokens,
            "answers": job.answers,
            "fits": fits,
            "weights": job.weights,
            "caches": job.caches,
            "limit": chip.memory,
            "needed": max(one.needed for one in compiled.values()),
            "programs": {
                name: {"bytes": one.memory, "refused": one.refused, "sent": dict(one.work.sent)}
                for name, one in compiled.items()
            },
            "seconds": _seconds(job, model, mesh, chip, {name: one.work for name, one in compiled.items()})
            if fits
            else None,
        }
        | stamp(compiled)
        | {"compile_seconds": round(time.monotonic() - begun)}
    )


def describe(row: dict[str, Any], what: str) -> str:
    """A row of `check_decoding` for people; the last line is the verdict. what: the recipe."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1)
    lines = [
        f"{what}, {row['what']} on {row['topology']} ({mesh or '1 chip'}): {row['rows']} rows of {row['length']} tokens and "
        f"{row['new_tokens']} new ones; compiled in {row['compile_seconds']} s",
        f"memory: weights {row['weights'] / _GIB:.2f}, caches {row['caches'] / _GIB:.2f}, at most {row['needed'] / _GIB:.2f} "
        f"of {row['limit'] / _GIB:.2f} GiB per chip",
    ]
    for name, program in row["programs"].items():
        sent = ", ".join(f"{kind} {n / 1e6:,.1f} MB" for kind, n in sorted(program["sent"].items()))
        lines.append(
            f"{name}: "
            + (
                f"refused by the compiler: {program['refused']}"
                if program["refused"]
                else f"a chip sends {sent or 'nothing'}"
            )
        )
    if row["seconds"]:
        step, first = row["seconds"]["token"], row["seconds"]["prompts"]
        shares = ", ".join(
            f"{name} {1e3 * value:.1f} ms at {ASSUMED[name]:.0%} of peak" for name, value in step.items()
        )
        lines.append(
            f"a token of {row['rows']} rows, an estimate, not measured: {1e3 * max(step.values()):.0f} to "
            f"{1e3 * sum(step.values()):.0f} ms ({shares})"
        )
        batches = row["answers"] / row["rows"] / _BUSY
        least, most = (batches * (of(first.values()) + row["new_tokens"] * of(step.values())) for of in (max, sum))
        lines.append(
            f"{row['answers']:,} answers, if each had {row['new_tokens']:,} tokens: {hours(least)} to {hours(most)}"
        )
    return "\n".join([*lines, "fits" if row["fits"] else "does not fit"])


@dataclasses.dataclass(frozen=True)
class _Work:
    """programs: "token", one step of all rows, and others; caches, weights: bytes per chip."""

    programs: dict[str, Program]
    rows: int
    length: int
    new_tokens: int
    answers: int
    weights: int
    caches: int


def _sampling(config, model: ModelConfig, mesh: Mesh, chip: Chip) -> _Work:
    """The stage `pairs`: prompts as long as training keeps them."""
    params = placed_shapes(model, mesh, config.dtype)
    weights, length, new = held_bytes(params), config.train.max_prompt_tokens, config.pairs.max_new_tokens
    variants = len(config.train.seeds) * len(answering(config.train.arms))
    masks = jax.eval_shape(lambda: Interventions.none(model).per_row(variants))
    whole = jax.tree.map(
        lambda x: array(mesh, x.shape, x.dtype),
        (masks, Draws.of(model, None, config.pairs.temperature, config.pairs.top_p), np.int32(1)),
    )
    shared, answers = (params, *whole), config.pairs.n_prompts * variants
    rows = config.pairs.batch_size or rows_that_fill(
        model, shared, length, new, int(chip.memory - weights), most=answers
    )
    rows = full_share(rows, ROW_AXES)
    found = programs(model, shared, rows, length, new)
    state = found.decode[1][-2:]
    return _Work(
        {
            "prompts": Program(found.prefill[0], found.prefill[1], options=found.prefill[2], beside=state),
            "token": Program(found.decode[0], found.decode[1]),
        },
        rows,
        length,
        new,
        answers,
        weights,
        held_bytes(state),
    )


def _detection(config, model: ModelConfig, mesh: Mesh, chip: Chip) -> _Work:
    """The stage `detect`: greedy answers to the longest cases, in one program; answers: of all cases with one needle."""
    task, rows = config.tasks[config.detect.task], config.batch_size
    new = config.detect.max_new_tokens
    length = min(bucket(max(task.lengths)), model.max_length - new)
    params = placed_shapes(model, mesh, config.dtype)
    masks = jax.eval_shape(lambda: Interventions.none(model).per_row(rows))
    given = [
        array(mesh, (rows, length), jnp.int32, "batch"),
        array(mesh, (rows,), jnp.int32, "batch"),
        jax.tree.map(lambda x: array(mesh, x.shape, x.dtype, "batch"), masks),
        *jax.tree.map(lambda x: array(mesh, x.shape, x.dtype), Draws.of(model, None, 0.0, 1.0)),
        *2 * [array(mesh, (rows,), jnp.uint32, "batch")],
    ]
    cache = jax.eval_shape(lambda: empty_cache(model, rows, length + new, config.dtype))
    placed = jax.tree.map(lambda x: array(mesh, x.shape, x.dtype, None, "batch", "heads"), cache)
    cases = len(task.lengths) * len(task.depths) if task.per_length is None else len(task.lengths) * task.per_length
    program = Program(generate_batch, (model, params, *given), options={"max_new_tokens": new, "probe": True})
    return _Work({"prompts and tokens": program}, rows, length, new, cases, held_bytes(params), held_bytes(placed))


def _compiled(program: Program, mesh: Mesh):
    with compiled_for("tpu"):
        return compile_program(program, mesh)


def _seconds(
    job: _Work, model: ModelConfig, mesh: Mesh, chip: Chip, work: dict[str, Work]
) -> dict[str, dict[str, float]]:
    """Of the prompts of all rows, and of one token of each: a step reads all weights and all caches."""
    sent = {name: sum(one.sent.values()) for name, one in work.items()}
    per_token = forward_flops(model, job.length + 1, 1) - forward_flops(model, job.length, 0)
    prompts = job.rows * forward_flops(model, job.length, 1) / mesh.size
    # An eighth of the rows begin at a time. In one program with the tokens the prompts pass in chunks, and the loops over
    # both are of unknown length: a turn of each is counted together, and nearly all of it is the chunk's.
    times, of_prompts = (
        (8, sent["prompts"]) if "prompts" in sent else (-(-job.length // usual_chunk()), sum(sent.values()))
    )
    return {
        "prompts": estimate(chip, prompts, times * job.weights, times * of_prompts),
        "token": estimate(chip, job.rows * per_token / mesh.size, job.weights + job.caches, sent.get("token", 0)),
    }
