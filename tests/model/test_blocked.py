"""Attention in blocks against one softmax: forward and gradient, over lengths, positions, windows and caps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retmask_jax.model.attention import Keys, Probe, attend, probe
from retmask_jax.model.kernels.blocked import Scores, blocked, plain
from retmask_jax.model.layers import at_positions

WIDTH = 8
RULES = [Scores(0.4), Scores(0.4, cap=1.5), Scores(0.4, window=37), Scores(0.4, window=300, cap=2.0)]
SHAPES = [(2, 130, 301), (1, 70, 530), (3, 257, 257)]  # groups, queries, keys: no multiple of any block


def _draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def _both(shape, scores):
    """Compiled: (output and gradients of `blocked`, those of `plain`) for first positions and one weighting."""
    groups, length, n_keys = shape

    def with_gradients(attention):
        def run(d_out_GTD, *qkv):
            out_GTD, pull = jax.vjp(attention, *qkv)
            return out_GTD, *pull(d_out_GTD)

        return run

    @jax.jit
    def both(first_query, first_key, d_out_GTD, *qkv):
        positions = first_query + jnp.arange(length), first_key + jnp.arange(n_keys)
        ours = with_gradients(lambda *qkv: blocked(*qkv, first_query, first_key, None, scores))
        reference = with_gradients(lambda *qkv: plain(*qkv, *positions, scores))
        return ours(d_out_GTD, *qkv), reference(d_out_GTD, *qkv)

    return both


@pytest.mark.parametrize("shape, scores", [*zip(SHAPES, RULES[1:], strict=True), (SHAPES[0], RULES[0])], ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_blocks_equal_one_softmax(shape, scores, data):
    """Queries anywhere among the keys, of which those at negative positions do not exist."""
    groups, length, n_keys = shape
    behind = data.draw(st.integers(0, n_keys - length), label="keys before the first query")
    first_key = data.draw(st.integers(-behind, 1000), label="first key")
    q_GTD, d_out_GTD, k_DS, v_SD = _draw(
        data.draw(st.integers(0, 99)),
        (groups, length, WIDTH),
        (groups, length, WIDTH),
        (WIDTH, n_keys),
        (n_keys, WIDTH),
    )
    ours, reference = _both(shape, scores)(first_key + behind, first_key, d_out_GTD, q_GTD, k_DS, v_SD)
    for actual, expected in zip(ours, reference, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("scores", RULES, ids=str)
def test_every_kernel_of_this_device_and_rows_at_once_agree(scores, close):
    q_BTHD, k_BTKD, v_BTKD = _draw(3, (2, 140, 4, WIDTH), (2, 140, 2, WIDTH), (2, 140, 2, WIDTH))

    @jax.jit
    def run(q_BTHD, k_BTKD, v_BTKD):
        keys = Keys.of(k_BTKD, v_BTKD)
        all_at_0 = [attend(q_BTHD, keys, scores, kernel=kernel) for kernel in ("plain", "blocked", "auto")]
        # As accelerators do it: all rows and heads at once, each from its own position on.
        late_B = jnp.array([0, 60])
        q_BKGTD = q_BTHD[:, :80].reshape(2, 80, 2, 2, WIDTH).transpose(0, 2, 3, 1, 4)
        over_heads = jax.vmap(lambda *x: blocked(*x, 0, None, scores), (0, 0, 0, None))
        out_BKGTD = jax.vmap(over_heads)(q_BKGTD, keys.k_BKDS, keys.v_BKSD, late_B)
        out_BTHD = out_BKGTD.transpose(0, 3, 1, 2, 4).reshape(2, 80, 4, WIDTH)
        return all_at_0, (out_BTHD, attend(q_BTHD[:, :80], keys, scores, late_B, kernel="plain"))

    (one, *others), (at_once, expected) = run(q_BTHD, k_BTKD, v_BTKD)
    for other in others:
        close(other, one)
    close(at_once, expected)


def test_an_unknown_kernel_is_refused():
    q_BTHD = jnp.zeros((1, 2, 2, WIDTH))
    with pytest.raises(ValueError, match="'fast'; it must be one of auto, plain"):
        attend(q_BTHD, Keys.of(q_BTHD, q_BTHD), Scores(1.0), kernel="fast")


# --- probes ---


@pytest.mark.parametrize("scores", RULES, ids=str)
def test_probes_are_read_off_the_weights(scores):
    """The keys with the largest weights, and mass and values in spans, of weights by the definition in float64."""
    q_BTHD, k_BSKD, v_BSKD = _draw(5, (2, 50, 4, WIDTH), (2, 60, 2, WIDTH), (2, 60, 2, WIDTH))
    start_B, rows_BP = np.array([3, 10]), np.array([[0, 49, 7], [20, 1, 33]])
    spans_BN2 = np.array([[[0, 5], [4, 40]], [[9, 9], [0, 60]]])
    request = Probe(rows_BP, spans_BN2, top=4, values=True)

    @jax.jit
    def run(q_BTHD, k_BSKD, v_BSKD):
        q_BPHD, positions_BP = at_positions(q_BTHD, jnp.asarray(rows_BP)), jnp.asarray(start_B[:, None] + rows_BP)
        return probe(q_BPHD, positions_BP, Keys.of(k_BSKD, v_BSKD), request, scores)

    found = jax.tree.map(np.asarray, run(q_BTHD, k_BSKD, v_BSKD))
    k_BSHD, v_BSHD = (np.repeat(np.asarray(x, np.float64), 2, axis=2) for x in (k_BSKD, v_BSKD))
    q_BTHD = np.asarray(q_BTHD, np.float64)
    for b, p in np.ndindex(rows_BP.shape):
        position = start_B[b] + rows_BP[b, p]
        first = 0 if scores.window is None else max(0, position - scores.window + 1)
        for h in range(4):
            raw_S = k_BSHD[b, first : position + 1, h] @ q_BTHD[b, rows_BP[b, p], h] * scores.scale
            raw_S = raw_S if scores.cap is None else scores.cap * np.tanh(raw_S / scores.cap)
            weights_S = np.exp(raw_S - raw_S.max()) / np.exp(raw_S - raw_S.max()).sum()
            best = (first + np.argsort(-raw_S, kind="stable")[:4]).tolist()
            assert found.keys[b, p, h].tolist() == best + [-1] * (4 - len(best))
            positions_S = first + np.arange(len(raw_S))
            for n, (begin, end) in enumerate(spans_BN2[b]):
                inside_S = (positions_S >= begin) & (positions_S < end)
                np.testing.assert_allclose(found.mass[b, p, h, n], weights_S[inside_S].sum(), atol=1e-5)
                value_D = (weights_S * inside_S) @ v_BSHD[b, first : position + 1, h]
                np.testing.assert_allclose(found.values[b, p, h, n], value_D, atol=1e-5)
