"""How the bundled tiny model is trained: stages, models saved along the way, and the data files in the package's
assets."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Float, Float32, Int, PyTree
from ml_collections import ConfigDict

from retmask_jax.data import tiny_language
from retmask_jax.generation.language_model import LanguageModel, from_params, load, save
from retmask_jax.model.config import ModelConfig, Rope
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.transformer import Transformer, hidden
from retmask_jax.utils.files import is_whole, mark_whole, read_json, write_atomically, write_json, write_jsonl
from retmask_jax.utils.progress import track

log = logging.getLogger(__name__)

_LIST = "checkpoints.json"


def pretrain(recipe: ConfigDict, folder: Path) -> LanguageModel:
    """Trains the stages of a recipe in order and returns the model of the last one.

    Each stage has a depth, a number of active heads, a new optimiser and a new random stream. Added layers write
    nothing at first, so growing the model does not change its function. A finished stage is saved as the HF checkpoint
    folder/stages/stageN and not trained again. Every `recipe.keep_every` steps, counted over all stages (0: never), the
    model is saved as folder/checkpoints/step_NNNNNN; `kept` lists these.

    Args:
        recipe: The `pretrain` section of a config.
        folder: Where the checkpoints go.
    """
    tokenizer = tiny_language.build_tokenizer()
    lm = None
    for number, stage in enumerate(recipe.stages, 1):
        target = folder / "stages" / f"stage{number}"
        if not is_whole(target):
            config = model_config(recipe.model, stage.layers)
            init_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(recipe.seed), number))
            fresh = _init(config, init_key)
            params = fresh if lm is None else grow(config, lm.params, fresh)
            rng = np.random.default_rng([recipe.seed, number])
            keeper = _Keeper(folder / "checkpoints", recipe, number, config, tokenizer)
            params = _run_stage(config, params, stage, rng, drop_key, keeper, f"stage {number} of {len(recipe.stages)}")
            save(from_params(config, params, tokenizer), target)
            mark_whole(target)
        lm = load(target)
    if lm is None:
        raise ValueError("pretrain.stages is empty: name at least one stage")
    return lm


def kept(folder: Path) -> list[dict]:
    """Returns a record {folder, stage, step, tokens, loss} for each checkpoint of `pretrain` in folder/checkpoints, in
    order.

    tokens counts the positions trained on so far, including padding; loss is that of the step's batch.
    """
    path = folder / "checkpoints" / _LIST
    return read_json(path) if path.exists() else []


def model_config(model: Mapping[str, Any], layers: int) -> ModelConfig:
    """Returns the tiny model's config.

    Args:
        model: Fields of ModelConfig, with `rope_theta` in place of `rope`. Fields that are left out have their
            defaults, except that embeddings are tied.
        layers: Number of layers.

    Raises:
        ValueError: The number of layers is no multiple of the layer pattern's length.
    """
    fields = dict(model)
    defaults: dict[str, Any] = {
        "vocab_size": len(tiny_language.VOCABULARY),
        "n_layers": layers,
        "tied_embeddings": True,
        "rope": Rope(theta=fields.pop("rope_theta")),
        "bos_id": tiny_language.BOS,
        "eos_ids": (tiny_language.EOS,),
        "pad_id": tiny_language.PAD,
    }
    config = ModelConfig(**defaults | fields)
    if config.tail:
        raise ValueError(f"{layers} layers are no whole number of repeats of {config.layer_pattern}")
    return config


def weighted_loss(
    config: ModelConfig,
    params: PyTree,
    tokens_BT: Int[jax.Array, "B T"],
    weights_BT: Float[jax.Array, "B T"],
    masks: Masks,
) -> Float32[jax.Array, ""]:
    """Returns the mean of the negative log-probabilities; weights_BT[b, t] is the weight of predicting tokens_BT[b,
    t]."""
    logits_BTV = unembed(config, params, hidden(config, params, tokens_BT[:, :-1], masks).x_BTE)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    return jnp.sum(loss_BT * weights_BT[:, 1:]) / jnp.sum(weights_BT[:, 1:])


def grow(config: ModelConfig, params: PyTree, fresh: PyTree) -> PyTree:
    """Returns the trained layers followed by the added layers of `fresh`, which write nothing into the residual stream
    yet.

    Without a norm after attention and MLP, the output projections of the added layers are zero. With such norms, the
    norms' weights are zero instead: a norm of zeros has a gradient of 1 / sqrt(eps).

    Args:
        config: The deeper config.
        params: Trained parameters of a shallower model.
        fresh: New parameters for `config`.
    """
    silent = {"o", "down"} if config.norm_placement == "pre" else {"attn_post_norm", "mlp_post_norm"}
    nothing = 0.0 if config.norm_placement == "pre" else -config.norm_offset

    def extend(path, old, new):
        keys = [entry.key for entry in path]
        if keys[0] != "blocks":
            return old
        added = new[len(old) :]
        return jnp.concatenate([old, jnp.full_like(added, nothing) if silent & set(keys) else added])

    return jax.tree_util.tree_map_with_path(extend, params, fresh)


class _Keeper:
    """Saves the model every few steps of one stage, and the list of all saved models."""

    def __init__(self, folder: Path, recipe, stage: int, config: ModelConfig, tokenizer):
        self.folder, self.every, self.stage = folder, recipe.keep_every, stage
        self.config, self.tokenizer = config, tokenizer
        before = [phase for earlier in recipe.stages[: stage - 1] for phase in earlier.phases]
        self.step = sum(phase.steps for phase in before)
        self.tokens = sum(phase.steps * phase.batch * phase.length for phase in before)

    def count(self, tokens_BT, params, loss) -> None:
        """Counts a step, and saves the model if its turn has come."""
        self.step += 1
        self.tokens += tokens_BT.size
        if not self.every or self.step % self.every:
            return
        name = f"step_{self.step:06d}"
        save(from_params(self.config, params, self.tokenizer), self.folder / name)
        record = {"folder": name, "stage": self.stage, "step": self.step, "tokens": self.tokens, "loss": float(loss)}
        # A stage that was interrupted starts again, and its records replace the earlier ones.
        records = [other for other in kept(self.folder.parent) if other["step"] < self.step]
        write_json(self.folder / _LIST, [*records, record])


def _run_stage(config, params, stage, rng, key, keeper, name):
    steps = sum(phase.steps for phase in stage.phases)
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.lr, min(100, steps // 6), steps, 0.05 * stage.lr)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.05))
    state = (params, optimizer.init(params))
    step = functools.partial(_step, config, optimizer)
    batches = ((phase, batch) for phase in stage.phases for batch in _batches(rng, phase))
    for number, (phase, batch) in enumerate(track(batches, steps, name, "step")):
        gate_BLH = _head_gate(config, jax.random.fold_in(key, number), phase, stage.active_heads)
        state, loss = step(state, *batch, gate_BLH)
        keeper.count(batch[0], state[0], loss)
        if number % 50 == 0 or number == steps - 1:
            log.info("%s step %d: loss %.4f", name, number, loss)
            if not np.isfinite(loss):
                raise ValueError(f"the loss is {loss} at {name}, step {number}: lower its learning rate")
    return state[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(config, optimizer, state, tokens_BT, weights_BT, gate_BLH):
    params, opt_state = state
    masked = normalise(config, Interventions(head_mask=gate_BLH))
    loss, grads = jax.value_and_grad(lambda p: weighted_loss(config, p, tokens_BT, weights_BT, masked))(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


def _batches(rng, phase):
    mix = tiny_language.Mix(**phase.mix)
    for _ in range(phase.steps):
        yield tiny_language.training_batch(rng, phase.batch, phase.length, mix)


def _head_gate(config, key, phase, active_heads: int):
    """Gates f32[B,L,H]: 1 for heads that are not active yet; active heads are dropped at random, and rescaled
    otherwise."""
    shape = (phase.batch, config.n_layers, config.n_heads)
    kept = jax.random.bernoulli(key, 1 - phase.head_drop, shape) / (1 - phase.head_drop)
    return 1.0 - kept * (jnp.arange(config.n_heads) < active_heads)


def _init(config, key):
    tokens = jnp.zeros((1, 8), jnp.int32)
    variables = jax.jit(lambda k: Transformer(config).init(k, tokens, normalise(config)))(key)
    return nn.unbox(variables)["params"]


def build(recipe: ConfigDict, root: Path) -> None:
    """Writes the model and its data: root/tiny (an HF checkpoint), root/data (needles, facts, prompts, text), and the
    checkpoints of `pretrain`.

    The data are drawn from other seeds than the training batches, so none of their texts was seen in training.

    Args:
        recipe: The `pretrain` section of a config.
        root: Where the folders go.
    """
    write_data(recipe.data, root / "data")
    save(pretrain(recipe, root), root / "tiny")


def write_data(recipe: ConfigDict, folder: Path) -> None:
    """Writes the data files of the tiny language, for detection, for evaluation and for training prompts, from
    separate seeds."""
    for split, seed in recipe.seeds.items():
        rng = np.random.default_rng(seed)
        write_jsonl(folder / f"{split}_needles.jsonl", tiny_language.needle_records(rng, recipe.needles))
        text = tiny_language.haystack_text(rng, recipe.sentences)
        write_atomically(folder / f"{split}_text.txt", "\n".join(text) + "\n")
    rng = np.random.default_rng(recipe.facts_seed)
    write_jsonl(folder / "test_facts.jsonl", tiny_language.fact_records(rng, recipe.needles))
    rng = np.random.default_rng(recipe.prompts_seed)
    prompts = tiny_language.prompt_records(
        rng, recipe.prompts, recipe.prompt_lengths, counterfactual=recipe.prompts_facts
    )
    write_jsonl(folder / "prompts.jsonl.gz", prompts)
    write_jsonl(folder / "closed_book.jsonl", tiny_language.closed_book_records())
