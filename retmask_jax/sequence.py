"""Log-probabilities of given sequences."""

import functools

import jax
import jax.numpy as jnp

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.transformer import check_tokens, hidden, longest_row, unembed

_CHUNK = 128


def sequence_logprobs(config: ModelConfig, params, tokens, loss_mask, lengths=None, interventions=None, *,
                      remat: bool = False):  # fmt: skip
    """f32[B]: sum over positions t with loss_mask[b, t] of log p(tokens[b, t] | tokens[b, :t]).

    tokens: i32[B,T], right-padded. loss_mask: bool[B,T]; position 0 has nothing before it and never counts. Pure and
    differentiable; logits exist for a chunk of positions at a time only. remat: recompute blocks in the backward pass.
    Raises ValueError for shapes that do not fit.
    """
    tokens = check_tokens(config, tokens, lengths)
    if jnp.shape(loss_mask) != tokens.shape:
        raise ValueError(f"loss_mask has shape {jnp.shape(loss_mask)}; tokens have {tokens.shape}")
    logps_BT = _logprobs(config, params, tokens, interventions, remat, longest_row(tokens, lengths))
    return jnp.sum(jnp.where(jnp.asarray(loss_mask)[:, 1:] != 0, logps_BT, 0.0), axis=1)


def token_logprobs(config: ModelConfig, params, tokens, interventions=None):
    """f32[B,T-1]: log p(tokens[b, t] | tokens[b, :t]) for t = 1..T-1, jitted."""
    tokens = check_tokens(config, tokens)
    filled = (interventions or Interventions()).fill(config, tokens.shape[0])
    return _jitted(config, params, tokens, filled)


@functools.partial(jax.jit, static_argnums=0)
def _jitted(config, params, tokens, interventions):
    return _logprobs(config, params, tokens, interventions, remat=False)


def _logprobs(config, params, tokens_BT, interventions, remat, longest=None):
    x_BTE = hidden(config, params, tokens_BT, interventions, longest=longest, remat=remat).x_BTE[:, :-1]
    batch, length, width = x_BTE.shape
    pad = -length % _CHUNK
    x_CBTE = jnp.pad(x_BTE, ((0, 0), (0, pad), (0, 0))).reshape(batch, -1, _CHUNK, width).swapaxes(0, 1)
    target_CBT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, pad))).reshape(batch, -1, _CHUNK).swapaxes(0, 1)

    @jax.checkpoint
    def chunk(args):
        x_BTE, target_BT = args
        logits_BTV = unembed(config, params, x_BTE)
        chosen_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
        return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)

    logps_CBT = jax.lax.map(chunk, (x_CBTE, target_CBT))
    return logps_CBT.swapaxes(0, 1).reshape(batch, -1)[:, :length]
