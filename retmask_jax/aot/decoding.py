"""Detection and sampling compiled for a TPU topology without a TPU: whether the rows fit, what the chips exchange for a
token, about how long it takes."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

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
from retmask_jax.generation.batching import bucket
from retmask_jax.generation.continuous import rows_that_fill
from retmask_jax.generation.continuous_programs import Shared, programs
from retmask_jax.generation.drafts import Drafted, Ends, answer_batch
from retmask_jax.generation.prefill import usual_chunk
from retmask_jax.generation.sampling import Draws
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.flops import forward_flops
from retmask_jax.model.kernels.blocked import compiled_for
from retmask_jax.model.kv_cache import empty_cache
from retmask_jax.model.masking import normalise
from retmask_jax.model.sharding import ROW_AXES, decoding_mesh, full_share, held_bytes, make_mesh, placed_shapes, using
from retmask_jax.pipeline.registry import check_config
from retmask_jax.stages.arms import answering

_DRAFT = 16  # tokens of an answer that are read with the prompt
_BUSY = 15 / 16  # share of the rows that are sampled, on average; the others wait to be filled again


def check_decoding(config: ConfigDict, topology: str, stage: str, mesh: Mesh | None = None) -> dict[str, Any]:
    """What the stage "detect" or "pairs" of a recipe takes on a topology, as JSON values; bytes are per chip.

    Needs the model's config.json, but no weights and no data. Call it before JAX has run anything.

    Args:
        mesh: None for the mesh that `decoding_mesh` gives.

    Raises:
        ValueError: as in `step.check_training`.
    """
    chip, begun = chip_of(topology), time.monotonic()
    model = model_of(config)
    devices = devices_of(topology)
    check_config(config, devices)
    model = dataclasses.replace(model, kernel=config.kernel)
    mesh = mesh or decoding_mesh(make_mesh(config.mesh, devices), model, config.dtype, chip.memory)
    with using(mesh), compiled_for("tpu"):
        job = {"pairs": _sampling, "detect": _detection}[stage](config, model, mesh, chip)
        compiled = {name: compile_program(program, mesh) for name, program in job.programs.items()}
    fits = all(outcome.refused is None and outcome.needed <= chip.memory for outcome in compiled.values())
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
            "needed": max(outcome.needed for outcome in compiled.values()),
            "programs": {
                name: {"bytes": outcome.memory, "refused": outcome.refused, "sent": dict(outcome.work.sent)}
                for name, outcome in compiled.items()
            },
            "seconds": _seconds(job, model, mesh, chip, compiled) if fits else None,
        }
        | stamp(compiled)
        | {"compile_seconds": round(time.monotonic() - begun)}
    )


def describe(row: dict[str, Any], recipe: str) -> str:
    """A row of `check_decoding` as text; its last line says whether the rows fit."""
    lines = [
        f"{recipe}, {row['what']} on {row['topology']} ({mesh_text(row['mesh'])}): {row['rows']} rows of "
        f"{row['length']} tokens and {row['new_tokens']} new ones; compiled in {row['compile_seconds']} s",
        f"memory: weights {row['weights'] / GIB:.2f}, caches {row['caches'] / GIB:.2f}, at most "
        f"{row['needed'] / GIB:.2f} of {row['limit'] / GIB:.2f} GiB per chip",
        *(_exchanged(name, program) for name, program in row["programs"].items()),
    ]
    if row["seconds"]:
        lines += _durations(row)
    return "\n".join([*lines, "fits" if row["fits"] else "does not fit"])


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a stage runs. programs: "token", one step of all rows, and others. caches, weights: bytes per chip."""

    programs: dict[str, Program]
    rows: int
    length: int
    new_tokens: int
    answers: int
    weights: int
    caches: int


def _sampling(config: ConfigDict, model: ModelConfig, mesh: Mesh, chip: Chip) -> _Job:
    """The stage `pairs`, with prompts of the largest length that training keeps."""
    params = placed_shapes(model, mesh, config.dtype)
    weights, length, new = held_bytes(params), config.train.max_prompt_tokens, config.pairs.max_new_tokens
    variants = len(config.train.seeds) * len(answering(config.train.arms))
    masks = jax.eval_shape(lambda: normalise(model).repeated(variants))
    whole = jax.tree.map(
        lambda x: array(mesh, x.shape, x.dtype),
        (masks, Draws.of(model, None, config.pairs.temperature, config.pairs.top_p), np.int32(1)),
    )
    shared, answers = Shared(params, *whole), config.pairs.n_prompts * variants
    rows = config.pairs.batch_size or rows_that_fill(
        model, shared, length, new, int(chip.memory - weights), most=answers
    )
    rows = full_share(rows, ROW_AXES)
    parts = programs(model, shared, rows, length, new)
    state = parts.decode.arguments[-2:]
    jitted = {
        "prompts": Program(
            parts.prefill.function, parts.prefill.arguments, options=parts.prefill.options, resident=state
        ),
        "token": Program(parts.decode.function, parts.decode.arguments),
    }
    return _Job(jitted, rows, length, new, answers, weights, held_bytes(state))


def _detection(config: ConfigDict, model: ModelConfig, mesh: Mesh, chip: Chip) -> _Job:
    """The stage `detect`: greedy answers to the longest cases in one program; it counts all cases of one needle."""
    task, rows = config.tasks[config.detect.task], config.batch_size
    new = config.detect.max_new_tokens
    length = min(bucket(max(task.lengths)), model.max_length - new)
    params = placed_shapes(model, mesh, config.dtype)
    words = np.zeros(model.vocab_size, bool)
    whole = jax.tree.map(
        lambda x: array(mesh, x.shape, x.dtype),
        (Ends.of(model, words, words), jax.eval_shape(lambda: normalise(model)), np.int32(1)),
    )
    of_row = array(mesh, (rows,), jnp.int32, "batch")
    tokens, drafts = (array(mesh, (rows, width), jnp.int32, "batch") for width in (length, min(_DRAFT, new)))
    given = [None, Drafted(tokens, of_row, of_row, of_row, drafts, of_row), *whole]
    cache = jax.eval_shape(lambda: empty_cache(model, rows, length + new, config.dtype))
    placed = jax.tree.map(lambda x: array(mesh, x.shape, x.dtype, None, "batch", "heads"), cache)
    cases = len(task.lengths) * len(task.depths) if task.per_length is None else len(task.lengths) * task.per_length
    program = Program(answer_batch, (model, params, *given), options={"max_new_tokens": new})
    return _Job({"prompts and tokens": program}, rows, length, new, cases, held_bytes(params), held_bytes(placed))


def _seconds(
    job: _Job, model: ModelConfig, mesh: Mesh, chip: Chip, compiled: Mapping[str, Compiled]
) -> dict[str, dict[str, float]]:
    """Times of the prompts of all rows, and of one token of each row; a step reads all weights and all caches."""
    sent = {name: sum(outcome.work.sent.values()) for name, outcome in compiled.items()}
    per_token = forward_flops(model, job.length + 1, 1) - forward_flops(model, job.length, 0)
    prompts = job.rows * forward_flops(model, job.length, 1) / mesh.size
    if "prompts" in sent:  # a program for an eighth of the rows, which begin together
        times, of_prompts = 8, sent["prompts"]
    else:
        # One program reads the prompts in chunks and decodes. Its loops over chunks and over tokens are of unknown
        # length, so the bytes sent are those of one turn of each, and nearly all of them are the chunk's.
        times, of_prompts = -(-job.length // usual_chunk()), sum(sent.values())
    return {
        "prompts": estimate(chip, prompts, times * job.weights, times * of_prompts),
        "token": estimate(chip, job.rows * per_token / mesh.size, job.weights + job.caches, sent.get("token", 0)),
    }


def _exchanged(name: str, program: dict[str, Any]) -> str:
    if program["refused"]:
        return f"{name}: refused by the compiler: {program['refused']}"
    sent = ", ".join(f"{kind} {n / 1e6:,.1f} MB" for kind, n in sorted(program["sent"].items()))
    return f"{name}: a chip sends {sent or 'nothing'}"


def _durations(row: dict[str, Any]) -> list[str]:
    step, first = row["seconds"]["token"], row["seconds"]["prompts"]
    batches = row["answers"] / row["rows"] / _BUSY
    least, most = (batches * (of(first.values()) + row["new_tokens"] * of(step.values())) for of in (max, sum))
    return [
        f"a token of {row['rows']} rows, an estimate, not measured: {1e3 * max(step.values()):.0f} to "
        f"{1e3 * sum(step.values()):.0f} ms ({shares_text(step, 1e3, 'ms')})",
        f"{row['answers']:,} answers, if each had {row['new_tokens']:,} tokens: {duration(least)} to {duration(most)}",
    ]
