"""Generation: the cache, rows of a batch, stopping, sampling, batching by length, compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retmask_jax.generation import decode as generation
from retmask_jax.generation.batching import batches_by_length, bucket, pad_rows, padded_width
from retmask_jax.generation.decode import generate, generate_many
from retmask_jax.generation.sampling import Draws, sample
from retmask_jax.model.attention import Probe
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.masking import normalise
from retmask_jax.model.transformer import hidden

NEW = 8
LENGTHS = np.array([20, 1, 13])
TOKENS = np.random.default_rng(0).integers(3, 61, (3, 20)).astype(np.int32)
VOCAB = 61


@pytest.fixture(scope="module")
def run(tiny):
    """Generate NEW tokens after the three prompts, without stop ids unless given."""

    def call(tokens=TOKENS, lengths=LENGTHS, stop_ids=(), **options):
        options |= {"max_new_tokens": NEW, "stop_ids": stop_ids}
        out = generate(tiny.config, tiny.params, tokens, lengths, **options)
        return jax.tree.map(np.asarray, out)

    return call


@pytest.fixture(scope="module")
def uncached(tiny):
    """logits f32[B,NEW,V] that predict the tokens i32[B,NEW] after each prompt, all at once."""

    def logits(generated, tokens=TOKENS, lengths=LENGTHS, interventions=None):
        rows_BN = lengths[:, None] - 1 + np.arange(NEW)
        full = np.pad(tokens, ((0, 0), (0, NEW)))
        np.put_along_axis(full, rows_BN + 1, generated, axis=1)
        logits_BTV = np.asarray(tiny.logits(full, interventions=interventions))
        return np.take_along_axis(logits_BTV, rows_BN[:, :, None], axis=1)

    return logits


def _masks(seed, rows=()):
    rng = np.random.default_rng(seed)
    return Interventions(rng.random((*rows, 3, 4)) < 0.3, rng.random((*rows, 3, 4, 4)) < 0.3)


# --- compilation (first, so that no other test has compiled what must not be compiled) ---


def test_within_a_bucket_no_value_compiles_anything(tiny, run, compiles):
    run(interventions=_masks(1), temperature=0.7, top_p=0.9, seed=3)
    narrow = TOKENS[:, :5], np.minimum(LENGTHS, 5)
    jnp.asarray(narrow[0])  # moving an array to the device may itself compile a copy
    programs = generation.generate_batch._cache_size()
    compiles.clear()
    for seed in range(3):
        run(interventions=_masks(seed), temperature=0.5 * seed, top_p=1 - seed / 4, seed=seed)
        run(interventions=_masks(seed), stop_ids=tuple(range(3, 3 + seed)))
    run(stop_ids=None)
    run(*narrow, seed=np.array([7, 8, 9]), temperature=1.3)
    assert not compiles
    assert generation.generate_batch._cache_size() == programs


# --- greedy ---


def test_greedy_programs_hold_nothing_that_draws(tiny):
    masks, zeros_B = normalise(tiny.config, None, len(TOKENS)).repeated(len(TOKENS)), np.zeros(len(TOKENS), np.uint32)

    def program(draws):
        given = tiny.config, tiny.params, TOKENS, LENGTHS, masks, draws, zeros_B, zeros_B
        return generation.generate_batch.lower(*given, max_new_tokens=NEW, probe=False).as_text()

    draws = Draws.of(tiny.config, (), 0.0, 1.0)
    assert "stablehlo.sort" in program(draws)
    assert "stablehlo.sort" not in program(draws.greedy)


@pytest.mark.parametrize("iv", [None, _masks(1)], ids=["untouched", "masked"])
def test_cached_greedy_decoding_is_the_argmax_of_full_forward_passes(run, uncached, iv):
    out = run(interventions=iv)
    np.testing.assert_array_equal(out.tokens, uncached(out.tokens, interventions=iv).argmax(-1))
    np.testing.assert_array_equal(out.lengths, NEW)
    assert out.argmax is None
    assert (out.tokens != run(interventions=_masks(2)).tokens).any()


def test_what_pads_a_prompt_does_not_matter(run):
    repadded = TOKENS.copy()
    repadded[1, 1:], repadded[2, 13:] = 7, 60
    wider = np.pad(repadded, ((0, 0), (0, 30)), constant_values=5)
    for tokens in (repadded, wider):
        np.testing.assert_array_equal(run(tokens).tokens, run().tokens)


def test_rows_have_their_own_masks(run):
    iv = _masks(3, rows=(3,))
    out = run(interventions=iv)
    for row in range(3):
        alone = run(interventions=jax.tree.map(lambda x, n=row: x[n], iv))
        np.testing.assert_array_equal(out.tokens[row], alone.tokens[row])
    assert (out.tokens != run().tokens).any(axis=1).all()


def test_rows_do_not_depend_on_their_batch(run):
    for row in (0, 1):
        alone = run(TOKENS[row : row + 1], LENGTHS[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], run().tokens[row])


def test_probes_see_what_full_forward_passes_see(five_layers):
    """Cached decoding of layers in pairs with a tail, against a pass of five layers in a row."""
    flat, paired = five_layers
    prompt = TOKENS % 31
    options = {"max_new_tokens": NEW, "stop_ids": (), "probe": True}
    out = generate(paired.config, paired.params, prompt, LENGTHS, **options)
    rows_BN = LENGTHS[:, None] - 1 + np.arange(NEW)
    tokens = np.pad(prompt, ((0, 0), (0, NEW)))
    np.put_along_axis(tokens, rows_BN + 1, np.asarray(out.tokens), axis=1)

    @jax.jit
    def full_pass(params):
        full = hidden(flat.config, params, tokens, normalise(flat.config), probe=Probe(rows_BN))
        return full.probed.keys[..., 0], full.x_BTE @ params["lm_head"]["kernel"]

    argmax_BNLH, logits_BTV = full_pass(flat.params)
    np.testing.assert_array_equal(out.argmax, argmax_BNLH)
    best_BT = np.argmax(logits_BTV, axis=-1)
    np.testing.assert_array_equal(out.tokens, np.take_along_axis(best_BT, rows_BN, axis=1))
    assert len(np.unique(argmax_BNLH)) > 10


# --- stopping ---


@pytest.mark.parametrize("ids_at", [[(0, 3)], [(1, 0)], [(2, 7)], [(0, 2), (1, 4), (2, 1)]])
def test_a_stop_id_ends_its_row(run, ids_at):
    """The tokens before a row's first stop id stay; it and what follows is padding, not counted."""
    free = run().tokens
    stop_ids = {int(free[row, step]) for row, step in ids_at}
    out = run(stop_ids=tuple(stop_ids))
    is_stop = np.isin(free, list(stop_ids))
    expected = np.where(is_stop.any(axis=1), is_stop.argmax(axis=1), NEW)
    np.testing.assert_array_equal(out.lengths, expected)
    ended_by = [free[row, n] if n < NEW else -1 for row, n in enumerate(expected)]
    np.testing.assert_array_equal(out.stops, ended_by)
    assert out.lengths.min() < NEW
    kept = np.arange(NEW) < expected[:, None]
    np.testing.assert_array_equal(out.tokens, np.where(kept, free, 0))


def test_the_models_eos_stops_by_default_and_never_with_an_empty_tuple(tiny, run):
    free = run().tokens
    assert (free == run(stop_ids=(60, 59)).tokens).all(), "these ids must not occur"
    eos = int(free[0, 2])
    ends = tiny.replace(params=_renamed(tiny.params, eos, tiny.config.eos_ids[0]))
    out = ends.generate(TOKENS, LENGTHS, NEW)
    never = ends.generate(TOKENS, LENGTHS, NEW, stop_ids=())
    assert out.lengths[0] < NEW and (never.lengths == NEW).all()
    assert never.tokens[0, out.lengths[0]] == tiny.config.eos_ids[0]
    custom = ends.generate(TOKENS, LENGTHS, NEW, stop_ids=[int(never.tokens[0, 0])])
    assert custom.lengths[0] == 0


def _renamed(params, a, b):
    """The model with output tokens a and b exchanged."""
    kernel = np.array(params["lm_head"]["kernel"])
    kernel[:, [a, b]] = kernel[:, [b, a]]
    return {**params, "lm_head": {"kernel": jnp.asarray(kernel)}}


# --- sampling ---


def test_temperature_0_is_greedy_whatever_the_seed(run):
    for seed in (1, 2):
        out = run(temperature=0.0, top_p=0.5, seed=seed)
        np.testing.assert_array_equal(out.tokens, run().tokens)


def test_a_seed_reproduces_its_draw_and_another_does_not(run):
    draws = [run(temperature=1.0, seed=seed).tokens for seed in (5, 6, 5)]
    np.testing.assert_array_equal(draws[0], draws[2])
    assert (draws[0] != draws[1]).any(axis=1).all()


def test_rows_of_one_prompt_draw_differently_under_one_seed(run):
    same = run(np.tile(TOKENS[:1], (3, 1)), np.full(3, 20), temperature=1.0, seed=5).tokens
    assert len(np.unique(same, axis=0)) == 3


def test_a_seed_per_row_makes_its_draw_independent_of_the_batch(run):
    seeds = np.array([4, 9, 4])
    out = run(temperature=1.0, seed=seeds).tokens
    for row in range(3):
        alone = run(TOKENS[row:][:1], LENGTHS[row:][:1], temperature=1.0, seed=seeds[row:][:1])
        np.testing.assert_array_equal(alone.tokens[0], out[row])
    order = [2, 0, 1]
    shuffled = run(TOKENS[order], LENGTHS[order], temperature=1.0, seed=seeds[order]).tokens
    np.testing.assert_array_equal(shuffled, out[order])


def test_generated_tokens_lie_in_the_nucleus_of_the_uncached_model(run, uncached):
    temperature, top_p, off_greedy = 1.5, 0.6, 0
    for seed in range(8):
        out = run(temperature=temperature, top_p=top_p, seed=seed).tokens
        logits_BNV = uncached(out)
        for token, logits_V in zip(out.ravel(), logits_BNV.reshape(-1, VOCAB), strict=True):
            probs_V = np.exp(np.float64(logits_V - logits_V.max()) / temperature)
            probs_V /= probs_V.sum()
            assert probs_V[probs_V > probs_V[token]].sum() < top_p + 1e-5
            off_greedy += token != logits_V.argmax()
    assert off_greedy > 20


@pytest.fixture(scope="module")
def frequencies():
    """Frequencies of 20,000 draws from logits f32[V]."""
    draw = jax.jit(sample)
    keys = jax.random.split(jax.random.key(0), 20_000)

    def of(probs, temperature, top_p):
        logits_BV = np.tile(np.log(np.float32(probs)), (len(keys), 1))
        drawn = draw(logits_BV, keys, np.float32(temperature), np.float32(top_p))
        return np.bincount(drawn, minlength=len(probs)) / len(keys)

    return of


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.05, 0.5, 0.15, 0.3]),
        (1.0, 0.79, [0, 5 / 8, 0, 3 / 8]),  # the set must reach top_p: .5 does not, .5 + .3 does
        (1.0, 0.81, [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
        (1.0, 0.4, [0, 1, 0, 0]),
        (0.5, 1.0, np.square([0.05, 0.5, 0.15, 0.3]) / 0.365),
        (2.0, 0.6, [0, 0.5**0.5 / (0.5**0.5 + 0.3**0.5), 0, 0.3**0.5 / (0.5**0.5 + 0.3**0.5)]),
        (0.0, 0.5, [0, 1, 0, 0]),
    ],
)
def test_sampling_follows_temperature_then_the_nucleus(frequencies, temperature, top_p, expected):
    observed = frequencies([0.05, 0.5, 0.15, 0.3], temperature, top_p)
    np.testing.assert_allclose(observed, expected, atol=0.015)  # four standard errors
    np.testing.assert_array_equal(observed[np.array(expected) == 0], 0)


# --- many prompts ---


def test_buckets_grow_in_bounded_steps():
    sizes = sorted({bucket(length) for length in range(1, 5000)})
    assert sizes[:12] == [64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert all(b <= a * 5 / 4 for a, b in zip(sizes[3:], sizes[4:], strict=False))
    assert all(bucket(size) == size for size in sizes)
    assert all(bucket(length) >= length for length in range(1, 5000))


def test_prompts_of_a_small_model_have_half_as_many_widths(tiny):
    small = dataclasses.replace(tiny.config, max_length=4096)
    large = dataclasses.replace(small, hidden_size=512)
    of_small, of_large = (sorted({padded_width(config, n, 8) for n in range(1, 1025)}) for config in (small, large))
    assert of_small == [128, 256, 384, 512, 640, 768, 896, 1024]
    assert of_large == sorted({*of_small, 64, 192, 320, 448})


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(3, VOCAB, n).tolist() for n in (17, 2, 30, 1, 64, 9, 64)]


def _many(tiny, prompts, **options):
    options |= {"batch_size": 3, "max_new_tokens": NEW}
    return generate_many(tiny.config, tiny.params, prompts, **options)


def test_many_prompts_come_back_in_their_order(tiny, run, prompts):
    results = _many(tiny, prompts, stop_ids=())
    for prompt, result in zip(prompts, results, strict=True):
        alone = run(np.array([prompt]), np.array([len(prompt)]))
        np.testing.assert_array_equal(result.tokens, alone.tokens[0])
        assert (result.lengths, result.argmax) == (NEW, None)


def test_batches_are_full_and_hold_prompts_of_similar_length():
    lengths = [70, 3, 64, 200, 65, 1, 128, 129, 2]
    batches = list(batches_by_length([[0] * n for n in lengths], batch_size=2))
    assert [[lengths[i] for i in batch] for batch in batches] == [[200, 129], [128, 70], [65, 64], [3, 2], [1, 1]]
    assert sorted({i for batch in batches for i in batch}) == list(range(len(lengths)))


def test_many_prompts_cut_each_row_at_its_stop(tiny, prompts):
    free = [result.tokens for result in _many(tiny, prompts, stop_ids=())]
    stop = int(free[2][3])
    for result, tokens in zip(_many(tiny, prompts, stop_ids=(stop,)), free, strict=True):
        end = tokens.tolist().index(stop) if stop in tokens else NEW
        assert (result.lengths, result.stops) == (end, stop if end < NEW else -1)
        np.testing.assert_array_equal(result.tokens, tokens[:end])


def test_many_prompts_have_their_own_seeds_and_masks(tiny, run, prompts):
    iv = _masks(9, rows=(len(prompts),))
    seeds = np.arange(len(prompts)) + 40
    options = {"temperature": 0.8, "stop_ids": ()}
    results = _many(tiny, prompts, seeds=seeds, interventions=iv, **options)
    for i, prompt in enumerate(prompts):
        tokens, lengths = pad_rows([prompt] * 3, pad_id=0)
        mask = jax.tree.map(lambda x, n=i: x[n], iv)
        alone = run(tokens, lengths, temperature=0.8, seed=seeds[[i] * 3], interventions=mask)
        np.testing.assert_array_equal(results[i].tokens, alone.tokens[0])
    again = _many(tiny, prompts, interventions=iv, **options)
    assert any((a.tokens != b.tokens).any() for a, b in zip(again, results, strict=True))


def test_pad_rows_pads_on_the_right_to_a_multiple():
    tokens, lengths = pad_rows([[5, 6], [7, 8, 9], []], pad_id=1, multiple_of=4)
    assert tokens.tolist() == [[5, 6, 1, 1], [7, 8, 9, 1], [1, 1, 1, 1]]
    assert lengths.tolist() == [2, 3, 0]


# --- errors ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": np.zeros((3, 293), np.int32)}, "293 prompt tokens and 8 new ones .* of 300"),
        ({"lengths": np.array([20, 0, 13])}, "lengths run from 0 to 20; tokens have 1 to 20"),
        ({"lengths": np.array([20, 1, 21])}, "lengths run from 1 to 21; they must lie in 0 to 20"),
        ({"lengths": np.array([20, 1])}, r"lengths has shape \(2,\)"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"top_p": 0.0}, r"top_p 0\.0 in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p 1\.1"),
        ({"stop_ids": range(9)}, "9 stop ids are given; at most 8"),
        ({"interventions": Interventions(np.zeros((2, 3, 4), bool))}, r"head_mask .* \(2, 3, 4\)"),
    ],
)
def test_unfit_requests_raise_before_any_compile(run, compiles, changes, message):
    # Moving an array to the device may itself compile a copy.
    jnp.asarray(changes.get("tokens", TOKENS))
    jax.tree.map(jnp.asarray, changes.get("interventions"))
    compiles.clear()
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not compiles


def test_no_new_tokens_is_an_error(tiny):
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        tiny.generate(TOKENS, LENGTHS, 0)
