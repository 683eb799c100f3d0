"""How the next token is chosen: the most likely one or a draw, from the model's own scores or from their contrast with those
of the model under masks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions, is_empty
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import Masks, alike

MAX_STOP_IDS = 8  # that a call may name; the files of a model may name more
NO_STOP = -1
ENTROPY = "entropy"
THRESHOLD = 0.1  # as in contrastive decoding


@dataclasses.dataclass(frozen=True)
class ContrastDecoding:
    """Decoding by contrast: next-token scores of the model, moved away from those of the same model under masks.

    The score of token v is (1 + alpha) log p(v) - alpha log q(v), p being the next-token distribution of the model and q that
    under the masks, if p(v) is at least `threshold` times the largest probability of p; other tokens are never chosen. Scores
    take the place of logits: temperature and top_p apply to them. Both passes read the prompt and the tokens chosen so far.

    The scores are those of DeCoRe (arXiv 2410.18860), with retrieval heads masked in q, and its alpha is the entropy of p. The
    threshold is the plausibility constraint of contrastive decoding (arXiv 2210.15097), which DeCoRe's code lacks: 0 turns it
    off. In that code q reads the prompt without masks up to its last token; here masks hold from the first token on.

    Attributes:
        interventions: What is masked in q.
        alpha: A number of at least 0, or "entropy": -sum p log p of each step, in nats. 0 is plain decoding, without a threshold.
        threshold: From 0 to 1.

    Raises:
        ValueError: alpha or threshold is something else.
    """

    interventions: Interventions
    alpha: float | str = ENTROPY
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        if self.alpha != ENTROPY and (isinstance(self.alpha, str) or not 0 <= self.alpha < float("inf")):
            raise ValueError(f'alpha is {self.alpha!r}; it must be a number of at least 0, or "{ENTROPY}"')
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must be a number from 0 to 1")

    @property
    def identity(self) -> tuple[float | str, float]:
        """What decides the answers besides the interventions."""
        return self.alpha, self.threshold


class Strength(NamedTuple):
    """The numbers of a contrast as arrays. alpha of a step is `fixed` + `per_nat` times the entropy of the step."""

    fixed: Any
    per_nat: Any
    threshold: Any

    @classmethod
    def of(cls, contrast: ContrastDecoding) -> "Strength":
        fixed, per_nat = (0.0, 1.0) if contrast.alpha == ENTROPY else (contrast.alpha, 0.0)
        return cls(np.float32(fixed), np.float32(per_nat), np.float32(contrast.threshold))


class Draws(NamedTuple):
    """How tokens are drawn and what ends a row, as arrays: no value compiles anything.

    Attributes:
        temperature, top_p: None: the most likely tokens are taken, by programs that cannot draw and compile sooner.
        most: Tokens of a row.
        contrast: None where a token depends on one pass. Else each row passes through the model twice, side by side: rows 2b
            and 2b + 1 of a pass are row b without and with the masks of the contrast.
    """

    stop_ids: Any
    temperature: Any
    top_p: Any
    most: Any = np.int32(np.iinfo(np.int32).max)
    contrast: Strength | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        stop_ids: Sequence[int] | None,
        temperature: float,
        top_p: float,
        contrast: ContrastDecoding | None = None,
    ) -> "Draws":
        if stop_ids is not None and len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(stop_ids)} stop ids are given; at most {MAX_STOP_IDS} are supported")
        padded = _padded_stop_ids(config.eos_ids if stop_ids is None else stop_ids)
        strength = None if contrast is None else Strength.of(contrast)
        return cls(padded, np.float32(temperature), np.float32(top_p), contrast=strength)

    @property
    def greedy(self) -> "Draws":
        """The same with the most likely tokens."""
        return self._replace(temperature=None, top_p=None)

    @property
    def passes(self) -> int:
        """Rows of a pass for each row."""
        return 1 if self.contrast is None else 2

    def spread(self, x_B: jax.Array) -> jax.Array:
        """The rows [B, ...] as those of a pass."""
        return x_B if self.contrast is None else jnp.repeat(x_B, 2, axis=0)


def used(contrast: ContrastDecoding | None) -> ContrastDecoding | None:
    """The contrast, or None where alpha is 0: plain decoding, by its own program and therefore to the same bits."""
    return None if contrast is None or contrast.alpha == 0 else contrast


def side_by_side(masks: Masks, others: Masks) -> Masks:
    """The masks [2B, ...] of the rows of a pass under contrast, from those of each row without and with the contrast.

    Raises:
        ValueError: Rotary masks of two sites, or heads that stream in two ways.
    """
    sites = {one.rope_site for one in (masks, others) if not is_empty(one.rope_BLHR)}
    if len(sites) > 1:
        raise ValueError(
            f"interventions and contrast mask rotary pairs of different sites ({', '.join(sorted(sites))}): take one"
        )

    def join(a, b):
        xp = np if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else jnp
        shape = np.broadcast_shapes(a.shape, b.shape)
        both = xp.stack([xp.broadcast_to(a, shape), xp.broadcast_to(b, shape)], axis=1)
        return both.reshape(-1, *shape[1:])

    site = sites.pop() if sites else masks.rope_site
    return jax.tree.map(join, *(one.replace(rope_site=site) for one in alike([masks, others])))


def pair_rows(rows: Any) -> Any:
    """i32[2B]: the places of rows i32[B] in arrays whose rows lie side by side."""
    return (2 * rows[:, None] + np.arange(2)).reshape(-1)


def row_keys(seeds_B: jax.Array, rows_B: jax.Array) -> jax.Array:
    """The random key of each row, from a seed and the number of the row under that seed."""
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds_B, rows_B)


def next_tokens(
    config: ModelConfig, params: PyTree, draws: Draws, x_B1E: jax.Array, keys_B: jax.Array | None, step: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """(token i32[B], whether it is a stop id) of each row. x_B1E: last hidden states of the rows of a pass. keys_B: None
    where nothing is drawn. step: of all rows, or of each."""
    scores_BV = unembed(config, params, x_B1E)[:, 0]
    if draws.contrast is not None:
        scores_BV = contrasted(scores_BV.reshape(-1, 2, scores_BV.shape[1]), draws.contrast)
    if keys_B is None:
        token_B = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
    else:
        step_keys_B = jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(step, keys_B.shape))
        token_B = sample(scores_BV, step_keys_B, draws.temperature, draws.top_p)
    return token_B, jnp.isin(token_B, draws.stop_ids)


def contrasted(logits_B2V: jax.Array, strength: Strength) -> jax.Array:
    """f32[B,V]: the scores of `ContrastDecoding`, from logits without and with its masks; implausible tokens have -inf."""
    logp_B2V = jax.nn.log_softmax(logits_B2V, axis=-1)
    plain_BV, masked_BV = logp_B2V[:, 0], logp_B2V[:, 1]
    entropy_B1 = -jnp.sum(jnp.exp(plain_BV) * plain_BV, axis=-1, keepdims=True)
    alpha_B1 = strength.fixed + strength.per_nat * entropy_B1
    plausible_BV = plain_BV >= plain_BV.max(axis=-1, keepdims=True) + jnp.log(strength.threshold)
    return jnp.where(plausible_BV, plain_BV + alpha_B1 * (plain_BV - masked_BV), -jnp.inf)


def sample(logits_BV: jax.Array, keys_B: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """i32[B]: the most likely token at temperature 0, else a draw from the top_p nucleus."""

    def draw():
        scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
        kept_BV = jax.lax.cond(top_p < 1, lambda: _nucleus(scaled_BV, top_p), lambda: scaled_BV)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV)

    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def check_options(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """ValueError for options with which no prompt can be continued."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1]")


def _nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits outside the smallest set of tokens with probability >= top_p at -inf."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    probs_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    keep_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(keep_BV, rank_BV, axis=-1), logits_BV, -jnp.inf)


def _padded_stop_ids(stop_ids: Sequence[int]) -> np.ndarray:
    """i32: padded to a multiple of MAX_STOP_IDS, so that sets of up to as many share one program."""
    slots = -(-max(len(stop_ids), 1) // MAX_STOP_IDS) * MAX_STOP_IDS
    return np.array([*stop_ids] + [NO_STOP] * (slots - len(stop_ids)), np.int32)
