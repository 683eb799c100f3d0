"""One DPO step against TRL's DPOTrainer, as RetMask ran it and with its reference precomputed: time and memory."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from retmask_jax.benchmarks import models
from retmask_jax.benchmarks.chip import product_peak, share_row
from retmask_jax.benchmarks.harness import Bound, Report, Row, Timed, alternate, speed_row
from retmask_jax.benchmarks.memory import measure
from retmask_jax.benchmarks.peers import TrlPeer, require, token_rows
from retmask_jax.benchmarks.programs import OurTrainer, dpo_settings, random_pairs
from retmask_jax.model.flops import training_flops
from retmask_jax.training.optimizer import schedule
from retmask_jax.training.settings import Settings

_EPOCHS = 2  # of RetMask's training: every pair is seen so often, and its reference is computed once
_MEMORY_SHAPE = {"vocab_size": 2**17, "n_layers": 2}


def run(
    size: str,
    length: int | None,
    layers: int | None,
    repeats: int,
    pairs: int,
    remat: bool,
    memory_length: int,
    lora_rank: int,
    model: str | None = None,
) -> Report:
    """Seconds of a step on pairs whose texts are half prompt and half answer.

    Rates are tokens of prompts, each counted once, and of their answers: what our side computes. The peer's rows hold a
    prompt twice.

    Args:
        length: tokens of a prompt with one answer; None for 1024.
        memory_length: the same when memory is measured; 0 measures no memory.
        lora_rank: rank of the adapters that are trained, without a peer; 0 trains all weights.
    """
    if not lora_rank:
        require("torch"), require("trl")
    length = length or 1024
    with models.subject(size, model, n_layers=layers) as subject, tempfile.TemporaryDirectory() as work:
        memory: list[Row] = []  # measured first, in processes that need the memory which both sides take below
        if memory_length and not lora_rank:
            with contextlib.nullcontext(subject) if model else models.subject(size, **_MEMORY_SHAPE) as wide:
                memory = _memory(wide.folder, memory_length)
        settings = dpo_settings(pairs, subject.dtype, remat, lora_rank)
        if lora_rank:
            rows = _adapters(subject, settings, length, repeats)
        else:
            rows = _steps(subject, Path(work), settings, length, repeats)
    rows += memory
    setting = {
        "size": subject.name,
        "compute_dtype": settings.compute_dtype,
        "length": length,
        "layers": layers,
        "pairs": pairs,
    }
    setting |= {
        "remat": remat,
        "lora_rank": lora_rank,
        "memory_length": memory_length,
        "memory_shape": None if model else _MEMORY_SHAPE,
    }
    return Report("dpo", setting, rows)


def _steps(subject: models.Subject, work: Path, settings: Settings, length: int, repeats: int) -> list[Row]:
    folder = subject.folder
    pairs = random_pairs(models.read_shape(folder).vocab_size, length, settings.batch_size)
    ours = OurTrainer(folder, pairs, settings)
    peers = {
        name: TrlPeer(folder, pairs, settings, work / name, precomputed=name == "precomputed")
        for name in ("frozen", "precomputed")
    }
    losses: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    rate = schedule(settings)
    contenders = {"ours": lambda: losses["ours"].append(ours.step()["loss"])}
    for name, peer in peers.items():
        contenders[name] = lambda name=name, peer=peer: losses[name].append(_stepped(peer, rate, losses[name]))
    # The first update has a learning rate of 0: only from the third step on losses tell whether updates are equal.
    timed = alternate(contenders | {"reference": ours.reference_pass}, max(repeats, 2))

    name = f"{subject.name}, {settings.batch_size} pairs of {length}"
    step, reference = timed["ours"], timed["reference"]
    whole = Timed(step.first, tuple(s + r / _EPOCHS for s, r in zip(step.runs, reference.runs, strict=True)))
    ref_difference = _relative(ours.reference, peers["precomputed"].reference)
    shared: dict[str, Any] = {"work": _tokens(settings, length), "what": "tokens"}
    frozen = {"target": 1.5, "bounds": _equality(losses, "frozen", pairs, peers), "facts": {"losses": losses}}
    precomputed = _equality(losses, "precomputed", pairs, peers)
    precomputed.append(Bound("reference log-probabilities", ref_difference, "<=", 1e-4))
    return [
        speed_row(f"{name}; peer: frozen reference in each step", step, timed["frozen"], **shared, **frozen),
        speed_row(f"{name}; ours with its reference pass over {_EPOCHS} epochs", whole, timed["frozen"], **shared),
        speed_row(f"{name}; peer: precomputed reference", step, timed["precomputed"], **shared, bounds=precomputed),
        speed_row(f"{name}; our reference pass alone", reference, None, **shared),
        _share(name, folder, settings, length, step, ours.mesh),
    ]


def _adapters(subject: models.Subject, settings: Settings, length: int, repeats: int) -> list[Row]:
    folder = subject.folder
    pairs = random_pairs(models.read_shape(folder).vocab_size, length, settings.batch_size)
    ours = OurTrainer(folder, pairs, settings)
    timed = alternate({"ours": ours.step, "reference": ours.reference_pass}, repeats)
    name = f"{subject.name}, {settings.batch_size} pairs of {length}, adapters of rank {settings.lora_rank}"
    shared = {"work": _tokens(settings, length), "what": "tokens"}
    return [
        speed_row(name, timed["ours"], None, **shared),
        speed_row(f"{name}; reference pass alone", timed["reference"], None, **shared),
        _share(name, folder, settings, length, timed["ours"], ours.mesh),
    ]


def _tokens(settings: Settings, length: int) -> int:
    return settings.batch_size * (length + length - length // 2)


def _share(name: str, folder: Path, settings: Settings, length: int, step: Timed, mesh: Mesh) -> Row:
    """The operations that a step needs where a prompt is computed once, a second, against what the machine can do."""
    config = dataclasses.replace(models.read_shape(folder), lora=settings.lora)
    flops = settings.batch_size * training_flops(config, length // 2, (length - length // 2,) * 2)
    peak = product_peak(mesh, jax.numpy.dtype(settings.compute_dtype))
    return share_row(f"{name}; peer: the machine's matrix-product peak", "FLOP", flops / step.median, peak, 0.4)


def _stepped(peer: TrlPeer, rate: Callable[[int], Any], losses: list[float]) -> float:
    return peer.step(float(rate(len(losses))))["loss"]


def _equality(
    losses: Mapping[str, list[float]], name: str, pairs: Mapping[str, np.ndarray], peers: Mapping[str, TrlPeer]
) -> list[Bound]:
    """The first loss is log 2 for any model; the losses of later steps, with updated weights, say more.

    A large model learns a few random pairs in a step or two, and what is then left of the loss falls exponentially with the
    margin. So differences of later losses are told as shares of the first.
    """
    ours, peer = (np.asarray(losses[side], np.float64) for side in ("ours", name))
    theirs = token_rows(pairs)
    return [
        Bound("rows that differ", int((peers[name].tokens != theirs).any(axis=1).sum()), "==", 0),
        Bound("loss at step 1", _relative(ours[:1], peer[:1]), "<=", 1e-4),
        Bound("loss at later steps", float(np.abs(ours[1:] - peer[1:]).max() / peer[0]), "<=", 1e-3),
    ]


def _memory(folder: Path, length: int) -> list[Row]:
    ours, peer = (measure(side, folder=str(folder), length=length, pairs=1) for side in ("ours", "trl"))
    config = models.read_shape(folder)
    shape = f"hidden {config.hidden_size}, {config.n_layers} layers, vocabulary {config.vocab_size}"
    what = {"whole": "peak of training, parameters included", "step": "peak of a step, beyond parameters and moments"}
    rows = []
    for name, text in what.items():
        ratio = ours[name] / peer[name]
        text, target = f"{text}; 1 pair of {length}, {shape}", Bound("ratio", ratio, "<=", 0.5)
        rows.append(Row(text, "bytes", ours[name], peer[name], ratio, target))
    return rows


def _relative(ours: ArrayLike, theirs: ArrayLike) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float((np.abs(ours - theirs) / np.abs(theirs)).max())
