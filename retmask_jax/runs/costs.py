"""About how long a stage will take: the tokens it reads, writes and trains on, and how fast the devices are."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from retmask_jax.data.builtin_files import path_of
from retmask_jax.data.needles import read_needles
from retmask_jax.evals.suites.ruler import TASKS
from retmask_jax.hf.summary import count_parameters
from retmask_jax.model.config import ModelConfig

_SHARE = 0.6  # of the speed of one matrix product that a whole model reaches
_TRAINING = 4.0  # a training token costs about as much as four that are read: forward, backward, forward again
_STARTING = 15.0  # seconds to compile a stage's programs


@dataclasses.dataclass(frozen=True)
class Cost:
    """Tokens of a stage's work: read in whole passes, written one by one in batches of `rows`, and trained on."""

    read: int = 0
    written: int = 0
    trained: int = 0
    rows: int = 1

    def __add__(self, other: "Cost") -> "Cost":
        sums = (self.read + other.read, self.written + other.written, self.trained + other.trained)
        return Cost(*sums, rows=max(self.rows, other.rows))

    def __rmul__(self, times: int) -> "Cost":
        return Cost(times * self.read, times * self.written, times * self.trained, self.rows)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What one device does: floating-point operations and bytes read from its memory, each per second."""

    flops: float
    bandwidth: float


def task_cost(config: Any, name: str) -> Cost:
    """The cost of answering the cases of a task of the config once; an answer takes half of its limit on average."""
    task = config.tasks[name]
    needles = len(read_needles(path_of(task.needles)))
    if not task.lengths:
        return Cost(32 * needles, needles * task.max_new_tokens // 2, rows=config.batch_size)
    each = task.per_length or len(task.depths) * needles
    written = each * len(task.lengths) * task.max_new_tokens // 2
    return Cost(each * sum(task.lengths), written, rows=config.batch_size)


def activity_cost(config: Any, model: ModelConfig) -> Cost:
    """The cost of the activity of all heads; a pass begins at the masked head, which is half the layers on average."""
    return Cost(model.n_layers * model.n_heads * config.knockout.activity_windows * config.text.length // 2)


def cases_cost(config: Any, name: str, n: int | None) -> Cost:
    """The cost of n cases of a task, evenly spread; None: of all."""
    whole, task = task_cost(config, name), config.tasks[name]
    cases = (task.per_length or len(task.depths) * len(read_needles(path_of(task.needles)))) * len(task.lengths)
    share = 1.0 if n is None else min(1.0, n / max(cases, 1))
    return dataclasses.replace(whole, read=round(share * whole.read), written=round(share * whole.written))


def suites_cost(config: Any) -> Cost:
    """The cost of RULER and of key-value recall, whose samples have the lengths that the config asks for."""
    ruler, pairs = config.suites.ruler, config.suites.json_kv
    samples = len(ruler.tasks) * ruler.n
    read = samples * sum(ruler.lengths) if samples else 0
    written = sum(TASKS[task].max_new_tokens for task in ruler.tasks) * ruler.n * len(ruler.lengths) // 2
    keyed = Cost(pairs.n * sum(pairs.lengths), pairs.n * len(pairs.lengths) * pairs.max_new_tokens // 2)
    return dataclasses.replace(Cost(read, written) + keyed, rows=config.batch_size)


def seconds(cost: Cost, model: ModelConfig, dtype: str, speed: Speed) -> float:
    """About how long work takes on a device of this speed, compiling included; right within a factor of two or so."""
    _, active = count_parameters(model)
    body = active - model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    per_token = 2 * body / (_SHARE * speed.flops)
    step = max(active * jnp.dtype(dtype).itemsize / speed.bandwidth, cost.rows * per_token)
    return _STARTING + (cost.read + _TRAINING * cost.trained) * per_token + cost.written / cost.rows * step


def in_words(duration: float) -> str:
    """A duration as one says it beforehand.

    >>> in_words(42.0), in_words(200.0), in_words(8000.0)
    ('about 40 s', 'about 3 min', 'about 2.2 h')
    """
    if duration < 60:
        return f"about {max(10, round(duration, -1)):.0f} s"
    return f"about {duration / 60:.0f} min" if duration < 5400 else f"about {duration / 3600:.1f} h"


@functools.cache
def measured_speed(dtype: str) -> Speed:
    """The speed of the first device, measured in a second or less."""
    n = 1024
    square, column = jnp.ones((n, n), dtype), jnp.ones((4 * n, 1), dtype)
    tall = jnp.ones((4 * n, 4 * n), dtype)
    product = jax.jit(lambda a, b: a @ b)
    flops = 2 * n**3 / _shortest(product, square, square)
    return Speed(flops, tall.nbytes / _shortest(product, tall, column))


def _shortest(function, *arguments) -> float:
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times)
