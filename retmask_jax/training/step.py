"""One update as two compiled programs: gradients of a part of the batch are added up, then applied."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retmask_jax.model import lora, sharding
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.masks import normalise
from retmask_jax.model.transformer import transformer
from retmask_jax.training.objective import metric_names, part_loss
from retmask_jax.training.optimizer import make_optimizer, schedule
from retmask_jax.training.settings import Settings


@flax.struct.dataclass
class State:
    """params: what is trained (all parameters, or the adapters) and opt_state, float32; step: updates done."""

    params: Any
    opt_state: Any
    step: Any


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions of a run. `frozen` is what is not trained: the model under adapters, else {}.

    begin(start params, seed) -> State of copies; seed: of new adapters.
    freeze(start params) -> frozen.
    gradients(params, frozen, batch, ablated) -> sums over a part of a batch: (gradients, metrics).
    accumulate(params, frozen, sums, batch, ablated) -> sums with those of another part; consumes the old ones.
    apply(state, sums) -> (State, metrics); consumes the old state.
    state: the State's shapes and shardings.
    """

    begin: Callable
    freeze: Callable
    gradients: Callable
    accumulate: Callable
    apply: Callable
    state: State


@functools.cache
def make_programs(config: ModelConfig, settings: Settings, mesh: Mesh) -> Programs:
    """The programs of a run on a mesh: state and gradients are placed as the parameters they belong to.

    config: of the start model; settings.lora adds adapters to it.
    """
    config = dataclasses.replace(config, lora=settings.lora)
    optimizer = make_optimizer(settings)
    placed = sharding.param_shardings(config, mesh)
    trained_at, frozen_at = (placed, {}) if config.lora is None else lora.split(placed)
    whole = NamedSharding(mesh, PartitionSpec())
    names = metric_names(settings)

    def begin(params, seed):
        trained = _cast(params if config.lora is None else _new_adapters(config, seed), jnp.float32)
        return State(trained, optimizer.init(trained), jnp.int32(0))

    @sharding.row_parallel("batch", results=sharding.SUM_OF_ROWS)
    def gradients(params, frozen, batch, ablated):
        loss = functools.partial(_loss, config, settings, frozen, batch, ablated)
        return jax.grad(loss, has_aux=True)(params)

    def accumulate(params, frozen, sums, batch, ablated):
        return jax.tree.map(jnp.add, sums, gradients(params, frozen, batch, ablated))

    def apply(state, sums):
        grads, metrics = sums
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": schedule(settings)(state.step),
        }
        return State(params, opt_state, state.step + 1), metrics

    start = sharding.placed_shapes(dataclasses.replace(config, lora=None), mesh, jnp.float32)
    shapes = jax.eval_shape(begin, start, 0)
    state_at = State(trained_at, _like_params(optimizer, shapes.opt_state, trained_at, whole), whole)
    sums_at = trained_at, dict.fromkeys(names, whole)
    state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, state_at)
    return Programs(
        begin=jax.jit(begin, out_shardings=state_at),
        freeze=jax.jit(
            lambda params: {} if config.lora is None else _cast(params, settings.compute_dtype), out_shardings=frozen_at
        ),
        gradients=jax.jit(gradients, out_shardings=sums_at),
        accumulate=jax.jit(accumulate, donate_argnums=2, out_shardings=sums_at),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(state_at, whole)),
        state=state,
    )


def _loss(config, settings, frozen, batch, ablated, params):
    loss, metrics = part_loss(config, settings, lora.join(params, frozen), batch, ablated)
    return loss, {"loss": loss} | metrics


def _new_adapters(config: ModelConfig, seed):
    """Adapters that change nothing yet: A at random, B zero."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    boxed = transformer(config).init(jax.random.key(seed), tokens, normalise(config))["params"]
    return lora.split(nn.unbox(boxed))[0]


def _like_params(optimizer, opt_state, shardings, otherwise):
    """Shardings of an optimiser's state: moments as the parameters they belong to."""
    return optax.tree_map_params(
        optimizer, lambda _, at: at, opt_state, shardings, transform_non_params=lambda _: otherwise
    )


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)
