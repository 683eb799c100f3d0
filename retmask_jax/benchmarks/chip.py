"""The share of the machine's peaks that we reach: its peaks as measured here, and the least work that a task needs."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Int

from retmask_jax.benchmarks.harness import Bound, Row, alternate
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.flops import block_weights, forward_flops, layer_kinds
from retmask_jax.model.sharding import row_parallel, using

_PRODUCT = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # rows and columns of the matrices that are multiplied
_TURNS = {
    "cpu": 1,
    "gpu": 8,
    "tpu": 8,
}  # runs that are timed together, since starting one takes a part of a millisecond
_COPIED = {"cpu": 2**28, "gpu": 2**31, "tpu": 2**30}  # bytes that are copied on each device


def decode_bytes(config: ModelConfig, rows: int, context: int, itemsize: int) -> float:
    """Returns the bytes that a decoding step of `rows` rows must read: every matrix, and the keys and values it sees.

    Args:
        context: tokens before the step.
        itemsize: bytes of a number.
    """
    matrices = block_weights(config) + config.hidden_size * config.vocab_size
    seen = sum(min(context, config.window or context) if kind == "sliding" else context for kind in layer_kinds(config))
    return float(itemsize) * (matrices + rows * 2 * config.n_kv_heads * config.head_dim * seen)


def product_peak(mesh: Mesh, dtype: DTypeLike) -> float:
    """Operations a second of square matrix products, on all devices of a data mesh at once; the best of ten runs."""
    n = _PRODUCT[jax.default_backend()]
    # Random numbers, since a GPU multiplies equal ones faster.
    draw = functools.partial(jax.random.normal, shape=(mesh.size * n, n), dtype=dtype)
    a, b = (_filled(mesh, functools.partial(draw, jax.random.key(seed))) for seed in range(2))
    multiply = jax.jit(row_parallel("a", "b")(lambda a, b: a @ b))
    return 2.0 * mesh.size * n**3 / _best(mesh, lambda: multiply(a, b))


def copy_bandwidth(mesh: Mesh) -> float:
    """Bytes read and written a second by copies, on all devices of a data mesh at once; the best of ten runs."""
    shape = mesh.size, _COPIED[jax.default_backend()] // 4
    x = _filled(mesh, lambda: jnp.full(shape, 0.5, jnp.float32))
    copy = jax.jit(row_parallel("x")(lambda x: x + 1))
    return 2.0 * x.nbytes / _best(mesh, lambda: copy(x))


def share_row(name: str, unit: str, done: float, peak: float, target: float | None) -> Row:
    """A row of `done` against `peak`, both in `unit` a second. target: least share, on GPUs."""
    share = done / peak
    bound = None if target is None or jax.default_backend() != "gpu" else Bound("share", share, ">=", target)
    return Row(name, f"G{unit}/s", done / 1e9, peak / 1e9, share, bound)


def generation_rows(
    lm: LanguageModel,
    mesh: Mesh,
    rows: int,
    length: int,
    new_tokens: int,
    repeats: int,
    generate: Callable[[Int[np.ndarray, "rows length"], int], object],
    how: str = "",
) -> list[Row]:
    """Rows of prefill's share of the matrix-product peak and of decoding's share of the copy bandwidth.

    Args:
        rows: prompts, all of `length` tokens.
        generate: generates so many new tokens for given prompts.
        how: it does that, for the names of the rows.
    """
    config, dtype = lm.config, jax.tree.leaves(lm.params)[0].dtype
    tokens = np.random.default_rng(6).integers(16, config.vocab_size, (rows, length), dtype=np.int32)
    ends = {"prefill": 1, "both": new_tokens}
    timed = alternate({name: functools.partial(generate, tokens, n) for name, n in ends.items()}, repeats)
    flops = rows * forward_flops(config, length, counted=1)
    about = f"{rows} prompts of {length}" + (f", {how}" if how else "")
    name, rate = f"prefill, {about}; peer: the machine's matrix-product peak", flops / timed["prefill"].median
    shares = [share_row(name, "FLOP", rate, product_peak(mesh, dtype), 0.5)]
    if new_tokens > 1:
        step = statistics.median(np.subtract(timed["both"].runs, timed["prefill"].runs)) / (new_tokens - 1)
        needed = decode_bytes(config, rows, length + new_tokens // 2, dtype.itemsize)
        name = f"decoding, {about}; peer: the machine's copy bandwidth"
        row = share_row(name, "B", needed / step, copy_bandwidth(mesh), 0.6)
        name = f"tokens a second, {about}"
        shares += [
            row,
            Row(
                name, "tokens/s", rows / step, facts={"tokens/s with prompts": rows * new_tokens / timed["both"].median}
            ),
        ]
    return shares


def _filled(mesh: Mesh, make: Callable[[], Any]) -> jax.Array:
    return jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec("data")))()


def _best(mesh: Mesh, run: Callable[[], Any]) -> float:
    turns = _TURNS[jax.default_backend()]

    def repeated():
        for _ in range(turns - 1):
            run()
        jax.block_until_ready(run())

    with using(mesh):
        timed = alternate({"run": repeated}, 10)
    return min(timed["run"].runs) / turns
