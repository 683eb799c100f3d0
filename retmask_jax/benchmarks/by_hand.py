"""Our trainer, one update at a time on one batch."""

from pathlib import Path

import jax
import numpy as np

from retmask_jax.benchmarks import models
from retmask_jax.generation.language_model import load
from retmask_jax.model import sharding
from retmask_jax.training.reference import batch_logprobs
from retmask_jax.training.settings import Settings
from retmask_jax.training.step import make_programs


class Ours:
    """Our trainer's programs, stepped by hand. reference: f32[2, pairs], log-probabilities of both sides; None: those
    of the checkpoint."""

    def __init__(self, folder: Path, pairs: dict[str, np.ndarray], settings: Settings, mesh=None, reference=None):
        self.mesh = models.mesh() if mesh is None else mesh
        # What is frozen is not needed in more than the dtype it is computed in.
        lm = load(folder, settings.start_dtype, self.mesh)
        self._config = lm.config
        self._programs = make_programs(lm.config, settings, self.mesh)
        n = settings.batch_size
        self._batch = sharding.place_rows(self.mesh, n, lambda at: {name: x[at] for name, x in pairs.items()})
        self._batch["weight"] = np.full(n, 1 / n, np.float32)
        with sharding.using(self.mesh):
            self._state = self._programs.begin(lm.params, 0)
            self._frozen = self._programs.freeze(lm.params)
        if reference is None:
            self._start = jax.tree.map(lambda x: x.astype(settings.compute_dtype), lm.params)
            reference = self.reference_pass()
        self.reference = reference

    def reference_pass(self) -> np.ndarray:
        """f32[2, pairs]: log-probabilities of chosen and rejected answers under the start model."""
        with sharding.using(self.mesh):
            return np.stack(batch_logprobs(self._config, self._start, self._batch))

    def step(self) -> dict[str, float]:
        """One update; returns its metrics, the loss before it among them."""
        batch = self._batch | {"ref_chosen": self.reference[0], "ref_rejected": self.reference[1]}
        with sharding.using(self.mesh):
            sums = self._programs.gradients(self._state.params, self._frozen, batch, None)
            self._state, values = self._programs.apply(self._state, sums)
        return {name: float(value) for name, value in values.items()}
