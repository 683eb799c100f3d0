"""Models between two: each head, MLP and norm has the weights of a start model or of the one trained from it, by gates.

The gates are arrays, so one program serves all of them. Where a gate chooses, the weights are taken and not mixed.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float32, Int, PyTree

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import Layers
from retmask_jax.model.interventions import Head
from retmask_jax.model.layers import split_layers, unembed
from retmask_jax.model.masking import normalise
from retmask_jax.model.sharding import STACKED_ROWS, row_parallel
from retmask_jax.model.transformer import Call, check_positions, check_tokens, longest_row, make_call
from retmask_jax.utils.array_types import Array, Lengths, Tokens

_HEADS, _MLPS = "attn", ("mlp", "experts")


class Gates(flax.struct.PyTreeNode):
    """The parts whose weights are those of the trained model (True); all others are the start model's.

    Attributes:
        heads_LH: The q, k, v and o slices of a query head. It reads the keys and values that its own model makes for its
            KV head, also where another query head of that KV head is of the other model.
        mlps_L: The MLP, or the experts with their router.
        norms_L: All norms of a layer, those of queries and keys among them.
        ends: The embedding, the final norm and the output matrix.
    """

    heads_LH: Bool[Array, "L H"]
    mlps_L: Bool[Array, " L"]
    norms_L: Bool[Array, " L"]
    ends: Bool[Array, ""]

    @classmethod
    def of(
        cls, config: ModelConfig, heads: Iterable[Head] = (), mlps: Iterable[int] = (), others: bool = False
    ) -> "Gates":
        """Some heads and the MLPs of some layers; others: also all that is neither, which is norms and embeddings."""
        heads_LH, mlps_L = np.zeros((config.n_layers, config.n_heads), bool), np.zeros(config.n_layers, bool)
        for head in heads:
            heads_LH[head] = True
        mlps_L[list(mlps)] = True
        return cls(heads_LH, mlps_L, np.full(config.n_layers, others), np.array(others))

    def __invert__(self) -> "Gates":
        """The parts that these leave to the start model."""
        return jax.tree.map(lambda gate: ~gate, self)

    def first_group(self, config: ModelConfig, base: bool) -> np.int32:
        """The first group of layers in which not every gate is `base`; the last group where there is none."""
        of_other = jax.tree.map(lambda gate: np.asarray(gate) != base, self)
        if of_other.ends:
            return np.int32(0)
        touched_L = of_other.heads_LH.any(axis=1) | of_other.mlps_L | of_other.norms_L
        first = int(touched_L.argmax()) if touched_L.any() else config.n_layers - 1
        return np.int32(first // len(config.layer_pattern))


def logits(
    config: ModelConfig,
    start: PyTree,
    trained: PyTree,
    gates: Gates,
    tokens: Tokens,
    lengths: Lengths | None = None,
    positions: Int[ArrayLike, "B P"] | None = None,
) -> Float32[jax.Array, "B T V"] | Float32[jax.Array, "B P V"]:
    """As `forward`, of the model between two; a pure function of arrays without a gradient.

    Args:
        start, trained: Parameters of the two models.
        gates: Arrays, which may be traced: no value of them recompiles.

    Raises:
        ValueError: As of `forward`.
    """
    tokens = check_tokens(config, tokens, lengths)
    positions = check_positions(positions, tokens)
    layers = _grafted(config, (start, trained), gates, tokens, longest_row(tokens, lengths))
    return _logits(layers, 0, layers.embed(tokens), positions)


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_BT", results=STACKED_ROWS)
def states(
    config: ModelConfig, params: tuple[PyTree, PyTree], gates: Gates, tokens_BT: jax.Array, longest: jax.Array | int
) -> jax.Array:
    """[R,B,T,E]: the input of each group of layers. params: of the start model and of the trained one."""
    layers = _grafted(config, params, gates, tokens_BT, longest)
    return layers.states(layers.embed(tokens_BT), normalise(config).by_layer(config))


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_BT", "rows_BP", "targets_BP", stacked=("states_RBTE",))
def target_logprobs(
    config: ModelConfig,
    params: tuple[PyTree, PyTree],
    gates: Gates,
    first: jax.Array | int,
    states_RBTE: jax.Array,
    tokens_BT: jax.Array,
    rows_BP: jax.Array,
    targets_BP: jax.Array,
    longest: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """(f32[B,P]: log-probability of targets after the positions rows_BP, bool[B,P]: whether each is the most likely token).

    Args:
        params: Of the start model and of the trained one.
        first: The group from which on the layers are computed, of `Gates.first_group`.
        states_RBTE: `states` with the gates that hold before that group.
    """
    layers = _grafted(config, params, gates, tokens_BT, longest)
    # Of the states before the first group only the embedding is not of the base.
    x_BTE = jnp.where(first == 0, layers.embed(tokens_BT), states_RBTE[first])
    logits_BPV = _logits(layers, first, x_BTE, rows_BP)
    logp_BP = jnp.take_along_axis(jax.nn.log_softmax(logits_BPV), targets_BP[..., None], axis=-1)[..., 0]
    return logp_BP, logits_BPV.argmax(axis=-1) == targets_BP


class _LayerGates(flax.struct.PyTreeNode):
    """The gates of one layer: heads_H, mlp, norms."""

    heads_H: Any
    mlp: Any
    norms: Any


class _Graft(flax.struct.PyTreeNode):
    """The parameters of a block in both models, and the gates that choose among them."""

    start: Any
    trained: Any
    gates: _LayerGates


class _GraftedLayers(Layers):
    """Layers whose blocks are `_Graft`s: the weights of a group are chosen where it is computed."""

    def apply_group(self, pattern, weights, carry, repeat_and_masks, call: Call):
        def apply(config: ModelConfig, carry):
            chosen = {place: _chosen(config, self.config.n_kv_heads, graft) for place, graft in weights.items()}
            plain = Layers(config, {}, self.call)
            return plain.apply_group(pattern, chosen, carry, repeat_and_masks, call)

        kv_heads, heads = self.config.n_kv_heads, self.config.n_heads
        if kv_heads == heads:
            return apply(self.config, carry)
        # Query heads of one KV head that are not of one model read different keys: each then gets keys of its own.
        each_own = dataclasses.replace(self.config, n_kv_heads=heads)
        gates_KG = [graft.gates.heads_H.reshape(kv_heads, -1) for graft in weights.values()]
        mixed = jnp.any(jnp.stack([gate_KG != gate_KG[:, :1] for gate_KG in gates_KG]))
        return jax.lax.cond(mixed, functools.partial(apply, each_own), functools.partial(apply, self.config), carry)


def _grafted(
    config: ModelConfig, params: tuple[PyTree, PyTree], gates: Gates, tokens_BT: jax.Array, longest: jax.Array | int
) -> _GraftedLayers:
    """The layers of the model between two, for a call of rows that begin at position 0."""
    start, trained = params
    by_place = split_layers(config, _LayerGates(*map(jnp.asarray, (gates.heads_LH, gates.mlps_L, gates.norms_L))))
    grafts = {
        part: {i: _Graft(start[part][i], trained[part][i], of_block) for i, of_block in blocks.items()}
        for part, blocks in by_place.items()
    }
    ends = {name: _either(gates.ends, start[name], trained[name]) for name in start if name not in grafts}
    batch, length = tokens_BT.shape
    call = make_call(config, length, None, jnp.full(batch, length), longest)
    return _GraftedLayers(config, ends | grafts, call)


def _logits(layers: Layers, first: jax.Array | int, x_BTE: jax.Array, rows_BP: jax.Array | None) -> jax.Array:
    x_BPE = layers.from_group(first, x_BTE, normalise(layers.config).by_layer(layers.config), rows_BP)
    return unembed(layers.config, layers.params, layers.normed(x_BPE))


def _chosen(config: ModelConfig, kv_heads: int, graft: _Graft) -> PyTree:
    """The weights of a block. kv_heads: of the models; the config may have one for each query head instead."""
    start, trained, gates = graft.start, graft.trained, graft.gates
    chosen = {}
    for name in start:
        gate = gates.mlp if name in _MLPS else gates.norms
        chosen[name] = _either(gate, start[name], trained[name]) if name != _HEADS else {}
    copies = config.n_kv_heads // kv_heads  # of each key and value
    gates_N = {"q": gates.heads_H, "o": gates.heads_H}
    gates_N["k"] = gates_N["v"] = gates.heads_H[:: config.n_heads // config.n_kv_heads]
    for name in start[_HEADS]:
        pair = start[_HEADS][name], trained[_HEADS][name]
        if name in ("k", "v"):
            pair = jax.tree.map(lambda x: _repeated(x, kv_heads, copies), pair)
        if name in gates_N:
            by_head = functools.partial(_by_head, gates_N[name], 0 if name == "o" else -1)
            chosen[_HEADS][name] = jax.tree.map(by_head, *pair)
            continue
        normed = _either(gates.norms, *pair)
        over_heads = name == "k_norm" and config.qk_norm == "projection"
        chosen[_HEADS][name] = jax.tree.map(lambda x: _repeated(x, kv_heads, copies), normed) if over_heads else normed
    return chosen


def _either(gate: ArrayLike, start: PyTree, trained: PyTree) -> PyTree:
    return jax.tree.map(lambda ours, theirs: jnp.where(gate, theirs, ours), start, trained)


def _by_head(gate_N: jax.Array, axis: int, start: jax.Array, trained: jax.Array) -> jax.Array:
    """Weights of which an axis holds the dimensions of N heads, each head's from the model that its gate says."""
    width = start.shape[axis] // len(gate_N)
    gate_W = jnp.repeat(gate_N, width)
    return jnp.where(gate_W if axis == -1 else gate_W[:, None], trained, start)


def _repeated(x: jax.Array, heads: int, copies: int) -> jax.Array:
    """Weights of which the last axis holds the dimensions of heads, with each head so many times."""
    if copies == 1:
        return x
    shape = x.shape[:-1]
    return jnp.repeat(x.reshape(*shape, heads, -1), copies, axis=-2).reshape(*shape, -1)
