"""Query norms against the tensors of the checkpoints themselves; the comparison against made differences."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
from safetensors.numpy import load_file

from retmask_jax.heads.query_norms import QueryNorms, norm_utility, query_norms
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.config import Lora
from retmask_jax.utils import stats


def stored_query_rows(folder, config):
    """Rows of q_proj as they lie in the file, [L, H, D, E]: a fused tensor begins with them."""
    tensors = load_file(folder / "model.safetensors")
    plain = [tensors.get(f"model.layers.{i}.self_attn.q_proj.weight") for i in range(config.n_layers)]
    fused = [tensors.get(f"model.layers.{i}.self_attn.qkv_proj.weight") for i in range(config.n_layers)]
    rows = config.n_heads * config.head_dim
    layers = [fused[i][:rows] if plain[i] is None else plain[i] for i in range(config.n_layers)]
    return np.stack(layers).reshape(config.n_layers, config.n_heads, config.head_dim, -1)


# Grouped heads; sliding and full layers in a pattern with a tail; half of each head rotated, weights fused.
@pytest.mark.parametrize("name", ["gqa_tied", "gemma3", "phi3_longrope"])
def test_norms_are_those_of_the_rows_in_the_file(read_golden, name):
    lm, folder = read_golden(name).lm, read_golden(name).folder
    rows_LHD = np.abs(stored_query_rows(folder, lm.config).astype(np.float64)).sum(axis=-1)
    norms = query_norms(lm.config, lm.params)
    np.testing.assert_allclose(norms.head_LH, rows_LHD.mean(axis=-1), rtol=1e-5)
    half = lm.config.n_pairs
    assert norms.pair_LHR.shape == (lm.config.n_layers, lm.config.n_heads, half)
    for pair in range(half):
        expected = (rows_LHD[..., pair] + rows_LHD[..., pair + half]) / 2
        np.testing.assert_allclose(norms.pair_LHR[..., pair], expected, rtol=1e-5)


def test_the_checkpoints_above_have_what_they_stand_for(read_golden):
    gqa, windows, half = (read_golden(name).lm.config for name in ("gqa_tied", "gemma3", "phi3_longrope"))
    assert gqa.n_kv_heads < gqa.n_heads
    assert windows.tail and len(windows.layer_pattern) > 1
    assert 2 * half.n_pairs < half.head_dim


def test_adapters_are_part_of_the_norms(tiny):
    config = dataclasses.replace(tiny.config, lora=Lora(rank=2, alpha=4.0, targets=("q",)))
    rng, q = np.random.default_rng(0), tiny.params["blocks"]["0"]["attn"]["q"]
    a, b = (jax.numpy.asarray(rng.normal(size=shape), "float32") for shape in ((3, 32, 2), (3, 2, 32)))
    blocks = {"0": {"attn": {"q": q | {"kernel_lora_a": a, "kernel_lora_b": b}}}}
    whole = {"0": {"attn": {"q": {"kernel": q["kernel"] + 2.0 * np.einsum("ler,lrd->led", a, b)}}}}
    with_adapters, merged = query_norms(config, {"blocks": blocks}), query_norms(tiny.config, {"blocks": whole})
    np.testing.assert_allclose(with_adapters.head_LH, merged.head_LH, rtol=1e-5)


def made_norms(shift, seed=0):
    """Norms that differ between layers by much, and between the labelled and other heads by `shift`."""
    rng = np.random.default_rng(seed)
    labels_LH = np.zeros((8, 12), bool)
    labels_LH[2:, :2] = True
    pair_LHR = rng.normal(size=(8, 12, 3)) + 10 * np.arange(8)[:, None, None]
    pair_LHR[labels_LH, 1] += shift
    scores = HeadScores.from_array(np.where(labels_LH, 0.5, 0.01) + rng.uniform(0, 0.005, labels_LH.shape))
    return QueryNorms(pair_LHR.mean(axis=-1), pair_LHR), scores, labels_LH


def test_a_difference_in_one_pair_is_found_within_layers_and_in_that_pair():
    norms, scores, labels_LH = made_norms(9.0)
    result = norm_utility(norms, scores, scores.heads(threshold=0.1), n_permutations=999, n_resamples=999)
    assert (result.n, result.n_other) == (12, 84)
    assert result.permutation.p_value == 1 / 1000
    assert result.partial_spearman.low > 0
    t = scipy.stats.ttest_ind(norms.head_LH[labels_LH], norms.head_LH[~labels_LH]).statistic
    assert result.cohens_d == pytest.approx(t * np.sqrt(1 / 12 + 1 / 84))
    assert np.argmax(result.pair_cohens_d) == 1
    gaps = np.subtract(result.pair_retrieval, result.pair_other)
    assert gaps == pytest.approx(norms.pair_LHR[labels_LH].mean(axis=0) - norms.pair_LHR[~labels_LH].mean(axis=0))


def test_every_pair_has_the_p_value_it_would_have_alone_adjusted_over_all():
    norms, scores, labels_LH = made_norms(1.0)
    result = norm_utility(norms, scores, scores.heads(threshold=0.1), n_permutations=499, n_resamples=99, seed=3)
    alone = [
        stats.layer_clustered_permutation(norms.pair_LHR[..., r], labels_LH, 499, seed=3).p_value for r in range(3)
    ]
    assert result.pair_p_value == alone and len(set(alone)) > 1
    ranks = np.argsort(np.argsort(alone))
    stepped = [p * 3 / (rank + 1) for p, rank in zip(alone, ranks, strict=True)]
    expected = [min(s for s, other in zip(stepped, ranks, strict=True) if other >= rank) for rank in ranks]
    assert result.pair_adjusted_p == pytest.approx(expected)


def test_a_difference_between_layers_alone_is_no_finding():
    norms, scores, _ = made_norms(0.0)
    result = norm_utility(norms, scores, scores.heads(threshold=0.1), n_permutations=999, n_resamples=999)
    assert result.permutation.value == pytest.approx(result.permutation.expected, abs=1)
    assert result.permutation.value > 3
    assert result.permutation.p_value > 0.05
    assert result.partial_spearman.low < 0 < result.partial_spearman.high


def test_scores_and_heads_of_another_model_are_refused():
    norms, scores, _ = made_norms(0.0)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(8, 12\)"):
        norm_utility(norms, HeadScores.from_array(np.ones((2, 3))), [(0, 0)])
    with pytest.raises(ValueError, match=r"\(8, 0\) is out of range"):
        norm_utility(norms, scores, [(8, 0)])
    with pytest.raises(ValueError, match="two values per side, got 1"):
        norm_utility(norms, scores, [(0, 0)])
