"""A sweep of masks, logits after the last token of every prompt under every mask, against hooks on transformers."""

import contextlib
from collections.abc import Generator, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from retmask_jax.benchmarks import models
from retmask_jax.benchmarks.harness import Bound, Report, alternate, speed_row
from retmask_jax.benchmarks.peers import hooked_sweep, load_peer, require
from retmask_jax.generation.language_model import load
from retmask_jax.generation.sweep import sweep
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions, mask_heads

_HEADS = 4  # masked heads of one layer
_TARGETS = {"bundled": 25, "30m": 1.2, "8b": None}
_COMPILED = "/jax/core/compile/backend_compile_duration"


def run(
    size: str, length: int | None, layers: int | None, repeats: int, masks: int | None, prompts: int | None
) -> Report:
    """Seconds of a sweep; the peer runs the prompts of a mask as one batch and, as published scripts do, one by one."""
    require("torch")
    bundled = size == "bundled"
    length = length or (128 if bundled else 512)
    masks, prompts = masks or (64 if bundled else 16), prompts or (32 if bundled else 8)
    with models.checkpoint(size, n_layers=layers) as folder:
        lm = load(folder, models.DTYPES[size], models.mesh())
        peer = load_peer(folder, models.DTYPES[size])
        tokens_MT = models.text_or_random(folder, prompts, length)
    heads = spread_masks(lm.config, masks)
    interventions = [as_interventions(lm.config, by_layer) for by_layer in heads]
    lengths_M = np.full(prompts, length, np.int32)
    compiles: list[str] = []

    def ours():
        with counted_compiles(compiles):
            return np.asarray(sweep(lm, tokens_MT, lengths_M, interventions))

    timed = alternate(
        {
            "ours": ours,
            "batched": lambda: hooked_sweep(peer, tokens_MT, heads),
            "one by one": lambda: hooked_sweep(peer, tokens_MT, heads, one_by_one=True),
        },
        repeats,
    )
    programs = sum("_sweep" in name for name in compiles)
    rows = []
    for kind, target in (("batched", _TARGETS[size]), ("one by one", None)):
        error = relative_difference(timed["ours"].result, timed[kind].result)
        bounds = [
            Bound("logit difference", error, "<=", models.logit_tolerance(size)),
            Bound("compiles of the sweep", programs, "==", 1),
        ]
        name = f"{size}, {masks} masks x {prompts} prompts of {length}; peer {kind}"
        shared = {"work": masks * prompts, "what": "prompts"}
        rows.append(speed_row(name, timed["ours"], timed[kind], **shared, target=target, bounds=bounds))
    more = {"masks": masks, "prompts": prompts, "heads of a mask": min(_HEADS, lm.config.n_heads)}
    return Report("masks", models.setting(size, length, lm.config) | more, rows)


def spread_masks(config: ModelConfig, n: int) -> list[dict[int, list[int]]]:
    """Returns n masks {layer: heads}, each of a few heads of one layer; the layers are spread evenly."""
    rng = np.random.default_rng(0)
    size = min(_HEADS, config.n_heads)
    return [
        {i * config.n_layers // n: sorted(rng.choice(config.n_heads, size, replace=False).tolist())} for i in range(n)
    ]


def as_interventions(config: ModelConfig, heads_by_layer: Mapping[int, Sequence[int]]) -> Interventions:
    """Turn {layer: heads} into a mask."""
    return mask_heads(config, [(layer, head) for layer, heads in heads_by_layer.items() for head in heads])


def relative_difference(ours: Float[np.ndarray, "..."], theirs: Float[np.ndarray, "..."]) -> float:
    """The largest absolute difference as a share of the largest absolute value of `theirs`."""
    return float(np.abs(np.float64(ours) - theirs).max() / np.abs(theirs).max())


@contextlib.contextmanager
def counted_compiles(events: list[str]) -> Generator[None]:
    """Append the name of every function that is compiled within the `with` block to `events`."""

    def record(name: str, *_, fun_name: str = "?", **__):
        if name == _COMPILED:
            events.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
