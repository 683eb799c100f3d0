"""Compile a prefill or a DPO step for a TPU topology without a TPU: bytes per chip before anyone pays for a pod.

    python -m retmask_jax.benchmarks.aot --topology=v5e:4x4 --what=prefill --length=131072 --mesh.fsdp=2 --mesh.tensor=8

needs libtpu, which the extra retmask_jax[tpu] brings. The row for the program goes into topologies.json beside this
file.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from retmask_jax import train
from retmask_jax.benchmarks.models import shape
from retmask_jax.benchmarks.programs import dpo_settings
from retmask_jax.files import write_json
from retmask_jax.model.cache import empty_cache
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.transformer import unembed
from retmask_jax.prefill import prefill
from retmask_jax.sharding import AXES, RULES, divided, make_mesh, param_shapes, param_shardings, using

TABLE = Path(__file__).parent / "topologies.json"
# Generation -> the accelerator type of n chips, as Cloud TPU names it; v5p counts cores.
_ACCELERATORS = {"v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
_KEY = ("topology", "model", "what", "mesh", "batch", "length")
_GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    """Compile, keep the row, print it; exit status 1 if it does not fit, 2 after one line about a user's mistake."""
    try:
        arguments = vars(_parse(argv))
        sizes = {axis: arguments.pop(f"mesh.{axis}") for axis in AXES}
        table = arguments.pop("out")
        row = compile_for(**arguments, sizes=sizes)
    except ValueError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    keep(row, table)
    print(describe(row))
    return 0 if row["fits"] else 1


def compile_for(topology: str, what: str, model: str, length: int, batch: int, sizes: dict[str, int]) -> dict:
    """Compile one program for a topology; a row of the table, with bytes per chip.

    what: "prefill", of `batch` prompts in one piece, bfloat16; or "dpo", a training step with `batch` pairs in a
    microbatch. sizes: of the mesh. Raises ValueError for an unknown topology, a mesh that does not fit it, or without
    libtpu. Call it before JAX has run anything: from then on, this process computes on the CPU.
    """
    devices = _devices(topology)
    mesh = make_mesh(sizes, devices)
    config = dataclasses.replace(shape(model), kernel="splash")
    function, arguments = PROGRAMS[what](config, mesh, batch, length)
    begun = time.monotonic()
    with using(mesh):
        lowered = function.lower(*arguments)
    try:
        memory, refused = _memory(lowered.compile()), None
    except jax.errors.JaxRuntimeError as error:
        memory, refused = None, _refused(error)
    return {
        "topology": topology, "model": model, "what": what, "mesh": {axis: int(n) for axis, n in mesh.shape.items()},
        "batch": batch, "length": length, "fits": refused is None, "bytes_per_chip": memory, "refused": refused,
        "compile_seconds": round(time.monotonic() - begun), "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax")},
    }  # fmt: skip


def keep(row: dict, table: Path) -> None:
    """Put a row into the table, in place of the one for the same program."""
    rows = json.loads(table.read_text()) if table.exists() else []
    rows = [other for other in rows if any(other[name] != row[name] for name in _KEY)]
    write_json(table, sorted([*rows, row], key=lambda row: [str(row[name]) for name in _KEY]))


def describe(row: dict) -> str:
    """A row for people."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1)
    rows = f"{row['batch']} {'pairs' if row['what'] == 'dpo' else 'prompts'} of {row['length']} tokens"
    lines = [f"{row['what']} of {row['model']}, {rows}, on {row['topology']} ({mesh}): {row['compile_seconds']} s"]
    if row["fits"]:
        lines += [f"  {name:<10} {n / _GIB:6.2f} GiB per chip" for name, n in row["bytes_per_chip"].items()]
    return "\n".join([*lines, "fits" if row["fits"] else f"does not fit: {row['refused']}"])


def _parse(argv: list[str] | None):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ValueError(f"{message} (--help lists what there is)")

    parser = Parser(prog="python -m retmask_jax.benchmarks.aot", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--topology", default="v5e:4x4", help="generation and grid of chips (default: v5e:4x4)")
    parser.add_argument("--what", choices=PROGRAMS, required=True)
    parser.add_argument("--model", choices=("30m", "8b"), default="8b", help="shape (default: 8b)")
    parser.add_argument("--length", type=int, required=True, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="prompts, or pairs of a microbatch (default: 1)")
    for axis, size in zip(AXES, (1, -1, 1), strict=True):
        parser.add_argument(f"--mesh.{axis}", type=int, default=size, help=f"chips, -1: the rest (default: {size})")
    parser.add_argument("--out", type=Path, default=TABLE, help="table to write (default: the package's)")
    return parser.parse_args(argv)


def _devices(topology: str):
    """The topology's chips, as libtpu describes them on any machine."""
    kind, _, grid = topology.partition(":")
    if kind not in _ACCELERATORS or not re.fullmatch(r"\d+(x\d+)+", grid):
        known = ", ".join(_ACCELERATORS)
        raise ValueError(f"topology is {topology!r}; it must be one of {known} and a grid of chips, such as v5e:4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for TPUs needs libtpu: pip install 'retmask_jax[tpu]'")
    name, cores = _ACCELERATORS[kind]
    chips = math.prod(int(side) for side in grid.split("x"))
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": f"{name}-{cores * chips}",
    }  # fmt: skip
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu knows no topology {topology!r}: {str(error).splitlines()[0]}") from error


def _prefill(config: ModelConfig, mesh: Mesh, batch: int, length: int):
    """(jitted function, arguments): whole prompts fill the cache, the last position's logits come out."""

    def run(params, tokens_BT, interventions):
        cache = empty_cache(config, batch, length, jnp.bfloat16)
        end_B = jnp.full(batch, length)
        out = prefill(config, params, tokens_BT, end_B, interventions, cache, end_B[:, None] - 1, chunk=length)
        return unembed(config, params, out.x_BPE[:, 0]), out.cache

    cache = jax.eval_shape(lambda: empty_cache(config, batch, length, jnp.bfloat16))
    cache = jax.tree.map(lambda x: _shaped(mesh, x, None, "batch", "heads").sharding, cache)
    logits = _array(mesh, (batch, config.vocab_size), jnp.float32, "batch", "vocab").sharding
    interventions = jax.eval_shape(lambda: Interventions.none(config))
    arguments = (
        _params(config, mesh, jnp.bfloat16), _array(mesh, (batch, length), jnp.int32, "batch"),
        jax.tree.map(lambda x: _shaped(mesh, x), interventions),
    )  # fmt: skip
    return jax.jit(run, out_shardings=(logits, cache)), arguments


def _dpo(config: ModelConfig, mesh: Mesh, batch: int, length: int):
    """(jitted function, arguments): float32 weights and AdamW, bfloat16 arithmetic, blocks recomputed.

    Gradients are accumulated over two microbatches; more of them take no more memory.
    """
    settings = dataclasses.replace(dpo_settings(batch, "bfloat16"), batch_size=2 * batch)
    params = _params(config, mesh, jnp.float32)
    optimizer = train.make_optimizer(settings)
    opt_state = optax.tree_map_params(
        optimizer, lambda _, param: param, jax.eval_shape(optimizer.init, params), params,
        transform_non_params=lambda x: _shaped(mesh, x),
    )  # fmt: skip
    examples = {}
    for side in ("chosen", "rejected"):
        examples[side] = _array(mesh, (2 * batch, length), jnp.int32, "batch")
        examples[f"{side}_mask"] = _array(mesh, (2 * batch, length), jnp.bool_, "batch")
        examples[f"ref_{side}"] = _array(mesh, (2 * batch,), jnp.float32, "batch")
    state = train.State(params, opt_state, _array(mesh, (), jnp.int32))
    return train._update, (config, settings, state, examples)


PROGRAMS = {"prefill": _prefill, "dpo": _dpo}


def _params(config: ModelConfig, mesh: Mesh, dtype):
    shapes, shardings = nn.unbox(param_shapes(config)), param_shardings(config, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes, shardings)


def _shaped(mesh: Mesh, x, *axes: str | None) -> jax.ShapeDtypeStruct:
    return _array(mesh, x.shape, x.dtype, *axes)


def _array(mesh: Mesh, shape: tuple[int, ...], dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
    """An argument split as the rules of its logical axes say, where the mesh divides it."""
    wanted = NamedSharding(mesh, nn.logical_to_mesh_axes(axes, RULES))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=divided(wanted, shape, "argument"))


def _memory(compiled) -> dict[str, int]:
    """peak: what a chip must have free; the others overlap in it."""
    report = compiled.memory_analysis()
    return {
        "arguments": report.argument_size_in_bytes, "outputs": report.output_size_in_bytes,
        "aliased": report.alias_size_in_bytes, "temporary": report.temp_size_in_bytes,
        "code": report.generated_code_size_in_bytes, "peak": report.peak_memory_in_bytes,
    }  # fmt: skip


def _refused(error: Exception) -> str:
    """The compiler's words on memory; an error about anything else is raised again."""
    found = re.search(r"Used [\d.]+\w of [\d.]+\w hbm|total memory required .*? exceeds available HBM \S+\)", str(error))
    if found is None:
        raise error
    return found.group()


if __name__ == "__main__":
    sys.exit(main())
