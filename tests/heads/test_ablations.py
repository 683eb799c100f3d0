"""Other ways to take a head out than writing nothing: its mean, a query of zeros and a mean query, against a slow reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_tiny import CONFIG, copying_lm, in_float64, reference

from retmask_jax.generation.continuous import Request, generate_stream
from retmask_jax.generation.language_model import save
from retmask_jax.generation.sweep import sweep
from retmask_jax.model.interventions import Interventions, mask_heads, mask_queries, mask_rope, stack, stream_heads
from retmask_jax.model.transformer import forward

LM = copying_lm()
TOKENS = np.random.default_rng(5).integers(4, CONFIG.vocab_size, (2, 24)).astype(np.int32)
HEADS = [(0, 1), (1, 2)]
MEAN = np.random.default_rng(6).normal(0, 0.3, (CONFIG.n_layers, CONFIG.n_heads, CONFIG.head_dim)).astype(np.float32)
QUERY = np.random.default_rng(7).normal(0, 2, MEAN.shape).astype(np.float32)


def _logits(interventions):
    return np.asarray(LM.logits(TOKENS, interventions=interventions))


def _expected(**masks):
    return np.stack([reference(in_float64(LM.params), row, **masks)[0] for row in TOKENS])


def test_a_masked_head_writes_its_mean(close):
    masked = mask_heads(CONFIG, HEADS, MEAN)
    expected = _expected(head_mask=np.asarray(masked.head_mask), head_mean=MEAN)
    close(_logits(masked), expected)
    assert np.abs(_logits(mask_heads(CONFIG, HEADS)) - expected).max() > 1e-2 * np.abs(expected).max()
    np.testing.assert_array_equal(_logits(mask_heads(CONFIG, [], MEAN)), _logits(None))


def test_a_gate_goes_from_the_heads_output_to_its_mean(close):
    gate_LH = np.random.default_rng(7).random((CONFIG.n_layers, CONFIG.n_heads)).astype(np.float32)
    close(_logits(Interventions(gate_LH, head_mean=MEAN)), _expected(head_mask=gate_LH, head_mean=MEAN))


def test_means_change_without_a_compile_and_may_differ_by_row(compiles):
    def masked(mean):
        return mask_heads(CONFIG, HEADS, mean)

    first = _logits(masked(MEAN))
    compiles.clear()
    other = _logits(masked(-MEAN))
    assert not compiles
    both = _logits(stack([masked(MEAN), masked(-MEAN)]))
    np.testing.assert_allclose(both, np.stack([first[0], other[1]]), atol=2e-5)


def test_a_zero_query_looks_at_all_keys_alike(close):
    """The projection's columns at zero give the same: every key the same weight, and the mean value is written."""
    kernel = np.array(LM.params["blocks"]["0"]["attn"]["q"]["kernel"])
    for layer, head in HEADS:
        kernel[layer, :, head * CONFIG.head_dim : (head + 1) * CONFIG.head_dim] = 0
    params = jax.tree.map(lambda x: x, LM.params)
    params["blocks"]["0"]["attn"]["q"]["kernel"] = jnp.asarray(kernel)
    close(_logits(mask_queries(CONFIG, HEADS)), LM.replace(params=params).logits(TOKENS))
    assert np.abs(_logits(mask_queries(CONFIG, HEADS)) - _logits(mask_heads(CONFIG, HEADS))).max() > 1e-3


def test_a_query_that_is_not_all_rotated_cannot_be_zeroed():
    config = dataclasses.replace(CONFIG, rotary_dim=16)
    with pytest.raises(ValueError, match="only 16 of the 32 dimensions of a head are rotated"):
        mask_queries(config, HEADS)
    assert mask_queries(config, HEADS, MEAN).rope_mask is None  # a mean takes the place of all dimensions


@pytest.mark.parametrize("query_mean", (QUERY, None), ids=("mean", "zero"))
def test_a_gate_goes_from_the_query_to_its_mean(close, query_mean):
    gate_LH = np.random.default_rng(8).choice(np.float32([0, 0.3, 1]), MEAN.shape[:2])
    close(
        _logits(Interventions(query_mask=gate_LH, query_mean=query_mean)),
        _expected(query_mask=gate_LH, query_mean=query_mean),
    )


def test_a_replaced_query_keeps_its_bits_where_nothing_is_replaced(compiles):
    """Where a head has its own query it is untouched, and values compile nothing, also in rows of their own."""
    masked, untouched = _logits(mask_queries(CONFIG, HEADS, QUERY)), _logits(None)
    compiles.clear()
    other = _logits(mask_queries(CONFIG, HEADS[:1], -QUERY))
    np.testing.assert_array_equal(_logits(mask_queries(CONFIG, [], QUERY)), untouched)
    assert not compiles
    rows = _logits(stack([mask_queries(CONFIG, HEADS, QUERY), mask_queries(CONFIG, HEADS[:1], -QUERY)]))
    np.testing.assert_allclose(rows, np.stack([masked[0], other[1]]), atol=2e-5)
    assert min(np.abs(masked - untouched).max(), np.abs(other - masked).max()) > 1e-2


def test_the_gradient_of_a_replaced_query_is_its_finite_difference():
    """Of the gates and of the means, in random directions, against differences in float64."""
    rng, shape = np.random.default_rng(9), MEAN.shape[:2]
    gate, mean = rng.uniform(0.2, 0.8, shape), QUERY.astype(np.float64)
    weights_TV, params64 = rng.normal(size=(24, CONFIG.vocab_size)) / 24, in_float64(LM.params)

    def loss(gate_LH, mean_LHD):
        iv = Interventions(query_mask=gate_LH, query_mean=mean_LHD)
        return (forward(CONFIG, LM.params, TOKENS[:1], interventions=iv)[0] * weights_TV).sum()

    def exact(gate_LH, mean_LHD):
        return (reference(params64, TOKENS[0], query_mask=gate_LH, query_mean=mean_LHD)[0] * weights_TV).sum()

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32(gate), jnp.float32(mean))
    for at in (0, 1):
        step = rng.normal(size=(gate, mean)[at].shape)
        above, below = (
            exact(gate + s * step, mean) if at == 0 else exact(gate, mean + s * step) for s in (1e-5, -1e-5)
        )
        np.testing.assert_allclose((slopes[at] * step).sum(), (above - below) / 2e-5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "part, masked, other",
    [
        ("head", mask_heads(CONFIG, HEADS, MEAN), mask_heads(CONFIG, [(0, 0)])),
        ("query", mask_queries(CONFIG, HEADS, MEAN), Interventions(query_mask=mask_heads(CONFIG, [(0, 0)]).head_mask)),
    ],
)
def test_means_join_other_masks_but_no_other_mask_of_their_kind(part, masked, other):
    builder = {"head": mask_heads, "query": mask_queries}[part]
    for others in (mask_rope(CONFIG, [(0, 0)], [1]), Interventions(), {"head": QUERIES, "query": MEANS}[part]):
        for joined in (masked | others, others | masked):
            np.testing.assert_array_equal(getattr(joined, f"{part}_mean"), MEAN)
            np.testing.assert_array_equal(getattr(joined, f"{part}_mask"), getattr(masked, f"{part}_mask"))
    for clash in (other, builder(CONFIG, [(0, 0)], MEAN)):
        with pytest.raises(ValueError, match=f"{part} masks .* give all heads to one {builder.__name__}"):
            masked | clash
    np.testing.assert_array_equal((other | other).query_mask, other.query_mask)


MEANS, QUERIES = mask_heads(CONFIG, HEADS, MEAN), mask_queries(CONFIG, HEADS, QUERY)
STREAMS = stream_heads(CONFIG, HEADS, sink=2, window=5)
MASKS = (Interventions(), mask_heads(CONFIG, HEADS), MEANS, QUERIES, mask_heads(CONFIG, [(0, 0)]) | QUERIES, STREAMS)


def test_sweeps_write_means_too(close):
    found = sweep(LM, TOKENS, np.full(2, 24), MASKS)
    for mask, logits_MV in zip(MASKS, found, strict=True):
        close(logits_MV, _logits(mask)[:, -1], 1e-5)


@pytest.mark.slow
def test_streams_write_means_too():
    requests = [Request(TOKENS[0].tolist(), mask=i) for i in range(len(MASKS))]
    streamed = dict(
        generate_stream(CONFIG, LM.params, requests, batch_size=3, max_new_tokens=6, stop_ids=(), masks=MASKS)
    )
    for i, mask in enumerate(MASKS):
        alone = LM.generate(TOKENS[:1], [24], max_new_tokens=6, stop_ids=(), interventions=mask)
        assert streamed[i].tokens.tolist() == np.asarray(alone.tokens)[0].tolist()


def test_means_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"head_mean has shape \(2, 4, 8\); the model and batch need \(2, 4, 32\)"):
        LM.logits(TOKENS, interventions=mask_heads(CONFIG, HEADS, MEAN[..., :8]))
    with pytest.raises(ValueError, match="head_mean has type int32; it must be float"):
        LM.logits(TOKENS, interventions=mask_heads(CONFIG, HEADS, MEAN.astype(np.int32)))
    with pytest.raises(ValueError, match=r"query_mean has shape \(2, 4, 8\); the model and batch need \(2, 4, 32\)"):
        LM.logits(TOKENS, interventions=mask_queries(CONFIG, HEADS, MEAN[..., :8]))
    with pytest.raises(ValueError, match="query_mean has type int32; it must be float"):
        LM.logits(TOKENS, interventions=mask_queries(CONFIG, HEADS, MEAN.astype(np.int32)))
    with pytest.raises(ValueError, match="a query mask cannot be baked"):
        save(LM, tmp_path / "out", mask_queries(CONFIG, HEADS, MEAN))
    with pytest.raises(ValueError, match="a head's mean cannot be baked"):
        save(LM, tmp_path / "out", mask_heads(CONFIG, HEADS, MEAN))
