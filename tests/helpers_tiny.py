"""A tiny model of random weights whose heads copy what they look at, and a slow reference of it.

The reference is written from the equations: one row, no cache, no scan, no chunks. It runs in NumPy
(float64), or in jax.numpy where its gradient is wanted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax.data import tiny_language as tl
from retmask_jax.generation.language_model import LanguageModel, from_params
from retmask_jax.model.config import ModelConfig, Rope

CONFIG = ModelConfig(
    vocab_size=len(tl.VOCABULARY),
    hidden_size=32,
    mlp_size=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    max_length=512,
    tied_embeddings=True,
    rope=Rope(theta=100.0),
    bos_id=tl.BOS,
    eos_ids=(tl.EOS,),
    pad_id=tl.PAD,
)
# Shapes that all tests share, so that they share compiled programs too: prompts of at most 64 tokens.
BATCH, NEW = 4, 8
# More heads than a random model needs: here only indices count, nothing is computed.
WIDE = ModelConfig(
    vocab_size=8, hidden_size=8, mlp_size=8, n_layers=3, n_heads=12, n_kv_heads=3, head_dim=16, max_length=64
)
WIDE_HEADS = [(2, 7), (0, 1), (2, 0), (2, 11)]
# How strongly each head writes: one head of the last layer has the last word.
_GAIN_LH = np.array([[0.05, 0.03, 0.05, 0.03], [1.5, 0.4, 0.5, 0.3]])


def copying_params(seed: int = 0, config: ModelConfig = CONFIG, sharpness: float = 2.0):
    """f32 parameters: attention is peaked, and a head writes the embedding of what it attends to.

    So the model repeats tokens of its prompt, though no training taught it which.
    """
    rng = np.random.default_rng(seed)
    layers, width, heads, kv_heads = config.n_layers, config.hidden_size, config.n_heads, config.n_kv_heads

    def normal(*shape, scale):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    v_LEKD = np.stack(
        [
            [np.linalg.qr(rng.standard_normal((width, config.head_dim)))[0] for _ in range(kv_heads)]
            for _ in range(layers)
        ]
    ).swapaxes(1, 2)
    o_LHDE = np.repeat(v_LEKD, heads // kv_heads, axis=2).transpose(0, 2, 3, 1)
    block = {
        "attn": {
            "q": {"kernel": normal(layers, width, heads * config.head_dim, scale=sharpness / width**0.5)},
            "k": {"kernel": normal(layers, width, kv_heads * config.head_dim, scale=sharpness / width**0.5)},
            "v": {"kernel": v_LEKD.reshape(layers, width, -1).astype(np.float32)},
            "o": {"kernel": (_GAIN_LH[..., None, None] * o_LHDE).reshape(layers, -1, width).astype(np.float32)},
        },
        "mlp": {
            "gate": {"kernel": normal(layers, width, config.mlp_size, scale=0.2)},
            "up": {"kernel": normal(layers, width, config.mlp_size, scale=0.2)},
            "down": {"kernel": normal(layers, config.mlp_size, width, scale=0.03)},
        },
        "attn_norm": {"scale": 1 + normal(layers, width, scale=0.1)},
        "mlp_norm": {"scale": 1 + normal(layers, width, scale=0.1)},
    }
    embedding_VE = normal(config.vocab_size, width, scale=1)
    params = {
        # Rows of one length: else a token wins because it is long, not because it was copied.
        "embed": {"embedding": embedding_VE / np.linalg.norm(embedding_VE, axis=1, keepdims=True)},
        "blocks": {"0": block},
        "norm": {"scale": 1 + normal(width, scale=0.1)},
    }
    return jax.tree.map(jnp.asarray, params)


@functools.cache
def copying_lm(seed: int = 0) -> LanguageModel:
    """The model above with the tiny language's tokenizer."""
    return from_params(CONFIG, copying_params(seed), tl.build_tokenizer())


def true_at(mask):
    """Indices at which a mask is True."""
    return {tuple(map(int, index)) for index in np.argwhere(np.asarray(mask))}


def in_float64(params):
    """The parameters as NumPy float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def reference(
    params,
    tokens_T,
    head_mask=None,
    rope_mask=None,
    config=CONFIG,
    xp=np,
    kept=None,
    head_mean=None,
    query_mask=None,
    query_mean=None,
    queries=None,
    streams=None,
):
    """(logits [T, V], attention weights [L, H, T, T]) of one row of tokens.

    head_mask, query_mask: bool, or a float gate. head_mean, query_mean: [L, H, D], what a masked head writes, or asks.
    streams: (bool or gates [L, H], sink, window) of streaming heads. kept: a list that gets the values [T, K, D] of each
    layer, and the final states before their norm. queries: one that gets the queries [T, H, D] of each layer before they
    are replaced and turned.
    """
    length, heads, half = len(tokens_T), config.n_heads, config.head_dim // 2
    frequency_R = config.rope.theta ** -(np.arange(half) / half)
    angle_T1R = np.arange(length)[:, None, None] * frequency_R
    causal_TS = np.tril(np.ones((length, length), bool))
    x_TE, attention = params["embed"]["embedding"][tokens_T], []
    for layer in range(config.n_layers):
        block = jax.tree.map(lambda w, i=layer: w[i], params["blocks"]["0"])
        h_TE = _norm(x_TE, block["attn_norm"]["scale"], config, xp)
        q_THD, k_TKD, v_TKD = (
            (h_TE @ block["attn"][name]["kernel"]).reshape(length, -1, config.head_dim) for name in "qkv"
        )
        if queries is not None:
            queries.append(q_THD)
        if query_mask is not None:
            gate_H1 = np.asarray(query_mask)[layer][:, None] * 1.0
            q_THD = (1 - gate_H1) * q_THD + gate_H1 * (0.0 if query_mean is None else query_mean[layer])
        q_THD, k_TKD = _turn(q_THD, angle_T1R, xp), _turn(k_TKD, angle_T1R, xp)
        if rope_mask is not None:
            q_THD = q_THD * np.tile(~np.asarray(rope_mask)[layer], 2)
        out_TE = 0.0
        if kept is not None:
            kept.append(v_TKD)
        for head in range(heads):
            kv = head // (heads // config.n_kv_heads)
            scores_TS = q_THD[:, head] @ k_TKD[:, kv].T / config.head_dim**0.5
            weights_TS = xp.exp(scores_TS - scores_TS.max(axis=-1, keepdims=True)) * causal_TS
            if streams is not None:
                gate_LH, sink, window = streams
                t, s = np.indices((length, length))
                weights_TS = weights_TS * (1 - gate_LH[layer][head] * ((s >= sink) & (s <= t - window)))
            weights_TS = weights_TS / weights_TS.sum(axis=-1, keepdims=True)
            attention.append(weights_TS)
            gate = 1.0 if head_mask is None else 1.0 - head_mask[layer][head]
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            o_DE = block["attn"]["o"]["kernel"][rows]
            out_TE = out_TE + gate * (weights_TS @ v_TKD[:, kv] @ o_DE)
            if head_mean is not None:
                out_TE = out_TE + (1 - gate) * (head_mean[layer, head] @ o_DE)
        x_TE = x_TE + out_TE
        h_TE, mlp = _norm(x_TE, block["mlp_norm"]["scale"], config, xp), block["mlp"]
        gate_TM = h_TE @ mlp["gate"]["kernel"]
        x_TE = x_TE + (gate_TM / (1 + xp.exp(-gate_TM)) * (h_TE @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    if kept is not None:
        kept.append(x_TE)
    logits_TV = _norm(x_TE, params["norm"]["scale"], config, xp) @ params["embed"]["embedding"].T
    return logits_TV, xp.stack(attention).reshape(config.n_layers, heads, length, length)


def reference_logprob(params, tokens_T, counted_T, xp=np):
    """Sum over counted positions t of log p(token t | the tokens before it)."""
    logits_TV, _ = reference(params, tokens_T, xp=xp)
    shifted_TV = logits_TV - logits_TV.max(axis=-1, keepdims=True)
    logp_TV = shifted_TV - xp.log(xp.exp(shifted_TV).sum(axis=-1, keepdims=True))
    logp_T = logp_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]]  # row t - 1 predicts token t
    return (logp_T * counted_T[1:]).sum()


def reference_answer(params64, prompt, n_steps, stop_ids=(), **masks):
    """Greedy decoding, the whole row anew for each token: (tokens, strongest keys [n, L, H])."""
    row, strongest = list(prompt), []
    for _ in range(n_steps):
        logits_TV, attention = reference(params64, np.array(row), **masks)
        token = int(logits_TV[-1].argmax())
        if token in stop_ids:
            break
        strongest.append(attention[:, :, -1].argmax(axis=-1))
        row.append(token)
    return row[len(prompt) :], np.array(strongest).reshape(-1, CONFIG.n_layers, CONFIG.n_heads)


def _norm(x, scale, config, xp):
    return x / xp.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * scale


def _turn(x_THD, angle_T1R, xp):
    """Dimensions r and r + R are the real and imaginary part of a number that turns."""
    half = x_THD.shape[-1] // 2
    a, b = x_THD[..., :half], x_THD[..., half:]
    cos, sin = np.cos(angle_T1R), np.sin(angle_T1R)
    return xp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
