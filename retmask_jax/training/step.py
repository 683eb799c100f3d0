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
from jaxtyping import PyTree

from retmask_jax.model import lora, sharding
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.masking import normalise
from retmask_jax.model.transformer import transformer
from retmask_jax.training.objective import metric_names, part_loss
from retmask_jax.training.optimizer import make_optimizer, schedule
from retmask_jax.training.settings import Settings


@flax.struct.dataclass
class State:
    """What an update changes, in float32: the parameters that are trained (all, or the adapters), the optimiser's
    state, and the number of updates done."""

    params: Any
    opt_state: Any
    step: Any


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions of a run. `frozen` are the parameters that are not trained: the model's under adapters, else
    {}. `trained` is where updates change what is trained, as of `optimizer.trained_parts`; None: everywhere.

    Attributes:
        begin: begin(start params, seed, trained=None) gives a State that holds copies; the seed draws new adapters, which
            are zero where they are not trained.
        freeze: freeze(start params) gives frozen.
        gradients: gradients(params, frozen, batch, ablated) gives (gradients, metrics), sums over a part of a batch.
        accumulate: accumulate(params, frozen, sums, batch, ablated) adds the sums of another part; the old sums are
            donated.
        apply: apply(state, sums, trained=None) gives (State, metrics); the old state is donated. Gradients are clipped by
            their norm within `trained`.
        state, sums: Shapes and shardings of the State, and of what gradients gives.
    """

    begin: Callable
    freeze: Callable
    gradients: Any
    accumulate: Any
    apply: Callable
    state: State
    sums: tuple[Any, dict[str, Any]]

    def within(self, trained: PyTree | None) -> "Programs":
        """Returns these programs with `trained` given."""
        if trained is None:
            return self
        begin, apply = (functools.partial(program, trained=trained) for program in (self.begin, self.apply))
        return dataclasses.replace(self, begin=begin, apply=apply)


@functools.cache
def make_programs(config: ModelConfig, settings: Settings, mesh: Mesh) -> Programs:
    """Returns the programs of a run on a mesh. State and gradients are placed as the parameters they belong to.

    Args:
        config: Config of the start model, without adapters.
        settings: How to train; settings.lora says whether adapters are added.
    """
    config = dataclasses.replace(config, lora=settings.lora)
    optimizer = make_optimizer(settings)
    placed = sharding.param_shardings(config, mesh)
    trained_at, frozen_at = (placed, {}) if config.lora is None else lora.split(placed)
    whole = NamedSharding(mesh, PartitionSpec())
    names = metric_names(settings)

    def begin(params, seed, trained=None):
        new = params if config.lora is None else _within(trained, _new_adapters(config, seed))
        new = _cast(new, jnp.float32)
        return State(new, optimizer.init(new), jnp.int32(0))

    @sharding.row_parallel("batch", results=sharding.SUM_OF_ROWS)
    def gradients(params, frozen, batch, ablated):
        loss = functools.partial(_loss, config, settings, frozen, batch, ablated)
        return jax.grad(loss, has_aux=True)(params)

    def accumulate(params, frozen, sums, batch, ablated):
        return jax.tree.map(jnp.add, sums, gradients(params, frozen, batch, ablated))

    def apply(state, sums, trained=None):
        grads, metrics = sums
        grads = _within(trained, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = _within(trained, optax.apply_updates(state.params, updates), state.params)
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
        # Gradients have the shapes, the float32 and the shardings of the parameters.
        sums=(state.params, dict.fromkeys(names, jax.ShapeDtypeStruct((), jnp.float32, sharding=whole))),
    )


def _loss(config, settings, frozen, batch, ablated, params):
    loss, metrics = part_loss(config, settings, lora.join(params, frozen), batch, ablated)
    return loss, {"loss": loss} | metrics


def _new_adapters(config: ModelConfig, seed):
    """New adapters, A random and B zero, so that they change nothing yet."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    boxed = transformer(config).init(jax.random.key(seed), tokens, normalise(config))["params"]
    return lora.split(nn.unbox(boxed))[0]


def _within(trained, new, old=None):
    """The new arrays where they are trained, elsewhere the old ones (None: zeros)."""
    if trained is None:
        return new
    return jax.tree.map(jnp.where, trained, new, optax.tree.zeros_like(new) if old is None else old)


def _like_params(optimizer, opt_state, shardings, otherwise):
    """Shardings of an optimiser's state: moments are placed as their parameters, the rest as `otherwise`."""
    return optax.tree_map_params(
        optimizer, lambda _, at: at, opt_state, shardings, transform_non_params=lambda _: otherwise
    )


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)
