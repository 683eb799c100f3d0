"""The transformer: blocks scanned over the repeats of the layer pattern, interventions as scanned inputs."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax.model.attention import Scores, attend, probe_argmax
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.experts import Experts
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.layers import GatedMLP, dense, norm, precision, softcap
from retmask_jax.model.rope import rotate, rotation


@flax.struct.dataclass
class Hidden:
    """x_BTE: final normed states; cache: the updated cache or None; argmax_BPLH: probed keys or None."""

    x_BTE: jax.Array
    cache: Any = None
    argmax_BPLH: jax.Array | None = None


def forward(config: ModelConfig, params, tokens, lengths=None, interventions=None, positions=None):
    """Next-token logits, a pure function of arrays: jit it with `config` static, vmap or differentiate it at will.

    tokens: i32[B,T], right-padded. lengths: i32[B]; under causal attention padding on the right cannot reach a real
    position, so they matter only to models whose rotary frequencies depend on the longest row (None: T).
    interventions: `Interventions` or None.
    Returns f32[B,T,V], or f32[B,P,V] for the rows positions: i32[B,P]. Raises ValueError for a wrong shape, a length
    beyond the model's context or a mask that does not fit, before anything is compiled.
    """
    tokens = check_tokens(config, tokens, lengths)
    x_BTE = hidden(config, params, tokens, interventions, longest=longest_row(tokens, lengths)).x_BTE
    if positions is not None:
        positions = jnp.asarray(positions)
        if positions.ndim != 2 or positions.shape[0] != tokens.shape[0]:
            raise ValueError(f"positions has shape {positions.shape}; {tokens.shape[0]} rows of tokens need (B, P)")
        _check_range("positions", positions, tokens.shape[1])
        x_BTE = jnp.take_along_axis(x_BTE, positions[:, :, None], axis=1)
    return unembed(config, params, x_BTE)


def hidden(config: ModelConfig, params, tokens_BT, interventions=None, *, start_B=None, cache=None, probe_BP=None,
           longest=None, remat: bool = False) -> Hidden:  # fmt: skip
    """Final hidden states of T new positions per row.

    Without start_B the rows begin at position 0 (with a cache: it is filled); with it, T is 1 and row b continues
    its cache at position start_B[b]. probe_BP: query rows whose strongest key is wanted in every layer and head.
    longest: tokens of the longest row, for models whose rotary frequencies depend on it (None: T). remat recomputes
    each block in the backward pass.
    """
    iv = (interventions or Interventions()).fill(config, tokens_BT.shape[0])
    model = Transformer(config, remat=remat, rope_site=iv.rope_site)
    return model.apply({"params": params}, tokens_BT, iv, start_B, cache, probe_BP, longest)


def longest_row(tokens_BT, lengths):
    """The largest of lengths, or T where they are None; an array if they are traced."""
    return tokens_BT.shape[1] if lengths is None else jnp.max(jnp.asarray(lengths))


def unembed(config: ModelConfig, params, x_BTE):
    """Logits in float32, f32[..., V]."""
    table_EV = params["embed"]["embedding"].T if config.tied_embeddings else params["lm_head"]["kernel"]
    logits = jnp.dot(x_BTE, table_EV, precision=precision(x_BTE.dtype), preferred_element_type=jnp.float32)
    return softcap(logits, config.logit_softcap)


def check_tokens(config: ModelConfig, tokens, lengths=None, new_tokens: int = 0):
    """tokens as an array, or ValueError if their shape, type, length or ids do not suit the model."""
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


def split_layers(config: ModelConfig, per_layer):
    """Arrays in absolute layer order [L, ...] as {"blocks": {i: [repeats, ...]}, "tail": {j: [...]}}."""
    period = len(config.layer_pattern)
    scanned = period * config.repeats
    return {
        "blocks": {str(i): jax.tree.map(lambda x: x[i:scanned:period], per_layer) for i in range(period)},
        "tail": {str(j): jax.tree.map(lambda x: x[scanned + j], per_layer) for j in range(len(config.tail))},
    }


def merge_layers(config: ModelConfig, grouped):
    """The inverse of `split_layers` for arrays: [L, ...] in absolute layer order."""
    blocks = jnp.stack([grouped["blocks"][str(i)] for i in range(len(config.layer_pattern))], axis=1)
    tail = [grouped["tail"][str(j)][None] for j in range(len(config.tail))]
    return jnp.concatenate([blocks.reshape(-1, *blocks.shape[2:]), *tail], axis=0)


@flax.struct.dataclass
class Call:
    """What all blocks of one call share. rotations: (cos, sin) by layer kind."""

    rotations: dict[str, Any]
    first_B: jax.Array
    probe_BP: jax.Array | None
    decoding: bool = flax.struct.field(pytree_node=False)


class Attention(nn.Module):
    """Grouped-query attention with a head mask before o_proj and a rotary mask on q.k."""

    config: ModelConfig
    kind: str
    rope_site: str

    @nn.compact
    def __call__(self, x_BTE, masks, cache, repeat, call: Call):
        cfg = self.config
        q_BTHD = self._project(x_BTE, cfg.n_heads, "q")
        k_BTKD = self._project(x_BTE, cfg.n_kv_heads, "k")
        v_BTKD = self._project(x_BTE, cfg.n_kv_heads, "v")
        if self.rope_site == "projection":
            q_BTHD = _drop(q_BTHD, _dims(cfg, masks["rope"]))
            k_BTKD = _drop(k_BTKD, _dims(cfg, _any_of_group(masks["rope"], cfg.n_kv_heads)))
        q_BTHD, k_BTKD = self._normed(q_BTHD, "q_norm"), self._normed(k_BTKD, "k_norm")
        q_BTHD, k_BTKD = (rotate(x, *call.rotations[self.kind]) for x in (q_BTHD, k_BTKD))
        if self.rope_site == "rotary":
            q_BTHD = _drop(q_BTHD, _dims(cfg, masks["rope"]))

        k_BKSD, v_BKSD = k_BTKD.swapaxes(1, 2), v_BTKD.swapaxes(1, 2)
        if cache is not None:
            cache = cache.write(repeat, k_BTKD, v_BTKD, call.first_B)
            if call.decoding:
                k_BKSD, v_BKSD = cache.read(repeat)
        scores = Scores(cfg.attention_scale, cfg.window if self.kind == "sliding" else None, cfg.attention_softcap)
        out_BTHD = attend(q_BTHD, k_BKSD, v_BKSD, scores, call.first_B if call.decoding else None)
        out_BTHD = _drop(out_BTHD, masks["head"][:, :, None])
        out_BTE = dense(out_BTHD.reshape(*x_BTE.shape[:2], -1), cfg.hidden_size, ("heads", "embed"), "o")
        argmax_BPH = None
        if call.probe_BP is not None:
            argmax_BPH = probe_argmax(q_BTHD, k_BKSD, call.probe_BP, call.first_B, scores)
        return out_BTE, cache, argmax_BPH

    def _project(self, x_BTE, heads: int, name: str):
        flat = dense(x_BTE, heads * self.config.head_dim, ("embed", "heads"), name, bias=self.config.qkv_bias)
        return flat.reshape(*x_BTE.shape[:2], heads, self.config.head_dim)

    def _normed(self, x_BTHD, name: str):
        match self.config.qk_norm:
            case "head":
                return norm(self.config, name)(x_BTHD)
            case "projection":
                return norm(self.config, name)(x_BTHD.reshape(*x_BTHD.shape[:2], -1)).reshape(x_BTHD.shape)
        return x_BTHD


class Block(nn.Module):
    """Attention, then an MLP or experts, each added to the residual stream, with norms before, behind or both.

    place: of the block in the layer pattern.
    """

    config: ModelConfig
    place: int
    rope_site: str

    @nn.compact
    def __call__(self, x_BTE, masks, cache, repeat, call: Call):
        cfg = self.config
        x_BTE = nn.with_logical_constraint(x_BTE, ("batch", "length", "embed_act"))
        attention = Attention(cfg, cfg.layer_pattern[self.place], self.rope_site, name="attn")
        out_BTE, cache, argmax = attention(self._before("attn_norm", x_BTE), masks, cache, repeat, call)
        x_BTE += self._behind("attn_post_norm", out_BTE)
        mlp = Experts(cfg, name="experts") if cfg.has_experts(self.place) else GatedMLP(cfg, name="mlp")
        x_BTE += self._behind("mlp_post_norm", mlp(self._before("mlp_norm", x_BTE)))
        return x_BTE, cache, argmax

    def _before(self, name: str, x_BTE):
        return x_BTE if self.config.norm_placement == "post" else norm(self.config, name)(x_BTE)

    def _behind(self, name: str, x_BTE):
        return x_BTE if self.config.norm_placement == "pre" else norm(self.config, name)(x_BTE)


class Group(nn.Module):
    """One repeat of the layer pattern; the body of the scan."""

    config: ModelConfig
    rope_site: str
    n_blocks: int

    @nn.compact
    def __call__(self, carry, per_repeat, call: Call):
        x_BTE, caches = carry
        repeat, masks = per_repeat
        argmax = {}
        for place in range(self.n_blocks):
            i = str(place)
            block = Block(self.config, place, self.rope_site, name=i)
            x_BTE, cache, argmax[i] = block(x_BTE, masks[i], caches and caches[i], repeat, call)
            caches = caches and caches | {i: cache}
        return (x_BTE, caches), argmax


class Transformer(nn.Module):
    """Embedding, scanned blocks, unrolled tail, final norm. Use it through `forward` and `hidden`."""

    config: ModelConfig
    remat: bool = False
    rope_site: str = "rotary"

    @nn.compact
    def __call__(self, tokens_BT, interventions, start_B=None, cache=None, probe_BP=None, longest=None) -> Hidden:
        cfg = self.config
        x_BTE = Embedding(cfg, name="embed")(tokens_BT)
        first_B = jnp.zeros(tokens_BT.shape[0], jnp.int32) if start_B is None else start_B
        positions_BT = first_B[:, None] + jnp.arange(tokens_BT.shape[1])
        longest = tokens_BT.shape[1] if longest is None else longest
        rotations = {kind: rotation(cfg, kind, positions_BT, longest) for kind in cfg.ropes}
        call = Call(rotations, first_B, probe_BP, decoding=start_B is not None)
        masks = split_layers(cfg, {
            "head": _layers_first(interventions.head_mask, 2), "rope": _layers_first(interventions.rope_mask, 3),
        })  # fmt: skip
        cache = cache or {"blocks": None, "tail": None}

        body = nn.remat(Group, prevent_cse=False) if self.remat else Group
        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=cfg.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        blocks = scanned(cfg, self.rope_site, len(cfg.layer_pattern), name="blocks")
        (x_BTE, block_cache), argmax = blocks(
            (x_BTE, cache["blocks"]), (jnp.arange(cfg.repeats), masks["blocks"]), call
        )
        tail_cache, tail_argmax = cache["tail"], {}
        if cfg.tail:
            tail = body(cfg, self.rope_site, len(cfg.tail), name="tail")
            (x_BTE, tail_cache), tail_argmax = tail((x_BTE, tail_cache), (0, masks["tail"]), call)

        x_BTE = norm(cfg, "norm")(x_BTE)
        if not cfg.tied_embeddings:
            Unembedding(cfg, name="lm_head")()
        argmax_BPLH = None
        if probe_BP is not None:
            argmax_BPLH = jnp.moveaxis(merge_layers(cfg, {"blocks": argmax, "tail": tail_argmax}), 0, 2)
        cache = None if cache["blocks"] is None else {"blocks": block_cache, "tail": tail_cache}
        return Hidden(x_BTE, cache, argmax_BPLH)


class Embedding(nn.Module):
    """Rows of the table [V, E], times the model's embedding scale."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        x_BTE = self.param("embedding", init, (self.config.vocab_size, self.config.hidden_size))[tokens_BT]
        scale = self.config.embed_scale
        return x_BTE if scale is None else x_BTE * jnp.asarray(scale, x_BTE.dtype)


class Unembedding(nn.Module):
    """Declares the output matrix [E, V], which `unembed` applies to the rows that are wanted."""

    config: ModelConfig

    @nn.compact
    def __call__(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "vocab"))
        return self.param("kernel", init, (self.config.hidden_size, self.config.vocab_size))


def _check_range(name: str, values, end: int) -> None:
    """ValueError unless 0 <= values < end; values that are being traced cannot be looked at."""
    if isinstance(values, jax.core.Tracer) or np.size(values) == 0:
        return
    values = np.asarray(values)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= end:
        raise ValueError(f"{name} run from {low} to {high}; they must lie in 0 to {end - 1}")


def _layers_first(mask, shared_ndim: int):
    """[L, ...] -> [L, 1, ...] and [B, L, ...] -> [L, B, ...]: what a block sees has a row axis to broadcast."""
    return mask[:, None] if mask.ndim == shared_ndim else jnp.swapaxes(mask, 0, 1)


def _drop(x_BTHD, mask_BHD):
    """x with masked entries zero; a float mask is a gate. mask_BHD broadcasts over rows and widths."""
    mask_BTHD = mask_BHD[:, None]
    if mask_BHD.dtype == jnp.bool_:
        return jnp.where(mask_BTHD, jnp.zeros((), x_BTHD.dtype), x_BTHD)
    return x_BTHD * (1 - mask_BTHD).astype(x_BTHD.dtype)


def _dims(config: ModelConfig, mask_BHR):
    """Rotary pair r is the dimensions r and r + R; those behind 2R are never rotated nor masked."""
    unrotated = jnp.zeros((*mask_BHR.shape[:-1], config.head_dim - 2 * config.n_pairs), mask_BHR.dtype)
    return jnp.concatenate([mask_BHR, mask_BHR, unrotated], axis=-1)


def _any_of_group(mask_BHR, kv_heads: int):
    """The mask of a KV head: the union (for gates, the maximum) over the query heads that share it."""
    return mask_BHR.reshape(mask_BHR.shape[0], kv_heads, -1, mask_BHR.shape[-1]).max(axis=2)
