"""One DPO optimiser step against TRL's DPOTrainer, as RetMask ran it and with its reference precomputed; its memory."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from retmask_jax import sharding
from retmask_jax.benchmarks import models
from retmask_jax.benchmarks.chip import forward_flops, product_peak, share_row
from retmask_jax.benchmarks.harness import Bound, Report, Row, Timed, alternate, speed_row
from retmask_jax.benchmarks.peak import measure
from retmask_jax.benchmarks.peers import require
from retmask_jax.benchmarks.programs import dpo_settings, random_pairs
from retmask_jax.benchmarks.trl_peer import TrlPeer
from retmask_jax.lm import load
from retmask_jax.train import Settings, _jitted_logprobs, _place, _update, init_state, make_optimizer, schedule

_EPOCHS = 2  # of RetMask: a reference computed once serves so many steps
_MEMORY_SHAPE = {"vocab_size": 2**17, "n_layers": 2}


def run(size: str, length: int | None, layers: int | None, repeats: int, pairs: int, remat: bool,
        memory_length: int) -> Report:  # fmt: skip
    """Seconds a step, half of each row prompt and half answer. memory_length: tokens of a row there, 0: no memory."""
    require("torch"), require("trl")
    length = length or 1024
    settings = dpo_settings(pairs, models.DTYPES[size], remat)
    with models.checkpoint(size, n_layers=layers) as folder, tempfile.TemporaryDirectory() as work:
        rows = _steps(folder, Path(work), settings, length, repeats, size)
    if memory_length:
        with models.checkpoint(size, **_MEMORY_SHAPE) as folder:
            rows += _memory(folder, memory_length)
    setting = {"size": size, "compute_dtype": settings.compute_dtype, "length": length, "layers": layers, "pairs": pairs,
               "remat": remat, "memory_length": memory_length, "memory_shape": _MEMORY_SHAPE}  # fmt: skip
    return Report("dpo", setting, rows)


class Ours:
    """Our trainer's state, stepped by hand."""

    def __init__(self, folder: Path, pairs: dict[str, np.ndarray], settings: Settings):
        self.mesh = models.mesh()
        lm = load(folder, mesh=self.mesh)
        self._config, self._settings = lm.config, settings
        self._start = jax.tree.map(lambda x: x.astype(settings.compute_dtype), lm.params)
        self._sides = [(pairs["chosen"], pairs["chosen_mask"]), (pairs["rejected"], pairs["rejected_mask"])]
        self._batch = _place(pairs, self.mesh)
        self._state = init_state(lm.params, make_optimizer(settings), self.mesh)
        self.reference = self.reference_pass()

    def reference_pass(self) -> np.ndarray:
        """f32[2, pairs]: log-probabilities of chosen and rejected answers under the start model."""
        with sharding.using(self.mesh):
            return np.stack([
                np.asarray(_jitted_logprobs(self._config, self._start, *_place(side, self.mesh)))
                for side in self._sides
            ])  # fmt: skip

    def step(self) -> float:
        """One update; returns the loss before it."""
        batch = self._batch | {"ref_chosen": self.reference[0], "ref_rejected": self.reference[1]}
        with sharding.using(self.mesh):
            self._state, values = _update(self._config, self._settings, self._state, batch)
        return float(values["loss"])


def _steps(folder: Path, work: Path, settings: Settings, length: int, repeats: int, size: str) -> list[Row]:
    pairs = random_pairs(models.read_shape(folder).vocab_size, length, settings.batch_size)
    ours = Ours(folder, pairs, settings)
    peers = {
        name: TrlPeer(folder, pairs, settings, work / name, precomputed=name == "precomputed")
        for name in ("frozen", "precomputed")
    }
    losses: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    rate = schedule(settings)
    contenders = {"ours": lambda: losses["ours"].append(ours.step())}
    for name, peer in peers.items():
        contenders[name] = lambda name=name, peer=peer: losses[name].append(peer.step(float(rate(len(losses[name])))))
    timed = alternate(contenders | {"reference": ours.reference_pass}, repeats)

    tokens = 2 * settings.batch_size * length
    name = f"{size}, {settings.batch_size} pairs of {length}"
    step, reference = timed["ours"], timed["reference"]
    whole = Timed(step.first, tuple(s + r / _EPOCHS for s, r in zip(step.runs, reference.runs, strict=True)))
    ref_difference = _relative(ours.reference, peers["precomputed"].reference)
    shared = {"work": tokens, "what": "tokens"}
    # Forward and backward, which is twice the forward; what is computed again is not counted.
    flops = 3 * 2 * settings.batch_size * forward_flops(models.read_shape(folder), length, counted=length - length // 2)
    return [
        speed_row(f"{name}; peer: frozen reference in each step", step, timed["frozen"], target=1.5, **shared,
                  bounds=_equality(losses, "frozen", pairs, peers), facts={"losses": losses}),
        speed_row(f"{name}; ours with its reference pass over {_EPOCHS} epochs", whole, timed["frozen"], **shared),
        speed_row(f"{name}; peer: precomputed reference", step, timed["precomputed"], **shared,
                  bounds=[*_equality(losses, "precomputed", pairs, peers),
                          Bound("reference log-probabilities", ref_difference, "<=", 1e-4)]),
        speed_row(f"{name}; our reference pass alone", reference, None, **shared),
        share_row(f"{name}; peer: the machine's matrix-product peak", "FLOP", flops / step.median,
                  product_peak(ours.mesh, np.dtype(settings.compute_dtype)), 0.4),
    ]  # fmt: skip


def _equality(losses, name: str, pairs, peers) -> list[Bound]:
    """The first loss is log 2 whatever the model; those of the later, updated models say more."""
    theirs = np.concatenate([pairs["chosen"], pairs["rejected"]])
    return [
        Bound("rows that differ", int((peers[name].tokens != theirs).any(axis=1).sum()), "==", 0),
        Bound("loss at step 1", _relative(losses["ours"][:1], losses[name][:1]), "<=", 1e-4),
        Bound("loss at later steps", _relative(losses["ours"][1:], losses[name][1:]), "<=", 1e-3),
    ]


def _memory(folder: Path, length: int) -> list[Row]:
    ours, peer = (measure(side, folder=str(folder), length=length, pairs=1) for side in ("ours", "trl"))
    config = models.read_shape(folder)
    shape = f"hidden {config.hidden_size}, {config.n_layers} layers, vocabulary {config.vocab_size}"
    what = {"whole": "peak of training, parameters included", "step": "peak of a step, beyond parameters and moments"}
    rows = []
    for name, text in what.items():
        ratio = ours[name] / peer[name]
        rows.append(Row(f"{text}; 1 pair of {length}, {shape}", "bytes", ours[name], peer[name], ratio,
                        Bound("ratio", ratio, "<=", 0.5)))  # fmt: skip
    return rows


def _relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float((np.abs(ours - theirs) / np.abs(theirs)).max())
