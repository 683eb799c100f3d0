"""Texts that fork: answers after a shared prompt have the log-probabilities and gradients of separate rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retmask_jax.generation.logprobs import branch_logprobs, sequence_logprobs
from retmask_jax.model import attention
from retmask_jax.model.attention import Keys, attend, attend_forked
from retmask_jax.model.config import Lora, Rope
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kernels.blocked import Scores
from retmask_jax.model.layers import Fork

# Beginnings of every kind: all of the prompt but its last token. One is empty, one fills the columns.
LENGTHS, WIDTH = np.array([1, 16, 6]), 16
OWN = np.array([[9, 4], [1, 7], [3, 9]])  # lengths of the answers
LONGEST = int((LENGTHS[:, None] + OWN).max())
# Windows, frequencies that depend on the length; caps, experts, layers without RoPE, norms over the whole projection.
FAMILIES = ("mistral_window",)
SLOW = ("dynamic", "gemma2", "qwen3_moe", "smollm3_window", "olmo2_gqa", "phi3_longrope", "gemma3")


@functools.cache
def _texts(vocab_size):
    """(prompts, answers, counted), and the same as rows [B*N,T] with what counts in them."""
    rng = np.random.default_rng(3)
    prompts, answers = (rng.integers(3, vocab_size, (3, *shape)).astype(np.int32) for shape in ((WIDTH,), (2, 9)))
    rows, mask = np.zeros((3, 2, LONGEST), np.int32), np.zeros((3, 2, LONGEST), bool)
    for (b, n), own in np.ndenumerate(OWN):
        row = np.concatenate([prompts[b, : LENGTHS[b]], answers[b, n, :own]])
        rows[b, n, : len(row)], mask[b, n, LENGTHS[b] : len(row)] = row, True
    flat = [x.reshape(6, -1) for x in (rows, mask)]
    return (prompts, LENGTHS, answers, np.arange(9) < OWN[..., None]), flat


def _both(config, params, of=jax.value_and_grad, masks=None, options=None):
    """(value, gradient) of log-probabilities [3,2], weighted at random: of texts that fork, and of rows."""
    weights = np.random.default_rng(4).normal(size=(3, 2))
    forks, rows = _texts(config.vocab_size)
    rows_masks = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), masks)

    def forked(params):
        logps = branch_logprobs(config, params, *forks, masks, longest=LONGEST, **(options or {}))
        return jnp.sum(weights * logps), logps

    def separate(params):
        logps = sequence_logprobs(config, params, *rows, interventions=rows_masks).reshape(3, 2)
        return jnp.sum(weights * logps), logps

    return jax.jit(lambda p: [of(function, has_aux=True)(p) for function in (forked, separate)])(params)


def _assert_same(found, close):
    ((_, ours), our_slopes), ((_, theirs), their_slopes) = found
    close(ours, theirs, 1e-5)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(our_slopes), jax.tree.leaves(their_slopes), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))
    assert max(np.abs(x).max() for x in jax.tree.leaves(their_slopes)) > 0.1


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_answers_after_a_shared_prompt_are_those_of_separate_rows(read_golden, close, name):
    """With their gradients. The window and the original context are shorter than the texts."""
    lm = read_golden(name).lm
    config = lm.config
    assert config.window is None or config.window < LONGEST
    if config.depends_on_length:  # else any length would do
        rope = dataclasses.replace(config.rope, original_length=8)
        config = dataclasses.replace(config, rope=rope)
    _assert_same(_both(config, lm.params), close)


def test_recomputed_blocks_and_adapters_have_the_same_gradients(random_model, tiny, close):
    """Where rotary frequencies depend on the length of the longest text."""
    rope = Rope(kind="dynamic", theta=100.0, factor=4.0, original_length=8)
    config = dataclasses.replace(tiny.config, lora=Lora(2, 4.0, ("q", "v", "up")), rope=rope)
    assert config.depends_on_length
    params = random_model(config).params
    assert any("lora" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params))
    _assert_same(_both(config, params, options={"remat": True}), close)


def _only_values(function, has_aux):
    return lambda params: function(params)[1]


@pytest.fixture(scope="module")
def untouched(tiny):
    return _both(tiny.config, tiny.params, _only_values)[0]


@pytest.mark.parametrize("site", ("rotary", "projection"))
def test_masks_of_each_row_hold_in_a_prompt_and_its_answers(tiny, untouched, close, site):
    rng, config = np.random.default_rng(5), tiny.config
    heads = 3, config.n_layers, config.n_heads
    masks = Interventions(
        head_mask=rng.random(heads) < 0.4,
        rope_mask=rng.random((*heads, config.n_pairs)) < 0.4,
        head_mean=rng.normal(size=(*heads, config.head_dim)).astype(np.float32),
        stream_mask=rng.random(heads) < 0.4,
        stream_sink=1,
        stream_window=3,
        query_mask=rng.random(heads) < 0.2,
        query_mean=rng.normal(size=(*heads, config.head_dim)).astype(np.float32),
        rope_site=site,
    )
    ours, theirs = _both(config, tiny.params, _only_values, masks)
    close(ours, theirs, 1e-5)
    assert np.abs(ours - untouched).min() > 1e-2


# --- attention, and how rows are laid out ---


@pytest.mark.parametrize("shares", (1, 2, 4))
def test_rows_are_laid_out_in_equal_shares(shares):
    fork = Fork(jnp.array([8, 0, 5]), width=8, branches=3, shares=shares)
    rng = np.random.default_rng(0)
    begun, branch = rng.normal(size=(3, 8, 2)), rng.normal(size=(3, 3, 4, 2))

    @jax.jit
    def run(begun, branch):
        row = fork.join(begun, branch)
        return row, fork.split(row), fork.split(fork.positions(20)[..., None])

    row, parts, (begun_at, branch_at) = jax.tree.map(np.asarray, run(begun, branch))
    for found, given in zip(parts, (begun, branch), strict=True):
        np.testing.assert_array_equal(found, np.float32(given))
    n = 20 // shares  # each share has its part of everything
    for s in range(shares):
        part = np.concatenate(
            [x.reshape(3, -1, shares, x.shape[-2] // shares, 2)[:, :, s].reshape(3, -1, 2) for x in (begun, branch)], 1
        )
        np.testing.assert_array_equal(row[:, s * n : (s + 1) * n], np.float32(part))
    assert begun_at[1, :, 0].tolist() == [*range(8)] and branch_at[0, 2, :, 0].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("scores", (Scores(0.4), Scores(0.4, window=5, cap=1.5)))
def test_a_branch_sees_its_beginning_and_itself_in_blocks(close, monkeypatch, scores):
    monkeypatch.setattr(attention, "plain", lambda *_: pytest.fail("not in blocks"))
    starts, width, own = [20, 0, 7], 20, 8
    fork = Fork(jnp.array(starts), width, 2, shares=2)
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(3, width + 2 * own, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    out = jax.jit(functools.partial(attend_forked, fork=fork, scores=scores))(q, k, v)
    alone = jax.jit(lambda q, k, v: attend(q, Keys.of(k, v), scores))
    parts = [[np.asarray(part) for part in fork.split(x)] for x in (q, k, v, out)]
    close(parts[3][0][0], alone(*(begun[:1] for begun, _ in parts[:3]))[0], 1e-5)
    for b, start in enumerate(starts):
        for n in range(2):
            text = [np.concatenate([begun[b, :start], branch[b, n]]) for begun, branch in parts]
            whole = [np.pad(x, ((0, width - start), (0, 0), (0, 0)))[None] for x in text[:3]]
            close(parts[3][1][b, n], alone(*whole)[0, start : start + own], 1e-5)
