"""The same numbers as transformers on torch (stored, and live), and as a float64 reference."""

import dataclasses

import numpy as np
import pytest
from conftest import PART_ROTATE, STORED, VARIANTS
from safetensors.numpy import load_file

from retmask_jax.generation.language_model import load
from retmask_jax.model.config import Rope
from retmask_jax.model.interventions import Interventions

MASKS = {
    "logits": (),
    "logits_heads": ("head_mask",),
    "logits_rotary": ("rope_mask",),
    "logits_projection": ("rope_mask",),
    "logits_queries": ("query_mask", "query_mean"),
}


# These differ in what a cache, a compiled loop or a projection can get wrong: frequencies that depend on the length,
# soft caps and windows in turn, the plain model, experts, layers without RoPE. Where a test needs a program of its own
# for every checkpoint, the others come with `make test-slow`.
DECODED = ("dynamic", "gqa_tied", "mixtral_window", "smollm3_window")
PROJECTED = ("gemma2", "gqa_tied", "mixtral_window", "qwen2_window_yarn")
# A norm per head and one over the projection, biases, one matrix for q, k and v with half a head rotated, no RoPE.
QUERIED = ("gemma3_short", "gqa_tied", "olmo2_gqa", "phi3_longrope", "qwen2", "smollm3")


def _others_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


ROTATING = [name for name in VARIANTS if name not in PART_ROTATE]


@pytest.mark.parametrize("stored", ("logits", "logits_heads"))
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree_with_torch(read_golden, name, stored, close):
    golden = read_golden(name)
    masks = {mask: getattr(golden, mask) for mask in MASKS[stored]}
    close(golden.compute(**masks), getattr(golden, stored))


@pytest.mark.parametrize("name", _others_slow(VARIANTS, QUERIED))
def test_logits_with_replaced_queries_agree_with_torch(read_golden, name, close):
    golden = read_golden(name)
    close(golden.compute(query_mask=golden.query_mask, query_mean=golden.query_mean), golden.logits_queries)


@pytest.mark.parametrize("name", ROTATING)
def test_logits_without_rotary_pairs_agree_with_torch(read_golden, name, close):
    golden = read_golden(name)
    close(golden.compute(rope_mask=golden.rope_mask), golden.logits_rotary)


@pytest.mark.parametrize("name", _others_slow(ROTATING, PROJECTED))
def test_logits_masked_in_the_projection_agree_with_torch(read_golden, name, close):
    golden = read_golden(name)
    close(golden.compute(rope_mask=golden.rope_mask, rope_site="projection"), golden.logits_projection)


def test_the_stored_masks_change_the_logits(golden):
    """Without this, the comparisons above would pass on masks that do nothing."""
    rotating = golden.name not in PART_ROTATE
    pairs = [("logits", name) for name, masks in MASKS.items() if masks and (rotating or masks != ("rope_mask",))]
    if rotating and golden.lm.config.n_heads > golden.lm.config.n_kv_heads:  # else both sites are the same thing
        pairs.append(("logits_rotary", "logits_projection"))
    for a, b in pairs:
        difference = np.abs(getattr(golden, a) - getattr(golden, b)).max()
        assert difference > 1e-3 * np.abs(golden.logits).max(), f"{a} and {b} are the same"


@pytest.mark.parametrize("name", _others_slow(VARIANTS, DECODED))
def test_greedy_tokens_agree_with_torch(read_golden, name):
    golden = read_golden(name)
    rows, length = golden.tokens.shape
    new = golden.greedy.shape[1]
    out = golden.lm.generate(golden.tokens, np.full(rows, length), new, stop_ids=())
    np.testing.assert_array_equal(out.tokens, golden.greedy)


# What a family has beyond the plain model. Without it, the logits must be others: else the comparisons above would
# not notice that it is missing.
WITHOUT = {
    "dynamic": [{"rope": Rope(theta=500.0)}],
    "gemma2": [
        {"attention_softcap": None},
        {"logit_softcap": None},
        {"norm_offset": 0.0},
        {"query_scale": None},
        {"embed_scale": None},
        {"window": 10},
        {"layer_pattern": ("full", "sliding")},
        {"activation": "silu"},
    ],
    "gemma3": [{"sliding_rope": None}, {"window": 6}, {"query_scale": None}],
    "gemma3_images": [
        {"sliding_rope": None},
        {"window": 6},
        {"query_scale": None},
        {"layer_pattern": ("full", "sliding")},
    ],
    "granite": [{name: None} for name in ("embed_scale", "residual_scale", "query_scale", "logit_scale")],
    "granite_mqa": [{"residual_scale": None}, {"logit_scale": None}, {"query_scale": 1.0}],
    "linear": [{"rope": Rope(theta=1e4)}],
    "llama3_mqa": [{"rope": Rope(theta=1e4)}],
    "mistral_window": [{"window": 6}, {"window": 8}],
    "mixtral": [{"normalise_router": False}, {"experts_per_token": 3}],
    "olmo3": [{"sliding_rope": Rope("linear", 900.0, 2.0)}, {"rope": Rope(theta=900.0)}, {"window": 7}],
    "phi3_longrope": [{"rope": Rope(theta=700.0)}],
    "phi3_shortrope": [{"rope": Rope(theta=700.0)}],
    "qwen2_window_yarn": [{"window": 4}, {"rope": Rope(theta=300.0)}],
    "qwen3_moe": [{"normalise_router": False}],
    "smollm3": [{"rope_pattern": (True,)}, {"rope_pattern": (True, False, True)}],
    "smollm3_window": [{"rope_pattern": (True,)}, {"window": 5}, {"rope": Rope(theta=300.0)}],
    "qwen3_moe_tied": [{"normalise_router": True}],
}


@pytest.mark.slow
@pytest.mark.parametrize("name, without", [(name, fields) for name, cases in WITHOUT.items() for fields in cases])
def test_what_a_family_has_of_its_own_matters(read_golden, name, without):
    golden = read_golden(name)
    config = dataclasses.replace(golden.lm.config, **without)
    other = golden.lm.replace(config=config).logits(golden.tokens)[:, STORED]
    assert np.abs(other - golden.logits).max() > 1e-3 * np.abs(golden.logits).max()  # ten times what parity allows


@pytest.mark.parametrize("name", ["gqa_tied", "gemma3", "qwen3_moe"])
def test_a_fresh_checkpoint_agrees_with_torch(tmp_path, close, name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import make_golden

    family, changes = make_golden.VARIANTS[name]
    changes = changes | {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}
    model = make_golden.build(family, changes, seed=20)
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(21)
    tokens = rng.integers(0, model.config.vocab_size, (2, make_golden.LENGTH))
    head_mask, rope_mask = make_golden.random_masks(model.config, rng)
    query_mask, query_mean = make_golden.random_queries(model.config, rng)
    lm = load(tmp_path)
    all_masks = dict(head_mask=head_mask, rope_mask=rope_mask, query_mask=query_mask, query_mean=query_mean)
    for masks in ({}, all_masks):
        iv = Interventions(**masks, rope_site="projection")
        expected = make_golden.torch_logits(model, tokens, **masks, rope_site="projection")
        close(lm.logits(tokens, interventions=iv), expected)


def test_gates_per_row_agree_with_a_float64_reference(read_golden, close):
    """GQA, tied, head_dim apart from hidden/heads; gates of both kinds, another set per row."""
    golden = read_golden("gqa_tied")
    cfg, tokens = golden.lm.config, golden.tokens
    rng = np.random.default_rng(3)
    heads = (len(tokens), cfg.n_layers, cfg.n_heads)
    head_gate = rng.choice(np.float32([0, 0.3, 1]), heads)
    rope_gate = rng.choice(np.float32([0, 0.3, 1]), (*heads, cfg.n_pairs))
    weights = load_file(golden.folder / "model.safetensors")
    weights = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    rows = zip(tokens, head_gate, rope_gate, strict=True)
    actual = golden.lm.logits(tokens, interventions=Interventions(head_gate, rope_gate))
    close(actual, [_reference(weights, cfg, *row) for row in rows])
    assert np.abs(actual[:, STORED] - golden.logits).max() > 0.01 * np.abs(golden.logits).max()


# --- an independent Llama: one row, float64, one head at a time, pairs as complex numbers ---


def _reference(weights, cfg, tokens_T, head_gate, rope_gate):
    x_TE = weights["model.embed_tokens.weight"][tokens_T]
    for layer in range(cfg.n_layers):
        prefix = f"model.layers.{layer}."
        w = {
            name.removeprefix(prefix).removesuffix(".weight").split(".")[-1]: tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        normed = _rms(x_TE, w["input_layernorm"], cfg.norm_eps)
        for head, gates_R in enumerate(rope_gate[layer]):
            x_TE = x_TE + (1 - head_gate[layer, head]) * _head(w, cfg, normed, head, gates_R)
        normed = _rms(x_TE, w["post_attention_layernorm"], cfg.norm_eps)
        gate, up = normed @ w["gate_proj"].T, normed @ w["up_proj"].T
        x_TE = x_TE + (gate / (1 + np.exp(-gate)) * up) @ w["down_proj"].T
    x_TE = _rms(x_TE, weights["model.norm.weight"], cfg.norm_eps)
    return x_TE @ weights["model.embed_tokens.weight"].T


def _head(w, cfg, x_TE, head, gates_R):
    q_dims = np.arange(cfg.head_dim) + head * cfg.head_dim
    kv_dims = np.arange(cfg.head_dim) + head * cfg.n_kv_heads // cfg.n_heads * cfg.head_dim
    q_TR = _turned(x_TE @ w["q_proj"][q_dims].T, cfg.rope.theta)
    k_TR = _turned(x_TE @ w["k_proj"][kv_dims].T, cfg.rope.theta)
    scores = [[(q * k.conj() * (1 - gates_R)).sum().real for k in k_TR] for q in q_TR]
    weights = np.tril(np.exp(np.array(scores) / np.sqrt(cfg.head_dim)))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ (x_TE @ w["v_proj"][kv_dims].T) @ w["o_proj"][:, q_dims].T


def _turned(x_TD, theta):
    """Dimensions r and r + R as one complex number, turned by position * theta ** (-r / R)."""
    pairs = x_TD.shape[1] // 2
    z_TR = x_TD[:, :pairs] + 1j * x_TD[:, pairs:]
    return z_TR * np.exp(1j * np.arange(len(z_TR))[:, None] * theta ** (-np.arange(pairs) / pairs))


def _rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale
