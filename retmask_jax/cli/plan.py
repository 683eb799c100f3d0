"""About how long stages take: said as one begins, and of several as a table beforehand."""

import sys
from collections.abc import Sequence

from retmask_jax.model.config import ModelConfig
from retmask_jax.pipeline.registry import up_to_date
from retmask_jax.reports import html
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, in_words, measured_speed, seconds
from retmask_jax.runs.stage import Stage, Table
from retmask_jax.utils.hosts import primary

_WORTH_SAYING = 20.0  # seconds


def planned(context: Context, stages: Sequence[Stage]) -> tuple[Table, str]:
    """(a row per stage, what is left to do in a sentence); a stage whose result is up to date counts as done."""
    rows, left = [], 0.0
    for stage in stages:
        cost = stage.cost(context)
        duration = 0.0 if cost == Cost() else _duration(context, cost)
        finished = up_to_date(context, stage) is not None
        left += 0.0 if finished else duration
        tokens = [f"{count / 1e3:,.0f}K" if count else "" for count in (cost.read, cost.written, cost.trained)]
        rows.append((stage.name, *tokens, in_words(duration) if duration else "seconds", "done" if finished else ""))
    devices, flops = html.count(context.mesh.size, "device"), measured_speed(context.config.dtype).flops
    sentence = f"left to do: {in_words(left)} on {devices} of {flops / 1e9:,.0f} GFLOP/s, as measured now"
    return Table(("stage", "tokens read", "written", "trained on", "takes", ""), rows), sentence


def say_how_long(context: Context, stage: Stage) -> None:
    """Say about how long a stage that begins will take, where progress is shown, unless it takes seconds only.

    Of several hosts the first one says it, so nothing is done here in which all must take part.
    """
    if not primary() or (cost := stage.cost(context)) == Cost():
        return
    _say(stage.name, _duration(context, cost))


def say_how_long_diff(dtype: str, model: ModelConfig, tokens: int) -> None:
    """The same for `retmask diff`, which reads so many tokens."""
    if primary():
        _say("diff", seconds(Cost(read=tokens), model, dtype, measured_speed(dtype)))


def _say(name: str, duration: float) -> None:
    if duration >= _WORTH_SAYING:
        print(f"{name:<9} {in_words(duration)}", file=sys.stderr, flush=True)


def _duration(context: Context, cost: Cost) -> float:
    """Seconds that work takes on all devices of the mesh."""
    dtype = context.config.dtype
    return seconds(cost, context.outline.config, dtype, measured_speed(dtype)) / context.mesh.size
