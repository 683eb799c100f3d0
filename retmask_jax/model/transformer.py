"""The transformer: blocks scanned over the repeats of the layer pattern, interventions as scanned inputs."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float32, Int, PyTree

from retmask_jax.model.attention import Keys, Probe, Probed, Scores, attend, attend_forked, probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kv_cache import KV, NO_CACHE, Cache
from retmask_jax.model.layers import (
    Embedding,
    Experts,
    Fork,
    GatedMLP,
    Unembedding,
    at_positions,
    dense,
    merge_layers,
    norm,
    scaled,
    unembed,
)
from retmask_jax.model.lora import with_adapters
from retmask_jax.model.masking import LayerMasks, Masks, normalise
from retmask_jax.model.rope import rotate, rotation
from retmask_jax.utils.array_types import Lengths, Tokens


class Hidden(flax.struct.PyTreeNode):
    """x_BTE: final normed states; cache: the updated cache or None; probed: answers [B,P,L,H,...] or None."""

    x_BTE: jax.Array
    cache: Cache | None = None
    probed: Probed | None = None


def forward(
    config: ModelConfig,
    params: PyTree,
    tokens: Tokens,
    lengths: Lengths | None = None,
    interventions: Interventions | None = None,
    positions: Int[ArrayLike, "B P"] | None = None,
) -> Float32[jax.Array, "B T V"] | Float32[jax.Array, "B P V"]:
    """Next-token logits, a pure function of arrays: jit it with `config` static, vmap or differentiate it at will.

    Args:
        tokens: i32[B,T], right-padded.
        lengths: i32[B]. Under causal attention padding on the right cannot reach a real position, so they matter only to
            models whose rotary frequencies depend on the longest row (None: T).
        interventions: What is ablated; None: nothing.
        positions: i32[B,P], the positions to return logits of; None: all.

    Returns:
        f32[B,T,V], or f32[B,P,V] for the positions asked for.

    Raises:
        ValueError: A wrong shape, a length beyond the model's context or a mask that does not fit, before anything is
            compiled.

    >>> import jax, jax.numpy as jnp, retmask_jax as rm
    >>> lm = rm.load("bundled")
    >>> tokens = jnp.array(lm.tokenizer(["<bos> the home of emma : rome . the home of emma :"])["input_ids"])
    >>> rome = tokens[0, 6]
    >>> def logit(gate):
    ...     return rm.forward(lm.config, lm.params, tokens, interventions=rm.Interventions(head_mask=gate))[0, -1, rome]
    >>> importance = -jax.jit(jax.grad(logit))(jnp.zeros((lm.config.n_layers, lm.config.n_heads)))
    >>> importance.shape, int(importance.sum(axis=1).argmax())  # of each head, and the layer that matters most
    ((4, 8), 1)
    """
    tokens = check_tokens(config, tokens, lengths)
    positions = check_positions(positions, tokens)
    masks = normalise(config, interventions, len(tokens))
    return next_logits(config, params, tokens, masks, longest_row(tokens, lengths), positions)


def next_logits(
    config: ModelConfig,
    params: PyTree,
    tokens_BT: jax.Array,
    masks: Masks,
    longest: jax.Array | int | None,
    positions_BP: jax.Array | None = None,
) -> jax.Array:
    """The logits that `forward` returns, from arguments that have been checked."""
    x_BTE = hidden(config, params, tokens_BT, masks, longest=longest).x_BTE
    return unembed(config, params, at_positions(x_BTE, positions_BP))


def hidden(
    config: ModelConfig,
    params: PyTree,
    tokens_BT: jax.Array,
    masks: Masks,
    *,
    cache: Cache | None = None,
    start_B: jax.Array | None = None,
    end_B: jax.Array | None = None,
    probe: Probe | None = None,
    longest: jax.Array | int | None = None,
    fork: Fork | None = None,
    remat: bool = False,
) -> Hidden:
    """Final hidden states of T new positions per row.

    Args:
        cache: Filled with the new positions; None: nothing is cached.
        start_B: The position at which each row continues its cache; None: the rows begin at position 0.
        end_B: The position at which the tokens of each row end; None: at T.
        probe: What to report about attention, for rows among the T.
        longest: Tokens of the longest row, for models whose rotary frequencies depend on it; None: T.
        fork: How the rows fork, without a cache; None: they do not.
        remat: Recompute each block in the backward pass.
    """
    model = transformer(config, remat=remat)
    return cast(Hidden, model.apply({"params": params}, tokens_BT, masks, start_B, end_B, cache, probe, longest, fork))


def transformer(config: ModelConfig, **options: Any) -> nn.Module:
    """The module, with adapters where the config has them. options: further fields of `Transformer`."""
    model = Transformer(config, **options)
    return model if config.lora is None else with_adapters(model, config.lora)


def longest_row(tokens_BT: jax.Array, lengths: Lengths | None) -> jax.Array | int:
    """The largest of lengths, or T where they are None; an array if they are traced."""
    return tokens_BT.shape[1] if lengths is None else jnp.max(jnp.asarray(lengths))


def check_tokens(config: ModelConfig, tokens: Tokens, lengths: Lengths | None = None, new_tokens: int = 0) -> jax.Array:
    """The tokens as an array; ValueError if their shape, type, length or ids do not suit the model."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers of shape (B, T), got {tokens.dtype}{tokens.shape}")
    if tokens.shape[1] + new_tokens > config.max_length:
        raise ValueError(
            f"{tokens.shape[1]} prompt tokens and {new_tokens} new ones exceed the model's context of "
            f"{config.max_length}: shorten the prompt"
        )
    _check_range("tokens", tokens, config.vocab_size)
    if lengths is not None and np.shape(lengths) != tokens.shape[:1]:
        raise ValueError(
            f"lengths has shape {np.shape(lengths)}; {tokens.shape[0]} rows of tokens need ({tokens.shape[0]},)"
        )
    if lengths is not None:
        _check_range("lengths", lengths, tokens.shape[1] + 1)
    return tokens


def check_positions(positions: Int[ArrayLike, "B P"] | None, tokens_BT: jax.Array) -> jax.Array | None:
    """The positions as an array; ValueError if they do not lie within the tokens."""
    if positions is None:
        return None
    positions = jnp.asarray(positions)
    if positions.ndim != 2 or positions.shape[0] != tokens_BT.shape[0]:
        raise ValueError(f"positions has shape {positions.shape}; {tokens_BT.shape[0]} rows of tokens need (B, P)")
    _check_range("positions", positions, tokens_BT.shape[1])
    return positions


class Call(flax.struct.PyTreeNode):
    """What all blocks of one call share.

    Attributes:
        rotations: (cos, sin) by kind of the layers with RoPE.
        start_B: As in `hidden`.
        end_B: As in `hidden`.
        probe: As in `hidden`.
        rows_BP: The positions, among the T, that are needed from the last block of a group (None: all); a probe then asks
            about the same positions.
        fork: As in `hidden`.
    """

    rotations: dict[str, Any]
    start_B: jax.Array | None
    end_B: jax.Array
    probe: Probe | None = None
    rows_BP: jax.Array | None = None
    fork: Fork | None = None

    @property
    def first_B(self) -> jax.Array:
        return jnp.zeros_like(self.end_B) if self.start_B is None else self.start_B


def make_call(
    config: ModelConfig,
    length: int,
    start_B: jax.Array | None,
    end_B: jax.Array,
    longest: jax.Array | int | None = None,
    probe: Probe | None = None,
    fork: Fork | None = None,
) -> Call:
    """The Call of `length` positions per row."""
    call = Call({}, start_B, end_B, probe, fork=fork)
    positions_BT = call.first_B[:, None] + jnp.arange(length) if fork is None else fork.positions(length)
    longest = length if longest is None else longest
    return call.replace(rotations={kind: rotation(config, kind, positions_BT, longest) for kind in config.ropes})


def merge_probed(config: ModelConfig, blocks: PyTree, tail: PyTree) -> PyTree:
    """[B,P,L,H,...]: the answers of all layers, from those of the scanned blocks and of the tail."""
    probed = merge_layers(config, {"blocks": blocks, "tail": tail})
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), probed)


Carry = tuple[jax.Array, dict[str, KV] | None]  # the states x_BTE, and the caches of a group of layers


class Attention(nn.Module):
    """Grouped-query attention with a head mask before o_proj and a rotary mask on q.k.

    Attributes:
        place: Of the block in the layer pattern.
    """

    config: ModelConfig
    place: int

    @nn.compact
    def __call__(
        self, x_BTE: jax.Array, masks: LayerMasks, cache: KV | None, repeat: jax.Array | int, call: Call
    ) -> tuple[jax.Array, KV | None, Probed | None]:
        cfg, kind = self.config, self.config.layer_pattern[self.place]
        wanted_BTE = at_positions(x_BTE, call.rows_BP)
        projected_BTHD = self._project(wanted_BTE, cfg.n_heads, "q")
        k_BTKD = self._project(x_BTE, cfg.n_kv_heads, "k")
        v_BTKD = self._project(x_BTE, cfg.n_kv_heads, "v")
        q_BTHD = masks.mask_queries(projected_BTHD)
        if masks.rope_site == "projection":
            q_BTHD, k_BTKD = masks.mask_query_pairs(q_BTHD), masks.mask_key_pairs(k_BTKD)
        q_BTHD, k_BTKD = self._normed(q_BTHD, "q_norm"), self._normed(k_BTKD, "k_norm")
        if cfg.has_rope(self.place):
            rotations = call.rotations[kind]
            q_BTHD = rotate(q_BTHD, *(at_positions(x, call.rows_BP) for x in rotations))
            k_BTKD = rotate(k_BTKD, *rotations)
        if masks.rope_site == "rotary":
            q_BTHD = masks.mask_query_pairs(q_BTHD)

        keys = Keys.of(k_BTKD, v_BTKD)
        if cache is not None:
            seen, cache = cache.extend(repeat, k_BTKD, v_BTKD, call.first_B, call.end_B)
            keys = keys if call.start_B is None else seen
        scores = Scores.for_layer(cfg, self.place)
        positions_BT = None if call.rows_BP is None else call.first_B[:, None] + call.rows_BP
        if call.fork is None:
            out_BTHD = attend(q_BTHD, keys, scores, call.start_B, cfg.kernel, positions_BT, masks.streams)
        else:
            out_BTHD = attend_forked(q_BTHD, k_BTKD, v_BTKD, call.fork, scores, cfg.kernel, masks.streams)
        out_BTHD = masks.mask_heads(out_BTHD)
        out_BTE = dense(out_BTHD.reshape(*wanted_BTE.shape[:2], -1), cfg.hidden_size, ("heads", "embed"), "o")
        probed = None
        if call.probe is not None:
            asked_BP = call.probe.rows_BP
            q_BPHD, projected_BPHD = (
                x if call.rows_BP is not None else at_positions(x, asked_BP) for x in (q_BTHD, projected_BTHD)
            )
            probed = probe(q_BPHD, call.first_B[:, None] + asked_BP, keys, call.probe, scores, masks.streams)
            if call.probe.projected:
                probed = probed.replace(projected=projected_BPHD.astype(jnp.float32))
        return out_BTE, cache, probed

    def _project(self, x_BTE: jax.Array, heads: int, name: str) -> jax.Array:
        flat = dense(x_BTE, heads * self.config.head_dim, ("embed", "heads"), name, bias=self.config.qkv_bias)
        return flat.reshape(*x_BTE.shape[:2], heads, self.config.head_dim)

    def _normed(self, x_BTHD: jax.Array, name: str) -> jax.Array:
        match self.config.qk_norm:
            case "head":
                return norm(self.config, name)(x_BTHD)
            case "projection":
                return norm(self.config, name)(x_BTHD.reshape(*x_BTHD.shape[:2], -1)).reshape(x_BTHD.shape)
        return x_BTHD


class Block(nn.Module):
    """Attention, then an MLP or experts, each added to the residual stream, with norms before, after or both.

    Attributes:
        place: Of the block in the layer pattern.
    """

    config: ModelConfig
    place: int

    @nn.compact
    def __call__(
        self, x_BTE: jax.Array, masks: LayerMasks, cache: KV | None, repeat: jax.Array | int, call: Call
    ) -> tuple[jax.Array, KV | None, Probed | None]:
        cfg = self.config
        # A single row would be padded to be split, and the padding copied away wherever states are picked from it.
        rows = "batch" if x_BTE.shape[0] > 1 else None
        x_BTE = nn.with_logical_constraint(x_BTE, (rows, "length", "embed_act"))
        attention = Attention(cfg, self.place, name="attn")
        out_BTE, cache, probed = attention(self._before("attn_norm", x_BTE), masks, cache, repeat, call)
        x_BTE = at_positions(x_BTE, call.rows_BP) + self._after("attn_post_norm", out_BTE)
        mlp = Experts(cfg, name="experts") if cfg.has_experts(self.place) else GatedMLP(cfg, name="mlp")
        x_BTE += self._after("mlp_post_norm", mlp(self._before("mlp_norm", x_BTE)))
        return x_BTE, cache, probed

    def _before(self, name: str, x_BTE: jax.Array) -> jax.Array:
        return x_BTE if self.config.norm_placement == "post" else norm(self.config, name)(x_BTE)

    def _after(self, name: str, x_BTE: jax.Array) -> jax.Array:
        x_BTE = x_BTE if self.config.norm_placement == "pre" else norm(self.config, name)(x_BTE)
        return scaled(x_BTE, self.config.residual_scale)


class Group(nn.Module):
    """One repeat of the layer pattern; the body of the scan. block: makes what is called for a block of it."""

    config: ModelConfig
    n_blocks: int
    block: Callable[..., Any] = Block

    @nn.compact
    def __call__(
        self, carry: Carry, per_repeat: tuple[jax.Array | int, dict[str, LayerMasks]], call: Call
    ) -> tuple[Carry, dict[str, Probed | None]]:
        x_BTE, caches = carry
        repeat, masks = per_repeat
        probed = {}
        for place in range(self.n_blocks):
            i = str(place)
            block = self.block(self.config, place, name=i)
            block_call = call if place == self.n_blocks - 1 else call.replace(rows_BP=None)
            x_BTE, cache, probed[i] = block(x_BTE, masks[i], None if caches is None else caches[i], repeat, block_call)
            caches = None if caches is None else caches | {i: cast(KV, cache)}
        return (x_BTE, caches), probed


class Transformer(nn.Module):
    """Embedding, scanned blocks, unrolled tail, final norm. Use it through `forward` and `hidden`."""

    config: ModelConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        masks: Masks,
        start_B: jax.Array | None = None,
        end_B: jax.Array | None = None,
        cache: Cache | None = None,
        probe: Probe | None = None,
        longest: jax.Array | int | None = None,
        fork: Fork | None = None,
    ) -> Hidden:
        cfg, (batch, length) = self.config, tokens_BT.shape
        x_BTE = Embedding(cfg, name="embed")(tokens_BT)
        end_B = jnp.full(batch, length) if end_B is None else end_B
        call = make_call(cfg, length, start_B, end_B, longest, probe, fork)
        by_layer = masks.by_layer(cfg)
        cache = cache or NO_CACHE

        body = nn.remat(Group, prevent_cse=False) if self.remat else Group
        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=cfg.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
            # The check traces all layers once more; without it a seed draws other parameters.
            check_constancy_invariants=self.is_initializing(),
        )
        blocks = scanned(cfg, len(cfg.layer_pattern), name="blocks")
        (x_BTE, block_cache), probed = blocks(
            (x_BTE, cache["blocks"]), (jnp.arange(cfg.repeats), by_layer["blocks"]), call
        )
        tail_cache, tail_probed = cache["tail"], {}
        if cfg.tail:
            tail = body(cfg, len(cfg.tail), name="tail")
            (x_BTE, tail_cache), tail_probed = tail((x_BTE, tail_cache), (0, by_layer["tail"]), call)

        x_BTE = norm(cfg, "norm")(x_BTE)
        if not cfg.tied_embeddings:
            Unembedding(cfg, name="lm_head")()
        cache = None if cache["blocks"] is None else {"blocks": block_cache, "tail": tail_cache}
        return Hidden(x_BTE, cache, None if probe is None else merge_probed(cfg, probed, tail_probed))


def _check_range(name: str, values: ArrayLike | Sequence[int], end: int) -> None:
    """ValueError unless 0 <= values < end. Values that are being traced cannot be checked."""
    if isinstance(values, jax.core.Tracer) or np.size(values) == 0:
        return
    values = np.asarray(values)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= end:
        raise ValueError(f"{name} run from {low} to {high}; they must lie in 0 to {end - 1}")
