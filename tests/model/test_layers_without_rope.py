"""Layers without RoPE, and scales: what depends on what, rotary masks refused before any compile, kernels alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retmask_jax.generation.logprobs import sequence_logprobs
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions, mask_heads, mask_queries, mask_rope, stack
from retmask_jax.model.layers import scaled
from retmask_jax.model.masking import normalise
from retmask_jax.model.transformer import forward

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 24)).astype(np.int32)
REFUSED = r"^the model has no RoPE in 2 of its 3 layers \(1, 2\), so it takes no rotary masks: mask heads"


@pytest.fixture(scope="module")
def lm(random_model):
    """The last layer has none, so what it attends to is not told apart by place within the window."""
    return random_model(
        ModelConfig(
            vocab_size=61,
            hidden_size=32,
            mlp_size=40,
            n_layers=3,
            n_heads=4,
            n_kv_heads=2,
            head_dim=8,
            max_length=300,
            layer_pattern=("full", "sliding", "full"),
            window=9,
            rope_pattern=(True, False, False),
            residual_scale=0.6,
            logit_scale=0.5,
        )
    )


def test_a_layer_without_rope_does_not_see_the_order_of_earlier_tokens(random_model):
    """A model whose only mixing layer has no RoPE: the last logits are those of the prompt in another order."""
    config = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        mlp_size=40,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        max_length=64,
        layer_pattern=("full", "full"),
        rope_pattern=(True, False),
    )
    lm = random_model(config)
    for place, unordered in (("1", False), ("0", True)):  # of the layer that writes nothing
        blocks = lm.params["blocks"]
        attn = blocks[place]["attn"] | {"o": jax.tree.map(jnp.zeros_like, blocks[place]["attn"]["o"])}
        silent = lm.replace(params=lm.params | {"blocks": blocks | {place: blocks[place] | {"attn": attn}}})
        shuffled = np.concatenate([TOKENS[:, np.random.default_rng(1).permutation(23)], TOKENS[:, 23:]], axis=1)
        first, second = (np.asarray(silent.logits(tokens))[:, -1] for tokens in (TOKENS, shuffled))
        assert (np.abs(first - second).max() < 1e-4 * np.abs(first).max()) == unordered


def test_rotary_masks_are_refused_before_any_compile(lm, compiles):
    some = np.zeros((3, 4, 4), bool)
    some[0, 1, 2] = True  # though this layer has RoPE
    iv = Interventions(rope_mask=jnp.asarray(some))
    jax.tree.map(jnp.asarray, TOKENS)
    compiles.clear()
    calls = [
        lambda: mask_rope(lm.config, [(0, 1)], [2]),
        lambda: mask_queries(lm.config, []),
        lambda: normalise(lm.config, iv),
        lambda: lm.logits(TOKENS, interventions=iv),
        lambda: lm.generate(TOKENS, [24, 24], 4, interventions=Interventions(rope_mask=np.float32(some))),
        lambda: forward(lm.config, lm.params, TOKENS, interventions=iv),
        # Values that are being traced might mask something.
        lambda: jax.jit(lambda iv: forward(lm.config, lm.params, TOKENS, interventions=iv))(
            Interventions(rope_mask=~some)
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert not compiles


def test_head_masks_and_rotary_masks_that_are_seen_to_be_empty_are_not(lm, close):
    heads, untouched = mask_heads(lm.config, [(1, 0), (2, 3)]), lm.logits(TOKENS)
    np.testing.assert_array_equal(lm.logits(TOKENS, interventions=Interventions.none(lm.config)), untouched)
    masked = lm.logits(TOKENS, interventions=heads | Interventions.none(lm.config))
    assert np.abs(masked - untouched).max() > 1e-2
    masks = stack([heads, mask_heads(lm.config, [])])
    both = jax.jit(jax.vmap(lambda iv: forward(lm.config, lm.params, TOKENS, interventions=iv)))(masks)
    close(both, [masked, untouched], 1e-5)


def test_kernels_agree(lm, close):
    close(lm.with_kernel("plain").logits(TOKENS), lm.with_kernel("blocked").logits(TOKENS), 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"layer_pattern": ("sliding",), "kernel": "plain"}, id="alike"),
        pytest.param(
            {"layer_pattern": ("sliding", "full"), "rope_pattern": (True, False)},
            id="without RoPE",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_scales_are_those_of_the_weights_they_stand_for(random_model, close, changes):
    """Scaled output projections and a scaled output matrix are the same as both scales; the gradient of a gate, too."""
    config = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        mlp_size=40,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        max_length=64,
        window=9,
        residual_scale=0.6,
        logit_scale=0.5,
        **changes,
    )
    lm = random_model(config)

    def instead(path, leaf):
        names = [key.key for key in path]
        if names[0] == "lm_head":
            return leaf * config.logit_scale
        return leaf * config.residual_scale if names[-2] in ("o", "down") else leaf

    without = dataclasses.replace(config, residual_scale=None, logit_scale=None)
    plain = lm.replace(config=without, params=jax.tree.map_with_path(instead, lm.params))

    @functools.partial(jax.jit, static_argnums=0)
    def logits_and_slopes(config, params):
        def logp(gate):
            counted = np.arange(24) >= np.full((2, 1), 12)
            return sum(sequence_logprobs(config, params, TOKENS, counted, interventions=Interventions(head_mask=gate)))

        return forward(config, params, TOKENS), jax.grad(logp)(np.zeros((2, 4), np.float32))

    (logits, slopes), (plain_logits, plain_slopes) = (logits_and_slopes(m.config, m.params) for m in (lm, plain))
    close(plain_logits, logits, 1e-5)
    assert np.abs(slopes).min() > 0
    close(plain_slopes, slopes, 1e-4)
    unscaled, _ = logits_and_slopes(without, lm.params)
    assert np.abs(unscaled - logits).max() > 1e-2


def test_bfloat16_states_are_scaled_in_float32_and_rounded_once():
    x = jnp.asarray(np.random.default_rng(2).standard_normal(200), jnp.bfloat16)
    expected = (np.asarray(x, np.float32) * np.float32(0.22)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(scaled(x, 0.22)), expected)
    assert np.any(np.asarray(x * jnp.bfloat16(0.22)) != expected) and scaled(x, None) is x
