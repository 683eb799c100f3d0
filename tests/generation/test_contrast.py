"""Decoding by contrast: a slow reference in float64, plain decoding at alpha 0, programs, batches that are refilled, meshes."""

import functools
import json
import textwrap

import jax
import numpy as np
import pytest
from helpers_processes import environment, printed
from helpers_tiny import in_float64, reference

from retmask_jax.generation import continuous
from retmask_jax.generation.batching import pad_rows
from retmask_jax.generation.continuous import Request, generate_stream
from retmask_jax.generation.continuous_programs import Shared
from retmask_jax.generation.decode import generate, generate_batch, generate_many
from retmask_jax.generation.language_model import load
from retmask_jax.generation.sampling import ContrastDecoding, Draws
from retmask_jax.model.interventions import Interventions, mask_heads, mask_rope, stack

NEW = 4
RETRIEVAL = [(1, 0), (1, 1), (1, 2), (1, 3)]  # of the bundled model
# Prompts to which plain decoding and every strength below give other answers.
TEXTS = [np.random.default_rng(seed).integers(22, 354, 6 + seed % 18).tolist() for seed in (111, 57, 20, 119)]
TOKENS, LENGTHS = pad_rows(TEXTS, pad_id=0)
STRENGTHS = [(0.5, 0.1), (3.0, 0.1), (3.0, 0.0), ("entropy", 0.1), ("entropy", 0.02)]


@pytest.fixture(scope="module")
def bundled():
    return load("bundled")


@pytest.fixture(scope="module")
def run(bundled):
    """(tokens, lengths) of NEW tokens after the prompts, without stop ids unless given."""

    def call(contrast=None, stop_ids=(), **options):
        options |= {"max_new_tokens": NEW, "stop_ids": stop_ids, "contrast": contrast}
        return jax.tree.map(np.asarray, generate(bundled.config, bundled.params, TOKENS, LENGTHS, **options))

    return call


@pytest.fixture(scope="module")
def logprobs(bundled):
    """f64[V]: log-probabilities of the token after a row of tokens, with heads masked or not; one row, no cache."""
    params = in_float64(bundled.params)

    @functools.cache
    def of(row, masked):
        mask = np.asarray(mask_heads(bundled.config, masked).head_mask)
        logits_V = reference(params, np.array(row), config=bundled.config, head_mask=mask)[0][-1]
        return logits_V - np.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max()

    return of


def _scores(plain_V, masked_V, alpha, threshold):
    """The rule of DeCoRe, with the plausibility threshold of contrastive decoding."""
    p_V = np.exp(plain_V)
    alpha = -(p_V * plain_V).sum() if alpha == "entropy" else alpha
    scores_V = (1 + alpha) * plain_V - alpha * masked_V
    return np.where(p_V >= threshold * p_V.max(), scores_V, -np.inf)


def _nucleus(scores_V, top_p):
    """The scores of the smallest set of tokens with so much probability; the others are -inf."""
    order_V = np.argsort(-scores_V, kind="stable")
    p_V = np.exp(scores_V[order_V] - scores_V.max())
    n = int(np.sum(np.cumsum(p_V) / p_V.sum() < top_p)) + 1
    kept_V = np.full_like(scores_V, -np.inf)
    kept_V[order_V[:n]] = scores_V[order_V[:n]]
    return kept_V


def _slowly(logprobs, alpha, threshold, choose=np.argmax, plain=(), masked=tuple(RETRIEVAL)):
    """tokens i32[B,NEW], each chosen from the scores by choose(scores_V, row, step)."""
    rows = [tuple(text) for text in TEXTS]
    for step in range(NEW):
        for b, row in enumerate(rows):
            scores_V = _scores(logprobs(row, plain), logprobs(row, masked), alpha, threshold)
            chosen = choose(scores_V) if choose is np.argmax else choose(scores_V, b, step)
            rows[b] = (*row, int(chosen))
    return np.array([row[-NEW:] for row in rows])


# --- compilation (first, so that no other test has compiled what must not be compiled) ---


def test_masks_strengths_and_thresholds_share_one_program(bundled, run, compiles):
    masks = [mask_heads(bundled.config, heads) for heads in (RETRIEVAL, [(0, 1)], [])]
    run(ContrastDecoding(masks[0], 0.5))
    programs = generate_batch._cache_size()
    compiles.clear()
    for mask, (alpha, threshold) in zip(masks * 2, STRENGTHS, strict=False):
        run(ContrastDecoding(mask, alpha, threshold), temperature=0.7, top_p=0.9, seed=3)
    run(ContrastDecoding(masks[1], 2.0), interventions=masks[0], stop_ids=(20, 21))
    assert not compiles and generate_batch._cache_size() == programs


# --- against the reference ---


@pytest.mark.parametrize("alpha, threshold", STRENGTHS)
def test_tokens_are_those_of_the_rule(run, logprobs, bundled, alpha, threshold):
    found = run(ContrastDecoding(mask_heads(bundled.config, RETRIEVAL), alpha, threshold)).tokens
    np.testing.assert_array_equal(found, _slowly(logprobs, alpha, threshold))


def test_every_strength_and_threshold_gives_other_answers(run, bundled):
    mask = mask_heads(bundled.config, RETRIEVAL)
    contrasts = [None, *(ContrastDecoding(mask, *strength) for strength in STRENGTHS)]
    assert len({run(contrast).tokens.tobytes() for contrast in contrasts}) == 1 + len(STRENGTHS)


@pytest.mark.parametrize("alpha, threshold, top_p", [(1.5, 0.0, 1.0), (0.7, 0.01, 0.9), ("entropy", 0.1, 1.0)])
def test_draws_are_from_the_scores_at_the_temperature(run, logprobs, bundled, alpha, threshold, top_p):
    """The noise of each draw is known from its seed, so the token is known, too."""
    temperature, seeds = 1.4, np.array([4, 9, 11, 2])

    def choose(scores_V, row, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seeds[row]), 0), step)
        noise_V = np.asarray(jax.random.gumbel(key, scores_V.shape, np.float32), np.float64)
        return np.argmax(_nucleus(scores_V / temperature, top_p) + noise_V)

    contrast = ContrastDecoding(mask_heads(bundled.config, RETRIEVAL), alpha, threshold)
    found = run(contrast, temperature=temperature, top_p=top_p, seed=seeds).tokens
    np.testing.assert_array_equal(found, _slowly(logprobs, alpha, threshold, choose))
    assert (found != run(contrast).tokens).any()


def test_the_model_may_have_masks_of_its_own(run, logprobs, bundled):
    ours, theirs = ((0, 2), (2, 5)), (*RETRIEVAL, (0, 2))
    contrast = ContrastDecoding(mask_heads(bundled.config, theirs), 1.5)
    found = run(contrast, interventions=mask_heads(bundled.config, ours)).tokens
    np.testing.assert_array_equal(found, _slowly(logprobs, 1.5, 0.1, plain=ours, masked=theirs))
    assert (found != run(contrast).tokens).any()


def test_rows_have_their_own_masks(run, bundled):
    masks = [mask_heads(bundled.config, heads) for heads in (RETRIEVAL, [(3, 1), (2, 2)], [(0, 5)], [])]
    together = run(ContrastDecoding(stack(masks), 2.0)).tokens
    for row, mask in enumerate(masks):
        np.testing.assert_array_equal(together[row], run(ContrastDecoding(mask, 2.0)).tokens[row])


def test_a_contrast_with_itself_changes_nothing(run, bundled):
    mask = mask_heads(bundled.config, RETRIEVAL)
    expected = run(interventions=mask, temperature=1.3, seed=5).tokens
    found = run(ContrastDecoding(mask, 7.0, 0.0), interventions=mask, temperature=1.3, seed=5).tokens
    np.testing.assert_array_equal(found, expected)


# --- alpha 0 ---


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_p": 0.95, "seed": 7}], ids=["greedy", "sampled"])
def test_alpha_0_is_plain_decoding(run, bundled, options):
    """Whatever the threshold; and as alpha goes to 0, answers without a threshold become these."""
    mask, plain = mask_heads(bundled.config, RETRIEVAL), run(**options)
    for contrast in (ContrastDecoding(mask, 0, 0.9), ContrastDecoding(mask, 0.0), ContrastDecoding(mask, 1e-7, 0.0)):
        jax.tree.map(np.testing.assert_array_equal, run(contrast, **options), plain)
    public = bundled.generate(TOKENS, LENGTHS, NEW, stop_ids=(), contrast=mask, alpha=0, **options)
    np.testing.assert_array_equal(public.tokens, plain.tokens)


# --- many prompts, refilled batches ---

PROMPTS = [np.random.default_rng(4).integers(16, 300, n).tolist() for n in (60, 3, 41, 7, 12, 50, 9)]
OPTIONS = {"max_new_tokens": 8, "stop_ids": (2, 34, 67, 124, 209), "temperature": 5.0}
FLAT = "entropy", 1e-4  # with the temperature: answers that vary


def _many(lm, contrast, **options):
    return generate_many(lm.config, lm.params, PROMPTS, batch_size=4, contrast=contrast, **OPTIONS | options)


def test_many_prompts_have_the_masks_of_their_contrast(bundled, run):
    rows = stack([mask_heads(bundled.config, heads) for heads in (RETRIEVAL, [(3, 1), (2, 2)], [(0, 5)], [])])
    contrast, options = ContrastDecoding(rows, 2.0), {"max_new_tokens": NEW, "stop_ids": ()}
    found = generate_many(bundled.config, bundled.params, TEXTS, batch_size=4, contrast=contrast, **options)
    np.testing.assert_array_equal([result.tokens for result in found], run(contrast).tokens)


def test_a_refilled_batch_gives_what_the_simple_path_gives(bundled, monkeypatch, caplog):
    """Also under masks of the model's own, and where memory runs out and the batch is halved."""
    masks = [mask_heads(bundled.config, heads) for heads in ([], [(0, 2), (2, 5)])]
    contrast = ContrastDecoding(mask_heads(bundled.config, RETRIEVAL), *FLAT)
    expected = _many(bundled, contrast, interventions=stack([masks[i % 2] for i in range(len(PROMPTS))]))
    decode, sizes = continuous.decode_rows, []

    def exhausted(config, shared, steps, enough, rows, cache):
        sizes.append(len(rows.done_B))
        if len(sizes) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes.")
        return decode(config, shared, steps, enough, rows, cache)

    monkeypatch.setattr(continuous, "decode_rows", exhausted)
    requests = [Request(prompt, i % 2, seed=i) for i, prompt in enumerate(PROMPTS)]
    options = OPTIONS | {"masks": masks, "contrast": contrast}
    found = dict(generate_stream(bundled.config, bundled.params, requests, batch_size=4, **options))
    assert set(sizes) == {4, 2} and "ran out of memory" in caplog.text
    for i, result in enumerate(expected):
        np.testing.assert_array_equal(found[i].tokens, result.tokens)
        assert found[i].stops == result.stops
    assert len({len(result.tokens) for result in expected}) > 3, "rows must end at different steps"


def test_caches_of_a_contrast_take_twice_the_room(bundled):
    def room(contrast):
        shared = Shared(bundled.params, None, Draws.of(bundled.config, None, 0.0, 1.0, contrast), None)
        return continuous._room(bundled.config, shared, 64, 100_000_000)

    assert room(None) // room(ContrastDecoding(Interventions())) == 2


# --- errors ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": -0.5}, "alpha is -0.5; it must be a number of at least 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": "entropic"}, "alpha is 'entropic'"),
        ({"threshold": 1.5}, "threshold is 1.5; it must be a number from 0 to 1"),
        ({"contrast": None, "alpha": 1.0}, "alpha is 1.0 and threshold None without contrast"),
        ({"contrast": None, "threshold": 0.1}, "threshold 0.1 without contrast"),
        ({"contrast": Interventions(np.zeros((2, 4, 8), bool))}, r"head_mask .* \(2, 4, 8\)"),
    ],
)
def test_unfit_contrasts_raise_before_any_compile(bundled, compiles, options, message):
    options = {"contrast": mask_heads(bundled.config, RETRIEVAL)} | options
    compiles.clear()
    with pytest.raises(ValueError, match=message):
        bundled.generate(TOKENS, LENGTHS, NEW, **options)
    assert not compiles


def test_what_a_contrast_cannot_go_with_is_an_error(bundled, run):
    config = bundled.config
    rotary = [mask_rope(config, RETRIEVAL, [3], site=site) for site in ("rotary", "projection")]
    with pytest.raises(ValueError, match=r"different sites \(projection, rotary\)"):
        run(ContrastDecoding(rotary[0], 1.0), interventions=rotary[1])
    with pytest.raises(ValueError, match="contrast decoding has two"):
        run(ContrastDecoding(rotary[0], 1.0), probe=True)
    per_row = ContrastDecoding(stack([mask_heads(config, RETRIEVAL)] * 2), 1.0)
    with pytest.raises(ValueError, match="without a row axis"):
        generate_stream(config, bundled.params, [Request([5])], batch_size=1, max_new_tokens=2, contrast=per_row)


# --- meshes ---

_MESHES = textwrap.dedent("""
    import json, sys
    import jax, numpy as np
    from retmask_jax.generation import continuous
    from retmask_jax.generation.decode import generate_many
    from retmask_jax.generation.language_model import load
    from retmask_jax.generation.sampling import ContrastDecoding
    from retmask_jax.model import sharding
    from retmask_jax.model.interventions import mask_heads

    prompts, heads, strength, options = json.loads(sys.argv[1])
    requests = [continuous.Request(prompt, seed=i) for i, prompt in enumerate(prompts)]
    found = []
    for sizes in json.loads(sys.argv[2]):
        lm = load("bundled", mesh=sharding.make_mesh(dict(zip(sharding.AXES, sizes))))
        options["contrast"] = ContrastDecoding(mask_heads(lm.config, map(tuple, heads)), *strength)
        many = generate_many(lm.config, lm.params, prompts, **options)
        stream = dict(continuous.generate_stream(lm.config, lm.params, requests, **options))
        found.append([[row.tokens.tolist() for row in many],
                      [stream[i].tokens.tolist() for i in range(len(prompts))]])
    names = ("empty_state", "start_rows", "replace_rows", "decode_rows")
    print(json.dumps([found, [getattr(continuous, name)._cache_size() for name in names]]))
""")


@pytest.mark.slow
def test_on_meshes_answers_and_the_number_of_programs_are_the_same(bundled):
    given = [PROMPTS, RETRIEVAL, FLAT, OPTIONS | {"batch_size": 4}]
    sizes = json.dumps([(4, 1, 1), (2, 2, 1), (1, 2, 2)])
    found, programs = json.loads(printed("-c", _MESHES, json.dumps(given), sizes, env=environment(4)))
    alone = _many(bundled, ContrastDecoding(mask_heads(bundled.config, RETRIEVAL), *FLAT))
    assert found == [[[result.tokens.tolist() for result in alone]] * 2] * 3 and programs == [3, 3, 3, 3]
