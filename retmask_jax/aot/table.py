"""The table of which recipes fit which TPUs, topologies.json in this folder, compiled without a TPU.

    python -m retmask_jax.aot.table recipes
    python -m retmask_jax.aot.table recipes --long --recipes llama3_1_8b
    python -m retmask_jax.aot.table prefill --topology=v5e:4x4 --length=131072 --mesh.fsdp=2 --mesh.tensor=8

These commands need libtpu, which the extra retmask_jax[tpu] installs. `recipes` compiles the training step of every
recipe in RECIPES for every topology in SETTINGS, each in a new process; the models' config.json comes from the hub, or
from FOLDER/NAME with --models=FOLDER. `retmask train --config=NAME --aot=TOPOLOGY` compiles a single one.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from retmask_jax.aot.program import Program, array, compile_program, mesh_text, sizes_of, stamp
from retmask_jax.aot.step import check_training, describe
from retmask_jax.aot.topology import GIB, chip_of, devices_of
from retmask_jax.benchmarks.models import shape
from retmask_jax.generation.prefill import prefill
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.kv_cache import empty_cache
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import normalise
from retmask_jax.model.sharding import AXES, make_mesh, placed_shapes
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.utils.files import write_json

TABLE = Path(__file__).parent / "topologies.json"
RECIPES = ("llama3_1_8b", "qwen3_8b", "olmo3_7b_instruct", "olmo3_7b_think")
# Topology -> keys that differ from the recipes, as `advise` suggested.
SETTINGS = {"v5e:4x4": {}, "v5e:8x8": {"train.microbatch_size": "64"}, "v5p:2x2x2": {}, "v6e:4x4": {}}
# Rows of 8,192 tokens, as long as the cases of detection; without the context axis they exceed the memory of a chip.
LONG = {
    "v5e:4x4": {
        "train.max_tokens": "8192",
        "train.max_prompt_tokens": "4096",
        "train.microbatch_size": "8",
        "mesh.fsdp": "8",
        "mesh.context": "2",
    }
}
_KEYS = {"train": ("what", "model", "topology", "length")}
_KEY = ("what", "model", "topology", "length", "mesh", "batch")


def main(argv: list[str] | None = None) -> int:
    """Compile, keep the rows in the table and print them; returns the exit status.

    It is 1 if something does not fit, and 2 after one line about a mistake in the call.
    """
    try:
        arguments = vars(_parse(argv))
        what, table = arguments.pop("what"), arguments.pop("out")
        fits = fill(table, **arguments) if what == "recipes" else _prefill(table, arguments)
    except ValueError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    return 0 if fits else 1


def fill(table: Path, models: Path | None, recipes: list[str], topologies: list[str] | None, long: bool) -> bool:
    """Compile the training steps of recipes for topologies and keep them in the table; returns whether all fit.

    Args:
        models: folder with a folder for each model; None takes config.json from the hub.
        topologies: None for all of SETTINGS, or of LONG.
        long: use the rows of 8,192 tokens, LONG.
    """
    fits, settings = True, LONG if long else SETTINGS
    # libtpu takes one topology for each process.
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawned, max_tasks_per_child=1) as pool:
        for topology in topologies or settings:
            for recipe in recipes:
                row = pool.submit(train_row, recipe, topology, models, settings.get(topology, {})).result()
                keep(row, table)
                print(describe(row, recipe), flush=True)
                fits = fits and row["fits"]
    return fits


def train_row(recipe: str, topology: str, models: Path | None, overrides: dict[str, str]) -> dict[str, Any]:
    """The row of a recipe's training step. overrides: keys of the recipe and their other values."""
    config = load_recipe(recipe, list(overrides.items()))
    if models is not None:
        config = load_recipe(recipe, [*overrides.items(), ("model", str(models / config.model.split("/")[-1]))])
    return {"model": recipe, "overrides": overrides} | check_training(config, topology)


def prefill_row(topology: str, model: str, length: int, batch: int, sizes: dict[str, int]) -> dict[str, Any]:
    """The row of a prefill of `batch` prompts in one piece, in bfloat16. sizes: of the axes of the mesh."""
    chip_of(topology)
    mesh = make_mesh(sizes, devices_of(topology))
    config = dataclasses.replace(shape(model), kernel="splash")
    compiled = compile_program(prefill_program(config, mesh, batch, length), mesh)
    return {
        "what": "prefill",
        "topology": topology,
        "model": model,
        "mesh": sizes_of(mesh),
        "batch": batch,
        "length": length,
        "fits": compiled.refused is None,
        "bytes_per_chip": compiled.memory,
        "refused": compiled.refused,
    } | stamp({"prefill": compiled})


def prefill_program(config: ModelConfig, mesh: Mesh, batch: int, length: int) -> Program:
    """The program that fills the cache with whole prompts and returns the logits of the last position."""

    def run(params, tokens_BT, interventions):
        cache = empty_cache(config, batch, length, jnp.bfloat16)
        end_B = jnp.full(batch, length)
        out = prefill(config, params, tokens_BT, end_B, interventions, cache, end_B[:, None] - 1, chunk=length)
        return unembed(config, params, out.x_BPE[:, 0]), out.cache

    cache = jax.eval_shape(lambda: empty_cache(config, batch, length, jnp.bfloat16))
    cache = jax.tree.map(lambda x: array(mesh, x.shape, x.dtype, None, "batch", "heads").sharding, cache)
    logits = array(mesh, (batch, config.vocab_size), jnp.float32, "batch", "vocab").sharding
    interventions = jax.eval_shape(lambda: normalise(config))
    arguments = (
        placed_shapes(config, mesh, jnp.bfloat16),
        array(mesh, (batch, length), jnp.int32, "batch"),
        jax.tree.map(lambda x: array(mesh, x.shape, x.dtype), interventions),
    )
    return Program(jax.jit(run, out_shardings=(logits, cache)), arguments)


def keep(row: dict[str, Any], table: Path) -> None:
    """Put a row into the table, in place of one of the same recipe, topology and length, or the same prefill."""
    rows = json.loads(table.read_text()) if table.exists() else []
    rows = [other for other in rows if _key(other) != _key(row)]
    write_json(table, sorted([*rows, row], key=_key))


def _key(row: dict[str, Any]) -> list[str]:
    return [str(row[name]) for name in _KEYS.get(row["what"], _KEY)]


def _prefill(table: Path, arguments: dict[str, Any]) -> bool:
    sizes = {axis: arguments.pop(f"mesh.{axis}") for axis in AXES}
    row = prefill_row(**arguments, sizes=sizes)
    keep(row, table)
    place = f"{row['topology']} ({mesh_text(row['mesh'])})"
    print(f"prefill of {row['model']}, {row['batch']} x {row['length']} tokens, on {place}")
    for name, n in (row["bytes_per_chip"] or {}).items():
        print(f"  {name:<10} {n / GIB:6.2f} GiB per chip")
    print("fits" if row["fits"] else f"does not fit: {row['refused']}")
    return row["fits"]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message} (--help lists the arguments)")

    parser = Parser(
        prog="python -m retmask_jax.aot.table",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", required=True)
    recipes = what.add_parser("recipes", help="the training steps of recipes", allow_abbrev=False)
    recipes.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    recipes.add_argument("--topologies", nargs="+", metavar="TOPOLOGY", help="default: all that the table has")
    recipes.add_argument("--long", action="store_true", help="rows of 8,192 tokens")
    recipes.add_argument("--models", type=Path, help="folder with a folder for each model (default: from the hub)")
    one = what.add_parser("prefill", help="prompts of random shape through a model", allow_abbrev=False)
    one.add_argument("--topology", default="v5e:4x4", help="generation and grid of chips (default: v5e:4x4)")
    one.add_argument("--model", choices=("30m", "8b"), default="8b", help="shape (default: 8b)")
    one.add_argument("--length", type=int, required=True, help="tokens of a prompt")
    one.add_argument("--batch", type=int, default=1, help="prompts (default: 1)")
    for axis in AXES:
        size = -1 if axis == "fsdp" else 1
        one.add_argument(f"--mesh.{axis}", type=int, default=size, help=f"chips, -1: the rest (default: {size})")
    for each in (recipes, one):
        each.add_argument("--out", type=Path, default=TABLE, help="table to write (default: the package's)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
