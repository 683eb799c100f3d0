"""Training: state, step, loop, checkpoints, exact resume."""

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from retmask_jax import sharding
from retmask_jax.data.preferences import PairRows, batches
from retmask_jax.dpo import dpo_loss, sft_loss
from retmask_jax.files import write_atomically
from retmask_jax.generate import full_batches
from retmask_jax.model.config import ModelConfig
from retmask_jax.progress import track
from retmask_jax.sequence import sequence_logprobs

log = logging.getLogger(__name__)

OBJECTIVES = ("dpo", "sft")


@flax.struct.dataclass
class State:
    """params and opt_state in float32; step: how many updates are done."""

    params: Any
    opt_state: Any
    step: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train; the `train` section of a config, where every key has its reason."""

    objective: str
    learning_rate: float
    final_learning_rate: float
    warmup: float
    steps: int
    batch_size: int
    microbatch_size: int
    beta: float
    label_smoothing: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip: float
    compute_dtype: str
    remat: bool
    checkpoint_every: int
    seed: int

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}")
        if self.batch_size % self.microbatch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of microbatch_size {self.microbatch_size}")


def train(config: ModelConfig, start_params, rows: PairRows, settings: Settings, folder: Path, mesh, *,
          fingerprint: str, what: str = "train"):  # fmt: skip
    """Train from start_params on preference rows; returns the final params, f32.

    Writes metrics.jsonl and checkpoints into folder and resumes from the newest checkpoint there: the outcome equals
    an uninterrupted run, since the batch of a step depends on the seed and the step alone. Raises ValueError for a
    non-finite loss, naming the step.
    """
    optimizer = make_optimizer(settings)
    examples = _examples(rows) | _reference(config, start_params, rows, settings, folder, mesh, fingerprint)
    loader = batches(examples, settings.batch_size, settings.seed)
    state = init_state(start_params, optimizer, mesh)
    with sharding.using(mesh), _checkpoints(folder, settings) as checkpoints:
        state = _restore(checkpoints, state)
        metrics = _Metrics(folder / "metrics.jsonl", int(state.step))
        # One program for all seeds: the seed orders the data and is no part of an update.
        update = functools.partial(_update, config, dataclasses.replace(settings, seed=0))
        with track(None, settings.steps, what, "step") as bar:
            bar.update(int(state.step))
            for step in range(int(state.step), settings.steps):
                state, values = update(state, _place(loader[step], mesh))
                values = {name: float(value) for name, value in values.items()}
                for name in ("loss", "gradient_norm", "parameter_norm"):
                    if not np.isfinite(values[name]):
                        mistake = f"the {name.replace('_', ' ')} is {values[name]}"
                        raise ValueError(f"{what}: {mistake} at step {step}; lower train.learning_rate")
                metrics.add({"step": step + 1, **values})
                bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                bar.update()
                if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                    metrics.flush()
                    _save(checkpoints, state)
    return state.params


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with clipping, linear warm-up and cosine decay; norm scales are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(schedule(settings), settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay,
                    mask=_decayed),
    )  # fmt: skip


def schedule(settings: Settings) -> optax.Schedule:
    """Learning rate by update: up over the share `warmup` of the steps, then a cosine to final_learning_rate."""
    warmup = min(max(1, round(settings.warmup * settings.steps)), settings.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warmup, settings.steps, settings.final_learning_rate
    )


def init_state(params, optimizer, mesh) -> State:
    """A fresh state around a copy of params, the optimiser's moments placed like the parameters they belong to."""
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else replicated, params)
    params = jax.device_put(params, shardings)
    placed = optax.tree_map_params(
        optimizer, lambda _, s: s, jax.eval_shape(optimizer.init, params), shardings,
        transform_non_params=lambda _: replicated,
    )  # fmt: skip
    opt_state = jax.jit(optimizer.init, out_shardings=placed)(params)
    return State(params, opt_state, jax.device_put(jnp.int32(0), replicated))


def pair_loss(config: ModelConfig, settings: Settings, params, batch):
    """(loss, metrics) of one microbatch; chosen and rejected rows share one forward pass."""
    params = jax.tree.map(lambda x: x.astype(settings.compute_dtype), params)
    if settings.objective == "sft":
        logps = sequence_logprobs(config, params, batch["chosen"], batch["chosen_mask"], remat=settings.remat)
        # n_tokens: the answer tokens these rows stand for within the whole batch; alone, their own.
        return sft_loss(logps, batch.get("n_tokens", batch["chosen_mask"].sum())), {}
    tokens = jnp.concatenate([batch["chosen"], batch["rejected"]])
    mask = jnp.concatenate([batch["chosen_mask"], batch["rejected_mask"]])
    chosen, rejected = jnp.split(sequence_logprobs(config, params, tokens, mask, remat=settings.remat), 2)
    reference = batch["ref_chosen"], batch["ref_rejected"]
    losses = dpo_loss(chosen, rejected, *reference, beta=settings.beta, label_smoothing=settings.label_smoothing)
    rewards = settings.beta * (chosen - reference[0]), settings.beta * (rejected - reference[1])
    metrics = {
        "reward_chosen": rewards[0].mean(), "reward_rejected": rewards[1].mean(),
        "margin": (rewards[0] - rewards[1]).mean(), "accuracy": (rewards[0] > rewards[1]).mean(),
    }  # fmt: skip
    return losses.mean(), metrics


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _update(config, settings, state, batch):
    """One optimiser step: gradients averaged over microbatches, then AdamW."""
    parts = settings.batch_size // settings.microbatch_size
    # Every answer token of the batch weighs the same, in whichever microbatch it is.
    batch |= {"n_tokens": jnp.full(settings.batch_size, batch["chosen_mask"].sum() / settings.batch_size)}
    micro = jax.tree.map(lambda x: x.reshape(parts, settings.microbatch_size, *x.shape[1:]), batch)
    one_grad = jax.grad(lambda p, b: _with_loss(pair_loss(config, settings, p, b)), has_aux=True)
    grad = functools.partial(sharding.by_rows, one_grad, mean=True)

    def accumulate(total, part):
        return jax.tree.map(lambda a, b: a + b / parts, total, grad(state.params, part)), None

    shapes = jax.eval_shape(grad, state.params, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(accumulate, zeros, micro)
    updates, opt_state = make_optimizer(settings).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
        "gradient_norm": optax.tree.norm(grads), "parameter_norm": optax.tree.norm(params),
        "learning_rate": schedule(settings)(state.step),
    }  # fmt: skip
    return State(params, opt_state, state.step + 1), metrics


def _with_loss(loss_and_metrics):
    loss, metrics = loss_and_metrics
    return loss, metrics | {"loss": loss}


def _decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def _examples(rows: PairRows) -> dict[str, np.ndarray]:
    return {
        "chosen": rows.chosen.tokens, "chosen_mask": rows.chosen.loss_mask,
        "rejected": rows.rejected.tokens, "rejected_mask": rows.rejected.loss_mask,
    }  # fmt: skip


def _place(batch, mesh):
    split = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.device_put(x, sharding.divided(split, x.shape, "rows of a batch")), batch)


def _reference(config, params, rows, settings, folder, mesh, fingerprint) -> dict[str, np.ndarray]:
    """The start model's log-probabilities of every row, computed once and kept in folder/reference.npz."""
    if settings.objective != "dpo":
        return {}
    path = folder / "reference.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["fingerprint"]) == fingerprint:
                return {name: stored[name] for name in ("ref_chosen", "ref_rejected")}
    values = {}
    with sharding.using(mesh):
        for name, side in (("ref_chosen", rows.chosen), ("ref_rejected", rows.rejected)):
            values[name] = _all_logprobs(
                config, params, side, 2 * settings.microbatch_size, settings.compute_dtype, mesh
            )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "reference.part.npz"
    np.savez(temporary, fingerprint=fingerprint, **values)
    temporary.rename(path)
    return values


def _all_logprobs(config, params, rows, batch_size, compute_dtype, mesh) -> np.ndarray:
    params = jax.tree.map(lambda x: x.astype(compute_dtype), params)
    n = len(rows.tokens)
    at = list(full_batches(range(n), batch_size))
    parts = [
        _jitted_logprobs(config, params, *_place((rows.tokens[i], rows.loss_mask[i]), mesh))
        for i in track(at, len(at), "reference log-probabilities", "batch")
    ]
    return np.concatenate([np.asarray(part) for part in parts])[:n]


@functools.partial(jax.jit, static_argnums=0)
def _jitted_logprobs(config, params, tokens, loss_mask):
    return sharding.by_rows(lambda params, rows: sequence_logprobs(config, params, *rows), params, (tokens, loss_mask))


# --- checkpoints and metrics ---


def _checkpoints(folder: Path, settings: Settings):
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.WARNING)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def _save(checkpoints, state: State) -> None:
    import orbax.checkpoint as ocp

    checkpoints.save(int(state.step), args=ocp.args.StandardSave(state))


def _restore(checkpoints, state: State) -> State:
    """The newest whole checkpoint if there is one, else the fresh state."""
    import orbax.checkpoint as ocp

    step = checkpoints.latest_step()
    if step is None:
        return state
    log.info("resuming at step %d", step)
    return checkpoints.restore(step, args=ocp.args.StandardRestore(state))


class _Metrics:
    """metrics.jsonl: one line per step; on resume the lines beyond the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows = [row for row in map(json.loads, lines) if row["step"] <= step]

    def add(self, row: dict) -> None:
        self._rows.append(row)

    def flush(self) -> None:
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))
