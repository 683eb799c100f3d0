"""Log-probabilities of given sequences."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float32, Int, PyTree, Shaped

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.layers import Fork, at_positions, logits, unembedding
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.sharding import mesh_of, row_parallel, split_vocab
from retmask_jax.model.transformer import check_tokens, hidden, longest_row
from retmask_jax.utils.array_types import Lengths, Tokens

_CHUNK = 128


def sequence_logprobs(
    config: ModelConfig,
    params: PyTree,
    tokens: Tokens,
    loss_mask: Shaped[ArrayLike, "B T"],
    lengths: Lengths | None = None,
    interventions: Interventions | None = None,
    *,
    remat: bool = False,
) -> Float32[jax.Array, " B"]:
    """The log-probability of the counted tokens of each row: a sum of log p(tokens[b, t] | tokens[b, :t]).

    Pure and differentiable; logits exist for only a chunk of positions at a time.

    Args:
        tokens: i32[B,T], right-padded.
        loss_mask: bool[B,T], which positions count; position 0 has nothing before it and never counts.
        lengths, interventions: As in `forward`.
        remat: Recompute blocks in the backward pass.

    Raises:
        ValueError: As in `forward`; also where loss_mask does not have the shape of the tokens.

    >>> import jax, jax.numpy as jnp, retmask_jax as rm
    >>> lm = rm.load("bundled")
    >>> tokens = jnp.array(lm.tokenizer([f"<bos> the home of emma : {x}" for x in ("moscow", "rome")])["input_ids"])
    >>> answer = jnp.arange(tokens.shape[1]) == 6
    >>> logprobs = jax.jit(rm.sequence_logprobs, static_argnums=0)
    >>> logps = logprobs(lm.config, lm.params, tokens, jnp.stack([answer, answer]))
    >>> print(jnp.exp(logps).round(1))
    [1. 0.]
    """
    tokens = check_tokens(config, tokens, lengths)
    if jnp.shape(loss_mask) != tokens.shape:
        raise ValueError(f"loss_mask has shape {jnp.shape(loss_mask)}; tokens have {tokens.shape}")
    masks = normalise(config, interventions, len(tokens))
    longest = longest_row(tokens, lengths)
    x_BTE = hidden(config, params, tokens, masks, longest=longest, remat=remat).x_BTE[:, :-1]
    counted_BT = jnp.asarray(loss_mask)[:, 1:] != 0
    return jnp.sum(chosen_logprobs(config, params, x_BTE, tokens[:, 1:], counted_BT), axis=1)


def branch_logprobs(
    config: ModelConfig,
    params: PyTree,
    prompts: Tokens,
    lengths: Lengths,
    answers: Int[ArrayLike, "B N A"],
    counted: Bool[ArrayLike, "B N A"],
    interventions: Interventions | None = None,
    *,
    longest: jax.Array | int | None = None,
    remat: bool = False,
) -> Float32[jax.Array, "B N"]:
    """The log-probability of the counted tokens of N answers to each prompt, which passes through the model once.

    Pure and differentiable, and otherwise that of `sequence_logprobs` for rows of a prompt and an answer.

    Args:
        prompts: i32[B,P], right-padded.
        lengths: i32[B], at least 1.
        answers: i32[B,N,A], right-padded.
        interventions: What is ablated in a prompt and in all its answers; None: nothing.
        longest: Tokens of the longest row, for models whose rotary frequencies depend on it; None: P + A.
        remat: Recompute blocks in the backward pass.
    """
    prompts_BP, start_B, answers_BNA = check_tokens(config, prompts), jnp.asarray(lengths) - 1, jnp.asarray(answers)
    (_, width), (_, n, own) = prompts_BP.shape, answers_BNA.shape
    # Branches begin with the last token of the prompt: the states that predict answers are then all theirs.
    last_BN1 = jnp.broadcast_to(at_positions(prompts_BP, start_B[:, None])[:, None], (len(start_B), n, 1))
    branches_BNA = jnp.concatenate([last_BN1, answers_BNA[:, :, :-1]], axis=2)
    fork = Fork.of(start_B, width, n, own)
    tokens_BT, longest = fork.join(prompts_BP, branches_BNA), width + own if longest is None else longest
    masks = normalise(config, interventions, len(start_B))
    out = hidden(config, params, tokens_BT, masks, longest=longest, fork=fork, remat=remat)
    x_BTE = fork.split(out.x_BTE)[1].reshape(len(start_B), n * own, -1)
    target_BT, counted_BT = (jnp.reshape(x, x_BTE.shape[:2]) for x in (answers_BNA, counted))
    return chosen_logprobs(config, params, x_BTE, target_BT, counted_BT).reshape(answers_BNA.shape).sum(axis=2)


def token_logprobs(
    config: ModelConfig, params: PyTree, tokens: Tokens, interventions: Interventions | None = None
) -> Float32[jax.Array, "B T-1"]:
    """f32[B,T-1]: log p(tokens[b, t] | tokens[b, :t]) for t = 1..T-1, jitted."""
    tokens = check_tokens(config, tokens)
    masks = normalise(config, interventions, len(tokens))
    with mesh_of(params):
        return _token_logprobs(config, params, tokens, masks)


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_BT", "masks")
def _token_logprobs(config: ModelConfig, params: PyTree, tokens_BT: jax.Array, masks: Masks) -> jax.Array:
    x_BTE = hidden(config, params, tokens_BT, masks).x_BTE[:, :-1]
    return chosen_logprobs(config, params, x_BTE, tokens_BT[:, 1:], jnp.ones(x_BTE.shape[:2], bool))


def next_logprobs(
    config: ModelConfig,
    params: PyTree,
    tokens: Tokens,
    targets: Int[ArrayLike, "B T"],
    counted: Bool[ArrayLike, "B T"],
    lengths: Lengths | None = None,
    interventions: Interventions | None = None,
) -> tuple[Float32[jax.Array, "B T"], Bool[jax.Array, "B T"]]:
    """log p(targets[b, t] | tokens[b, :t + 1]), and whether that target is the most likely token. Jitted.

    Logits exist for only a chunk of positions at a time.

    Args:
        tokens: i32[B,T], right-padded.
        targets: i32[B,T].
        counted: bool[B,T]; elsewhere the results are 0 and False.

    Raises:
        ValueError: The shapes do not fit.
    """
    tokens = check_tokens(config, tokens, lengths)
    if not jnp.shape(targets) == jnp.shape(counted) == tokens.shape:
        shapes = f"targets {jnp.shape(targets)} and counted {jnp.shape(counted)}"
        raise ValueError(f"{shapes} must have the shape of tokens, {tokens.shape}")
    masks = normalise(config, interventions, len(tokens))
    with mesh_of(params):
        return _next_logprobs(config, params, longest_row(tokens, lengths), tokens, targets, counted, masks)


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_BT", "targets_BT", "counted_BT", "masks")
def _next_logprobs(
    config: ModelConfig,
    params: PyTree,
    longest: jax.Array | int | None,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    counted_BT: jax.Array,
    masks: Masks,
) -> tuple[jax.Array, jax.Array]:
    x_BTE = hidden(config, params, tokens_BT, masks, longest=longest).x_BTE
    return over_chunks(config, params, _logprob_and_greedy, (x_BTE, targets_BT), counted_BT)


def chosen_logprobs(
    config: ModelConfig, params: PyTree, x_BTE: jax.Array, target_BT: jax.Array, counted_BT: jax.Array
) -> jax.Array:
    """f32[B,T]: log-probability of each target, 0 where it is not counted."""

    def logprobs(logits_of: Callable[[jax.Array], jax.Array], x_BTE: jax.Array, target_BT: jax.Array) -> jax.Array:
        return _logprob(logits_of(x_BTE), target_BT)

    return over_chunks(config, params, logprobs, (x_BTE, target_BT), counted_BT)


def _logprob(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
    chosen_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def _logprob_and_greedy(
    logits_of: Callable[[jax.Array], jax.Array], x_BTE: jax.Array, target_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits_BTV = logits_of(x_BTE)
    return _logprob(logits_BTV, target_BT), logits_BTV.argmax(axis=-1) == target_BT


def over_chunks(
    config: ModelConfig,
    params: PyTree,
    function: Callable[..., PyTree],
    arrays: tuple[jax.Array, ...],
    counted_BT: jax.Array,
) -> PyTree:
    """[B,T]: what a function gives for the positions of each row, computed for a chunk of positions at a time.

    One chunk of logits exists at a time, and none for a chunk in which no position counts.

    Args:
        function: Of (logits of states, *arrays), all [B,C,...]; gives an array [B,C] or a pytree of such.
        counted_BT: bool; the result is 0 elsewhere.
    """
    batch, length = counted_BT.shape
    chunk = max(1, min(_CHUNK, length))

    def chunked(x: jax.Array) -> jax.Array:
        """[B,T,...] as chunks [N,B,C,...]."""
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    # Every device keeps its part of the vocabulary for all chunks; moving the matrix to the rows would cost more.
    table_EV = split_vocab(unembedding(config, params))

    def logits_of(x_BTE: jax.Array) -> jax.Array:
        x_BTE = nn.with_logical_constraint(x_BTE, ("unembed_rows", None, None))
        return nn.with_logical_constraint(logits(config, table_EV, x_BTE), ("unembed_rows", None, "unembed_vocab"))

    def compute(counted_BC: jax.Array, *parts: jax.Array) -> PyTree:
        found = function(logits_of, *parts)
        return jax.tree.map(lambda x: jnp.where(counted_BC, x, jnp.zeros_like(x)), found)

    def nothing(*args: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, *args))

    @jax.checkpoint
    def one(args: tuple) -> PyTree:
        return jax.lax.cond(args[0].any(), compute, nothing, *args)

    out_NBC = jax.lax.map(one, tuple(chunked(x) for x in (counted_BT, *arrays)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length], out_NBC)
