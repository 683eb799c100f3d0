"""Our compiled programs whose memory is compared over lengths: prefill, detection, the DPO step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax.benchmarks.models import mesh
from retmask_jax.generation.decode import Draws, generate_batch
from retmask_jax.heads.reading import own_choices, read_batch
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.masks import normalise
from retmask_jax.model.sharding import plain_shapes
from retmask_jax.model.transformer import forward
from retmask_jax.training.settings import Settings
from retmask_jax.training.step import make_programs

_PROBED = 8  # tokens of an answer


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with its static arguments; arguments() makes the others, and traces under `jax.eval_shape`."""

    jitted: Callable
    static: Sequence[Any]
    arguments: Callable[[], Sequence[Any]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def compile(self) -> jax.stages.Compiled:
        """Compiled from shapes: no array is made."""
        return self.jitted.lower(*self.static, *jax.eval_shape(self.arguments), **self.options).compile()


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
    """Detection in one case of `length` tokens by reading the answer behind it."""

    def arguments():
        rows, target = length - _PROBED + jnp.arange(_PROBED)[None], jnp.ones((1, _PROBED), jnp.int32)
        start, end = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)
        return (
            _params(config),
            None,
            jnp.ones((1, length), jnp.int32),
            start,
            end,
            rows,
            target,
            None,
            normalise(config),
            jnp.int32(length),
        )

    return Program(read_batch, (config, own_choices, False), arguments)


def decoding(config: ModelConfig, length: int) -> Program:
    """Detection in one case of `length` tokens by prefill and a few probed steps."""

    def arguments():
        row = jnp.zeros(1, jnp.uint32)
        return (
            _params(config),
            jnp.ones((1, length), jnp.int32),
            jnp.full(1, length, jnp.int32),
            normalise(config),
            Draws.of(config, (), 0.0, 1.0),
            row,
            row,
        )

    return Program(generate_batch, (config,), arguments, {"max_new_tokens": _PROBED, "probe": True})


def dpo_step(config: ModelConfig, length: int, pairs: int = 1) -> Program:
    """The gradients of pairs of rows of `length` tokens, blocks recomputed in the backward pass."""
    programs = make_programs(config, dpo_settings(pairs, "float32"), mesh(1))

    def arguments():
        tokens, mask = jnp.ones((pairs, length), jnp.int32), jnp.ones((pairs, length), bool)
        reference = jnp.zeros(pairs)
        batch = {
            "chosen": tokens,
            "rejected": tokens,
            "chosen_mask": mask,
            "rejected_mask": mask,
            "ref_chosen": reference,
            "ref_rejected": reference,
            "weight": jnp.full(pairs, 1 / pairs),
        }
        return _params(config), {}, batch, None

    return Program(programs.gradients, (), arguments)


PROGRAMS = {"prefill": prefill, "detect by reading": reading, "detect by decoding": decoding, "dpo": dpo_step}


def dpo_settings(pairs: int, compute_dtype: str, remat: bool = True, lora_rank: int = 0) -> Settings:
    """RetMask's optimiser (arXiv 2601.11020) at a learning rate that shows after a step or two."""
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
    """Rows of one half prompt and one half answer, as `train` takes them; every answer ends with token 2."""
    rng = np.random.default_rng(5)
    prompt = rng.integers(16, vocab_size, (pairs, length // 2))
    sides = {}
    for side in ("chosen", "rejected"):
        answer = rng.integers(16, vocab_size, (pairs, length - length // 2))
        answer[:, -1] = 2
        sides[side] = np.concatenate([prompt, answer], axis=1).astype(np.int32)
        sides[f"{side}_mask"] = np.broadcast_to(np.arange(length) >= length // 2, (pairs, length)).copy()
    return sides


def _params(config: ModelConfig):
    """Small constants: what a program needs of memory does not depend on the values."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), plain_shapes(config))
