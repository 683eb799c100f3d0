"""Our side of the comparisons of memory and training: prefill, detection and the DPO step as compiled programs, and our
trainer stepped one update at a time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from retmask_jax.benchmarks import models
from retmask_jax.data.pair_rows import PairRows
from retmask_jax.generation.drafts import Drafted, Ends, answer_batch
from retmask_jax.generation.language_model import load
from retmask_jax.heads.reading import own_choices, read_batch
from retmask_jax.model import sharding
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.masking import normalise
from retmask_jax.model.transformer import forward
from retmask_jax.training.reference import batch_logprobs
from retmask_jax.training.settings import Settings
from retmask_jax.training.step import make_programs

_PROBED = 8  # tokens of an answer


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with its static arguments.

    arguments() makes the other arguments; it can be traced by `jax.eval_shape`, so that compiling makes no array.
    options: arguments by name.
    """

    jitted: Any
    static: Sequence[Any]
    arguments: Callable[[], Sequence[Any]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def compile(self) -> jax.stages.Compiled:
        """Compile the function from the shapes of its arguments."""
        return self.jitted.lower(*self.static, *jax.eval_shape(self.arguments), **self.options).compile()

    def temporary_bytes(self) -> int:
        """Bytes of temporary memory that the function needs, as the compiler reports them."""
        report: Any = self.compile().memory_analysis()
        return report.temp_size_in_bytes


def prefill(config: ModelConfig, length: int) -> Program:
    """Logits after the last of `length` tokens."""

    def run(config, params, tokens, positions):
        return forward(config, params, tokens, positions=positions)

    return Program(
        jax.jit(run, static_argnums=0),
        (config,),
        lambda: (_params(config), jnp.ones((1, length), jnp.int32), jnp.full((1, 1), length - 1)),
    )


def reading(config: ModelConfig, length: int) -> Program:
    """Detection in one case of `length` tokens, in one pass over the prompt and the answer after it."""

    def arguments():
        rows, target = length - _PROBED + jnp.arange(_PROBED)[None], jnp.ones((1, _PROBED), jnp.int32)
        start, end = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)
        tokens, masks = jnp.ones((1, length), jnp.int32), normalise(config)
        return _params(config), None, tokens, start, end, rows, target, None, masks, jnp.int32(length)

    return Program(read_batch, (config, own_choices, False), arguments)


def decoding(config: ModelConfig, length: int) -> Program:
    """Detection in one case of `length` tokens, an answer of which is foreseen in part, and the rest decoded."""

    def arguments():
        start, end, tokens = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32), jnp.ones((1, length), jnp.int32)
        words, draft = np.zeros(config.vocab_size, bool), jnp.ones((1, _PROBED // 2), jnp.int32)
        drafted = Drafted(tokens, start, end, end - _PROBED // 2, draft, end * 0 + _PROBED // 2)
        ends, longest = Ends.of(config, words, words), jnp.int32(length + _PROBED)
        return _params(config), None, drafted, ends, normalise(config), longest

    return Program(answer_batch, (config,), arguments, {"max_new_tokens": _PROBED})


def dpo_step(config: ModelConfig, length: int, pairs: int = 1) -> Program:
    """The gradients of pairs of up to `length` tokens; the backward pass recomputes each block."""
    programs = make_programs(config, dpo_settings(pairs, "float32"), models.mesh(1))

    def arguments():
        shared = {"weight": jnp.full(pairs, 1 / pairs), "reference": jnp.zeros((pairs, 2))}
        batch = random_pairs(config.vocab_size, length, pairs) | shared
        return _params(config), {}, batch, None

    return Program(programs.gradients, (), arguments)


PROGRAMS: dict[str, Callable[[ModelConfig, int], Program]] = {
    "prefill": prefill,
    "detect by reading": reading,
    "detect by decoding": decoding,
    "dpo": dpo_step,
}


def dpo_settings(pairs: int, compute_dtype: str, remat: bool = True, lora_rank: int = 0) -> Settings:
    """The settings of RetMask's optimiser (arXiv 2601.11020), with a learning rate that shows after a step or two."""
    return Settings(
        objective="dpo",
        learning_rate=1e-5,
        final_learning_rate=1e-6,
        warmup=0.1,
        steps=20,
        batch_size=pairs,
        microbatch_size=pairs,
        compute_dtype=compute_dtype,
        remat=remat,
        lora_rank=lora_rank,
        seed=0,
    )


def random_pairs(vocab_size: int, length: int, pairs: int) -> dict[str, np.ndarray]:
    """Random tokens as `train` takes them: half prompt, half answer, and every answer ends with token 2."""
    prompt, answer = length // 2, length - length // 2
    ends = np.cumsum([0, prompt, answer, answer])
    tokens = np.random.default_rng(5).integers(16, vocab_size, (pairs, ends[-1]), dtype=np.int32)
    tokens[:, ends[2:] - 1] = 2
    rows = PairRows([*map(str, range(pairs))], tokens.ravel(), ends + ends[-1] * np.arange(pairs)[:, None])
    return rows.forked(np.arange(pairs), (prompt, answer), 0)


class OurTrainer:
    """Our trainer's programs on one batch, run one update at a time."""

    def __init__(
        self,
        folder: Path,
        pairs: Mapping[str, np.ndarray],
        settings: Settings,
        mesh: Mesh | None = None,
        reference: Float32[np.ndarray, "pairs 2"] | None = None,
    ):
        """Load the checkpoint and place the batch.

        Args:
            mesh: None for `models.mesh()`.
            reference: log-probabilities of chosen and rejected answers; None for those of the checkpoint.
        """
        self.mesh = models.mesh() if mesh is None else mesh
        # Frozen weights are needed in the dtype of the computation only.
        lm = load(folder, settings.start_dtype, self.mesh)
        self._config = lm.config
        self._programs = make_programs(lm.config, settings, self.mesh)
        n = settings.batch_size
        self._batch = sharding.place_rows(self.mesh, n, lambda rows: {name: x[rows] for name, x in pairs.items()})
        self._batch["weight"] = np.full(n, 1 / n, np.float32)
        with sharding.using(self.mesh):
            self._state = self._programs.begin(lm.params, 0)
            self._frozen = self._programs.freeze(lm.params)
        if reference is None:
            self._start = jax.tree.map(lambda x: x.astype(settings.compute_dtype), lm.params)
            reference = self.reference_pass()
        self.reference = reference

    def reference_pass(self) -> Float32[np.ndarray, "pairs 2"]:
        """Log-probabilities of chosen and rejected answers under the start model."""
        with sharding.using(self.mesh):
            return np.asarray(batch_logprobs(self._config, self._start, self._batch))

    def step(self) -> dict[str, float]:
        """Make one update and return its metrics; the loss is that before the update."""
        batch = self._batch | {"reference": self.reference}
        with sharding.using(self.mesh):
            sums = self._programs.gradients(self._state.params, self._frozen, batch, None)
            self._state, values = self._programs.apply(self._state, sums)
        return {name: float(value) for name, value in values.items()}


def _params(config: ModelConfig) -> Any:
    """Parameters that are all one small number; the memory of a program does not depend on their values."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), sharding.plain_shapes(config))
