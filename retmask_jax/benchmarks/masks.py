"""A sweep of masks, logits after the last token of every prompt under every mask, against hooks on transformers and, for a
model that is named, against TransformerLens and nnsight."""

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from retmask_jax.benchmarks import models
from retmask_jax.benchmarks.harness import Bound, Report, alternate, speed_row
from retmask_jax.benchmarks.mask_peers import hooked_sweep, nnsight_sweep, transformer_lens_sweep
from retmask_jax.benchmarks.peers import load_peer, require
from retmask_jax.generation.language_model import load
from retmask_jax.generation.sweep import sweep
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions, mask_heads

_HEADS = 4  # masked heads of one layer
_TARGETS = {"bundled": 25, "30m": 1.2, "8b": None, models.OWN: 2}
_HOOKS, _LENS, _NNSIGHT = "transformers with hooks, batched", "TransformerLens", "nnsight"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def run(
    size: str,
    length: int | None,
    layers: int | None,
    repeats: int,
    masks: int | None,
    prompts: int | None,
    model: str | None = None,
) -> Report:
    """Seconds of a sweep; peers run the prompts of a mask as one batch, and hooks also one by one, as published scripts do."""
    require("torch")
    if model:
        require("transformer_lens"), require("nnsight")
    bundled = size == "bundled" and not model
    length = length or (128 if bundled else 512)
    masks, prompts = masks or (64 if bundled else 16), prompts or (32 if bundled else 8)
    with models.subject(size, model, n_layers=layers) as subject:
        lm = load(subject.folder, subject.dtype, models.mesh())
        peers = _peers(subject)
        tokens_MT = models.text_or_random(subject, prompts, length)
    heads = spread_masks(lm.config, masks)
    interventions = [as_interventions(lm.config, by_layer) for by_layer in heads]
    lengths_M = np.full(prompts, length, np.int32)
    compiles: list[str] = []

    def ours():
        with counted_compiles(compiles):
            return np.asarray(sweep(lm, tokens_MT, lengths_M, interventions))

    contenders = {"ours": ours} | {name: functools.partial(run, tokens_MT, heads) for name, run in peers.items()}
    timed = alternate(contenders, repeats)
    programs = sum("_sweep" in name for name in compiles)
    rows = []
    for name in peers:
        error = relative_difference(timed["ours"].result, timed[name].result)
        bounds = [
            Bound("logit difference", error, "<=", subject.tolerance),
            Bound("compiles of the sweep", programs, "==", 1),
        ]
        target = _TARGETS[subject.size] if name == (_LENS if model else _HOOKS) else None
        shared = {"work": masks * prompts, "what": "prompts", "target": target, "bounds": bounds}
        row = f"{subject.name}, {masks} masks x {prompts} prompts of {length}; peer: {name}"
        rows.append(speed_row(row, timed["ours"], timed[name], **shared))
    more = {"masks": masks, "prompts": prompts, "heads of a mask": min(_HEADS, lm.config.n_heads)}
    return Report("masks", subject.setting(length, lm.config) | more, rows)


def _peers(subject: models.Subject) -> dict[str, Callable[..., Any]]:
    """{name: run(tokens, masks)}; what a user of interpretability tools would take, only for a model that they load."""
    peer = load_peer(subject.folder, subject.dtype)
    hooks = {
        _HOOKS: functools.partial(hooked_sweep, peer),
        "transformers with hooks, one by one": functools.partial(hooked_sweep, peer, one_by_one=True),
    }
    if subject.size != models.OWN:
        return hooks
    tools = {_LENS: transformer_lens_sweep, _NNSIGHT: nnsight_sweep}
    return hooks | {name: make(subject.folder, subject.dtype) for name, make in tools.items()}


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
