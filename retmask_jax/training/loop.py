"""The training loop: checkpoints, exact resume, and the numbers that are reported on the way."""

import contextlib
import dataclasses
import functools
import itertools
import signal
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, PyTree

from retmask_jax.data.pair_rows import PairRows, Part, batches, one_of_each, parts, widths
from retmask_jax.model import lora, sharding
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.flops import peak_flops, training_flops
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.training.checkpoints import Checkpoints
from retmask_jax.training.metrics import Metrics, memory_in_use
from retmask_jax.training.optimizer import trained_parts
from retmask_jax.training.reference import reference_logprobs
from retmask_jax.training.settings import Settings
from retmask_jax.training.step import Programs, State, make_programs
from retmask_jax.utils import compiled
from retmask_jax.utils.files import read_json, write_json
from retmask_jax.utils.hosts import several, wait_for_all
from retmask_jax.utils.progress import track

_FINITE = ("loss", "gradient_norm", "parameter_norm")
_NAMED = 8  # how many pairs a message names


class Stopped(InterruptedError):
    """A run was told to stop by SIGTERM and has written a checkpoint; the same call resumes from it."""


def train(
    config: ModelConfig,
    load_params: Callable[[], PyTree],
    rows: PairRows,
    settings: Settings,
    folder: Path,
    mesh: Mesh,
    *,
    identity: Mapping[str, Any],
    what: str = "train",
    ablated: Interventions | None = None,
    reference: Path | None = None,
) -> PyTree:
    """Trains on preference rows from load_params() on, and resumes from the newest checkpoint in `folder`.

    The outcome equals an uninterrupted run. Into `folder` go reference/ (unless it is elsewhere), metrics.jsonl,
    tensorboard/ and checkpoints/, or a note of where the checkpoints are if settings.checkpoint_folder names another place.

    Args:
        load_params: Gives the start model's parameters in settings.start_dtype; called once at most. Only the trained
            parameters are held while training.
        folder: Where the run keeps its files.
        identity: What the run is made from, {name: JSON value}: the start model, the data and how they were made into
            rows.
        what: Name of the run in its progress bar, messages and metrics.
        ablated: The interventions of the objective "contrast".
        reference: The store of the start model's log-probabilities, which runs of the same identity may share; None: in
            `folder`.

    Returns:
        The final parameters: all of them in float32, or adapters next to the frozen model, which are parameters of a
        config with settings.lora; `language_model.save` merges them into the weights as stored.

    Raises:
        ValueError: Settings, rows or mesh do not fit, files in `folder` have another identity, or a loss is not finite;
            the message then names the step and the pairs.
        Stopped: After SIGTERM.
    """
    check_mesh(settings, mesh)
    sizes_NS = rows.sizes if settings.objective == "dpo" else rows.lengths[:, None]
    allowed = widths(sizes_NS, 1 if config.depends_on_length else settings.widths, config.max_length)
    loader = batches(len(rows), settings.batch_size, settings.seed)
    start = functools.cache(load_params)
    reference_ND = None
    if settings.has_reference:
        reference_ND = reference_logprobs(
            config,
            start,
            rows,
            reference or folder / "reference",
            mesh,
            batch_size=settings.reference_batch_size,
            compute_dtype=settings.compute_dtype,
            allowed_widths=allowed,
            identity=identity,
        )
    # One set of programs for all seeds and heads: a seed orders the data, and heads are an argument of an update.
    programs = make_programs(config, dataclasses.replace(settings, seed=0, heads=None), mesh)
    programs = programs.within(trained_parts(config, settings))
    masks = None if ablated is None else normalise(config, ablated)
    run = _Run(config, settings, rows, sizes_NS, reference_ND, mesh, programs, allowed, masks)
    place = _checkpoint_folder(folder, settings.checkpoint_folder)
    with sharding.using(mesh), Checkpoints(place, settings.keep, identity) as checkpoints:
        resumed = checkpoints.latest is not None
        frozen = {} if settings.lora is None else programs.freeze(start())
        if resumed:
            state, loader_state = checkpoints.restore(programs.state)
            loader.set_state(loader_state)
        else:
            state = programs.begin(start(), settings.seed)
        start.cache_clear()
        state = _loop(run, state, frozen, loader, checkpoints, folder, what)
        return lora.join(state.params, frozen)


def check_mesh(settings: Settings, mesh: Mesh) -> None:
    """Raises ValueError where a part of a batch cannot be split over the mesh."""
    shards = sharding.row_shards(mesh)
    if settings.microbatch_size % shards:
        raise ValueError(
            f"train.microbatch_size {settings.microbatch_size} does not divide over {shards} devices (mesh.data "
            f"{mesh.shape['data']} x mesh.fsdp {mesh.shape['fsdp']}): make it a multiple, or the mesh smaller"
        )


def _checkpoint_folder(folder: Path, elsewhere: str) -> str | Path:
    """Where the run in `folder` keeps its checkpoints: in `folder`, or in a new folder elsewhere, which is noted in
    `folder`."""
    if not elsewhere:
        return folder / "checkpoints"
    note = folder / "checkpoints.json"
    if not note.exists():
        write_json(note, {"folder": f"{elsewhere.rstrip('/')}/{folder.name}-{uuid.uuid4().hex[:8]}"})
    wait_for_all("where checkpoints go is noted")
    return read_json(note)["folder"]


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same over the steps; `sizes_NS` and `allowed` are the arguments and the result of `widths`."""

    config: ModelConfig
    settings: Settings
    rows: PairRows
    sizes_NS: np.ndarray
    reference_ND: Float32[np.ndarray, "N 2"] | None
    mesh: Mesh
    programs: Programs
    allowed: tuple[list[int], ...]
    ablated: Masks | None


def _loop(run: _Run, state: State, frozen, loader, checkpoints: Checkpoints, folder: Path, what: str) -> State:
    settings, first = run.settings, int(state.step)
    losses = []
    with (
        Metrics(folder, first, settings.wandb, what) as metrics,
        _stop_signal() as stop_requested,
        _profile(folder, settings.profile) as profile,
        track(None, settings.steps, what, "step", first) as bar,
    ):
        ahead = _compile_ahead(run, frozen)
        for step in range(first, settings.steps):
            profile(step)
            begun, pairs = time.monotonic(), next(loader)
            state, values = _update(run, state, frozen, pairs, ahead)
            _check_finite(values, step, [run.rows.ids[pair] for pair in pairs], what)
            values |= _speed(run, pairs, time.monotonic() - begun)
            metrics.add({"step": step + 1, **values})
            losses.append(values["loss"])
            bar.set_postfix_str(_shown(values), refresh=False)
            bar.update()
            stopping = stop_requested(step)
            if stopping or (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                checkpoints.save(step + 1, state, loader.get_state(), statistics.fmean(losses))
                losses = []
            if stopping and step + 1 < settings.steps:
                raise Stopped(f"{what} was told to stop; a checkpoint of step {step + 1} is written")
    return state


def _compile_ahead(run: _Run, frozen) -> compiled.Ahead:
    """The programs of a part of a batch, for all widths of single pairs; keys are (widths, whether sums are added to)."""
    programs, size = run.programs, run.settings.microbatch_size

    def compile_for(part: Part, adds: bool) -> None:
        rows = functools.partial(_rows, run, Part(np.repeat(part.pairs, size), part.widths), 1.0)
        with sharding.using(run.mesh):
            given = sharding.place_rows(run.mesh, size, rows), run.ablated
            if adds:
                programs.accumulate.lower(programs.state.params, frozen, programs.sums, *given).compile()
            else:
                programs.gradients.lower(programs.state.params, frozen, *given).compile()

    kinds = (False, True) if run.settings.batch_size > size else (False,)
    each = itertools.product(one_of_each(run.sizes_NS, run.allowed), kinds)
    return compiled.Ahead({(part.widths, adds): functools.partial(compile_for, part, adds) for part, adds in each})


def _update(
    run: _Run, state: State, frozen, pairs: np.ndarray, ahead: compiled.Ahead
) -> tuple[State, dict[str, float]]:
    """One optimiser step: gradients added up over the parts of a batch, then AdamW."""
    sums, weight = None, _weight(run, pairs)
    for part in parts(run.sizes_NS, pairs, run.settings.microbatch_size, run.allowed):
        batch = sharding.place_rows(run.mesh, len(part.pairs), functools.partial(_rows, run, part, weight))
        ahead.wait((part.widths, sums is not None))
        if sums is None:
            sums = run.programs.gradients(state.params, frozen, batch, run.ablated)
        else:
            sums = run.programs.accumulate(state.params, frozen, sums, batch, run.ablated)
    state, values = run.programs.apply(state, sums)
    return state, {name: float(value) for name, value in values.items()}


def _weight(run: _Run, pairs: np.ndarray) -> float:
    """Weight of a pair in the batch's loss. In DPO all pairs weigh the same; other losses are sums over the answers'
    tokens, all of which weigh the same."""
    if run.settings.objective == "dpo":
        return 1 / len(pairs)
    _, chosen, rejected, _ = run.rows.bounds[pairs].T
    return 1 / float((rejected - chosen).sum())


def _rows(run: _Run, part: Part, weight: float, at: slice) -> dict[str, np.ndarray]:
    """Some rows of a part of a batch, as `part_loss` takes them."""
    pairs = part.pairs[at]
    padded = run.rows.forked if run.settings.objective == "dpo" else run.rows.chosen
    batch = padded(pairs, part.widths, run.config.pad_id)
    batch["weight"] = np.full(len(pairs), weight, np.float32)
    if run.reference_ND is not None:
        batch["reference"] = run.reference_ND[pairs]
    return batch


def _check_finite(values: dict[str, float], step: int, ids: list[str], what: str) -> None:
    broken = next((name for name in _FINITE if not np.isfinite(values[name])), None)
    if broken is None:
        return
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    raise ValueError(
        f"{what}: the {broken.replace('_', ' ')} is {values[broken]} at step {step}, whose batch is pairs "
        f"{', '.join(map(str, ids[:_NAMED]))}{more}: lower train.learning_rate, or look at these pairs"
    )


def _speed(run: _Run, pairs: np.ndarray, seconds: float) -> dict[str, float]:
    """Tokens per second without padding, the share of the devices' peak where that is known, and the memory in use.

    Of a pair, the prompt counts once, since it is computed once.
    """
    sizes_NP = np.diff(run.rows.bounds[pairs], axis=1)[:, : 3 if run.settings.objective == "dpo" else 2]
    values = {"tokens_per_second": float(sizes_NP.sum() / seconds)}
    peak, held = peak_flops(), memory_in_use()
    if peak is not None:
        config = dataclasses.replace(run.config, lora=run.settings.lora)
        needed = sum(training_flops(config, prompt, answers) for prompt, *answers in sizes_NP.tolist())
        values["flops_utilisation"] = needed / seconds / peak
    return values if held is None else values | {"memory_gib": held}


def _shown(values: dict[str, float]) -> str:
    """The numbers of the progress line."""
    shown = [f"loss {values['loss']:.3f}", f"{values['tokens_per_second']:,.0f} tokens/s"]
    if "flops_utilisation" in values:
        shown.append(f"{values['flops_utilisation']:.0%} of peak")
    if "memory_gib" in values:
        shown.append(f"{values['memory_gib']:.1f} GiB")
    return ", ".join(shown)


@contextlib.contextmanager
def _stop_signal():
    """Gives a function that says after a step whether SIGTERM has come; within this context the signal does not kill.

    Hosts of one program agree on the step through JAX's service for preemption.
    """
    if several():
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    signalled = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # the only one that may catch signals
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signalled.set())
    try:
        yield lambda step: signalled.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _profile(folder: Path, steps: tuple[int, ...]):
    """Gives a function to call before each step, which writes a profile of the steps steps[0], ..., steps[1] - 1."""
    running = False

    def before(step: int) -> None:
        nonlocal running
        if steps and step == steps[0]:
            jax.profiler.start_trace(str(folder / "profile"))
            running = True
        elif running and step >= steps[1]:
            jax.profiler.stop_trace()
            running = False

    try:
        yield before
    finally:
        if running:
            jax.profiler.stop_trace()
