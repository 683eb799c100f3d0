"""The forward pass group by group: for work that begins at a late layer, needs few positions of the last layer, or adds
one token. For inference only: the loop over groups has no gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from retmask_jax.model.attention import Probe, Probed
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.kv_cache import NO_CACHE, Cache
from retmask_jax.model.layers import Embedding, norm
from retmask_jax.model.masking import ByLayer, LayerMasks, Masks
from retmask_jax.model.transformer import Block, Call, Carry, Group, Hidden, make_call, merge_probed


@dataclasses.dataclass(frozen=True)
class Layers:
    """The groups of a model in one call. A carry is (x_BTE, the caches of the group or None)."""

    config: ModelConfig
    params: Any
    call: Call

    @property
    def before_last(self) -> int:
        """Repeats of the pattern before the last group, which is the tail where there is one."""
        return self.config.repeats if self.config.tail else self.config.repeats - 1

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        return cast(jax.Array, Embedding(self.config).apply({"params": self.params["embed"]}, tokens_BT))

    def through(
        self, r: jax.Array | int, carry: Carry, masks: ByLayer, call: Call | None = None
    ) -> tuple[Carry, PyTree]:
        """(carry after repeat r, what it probed). call: used for this repeat instead of the usual one."""
        of_r = functools.partial(jax.lax.dynamic_index_in_dim, index=r, keepdims=False, allow_negative_indices=False)
        weights, masks = jax.tree.map(of_r, (self.params["blocks"], masks["blocks"]))
        return self.apply_group(self.config.layer_pattern, weights, carry, (r, masks), call or self.call)

    def through_first(self, carry: Carry, masks: ByLayer, n: int) -> tuple[Carry, PyTree]:
        """(carry after the first n repeats, what they probed [n, ...]).

        The loop counts the repeats itself: XLA then knows where the weights of each lie, and on a GPU reads them in place instead
        of copying them first.
        """
        if self.call.probe is None:
            probed = dict.fromkeys(map(str, range(len(self.config.layer_pattern))))
        else:
            one = jax.eval_shape(lambda carry: self.through(0, carry, masks)[1], carry)
            probed = jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape), leaf.dtype), one)

        def step(state):
            r, carry, probed = state
            carry, new = self.through(r, carry, masks)
            return r + 1, carry, jax.tree.map(lambda all_R, of_r: all_R.at[r].set(of_r), probed, new)

        if n == 0:  # what has no entries cannot be written into, in a loop that never runs either
            return carry, probed
        return jax.lax.while_loop(lambda state: state[0] < n, step, (jnp.int32(0), carry, probed))[1:]

    def states(self, x_BTE: jax.Array, masks: ByLayer) -> jax.Array:
        """[R,B,T,E]: the input of each group, from the embedded tokens on, for work that begins at a later group."""
        return self.states_and_caches((x_BTE, None), masks)[0]

    def states_and_caches(self, carry: Carry, masks: ByLayer) -> tuple[jax.Array, Any]:
        """(`states`, the caches of the groups before the last, filled), from the embedded tokens and empty caches."""

        def step(carry: Carry, r):
            return self.through(r, carry, masks)[0], carry[0]

        (x_BTE, caches), before_RBTE = jax.lax.scan(step, carry, jnp.arange(self.before_last))
        return jnp.concatenate([before_RBTE, x_BTE[None]]), caches

    def rows_from_group(
        self, start: jax.Array, x_BTE: jax.Array, cache: Cache, masks: ByLayer, rows_BP: jax.Array
    ) -> "HiddenRows":
        """As `hidden_rows`, from the input of group `start` and the caches of those before it."""
        x_BTE, blocks = self._up_to_last(start, (x_BTE, cache["blocks"]), masks)
        (x_BPE, last), _ = self.last((x_BTE, cache["tail"] if self.config.tail else blocks), masks, rows_BP)
        blocks, tail = (blocks, last) if self.config.tail else (last, cache["tail"])
        return HiddenRows.of(self, x_BPE, {"blocks": blocks, "tail": tail})

    def from_group(
        self, start: jax.Array | int, x_BTE: jax.Array, masks: ByLayer, rows_BP: jax.Array | None = None
    ) -> jax.Array:
        """Final states x_BPE before their norm, from the input of group `start`; rows_BP as in `last`."""
        return self.last(self._up_to_last(start, (x_BTE, None), masks), masks, rows_BP)[0][0]

    def last(self, carry: Carry, masks: ByLayer, rows_BP: jax.Array | None) -> tuple[Carry, PyTree]:
        """The last group: ((final states x_BPE of rows_BP before their norm, cache of the group), what it probed).

        The last layer computes the keys and values of all positions, but everything else only for the positions asked for.
        """
        call = self.call.replace(rows_BP=rows_BP)
        return self.tail(carry, masks, call) if self.config.tail else self.through(self.before_last, carry, masks, call)

    def tail(self, carry: Carry, masks: ByLayer, call: Call | None = None) -> tuple[Carry, PyTree]:
        return self.apply_group(self.config.tail, self.params["tail"], carry, (0, masks["tail"]), call or self.call)

    def apply_group(
        self,
        pattern: tuple[str, ...],
        weights: PyTree,
        carry: Carry,
        repeat_and_masks: tuple[jax.Array | int, dict[str, LayerMasks]],
        call: Call,
    ) -> tuple[Carry, PyTree]:
        """(carry after one group with these weights, what it probed). A subclass may make the weights from more than one."""
        repeat, masks = repeat_and_masks
        group = Group(self.config, len(pattern), functools.partial(_block_of, weights))
        return group.apply({}, carry, (jnp.int32(repeat), masks), call)

    def normed(self, x_BPE: jax.Array) -> jax.Array:
        return cast(jax.Array, norm(self.config, None).apply({"params": self.params["norm"]}, x_BPE))

    def _up_to_last(self, start: jax.Array | int, carry: Carry, masks: ByLayer) -> Carry:
        """The carry after the groups from `start` on, without the last."""
        return jax.lax.fori_loop(start, self.before_last, lambda r, carry: self.through(r, carry, masks)[0], carry)


def _block_of(weights: PyTree, config: ModelConfig, place: int, name: str) -> Callable[..., Any]:
    """What a Group calls for a block, in place of a Block that declares its weights."""
    return functools.partial(_through_block, config, config.first_like(place), weights[name])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _through_block(config, place, weights, x_BTE, masks, cache, repeat, call):
    """A Block. Under jit, so that it is traced once for all places that are alike and wherever a program has it again."""
    return Block(config, place, parent=None).apply({"params": weights}, x_BTE, masks, cache, repeat, call)


class HiddenRows(flax.struct.PyTreeNode):
    """What a pass gives for some positions of each row.

    Attributes:
        x_BPE: Final normed states.
        rms_BP: f32, what the final norm divided the states by.
        cache: The updated cache, or None.
        probed: Answers [B,P,L,H,...] of a probe, or None.
    """

    x_BPE: jax.Array
    rms_BP: jax.Array
    cache: Cache | None = None
    probed: Probed | None = None

    @classmethod
    def of(cls, layers: Layers, x_BPE: jax.Array, cache: Cache | None, probed: Probed | None = None) -> "HiddenRows":
        """From the states before the final norm."""
        squares_BP = jnp.mean(jnp.square(x_BPE.astype(jnp.float32)), axis=-1)
        return cls(layers.normed(x_BPE), jnp.sqrt(squares_BP + layers.config.norm_eps), cache, probed)


def next_hidden(
    config: ModelConfig,
    params: PyTree,
    token_B: jax.Array,
    masks: Masks,
    *,
    cache: Cache,
    start_B: jax.Array,
    probe: Probe | None = None,
    longest: jax.Array | int | None = None,
) -> Hidden:
    """As `hidden`, for one new token per row, which continues the cache at position start_B[b]; a probe asks about it."""
    layers = Layers(config, params, make_call(config, 1, start_B, start_B + 1, longest, probe))
    by_layer, carry = masks.by_layer(config), (layers.embed(token_B[:, None]), cache["blocks"])
    (x_B1E, blocks), probed = layers.through_first(carry, by_layer, config.repeats)
    tail, tail_probed = cache["tail"], {}
    if config.tail:
        (x_B1E, tail), tail_probed = layers.tail((x_B1E, tail), by_layer)
    probed = None if probe is None else merge_probed(config, probed, tail_probed)
    return Hidden(layers.normed(x_B1E), {"blocks": blocks, "tail": tail}, probed)


def hidden_rows(
    config: ModelConfig,
    params: PyTree,
    tokens_BT: jax.Array,
    masks: Masks,
    rows_BP: jax.Array,
    *,
    cache: Cache | None = None,
    start_B: jax.Array | None = None,
    end_B: jax.Array | None = None,
    probe: Probe | None = None,
    longest: jax.Array | int | None = None,
) -> HiddenRows:
    """As `hidden`, but only for the positions rows_BP i32[B,P] among the T; a probe asks about the same positions."""
    if config.lora is not None:
        raise ValueError("a model with adapters cannot generate: merge them first (retmask_jax.model.lora.merged)")
    batch, length = tokens_BT.shape
    end_B = jnp.full(batch, length) if end_B is None else end_B
    layers = Layers(config, params, make_call(config, length, start_B, end_B, longest, probe))
    by_layer = masks.by_layer(config)
    cache = cache or NO_CACHE
    carry = layers.embed(tokens_BT), cache["blocks"]
    (x_BTE, blocks), probed = layers.through_first(carry, by_layer, layers.before_last)
    (x_BPE, last_cache), last_probed = layers.last((x_BTE, cache["tail"] if config.tail else blocks), by_layer, rows_BP)
    if config.tail:
        tail, tail_probed = last_cache, last_probed
    else:
        blocks, tail, tail_probed = last_cache, cache["tail"], {}
        probed = jax.tree.map(lambda first, last: jnp.concatenate([first, last[None]]), probed, last_probed)
    cache = None if blocks is None else {"blocks": blocks, "tail": tail}
    probed = None if probe is None else merge_probed(config, probed, tail_probed)
    return HiddenRows.of(layers, x_BPE, cache, probed)
