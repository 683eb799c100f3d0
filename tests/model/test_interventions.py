"""Interventions: no mask is no change, values never recompile, rows are independent, builders."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retmask_jax.model.config import Rope
from retmask_jax.model.interventions import (
    Interventions,
    all_heads,
    layer_matched,
    mask_heads,
    mask_rope,
    random_heads,
    stack,
)
from retmask_jax.model.rope import inverse_frequencies, rope_pairs
from retmask_jax.model.transformer import forward

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 24)).astype(np.int32)
HEADS, PAIRS = (3, 4), (3, 4, 4)  # [L, H] and [L, H, R] of the tiny model


def _random_masks(seed, rows=()):
    rng = np.random.default_rng(seed)
    return Interventions(rng.random((*rows, *HEADS)) < 0.4, rng.random((*rows, *PAIRS)) < 0.4)


def _gates(iv):
    return Interventions(np.float32(iv.head_mask), np.float32(iv.rope_mask), iv.rope_site)


@pytest.fixture(scope="module")
def logits(tiny):
    """Logits of the two rows TOKENS under an intervention."""
    return lambda iv: np.asarray(tiny.logits(TOKENS, interventions=iv))


# --- no mask ---


def test_no_mask_in_any_form_is_the_same_program_and_the_same_bits(tiny, logits, compiles):
    forms = [
        Interventions(),
        Interventions.none(tiny.config),
        Interventions(head_mask=np.zeros(HEADS, bool)),
        Interventions(rope_mask=np.zeros(PAIRS, bool)),
        mask_heads(tiny.config, []),
        mask_rope(tiny.config, [], [0]),
    ]
    untouched = logits(None)
    compiles.clear()
    for iv in forms:
        np.testing.assert_array_equal(logits(iv), untouched)
    assert not compiles


@pytest.mark.parametrize(
    "zeros",
    [
        Interventions(rope_site="projection"),
        Interventions(np.zeros((2, *HEADS), bool), np.zeros((2, *PAIRS), bool)),
        Interventions(np.zeros(HEADS, np.float32), np.zeros(PAIRS, np.float32)),
    ],
    ids=["projection", "per row", "gates"],
)
def test_an_empty_mask_of_another_program_changes_nothing(logits, zeros):
    np.testing.assert_array_equal(logits(zeros), logits(None))


# --- values ---


def test_a_mask_changes_the_logits_of_every_layer_head_and_pair(tiny, logits):
    untouched = logits(None)
    single = [mask_heads(tiny.config, [head]) for head in all_heads(tiny.config)]
    for pair in range(4):
        single += [mask_rope(tiny.config, [head], [pair]) for head in all_heads(tiny.config)]
    results = np.array([logits(iv) for iv in single])
    changed = np.abs(results - untouched).max(axis=(1, 2, 3))
    assert changed.min() > 1e-4 * np.abs(untouched).max()
    assert len(np.unique(results.reshape(len(single), -1), axis=0)) == len(single)


@pytest.mark.parametrize("form", ["shared", "per row", "gates", "projection"])
def test_a_change_of_value_compiles_nothing(logits, compiles, form):

    def masks(seed):
        iv = _random_masks(seed, rows=(2,) if form == "per row" else ())
        iv = _gates(iv) if form == "gates" else iv
        return iv.replace(rope_site="projection") if form == "projection" else iv

    first = logits(masks(1))
    compiles.clear()
    assert np.abs(logits(masks(2)) - first).max() > 1e-3
    assert not compiles


def test_the_counter_of_compilations_counts(compiles):
    jax.jit(lambda x: 3 * x - 1)(TOKENS)
    assert compiles


def test_a_float_mask_of_zeros_and_ones_is_the_bool_mask(logits, close):
    for seed in range(3):
        iv = _random_masks(seed)
        close(logits(_gates(iv)), logits(iv), 1e-5)


def test_rows_have_their_own_masks(logits, close):
    iv = _random_masks(5, rows=(2,))
    together = logits(iv)
    for row in range(2):
        alone = logits(Interventions(iv.head_mask[row], iv.rope_mask[row]))
        close(together[row], alone[row], 1e-5)
        other = logits(Interventions(iv.head_mask[1 - row], iv.rope_mask[1 - row]))
        assert np.abs(together[row] - other[row]).max() > 1e-3


def test_a_shared_part_beside_a_part_per_row(logits, close):
    iv = _random_masks(6, rows=(2,))
    mixed = Interventions(iv.head_mask[0], iv.rope_mask)
    spread = Interventions(np.stack([iv.head_mask[0]] * 2), iv.rope_mask)
    close(logits(mixed), logits(spread), 1e-5)


def test_vmap_over_masks_is_a_loop_in_one_program(tiny, logits, close):
    run = functools.partial(forward, tiny.config, tiny.params, TOKENS)
    batched = jax.jit(jax.vmap(lambda iv: run(interventions=iv)))
    for seed in (0, 100):
        masks = [_random_masks(seed + i) for i in range(16)]
        close(batched(stack(masks)), np.array([logits(iv) for iv in masks]), 1e-5)
    assert batched._cache_size() == 1


def test_the_gradient_of_a_gate_is_its_finite_difference(tiny):
    """Every head gate, and rotary gates in random directions; the steps are rows of one batch."""
    rng = np.random.default_rng(8)
    weights_TV = rng.normal(size=(24, 61)).astype(np.float32) / 24
    head_gate, rope_gate = rng.uniform(0.2, 0.8, HEADS), rng.uniform(0.2, 0.8, PAIRS)
    head_steps = np.concatenate([np.eye(12).reshape(12, *HEADS), np.zeros((8, *HEADS))])
    rope_steps = np.concatenate([np.zeros((12, *PAIRS)), rng.normal(size=(8, *PAIRS))])
    step = 0.01

    def losses(head_gates, rope_gates):
        iv = Interventions(jnp.float32(head_gates), jnp.float32(rope_gates))
        tokens = np.tile(TOKENS[:1], (len(head_gates), 1))
        logits_BTV = forward(tiny.config, tiny.params, tokens, interventions=iv)
        return (logits_BTV * weights_TV).sum(axis=(1, 2))

    signs = np.array([1, -1])[:, None, None, None]
    heads_BLH = (head_gate + step * signs * head_steps).reshape(-1, *HEADS)
    pairs_BLHR = (rope_gate + step * signs[..., None] * rope_steps).reshape(-1, *PAIRS)
    above, below = np.split(np.asarray(jax.jit(losses)(heads_BLH, pairs_BLHR), np.float64), 2)
    numeric = (above - below) / (2 * step)

    gradient = jax.grad(lambda h, r: losses(h[None], r[None])[0], argnums=(0, 1))
    head_grad, rope_grad = jax.jit(gradient)(head_gate, rope_gate)
    exact = np.einsum("nlh,lh->n", head_steps, head_grad)
    exact += np.einsum("nlhr,lhr->n", rope_steps, rope_grad)
    for part in (slice(0, 12), slice(12, 20)):
        scale = np.abs(numeric[part]).max()
        assert scale > 0.01
        np.testing.assert_allclose(exact[part], numeric[part], rtol=0.02, atol=0.01 * scale)


# --- sites ---


def test_the_rotary_site_touches_its_own_head_alone(tiny, logits):
    """A head that writes nothing makes no difference to anyone through its rotary mask."""
    head = [(1, 0)]
    silent = mask_heads(tiny.config, head)
    both = silent | mask_rope(tiny.config, head, [0, 2])
    np.testing.assert_array_equal(logits(both), logits(silent))


def test_the_projection_site_reaches_the_siblings_of_its_group_only(tiny, logits):
    heads, sibling = [(1, 0)], (1, 1)  # query heads 0 and 1 share KV head 0
    rope = mask_rope(tiny.config, heads, [0, 2], site="projection")

    def silent(*silenced):
        return Interventions(mask_heads(tiny.config, silenced).head_mask, rope_site="projection")

    own = silent(*heads)
    assert np.abs(logits(own | rope) - logits(own)).max() > 1e-3
    group = silent(*heads, sibling)
    np.testing.assert_array_equal(logits(group | rope), logits(group))


def test_the_projection_site_takes_the_union_of_a_group(tiny, logits, close):
    """What all heads of a group lose is lost alike at both sites; gates join by their maximum."""
    cfg = tiny.config
    everyone = [(1, 0), (1, 1)]
    at_projection = mask_rope(cfg, everyone, [1], "projection")
    close(logits(at_projection), logits(mask_rope(cfg, everyone, [1])), 1e-5)
    gate = np.zeros(PAIRS, np.float32)
    gate[1, 0, 1], gate[1, 1, 1] = 0.25, 0.5
    # Projection: q of head 0 keeps 0.75, of head 1 0.5, their key 0.5. Rotary: the products, in q.
    in_query = np.zeros(PAIRS, np.float32)
    in_query[1, 0, 1], in_query[1, 1, 1] = 1 - 0.75 * 0.5, 1 - 0.5 * 0.5
    no_heads = np.zeros(HEADS, np.float32)
    joined = Interventions(no_heads, gate, "projection")
    close(logits(joined), logits(Interventions(no_heads, in_query)), 1e-5)


# --- composition ---


def test_bool_masks_join_by_or(tiny):
    a, b = _random_masks(1), _random_masks(2)
    both = a | b
    np.testing.assert_array_equal(both.head_mask, a.head_mask | b.head_mask)
    np.testing.assert_array_equal(both.rope_mask, a.rope_mask | b.rope_mask)
    assert both.head_mask.dtype == bool
    heads = mask_heads(tiny.config, [(0, 1)])
    rope = mask_rope(tiny.config, [(2, 3)], [1], "projection")
    for joined in (heads | rope, rope | heads):
        np.testing.assert_array_equal(joined.head_mask, heads.head_mask)
        np.testing.assert_array_equal(joined.rope_mask, rope.rope_mask)
        assert joined.rope_site == "projection"


def test_gates_join_by_their_maximum_also_with_bools():
    gate = Interventions(np.float32([[0.2, 0.7, 0]]))
    mask = Interventions(np.array([[True, False, False]]))
    joined = gate | Interventions(np.float32([[0.5, 0.1, 0]]))
    np.testing.assert_array_equal(joined.head_mask, np.float32([[0.5, 0.7, 0]]))
    for joined in (gate | mask, mask | gate):
        np.testing.assert_array_equal(joined.head_mask, np.float32([[1, 0.7, 0]]))
        assert joined.head_mask.dtype == np.float32


def test_a_shared_mask_joins_every_row():
    rows, shared = _random_masks(1, rows=(2,)), _random_masks(2)
    for joined in (rows | shared, shared | rows):
        np.testing.assert_array_equal(joined.head_mask, rows.head_mask | shared.head_mask[None])
        np.testing.assert_array_equal(joined.rope_mask, rows.rope_mask | shared.rope_mask[None])


def test_rotary_masks_of_different_sites_do_not_join(tiny):
    a, b = (mask_rope(tiny.config, [(0, 0)], [0], site) for site in ("rotary", "projection"))
    with pytest.raises(ValueError, match="'rotary' and 'projection'"):
        a | b
    with pytest.raises(ValueError, match="cannot stack .* different rope_site: 'rotary' and 'projection'"):
        stack([a, b])


# --- builders ---


def test_mask_heads_and_mask_rope_set_exactly_what_they_are_given(tiny):
    heads = [(2, 1), (0, 3)]
    masked = np.argwhere(np.asarray(mask_heads(tiny.config, heads).head_mask))
    assert masked.tolist() == [[0, 3], [2, 1]]
    iv = mask_rope(tiny.config, heads, [3, 1], site="projection")
    masked = np.argwhere(np.asarray(iv.rope_mask))
    assert masked.tolist() == [[0, 3, 1], [0, 3, 3], [2, 1, 1], [2, 1, 3]]
    assert (iv.head_mask, iv.rope_site) == (None, "projection")
    assert mask_rope(tiny.config, heads, [0]).rope_site == "rotary"


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda cfg: mask_heads(cfg, [(0, 0), (3, 0)]), r"head \(3, 0\) .* 3 layers of 4 query heads"),
        (lambda cfg: mask_heads(cfg, [(0, 4)]), r"head \(0, 4\) is out of range"),
        (lambda cfg: mask_heads(cfg, [(-1, 0)]), r"head \(-1, 0\) is out of range"),
        (lambda cfg: mask_rope(cfg, [(0, 9)], [0]), r"head \(0, 9\) is out of range"),
        (lambda cfg: mask_rope(cfg, [(0, 0)], [4]), "rotary pair 4 is out of range: .* 0 to 3"),
        (lambda cfg: mask_rope(cfg, [(0, 0)], [-1]), "rotary pair -1"),
        (lambda cfg: mask_rope(cfg, [(0, 0)], [0], site="keys"), "site is 'keys'.*rotary, projection"),
        (lambda cfg: random_heads(cfg), "either n or like"),
        (lambda cfg: random_heads(cfg, n=1, like=[(0, 0)]), "either n or like"),
        (lambda cfg: random_heads(cfg, n=1, exclude=[(5, 0)]), r"head \(5, 0\)"),
        (lambda cfg: random_heads(cfg, like=[(0, 7)]), r"head \(0, 7\)"),
        (lambda cfg: random_heads(cfg, n=11, exclude=[(0, 0), (0, 1)]), "10 free heads, 11 are wanted"),
        (
            lambda cfg: random_heads(cfg, like=[(1, 0), (1, 1)], exclude=[(1, 2)]),
            "layer 1 has 1 free heads, 2 are wanted",
        ),
        (lambda cfg: rope_pairs(cfg, 5, "low"), "k is 5; the model has 4"),
        (lambda cfg: rope_pairs(cfg, -1, "low"), "k is -1"),
        (lambda cfg: rope_pairs(cfg, 1, "middle"), "'middle'"),
    ],
)
def test_builders_refuse_what_the_model_does_not_have(tiny, build, message):
    with pytest.raises(ValueError, match=message):
        build(tiny.config)


def test_random_heads_are_drawn_without_those_excluded(tiny):
    exclude = [(0, 0), (1, 2), (2, 3)]
    draws = [random_heads(tiny.config, n=5, exclude=exclude, seed=seed) for seed in range(60)]
    for draw in draws:
        assert len(set(draw)) == 5 and not set(draw) & set(exclude)
    assert set().union(*draws) == set(all_heads(tiny.config)) - set(exclude)
    assert random_heads(tiny.config, n=5, exclude=exclude, seed=7) == draws[7]
    assert len({tuple(draw) for draw in draws}) > 40
    assert random_heads(tiny.config, n=0) == []


def test_random_heads_like_others_have_their_layers_and_none_of_them(tiny):
    like, exclude = [(0, 1), (2, 0), (2, 3)], [(0, 0)]
    draws = [random_heads(tiny.config, like=like, exclude=exclude, seed=seed) for seed in range(30)]
    for draw in draws:
        assert sorted(layer for layer, _ in draw) == [0, 2, 2] and len(set(draw)) == 3
        assert not set(draw) & set(like + exclude)
    assert set().union(*draws) == {(0, 2), (0, 3), (2, 1), (2, 2)}
    assert random_heads(tiny.config, like=like, exclude=exclude, seed=3) == draws[3]


def test_layer_matched_heads_are_those_of_random_heads_where_each_layer_has_enough(tiny):
    like = [(0, 1), (2, 0), (2, 3)]
    for seed in range(20):
        assert layer_matched(tiny.config, like, seed) == random_heads(tiny.config, like=like, seed=seed)


def test_layer_matched_heads_come_from_the_nearest_layer_where_a_layer_has_too_few(tiny):
    """Layer 0 loses all of its four heads, layer 1 one: layer 1 keeps its own draw, the rest comes from 1, then 2."""
    like = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2)]
    draws = [layer_matched(tiny.config, like, seed) for seed in range(20)]
    for draw in draws:
        assert Counter(layer for layer, _ in draw) == {1: 3, 2: 2} and not set(draw) & set(like)
    assert len({tuple(draw) for draw in draws}) > 3
    with pytest.raises(ValueError, match="7 other heads are wanted, the model has 5 left"):
        layer_matched(tiny.config, all_heads(tiny.config)[:7])


def test_rope_pairs_are_ordered_by_frequency(tiny):
    assert rope_pairs(tiny.config, 3, "high") == [0, 1, 2]
    assert rope_pairs(tiny.config, 2, "low") == [2, 3]
    draws = [tuple(rope_pairs(tiny.config, 2, "random", seed=seed)) for seed in range(40)]
    assert len(set(draws)) == 6 and all(len(set(draw)) == 2 for draw in draws)
    assert rope_pairs(tiny.config, 2, "random", seed=5) == list(draws[5])
    assert rope_pairs(tiny.config, 0, "low") == []
    assert rope_pairs(tiny.config, 4, "low") == [0, 1, 2, 3]


def test_rope_pairs_go_by_the_frequency_after_scaling(tiny):
    """low_freq_factor above high_freq_factor slows short wavelengths only: the order turns over."""
    rope = Rope("llama3", 1e4, 1000.0, 4.0, 1.0, original_length=100)
    cfg = dataclasses.replace(tiny.config, rope=rope)
    freq_R = inverse_frequencies(cfg)
    assert np.argmax(freq_R) != 0
    for which, sign in (("high", -1), ("low", 1)):
        assert rope_pairs(cfg, 2, which) == sorted(np.argsort(sign * freq_R)[:2].tolist())


# --- shapes and types ---


@pytest.mark.parametrize(
    "iv, message",
    [
        (Interventions(np.zeros((4, 3), bool)), r"head_mask .* \(4, 3\); .* \(3, 4\) or \(2, 3, 4\)"),
        (Interventions(np.zeros((3, 3, 4), bool)), r"head_mask has shape \(3, 3, 4\); .* \(2, 3, 4\)"),
        (Interventions(np.zeros(4, bool)), r"head_mask has shape \(4,\)"),
        (Interventions(np.zeros((1, *HEADS), bool)), r"head_mask has shape \(1, 3, 4\)"),
        (
            Interventions(rope_mask=np.zeros((3, 4, 8), bool)),
            r"rope_mask has shape \(3, 4, 8\); .* \(3, 4, 4\) or \(2, 3, 4, 4\)",
        ),
        (Interventions(rope_mask=np.zeros(HEADS, bool)), r"rope_mask has shape \(3, 4\)"),
        (Interventions(rope_mask=np.zeros((2, 2, 3, 4, 4), bool)), r"rope_mask .* \(2, 2, 3, 4, 4\)"),
        (Interventions(np.zeros(HEADS, np.int32)), "head_mask has type int32; .* bool, or float"),
        (Interventions(rope_mask=np.zeros(PAIRS, np.uint8)), "rope_mask has type uint8"),
        (Interventions(rope_site="key"), "rope_site is 'key'; it must be one of rotary, projection"),
    ],
)
def test_a_mask_that_does_not_fit_raises_before_any_compile(tiny, compiles, iv, message):
    # Moving an array to the device may itself compile a copy.
    jax.tree.map(jnp.asarray, (iv, TOKENS))
    compiles.clear()
    with pytest.raises(ValueError, match=message):
        tiny.logits(TOKENS, interventions=iv)
    with pytest.raises(ValueError, match=message):
        tiny.generate(TOKENS, np.array([24, 24]), 8, interventions=iv)
    assert not compiles
