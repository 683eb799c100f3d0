"""Log-probabilities of sequences against a plain log_softmax of the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retmask_jax.generation.logprobs import sequence_logprobs, token_logprobs
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.transformer import forward

LENGTH = 130  # its 129 predictions are one more than a chunk
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 61, (2, LENGTH)).astype(np.int32)
LOSS_MASK = RNG.random((2, LENGTH)) < 0.5
LOSS_MASK[:, 0] = True  # there is nothing before the first token: it must not count
LOSS_MASK[:, -3:] = True


def _masks(rows=()):
    rng = np.random.default_rng(1)
    return Interventions(rng.random((*rows, 3, 4)) < 0.3, rng.random((*rows, 3, 4, 4)) < 0.3)


def _plain(logits_BTV, loss_mask):
    """f[B] by the definition."""
    logps_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    target_BT = TOKENS[:, 1 : logits_BTV.shape[1]]
    chosen_BT = jnp.take_along_axis(logps_BTV[:, :-1], target_BT[..., None], axis=-1)[..., 0]
    return jnp.where(loss_mask[:, 1:], chosen_BT, 0).sum(axis=1)


@pytest.fixture(scope="module")
def summed(tiny):
    """sequence_logprobs of the first `length` positions, jitted."""
    jitted = jax.jit(lambda *args: sequence_logprobs(tiny.config, tiny.params, *args))

    def call(length=LENGTH, loss_mask=LOSS_MASK, interventions=None):
        filled = interventions or Interventions.none(tiny.config)
        return jitted(TOKENS[:, :length], loss_mask[:, :length], None, filled)

    return call


@pytest.mark.parametrize("length", [1, 129, 130])
def test_a_sum_over_chunks_is_the_sum_over_all_positions(tiny, summed, close, length):
    logits_BTV = tiny.logits(TOKENS)[:, :length]
    actual = summed(length)
    assert actual.dtype == jnp.float32
    if length == 1:
        np.testing.assert_array_equal(actual, [0, 0])
    else:
        close(actual, _plain(logits_BTV, LOSS_MASK[:, :length]), 1e-5)


def test_the_loss_mask_chooses_what_counts(tiny, summed, close):
    logits_BTV = tiny.logits(TOKENS)
    only_last = np.arange(LENGTH) == np.array([[LENGTH - 1], [5]])
    for loss_mask in (only_last, ~only_last, np.ones_like(only_last)):
        close(summed(loss_mask=loss_mask), _plain(logits_BTV, loss_mask), 1e-5)
    np.testing.assert_array_equal(summed(loss_mask=np.zeros_like(only_last)), [0, 0])
    first = np.arange(LENGTH) == np.zeros((2, 1))
    np.testing.assert_array_equal(summed(loss_mask=first), [0, 0])


def test_padding_behind_the_last_counted_token_does_not_matter(tiny, summed, close):
    lengths, logits_BTV = (100, 128), tiny.logits(TOKENS)
    loss_mask = LOSS_MASK & (np.arange(LENGTH) < np.array(lengths)[:, None])
    alone = [_plain(logits_BTV[:, :length], LOSS_MASK[:, :length]) for length in lengths]
    close(summed(loss_mask=loss_mask), [alone[0][0], alone[1][1]], 1e-5)


def test_interventions_reach_the_sum(tiny, summed, close):
    iv = _masks()
    masked = summed(interventions=iv)
    close(masked, _plain(tiny.logits(TOKENS, interventions=iv), LOSS_MASK), 1e-5)
    assert np.abs(masked - summed()).min() > 0.1


GATES = Interventions(np.full((3, 4), 0.25, np.float32), np.full((3, 4, 4), 0.25, np.float32))


def test_the_gradient_is_that_of_a_plain_log_softmax(tiny, close):
    """With respect to every parameter and to gates of both kinds; blocks are recomputed."""

    def chunked(params, iv):
        options = {"interventions": iv, "remat": True}
        return sequence_logprobs(tiny.config, params, TOKENS, LOSS_MASK, **options)

    def plain(params, iv):
        config = dataclasses.replace(tiny.config, kernel="plain")
        return _plain(forward(config, params, TOKENS, interventions=iv), LOSS_MASK)

    def gradients(function):
        weighted = jax.grad(lambda *args: function(*args) @ jnp.float32([1, -0.5]), argnums=(0, 1))
        return jax.jit(weighted)(tiny.params, GATES)

    expected = gradients(plain)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    jax.tree.map(close, gradients(chunked), expected)


def test_token_logprobs_are_the_terms_of_the_sum(tiny, close):
    iv = _masks()
    logps_BTV = np.asarray(jax.nn.log_softmax(tiny.logits(TOKENS, interventions=iv), axis=-1))
    expected = np.take_along_axis(logps_BTV[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    close(token_logprobs(tiny.config, tiny.params, TOKENS, iv), expected, 1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_mask": LOSS_MASK[:, 1:]}, r"loss_mask has shape \(2, 129\); tokens have \(2, 130\)"),
        ({"tokens": TOKENS[0], "loss_mask": LOSS_MASK[0]}, r"integers of shape \(B, T\)"),
        ({"lengths": np.array([130])}, r"lengths has shape \(1,\); 2 rows"),
        ({"interventions": Interventions(np.zeros((4, 4), bool))}, r"head_mask has shape \(4, 4\)"),
        ({"tokens": np.zeros((2, 301), np.int32)}, "exceed the model's context of 300"),
    ],
)
def test_shapes_that_do_not_fit_raise(tiny, changes, message):
    arguments = {"tokens": TOKENS, "loss_mask": LOSS_MASK} | changes
    with pytest.raises(ValueError, match=message):
        sequence_logprobs(tiny.config, tiny.params, **arguments)
