"""The transformer: what may depend on what, attention against its definition, layouts, configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retmask_jax.hf.families import from_hf, to_hf
from retmask_jax.model.attention import Keys, Probe, Scores, attend, probe
from retmask_jax.model.config import ModelConfig, Rope
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.layers import at_positions, merge_layers, split_layers
from retmask_jax.model.transformer import forward

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 24)).astype(np.int32)


# --- dependencies ---


def test_a_logit_depends_on_its_own_and_earlier_tokens_only(tiny):
    tokens = np.random.default_rng(1).permutation(61)[None, :20]  # all different: one row each

    @jax.jit
    def gradients(table_VE):
        """d (one random direction of logits[t]) / d (embedding of token s), [t, s, E]."""
        params = {**tiny.params, "embed": {"embedding": table_VE}}
        direction_V = np.random.default_rng(2).normal(size=61)
        _, pull = jax.vjp(lambda p: forward(tiny.config, p, tokens)[0] @ direction_V, params)
        grads = jax.vmap(lambda one_hot: pull(one_hot)[0]["embed"]["embedding"])(jnp.eye(20))
        return grads[:, tokens[0]]

    reached_TS = np.abs(gradients(tiny.params["embed"]["embedding"])).max(axis=-1)
    earlier = np.tri(20, dtype=bool)
    np.testing.assert_array_equal(reached_TS[~earlier], 0)
    assert reached_TS[earlier].min() > 1e-6


def test_padding_on_the_right_reaches_no_real_position(tiny):
    lengths = np.array([24, 9])
    logits = tiny.logits(TOKENS, lengths)
    repadded = TOKENS.copy()
    repadded[1, 9:] = np.random.default_rng(1).integers(0, 61, 15)
    padded_otherwise = tiny.logits(repadded, lengths)
    np.testing.assert_array_equal(padded_otherwise[1, :9], logits[1, :9])
    assert np.abs(padded_otherwise - logits)[1, 9:].min(axis=0).max() > 0


def test_positions_choose_rows_of_the_logits(tiny, close):
    positions = np.array([[23, 0, 7], [5, 5, 11]])
    logits = tiny.logits(TOKENS)
    chosen = np.take_along_axis(np.asarray(logits), positions[:, :, None], axis=1)
    close(tiny.logits(TOKENS, positions=positions), chosen, 1e-6)
    with pytest.raises(ValueError, match=r"positions has shape \(3,\).*2 rows"):
        forward(tiny.config, tiny.params, TOKENS, positions=np.arange(3))


def test_rows_of_a_batch_do_not_meet(tiny):
    swapped = tiny.logits(TOKENS[::-1])[::-1]
    np.testing.assert_array_equal(swapped, tiny.logits(TOKENS))


@pytest.mark.parametrize(
    "tokens, lengths, message",
    [
        (TOKENS[0], None, r"tokens must be integers of shape \(B, T\), got int32\(24,\)"),
        (TOKENS * 1.0, None, r"tokens must be integers .* got float"),
        (np.zeros((1, 301), np.int32), None, "301 prompt tokens .* context of 300"),
        (TOKENS, np.array([24]), r"lengths has shape \(1,\); 2 rows of tokens need \(2,\)"),
    ],
)
def test_unfit_tokens_raise_before_any_compile(tiny, compiles, tokens, lengths, message):
    jnp.asarray(tokens)  # moving an array to the device may itself compile a copy
    compiles.clear()
    with pytest.raises(ValueError, match=message):
        tiny.logits(tokens, lengths)
    with pytest.raises(ValueError, match=message):
        forward(tiny.config, tiny.params, tokens, lengths)
    assert not compiles


# --- attention ---


def _random_qkv(length, keys=None, batch=2, heads=2, kv_heads=1, width=4, seed=0):
    rng = np.random.default_rng(seed)
    q_BTHD = rng.normal(size=(batch, length, heads, width)).astype(np.float32) * 2
    kv = rng.normal(size=(2, batch, kv_heads, keys or length, width)).astype(np.float32)
    return q_BTHD, kv[0], kv[1]


def _keys(k_BKSD, v_BKSD):
    return Keys.of(k_BKSD.swapaxes(1, 2), v_BKSD.swapaxes(1, 2))


def _weights(q_BTHD, k_BKSD, scores, start_B=0):
    """(f64[B,H,T,S], capped scores) by the definition: everything at once, one softmax."""
    k_BHSD = np.repeat(k_BKSD.astype(np.float64), q_BTHD.shape[2] // k_BKSD.shape[1], axis=1)
    raw_BHTS = np.einsum("bthd,bhsd->bhts", q_BTHD.astype(np.float64), k_BHSD) * scores.scale
    capped_BHTS = scores.cap * np.tanh(raw_BHTS / scores.cap) if scores.cap else raw_BHTS
    last_BT = np.asarray(start_B)[..., None] + np.arange(q_BTHD.shape[1])
    last_BHTS = np.broadcast_to(last_BT, q_BTHD.shape[:2])[:, None, :, None]
    keys = np.arange(k_BKSD.shape[2])
    seen = (keys <= last_BHTS) & (keys > last_BHTS - (scores.window or 10**6))
    weights_BHTS = np.where(seen, np.exp(capped_BHTS - capped_BHTS.max(-1, keepdims=True)), 0)
    return weights_BHTS / weights_BHTS.sum(-1, keepdims=True), capped_BHTS


def _plain(q_BTHD, k_BKSD, v_BKSD, scores, start_B=0):
    v_BHSD = np.repeat(v_BKSD.astype(np.float64), q_BTHD.shape[2] // v_BKSD.shape[1], axis=1)
    return np.einsum("bhts,bhsd->bthd", _weights(q_BTHD, k_BKSD, scores, start_B)[0], v_BHSD)


def _plain_gradients(q_BTHD, k_BKSD, v_BKSD, scores, out_BTHD):
    """Gradients of sum(attention * out_BTHD) with respect to q, k and v, by hand, float64."""
    weights, capped = _weights(q_BTHD, k_BKSD, scores)
    batch, kv_heads, keys, width = k_BKSD.shape
    share = q_BTHD.shape[2] // kv_heads
    k_BHSD, v_BHSD = (np.repeat(x.astype(np.float64), share, axis=1) for x in (k_BKSD, v_BKSD))
    wanted = np.einsum("bthd,bhsd->bhts", out_BTHD, v_BHSD)
    raw = weights * (wanted - (wanted * weights).sum(-1, keepdims=True)) * scores.scale
    raw *= 1 - (capped / scores.cap) ** 2 if scores.cap else 1

    def per_kv_head(x_BHSD):
        return x_BHSD.reshape(batch, kv_heads, share, keys, width).sum(axis=2)

    return (
        np.einsum("bhts,bhsd->bthd", raw, k_BHSD),
        per_kv_head(np.einsum("bhts,bthd->bhsd", raw, q_BTHD)),
        per_kv_head(np.einsum("bhts,bthd->bhsd", weights, out_BTHD)),
    )


@pytest.mark.parametrize(
    "length, scores",
    [
        *((length, Scores(0.7)) for length in (1, 127, 128, 129, 300, 1100)),
        (300, Scores(0.7, window=1)),
        (300, Scores(0.7, window=37)),
        (1100, Scores(0.4, window=130, cap=1.5)),
        (1100, Scores(0.4, window=5000)),
        (129, Scores(0.7, cap=0.8)),
    ],
)
def test_attention_in_chunks_is_one_softmax(length, scores, close):
    qkv = _random_qkv(length, batch=1 if length > 200 else 2)
    out_BTHD = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)

    @jax.jit
    def both(*qkv):
        out, pull = jax.vjp(lambda q, *kv: attend(q, _keys(*kv), scores), *qkv)
        return out, pull(jnp.asarray(out_BTHD))

    out, gradients = both(*qkv)
    close(out, _plain(*qkv, scores), 1e-5)
    expected = _plain_gradients(*qkv, scores, out_BTHD)
    scale = max(np.abs(gradient).max() for gradient in expected)
    for actual, gradient in zip(gradients, expected, strict=True):  # of one key, q and k have none
        np.testing.assert_allclose(actual, gradient, rtol=0, atol=1e-5 * scale)


def test_attention_shares_kv_heads_in_order(close):
    qkv = _random_qkv(5, heads=6, kv_heads=3)
    out = jax.jit(lambda q, *kv: attend(q, _keys(*kv), Scores(0.5)))(*qkv)
    close(out, _plain(*qkv, Scores(0.5)), 1e-5)


@pytest.mark.parametrize("scores", [Scores(0.5), Scores(0.5, window=3, cap=0.9)])
def test_attention_over_a_cache_ends_at_each_rows_position(scores, close):
    start_B = np.array([3, 0, 6])
    qkv = _random_qkv(2, keys=9, batch=3, heads=4, kv_heads=2)
    out = jax.jit(lambda q, *kv: attend(q, _keys(*kv), scores, jnp.asarray(start_B)))(*qkv)
    close(out, _plain(*qkv, scores, start_B), 1e-5)


def _probed(q, k, v, start_B, request, scores):
    """What `probe` finds, in one program, for rows whose first query is at start_B."""

    @jax.jit
    def run(q, k, v):
        rows_BP = jnp.asarray(request.rows_BP)
        return probe(at_positions(q, rows_BP), start_B[:, None] + rows_BP, _keys(k, v), request, scores)

    return jax.tree.map(np.asarray, run(q, k, v))


@pytest.mark.parametrize("window", [None, 4])
def test_probe_finds_the_largest_attention_weight_by_absolute_position(window):
    q, k, v = _random_qkv(12, keys=20, batch=3, heads=4, kv_heads=2)
    start_B, rows_BP = np.array([0, 5, 8]), np.array([[0, 11], [3, 7], [11, 2]])
    scores = Scores(0.3, window, cap=2.0)
    best_BTH = _weights(q, k, scores, start_B)[0].argmax(-1).swapaxes(1, 2)
    expected = np.take_along_axis(best_BTH, rows_BP[:, :, None], axis=1)
    actual = _probed(q, k, v, start_B, Probe(rows_BP), scores).keys[..., 0]
    np.testing.assert_array_equal(actual, expected)
    unmasked = np.einsum("bthd,bhsd->bths", q, np.repeat(k, 2, axis=1)).argmax(-1)
    assert (np.take_along_axis(unmasked, rows_BP[:, :, None], axis=1) != expected).any()


@pytest.mark.parametrize("scores", [Scores(0.3), Scores(0.3, window=4, cap=2.0)])
def test_probe_reports_the_weights_of_its_keys_and_the_queries(scores, close):
    q, k, v = _random_qkv(12, keys=20, batch=3, heads=4, kv_heads=2)
    start_B, rows_BP = np.array([0, 5, 8]), np.array([[0, 11], [3, 7], [11, 2]])
    weights_BTHS = _weights(q, k, scores, start_B)[0].swapaxes(1, 2)
    expected_BPHS = np.take_along_axis(weights_BTHS, rows_BP[:, :, None, None], axis=1)
    q_BPHD = np.take_along_axis(q, rows_BP[:, :, None, None], axis=1)
    for top in (1, 3, 25):  # the last: more than there are keys
        found = _probed(q, k, v, start_B, Probe(rows_BP, top=top, weights=True, queries=True), scores)
        largest = -np.sort(-expected_BPHS, axis=-1)[..., :top]
        close(found.weights[..., :20], largest, 1e-5)
        np.testing.assert_array_equal(found.keys[..., :20] >= 0, largest > 0)
        assert not np.any(found.weights[..., 20:]) and np.all(found.keys[..., 20:] == -1)
        taken = np.take_along_axis(expected_BPHS, np.maximum(found.keys[..., :20], 0), axis=-1)
        close(np.where(found.keys[..., :20] < 0, 0, taken), largest, 1e-6)
        np.testing.assert_array_equal(found.queries, q_BPHD)


# --- layout of the layers ---


def test_split_layers_keeps_absolute_order_and_merge_inverts_it(five_layers):
    flat, paired = (lm.config for lm in five_layers)
    layers = np.arange(10).reshape(5, 2)
    split = split_layers(paired, {"x": layers})
    np.testing.assert_array_equal(split["blocks"]["0"]["x"], layers[[0, 2]])
    np.testing.assert_array_equal(split["blocks"]["1"]["x"], layers[[1, 3]])
    np.testing.assert_array_equal(split["tail"]["0"]["x"], layers[4])
    for config in (flat, paired, dataclasses.replace(flat, layer_pattern=("full",) * 3)):
        np.testing.assert_array_equal(merge_layers(config, split_layers(config, layers)), layers)


def test_a_layer_pattern_changes_the_layout_and_nothing_else(five_layers, close):
    flat, paired = five_layers
    assert flat.config.tail == () and paired.config.tail == ("full",)
    assert (flat.config.repeats, paired.config.repeats) == (5, 2)
    rng = np.random.default_rng(4)
    iv = Interventions(rng.random((5, 4)) < 0.3, rng.random((5, 4, 2)) < 0.3)
    for interventions in (None, iv):
        expected = flat.logits(TOKENS % 31, interventions=interventions)
        close(paired.logits(TOKENS % 31, interventions=interventions), expected, 1e-5)


# --- configs ---

OLD_FORM = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 5,
    "eos_token_id": [7, 8],
    "pad_token_id": 3,
    "torch_dtype": "bfloat16",
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 1024,
    },
}


def _without(form, *names, **changes):
    return {name: value for name, value in form.items() if name not in names} | changes


def test_every_attribute_is_read_into_its_field():
    assert from_hf(OLD_FORM) == ModelConfig(
        vocab_size=128,
        hidden_size=64,
        mlp_size=96,
        n_layers=3,
        n_heads=8,
        n_kv_heads=2,
        head_dim=16,
        max_length=4096,
        norm_eps=1e-6,
        activation="silu",
        tied_embeddings=True,
        bos_id=5,
        eos_ids=(7, 8),
        pad_id=3,
        rope=Rope("llama3", 5e5, 32.0, 1.5, 3.0, 1024),
    )


def test_both_forms_of_rope_settings_read_the_same():
    plain = _without(OLD_FORM, "rope_scaling", "rope_theta")
    for scaling in (OLD_FORM["rope_scaling"], {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default"}):
        old = plain | {"rope_theta": 5e5, "rope_scaling": scaling}
        new = plain | {"rope_parameters": {"rope_theta": 5e5, **scaling}}
        assert from_hf(old) == from_hf(new)
        assert from_hf(old).rope.theta == 5e5
        assert from_hf(old).rope.kind == scaling["rope_type"]
    linear = from_hf(plain | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert linear.rope == Rope("linear", 5e5, factor=4.0)
    assert from_hf(plain | {"rope_theta": 5e5, "rope_scaling": None}).rope == Rope(theta=5e5)


def test_what_a_config_may_leave_out_has_hfs_default():
    left_out = ("head_dim", "num_key_value_heads", "tie_word_embeddings", "eos_token_id")
    left_out += ("pad_token_id", "rope_theta", "rope_scaling")
    config = from_hf(_without(OLD_FORM, *left_out))
    assert (config.head_dim, config.n_kv_heads, config.tied_embeddings) == (8, 8, False)
    assert (config.eos_ids, config.pad_id, config.rope) == ((), 0, Rope(theta=10000.0))
    assert from_hf(_without(OLD_FORM, eos_token_id=7, pad_token_id=-1)).eos_ids == (7,)
    assert from_hf(_without(OLD_FORM, eos_token_id=7, pad_token_id=-1)).pad_id == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attn_logit_softcapping": 30.0}, r"not understood.*attn_logit_softcapping=30\.0"),
        ({"sliding_window": 512}, r"sliding_window=512"),
        ({"attention_bias": True}, r"attention_bias=True; only False is supported"),
        ({"mlp_bias": True}, r"mlp_bias=True"),
        ({"hidden_act": "relu"}, r"activation 'relu'; supported are silu"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, r"RoPE type 'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "gamma": 2}}, r"'yarn' takes .*'gamma'"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "two values for rope_theta: 10000.0 and 20000.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\): use the unquantised one"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"'linear' takes \['factor'\], .* has \[\]"),
        ({"rope_scaling": {"rope_type": "default", "beta": 1}}, r"'default' takes \[\].*beta"),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic"}}, "types: dynamic, linear"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, r"must be numbers.*'4'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "must be numbers"),
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported \(supported: .*llama"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 query heads cannot share 4"),
        ({"head_dim": 15}, "rotary width 15 must be even"),
    ],
)
def test_a_config_that_is_not_fully_understood_raises_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(OLD_FORM | changes)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_a_missing_attribute_raises_by_name(name):
    with pytest.raises(ValueError, match=f"no '{name}'"):
        from_hf(_without(OLD_FORM, name))


@pytest.mark.parametrize(
    "rope", [Rope(), Rope(theta=5e5), Rope("linear", factor=3.0), Rope("llama3", 1e6, 8.0, 1.0, 4.0, 512)]
)
def test_a_config_made_here_is_read_back_the_same(rope):
    config = dataclasses.replace(from_hf(OLD_FORM), rope=rope)
    assert from_hf(to_hf(config)) == config
