"""Streaming heads: a slow reference, models with a window, every way through the model, gradients, and what refuses them."""

import dataclasses
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import STORED
from helpers_processes import environment, printed
from helpers_tiny import CONFIG, copying_lm, copying_params, in_float64, reference

from retmask_jax.evals.scoring import mask_hash
from retmask_jax.generation.decode import generate
from retmask_jax.generation.language_model import save
from retmask_jax.model.attention import Keys, Probe, attend, probe
from retmask_jax.model.interventions import Interventions, all_heads, mask_heads, mask_rope, stack, stream_heads
from retmask_jax.model.kernels.blocked import Scores, Streams, blocked, plain
from retmask_jax.model.kernels.choice import choose
from retmask_jax.model.masking import normalise
from retmask_jax.model.transformer import forward

LM = copying_lm()
TOKENS = np.random.default_rng(5).integers(4, CONFIG.vocab_size, (2, 24)).astype(np.int32)
SINK, WINDOW, HEADS = 2, 5, (CONFIG.n_layers, CONFIG.n_heads)
GATES = np.random.default_rng(6).permutation(np.float32([0, 0, 0, 0.3, 0.3, 0.7, 0.7] + [1] * 9)).reshape(2, *HEADS)
_logits = jax.jit(lambda iv: forward(CONFIG, LM.params, TOKENS, interventions=iv))
_untouched = jax.jit(lambda: forward(CONFIG, LM.params, TOKENS))


def _streams(mask, sink=SINK, window=WINDOW):
    return Interventions(stream_mask=mask, stream_sink=sink, stream_window=window)


# --- what streaming is ---


def test_streaming_heads_see_the_beginning_and_their_last_keys(close):
    """Bools that all rows share, and gates of each row, against the definition in float64."""
    expected = [reference(in_float64(LM.params), row, streams=(GATES[0] > 0, SINK, WINDOW))[0] for row in TOKENS]
    close(LM.logits(TOKENS, interventions=_streams(GATES[0] > 0)), expected)
    rows = zip(TOKENS, GATES, strict=True)
    expected = np.array([reference(in_float64(LM.params), row, streams=(gate, SINK, WINDOW))[0] for row, gate in rows])
    close(LM.logits(TOKENS, interventions=_streams(GATES)), expected)
    assert np.abs(expected - LM.logits(TOKENS)).max() > 0.1 * np.abs(expected).max()


def test_all_heads_streaming_without_a_beginning_are_a_model_with_that_window(read_golden, close):
    """Torch's logits and greedy answer of a model with a window, from its weights in a model without one."""
    golden = read_golden("mistral_window")
    config = golden.lm.config
    assert set(config.layer_pattern) == {"sliding"} and config.window < golden.tokens.shape[1]
    whole = golden.lm.replace(config=dataclasses.replace(config, layer_pattern=("full",), window=None))
    streams = stream_heads(config, all_heads(config), sink=0, window=config.window)
    close(whole.logits(golden.tokens, interventions=streams)[:, STORED], golden.logits)
    one = stream_heads(config, [(0, 0)], sink=0, window=config.window)
    assert np.abs(whole.logits(golden.tokens, interventions=one)[:, STORED] - golden.logits).max() > 1e-2
    options = {"max_new_tokens": golden.greedy.shape[1], "stop_ids": ()}
    out = whole.generate(golden.tokens, np.full(2, golden.tokens.shape[1]), interventions=streams, **options)
    np.testing.assert_array_equal(out.tokens, golden.greedy)


def test_a_models_own_window_stays(read_golden, close):
    """Of what its window shows a head still sees the same where it may stream further, caps and other layers included."""
    golden = read_golden("gemma2")
    config = golden.lm.config
    sliding = [kind == "sliding" for kind in [*config.layer_pattern * config.repeats, *config.tail]]
    mask = np.repeat(sliding, config.n_heads).reshape(config.n_layers, config.n_heads)
    close(golden.compute(stream_mask=mask, stream_sink=3, stream_window=config.window), golden.logits)
    wider = dataclasses.replace(config, layer_pattern=("full", "full"), window=None)
    streams = stream_heads(config, np.argwhere(mask), sink=0, window=config.window)
    close(golden.lm.replace(config=wider).logits(golden.tokens, interventions=streams)[:, STORED], golden.logits)


# --- one program, and no change where there is none ---


def test_no_streaming_head_is_the_untouched_model_and_values_compile_nothing(compiles):
    untouched, masks = LM.logits(TOKENS), [_streams(GATES[0] > 0), _streams(GATES[1] > 0.5), _streams(GATES[1] < 2)]
    first = LM.logits(TOKENS, interventions=masks[0])
    compiles.clear()
    others = [LM.logits(TOKENS, interventions=mask) for mask in masks[1:]]
    for none in (np.zeros(HEADS, bool), np.zeros(HEADS, np.float32), np.zeros((2, *HEADS), bool)):
        np.testing.assert_array_equal(LM.logits(TOKENS, interventions=_streams(none)), untouched)
    assert not compiles
    assert min(np.abs(a - b).max() for a, b in ((first, untouched), (first, others[0]), (*others,))) > 1e-3


@pytest.mark.parametrize("kind", (bool, np.float32))
def test_a_program_with_streams_changes_nothing_where_no_head_streams(kind):
    """Inside a user's own jit it is not known which heads stream, and the bits are the same."""
    np.testing.assert_array_equal(_logits(_streams(np.zeros(HEADS, kind))), _untouched())
    one = _streams(np.arange(8).reshape(HEADS) == 5)
    close_to = _logits(one.replace(stream_mask=one.stream_mask.astype(kind)))
    np.testing.assert_allclose(close_to, LM.logits(TOKENS, interventions=one), atol=1e-5)


def test_masks_run_side_by_side_and_under_vmap(close):
    masks = [_streams(GATES[0] > 0), _streams(GATES[1] > 0), Interventions()]
    alone = [np.asarray(LM.logits(TOKENS[:1], interventions=mask))[0] for mask in masks]
    close(LM.logits(TOKENS[[0, 0, 0]], interventions=stack(masks)), alone, 1e-5)
    over = jax.jit(jax.vmap(lambda iv: forward(CONFIG, LM.params, TOKENS[:1], interventions=iv)[0]))
    close(over(stack(masks)), alone, 1e-5)


# --- gradients ---


@pytest.mark.parametrize("kernel", ("plain", "blocked"))
def test_the_gradient_of_a_gate_is_its_finite_difference(kernel):
    """Against differences in float64, also where a gate is 0 or 1, and of the parameters under gates."""
    params = copying_params(sharpness=0.7)  # of more peaked weights a gate of 1 has slopes of millions
    rng, params64 = np.random.default_rng(7), in_float64(params)
    weights_TV, config = rng.normal(size=(24, CONFIG.vocab_size)) / 24, dataclasses.replace(CONFIG, kernel=kernel)

    def loss(gate_LH, params):
        return (forward(config, params, TOKENS[:1], interventions=_streams(gate_LH))[0] * weights_TV).sum()

    def exact(gate_LH, params):
        return (reference(params, TOKENS[0], streams=(gate_LH, SINK, WINDOW))[0] * weights_TV).sum()

    gate, of_gate = GATES[0].astype(np.float64), rng.normal(size=HEADS)
    assert {0, 1} <= set(gate.ravel())
    slope, slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32(gate), params)
    above, below = (exact(gate + s * of_gate, params64) for s in (1e-7, -1e-7))
    np.testing.assert_allclose((slope * of_gate).sum(), (above - below) / 2e-7, rtol=1e-3)
    steps = jax.tree.map(lambda x: rng.normal(size=x.shape), params64)
    above, below = (exact(gate, jax.tree.map(lambda x, step: x + s * step, params64, steps)) for s in (1e-6, -1e-6))
    found = sum(jax.tree.leaves(jax.tree.map(lambda x, step: (np.asarray(x) * step).sum(), slopes, steps)))
    np.testing.assert_allclose(found, (above - below) / 2e-6, rtol=2e-3)


SHAPES = [(2, 130, 301, 7), (1, 70, 530, None), (3, 257, 257, 100)]  # groups, queries, keys, the model's window


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", (bool, np.float32))
def test_blocks_equal_one_softmax(shape, kind):
    """Where reach ends in the middle of blocks; with heads that stream, stream in part and do not."""
    groups, length, n_keys, window = shape
    rng, first_query = np.random.default_rng(groups), n_keys - length
    q_GTD, d_out_GTD, k_DS, v_SD = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((groups, length, 8), (groups, length, 8), (8, n_keys), (n_keys, 8))
    )
    scores, gate_G = Scores(0.4, window), jnp.asarray([0.0, 1.0, 0.6][-groups:], jnp.float32)
    positions = jnp.arange(first_query, n_keys), jnp.arange(n_keys)

    @jax.jit
    def both(gate_G):
        def ours(q, k, v, gate):
            streams = Streams((gate > 0.3) if kind is bool else gate, 9, 33)
            return blocked(q, k, v, first_query, 0, streams, scores)

        def theirs(q, k, v, gate):
            streams = Streams((gate > 0.3) if kind is bool else gate, 9, 33)
            return plain(q, k, v, *positions, scores, streams)

        found = []
        for attention in (ours, theirs):
            out, pull = jax.vjp(attention, q_GTD, k_DS, v_SD, gate_G)
            found.append((out, *pull(d_out_GTD)))
        return found

    for actual, expected in zip(*both(gate_G), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4 * max(float(jnp.abs(expected).max()), 1e-9))


def test_a_key_that_counts_nothing_may_be_of_any_size():
    """Its weight would be e to the thousands of what is in reach, yet outputs are those without it, and slopes finite."""
    rng = np.random.default_rng(10)
    q_GTD, k_DS, v_SD = (rng.uniform(0.5, 1, shape).astype(np.float32) for shape in ((2, 40, 8), (8, 40), (40, 8)))
    huge_DS, positions = k_DS.copy(), (np.arange(40), np.arange(40))
    huge_DS[:, 3] *= 2000

    @jax.jit
    def run(k_DS, huge_DS, gate):
        found = []
        for attention in (
            lambda k_DS, gate: blocked(q_GTD, k_DS, v_SD, 0, 0, Streams(gate, 2, 6), Scores(0.4)),
            lambda k_DS, gate: plain(q_GTD, k_DS, v_SD, *positions, Scores(0.4), Streams(gate, 2, 6)),
        ):
            with_it, pull = jax.vjp(attention, huge_DS, gate)
            found.append((with_it, attention(k_DS, gate), pull(with_it.at[:, :9].set(0))))
        return found

    for with_it, without, slopes in run(k_DS, huge_DS, np.ones(2, np.float32)):
        np.testing.assert_allclose(with_it[:, 9:], without[:, 9:], atol=1e-6)
        assert all(np.isfinite(slope).all() for slope in slopes)


# --- every way through the model ---


@pytest.mark.parametrize(
    "name", ("gqa_tied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "smollm3_window")))
)
def test_decoding_with_a_cache_is_the_argmax_of_full_passes(read_golden, name):
    """Rings included, each row under its own mask, one of which masks nothing; the probe sees the keys in reach."""
    lm, tokens = read_golden(name).lm, read_golden(name).tokens
    rng, heads = np.random.default_rng(8), (lm.config.n_layers, lm.config.n_heads)
    masks = _streams(np.stack([rng.random(heads) < 0.6, np.zeros(heads, bool), rng.random(heads)]).astype(np.float32))
    tokens = np.concatenate([tokens, tokens[:1]])
    options = {"max_new_tokens": 6, "stop_ids": (), "interventions": masks, "probe": True}
    out = jax.tree.map(np.asarray, generate(lm.config, lm.params, tokens, np.full(3, 24), **options))
    full = np.concatenate([tokens, out.tokens], axis=1)
    logits = lm.logits(full, interventions=masks)
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[:, 23:-1], out.tokens)
    others = _streams(np.asarray(masks.stream_mask)[[1, 0, 1]])  # rows 0 and 2 of the first masks stream
    assert np.abs(logits - lm.logits(full, interventions=others))[[0, 2]].max(axis=(1, 2)).min() > 1e-2
    behind = np.arange(23, 29)[None, :, None, None] - out.argmax  # how far each head's strongest key lies back
    in_reach = (behind < WINDOW) | (out.argmax < SINK)
    assert in_reach[0][:, np.asarray(masks.stream_mask[0]) == 1].all() and not in_reach[1].all()


def test_probes_report_the_weights_in_reach():
    """Keys, mass and values, of weights by the definition, where gates are open in part."""
    rng = np.random.default_rng(9)
    q_BTHD, k_BSKD, v_BSKD = (rng.normal(size=(2, 40, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    gates = rng.choice(np.float32([0, 0.5, 1]), (2, 4))
    rows_BP, spans_BN2 = np.array([[39, 20], [7, 0]]), np.array([[[0, 3], [10, 30]], [[2, 8], [0, 40]]])
    q_BPHD = np.take_along_axis(q_BTHD, rows_BP[..., None, None], axis=1)
    request = Probe(rows_BP, spans_BN2, top=3, values=True)

    @jax.jit
    def run(q_BPHD, k_BSKD, v_BSKD, gates):
        return probe(q_BPHD, rows_BP, Keys.of(k_BSKD, v_BSKD), request, Scores(0.5), Streams(gates, 3, 6))

    found = jax.tree.map(np.asarray, run(q_BPHD, k_BSKD, v_BSKD, gates))
    for b, p, h in np.ndindex(2, 2, 4):
        t, s = rows_BP[b, p], np.arange(40)
        away = (s >= 3) & (s <= t - 6)
        weights = np.exp(0.5 * k_BSKD[b, :, h // 2].astype(np.float64) @ q_BPHD[b, p, h]) * (s <= t)
        weights = weights * (1 - gates[b, h] * away)
        weights /= weights.sum()
        best = [i if weights[i] > 0 else -1 for i in np.argsort(-weights, kind="stable")[:3].tolist()]
        assert found.keys[b, p, h].tolist() == best
        for n, (begin, end) in enumerate(spans_BN2[b]):
            inside = (s >= begin) & (s < end)
            np.testing.assert_allclose(found.mass[b, p, h, n], (weights * inside).sum(), atol=1e-5)
            np.testing.assert_allclose(found.values[b, p, h, n], (weights * inside) @ v_BSKD[b, :, h // 2], atol=1e-5)


MESHED = textwrap.dedent("""
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from retmask_jax.generation.language_model import load
    from retmask_jax.generation.logprobs import branch_logprobs
    from retmask_jax.hf.hub import BUNDLED
    from retmask_jax.model import sharding
    from retmask_jax.model.interventions import Interventions

    rng = np.random.default_rng(0)
    tokens = rng.integers(16, 256, (4, 64)).astype(np.int32)
    answers, counted = rng.integers(16, 256, (4, 2, 16)).astype(np.int32), np.ones((4, 2, 16), bool)
    gates = jnp.asarray(rng.choice(np.float32([0, 0.5, 1]), (4, 4, 8)))

    def found(mesh):
        lm = load(BUNDLED, mesh=mesh)

        def forked(gates):
            iv = Interventions(stream_mask=gates, stream_sink=2, stream_window=7)
            logps = branch_logprobs(lm.config, lm.params, tokens, np.array([64, 30, 9, 51]), answers, counted, iv)
            return logps.sum(), logps

        with sharding.mesh_of(lm.params):
            (_, logps), slopes = jax.jit(jax.value_and_grad(forked, has_aux=True))(gates)
        iv = Interventions(stream_mask=gates, stream_sink=2, stream_window=7)
        return [np.asarray(x, np.float64) for x in (logps, slopes, lm.logits(tokens, interventions=iv))]

    one = found(sharding.make_mesh({"data": 1}, jax.devices()[:1]))
    many = found(sharding.make_mesh(json.loads(sys.argv[1])))
    print(json.dumps([float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(many, one, strict=True)]))
""")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ({"context": 2, "data": 2}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}), ids=str)
def test_streaming_heads_on_several_devices_are_those_of_one(mesh):
    out = printed("-c", MESHED, json.dumps(mesh), env=environment(4))
    assert max(json.loads(out)) < 1e-4, out


# --- what is refused, and how masks join ---


def test_kernels_that_know_no_streaming_heads_refuse_them_and_auto_takes_one_that_does():
    for kernel in ("cudnn", "splash"):
        lm = LM.with_kernel(kernel)
        with pytest.raises(
            ValueError, match=f"the {kernel} kernel knows no streaming heads .*: choose auto, blocked or plain"
        ):
            lm.logits(TOKENS, interventions=_streams(GATES[0] > 0))
    q_BTHD = jnp.zeros((1, 1, 4, 8), jnp.float32)
    attend(
        q_BTHD, Keys.of(q_BTHD, q_BTHD), Scores(1.0), jnp.zeros(1, int), "splash", streams=Streams(GATES[0, :1], 1, 1)
    )
    call = "bfloat16", 64, 64, True, Scores(1.0)
    assert [
        choose("auto", backend, None, *call, streams) for backend in ("tpu", "gpu") for streams in (False, True)
    ] == ["splash", "blocked", "cudnn", "blocked"]


def test_streams_join_other_masks_and_each_other_where_they_stream_alike():
    a, b = (stream_heads(CONFIG, heads, SINK, WINDOW) for heads in ([(0, 1)], [(1, 2), (0, 1)]))
    others = mask_heads(CONFIG, [(1, 0)]) | mask_rope(CONFIG, [(0, 0)], [1], "projection")
    for joined in (a | others, others | a, a | b):
        assert (joined.stream_sink, joined.stream_window) == (SINK, WINDOW)
    np.testing.assert_array_equal((others | a).head_mask, others.head_mask)
    assert (others | a).rope_site == "projection"
    np.testing.assert_array_equal((a | b).stream_mask, b.stream_mask)
    np.testing.assert_array_equal((_streams(GATES[0]) | a).stream_mask, np.maximum(GATES[0], a.stream_mask))
    wider = stream_heads(CONFIG, [(0, 0)], SINK, 9)
    for join in (lambda: a | wider, lambda: stack([a, wider, Interventions()])):
        with pytest.raises(ValueError, match="stream_masks have different stream_sink, stream_window: 2, 5 and 2, 9"):
            join()
    assert stack([Interventions(), wider]).stream_window == 9
    assert len({mask_hash(CONFIG, mask) for mask in (Interventions(), a, b, wider, a | others)}) == 5


@pytest.mark.parametrize(
    "iv, message",
    [
        (
            _streams(np.zeros((2, 5), bool)),
            r"stream_mask has shape \(2, 5\); the model and batch need \(2, 4\) or \(2, 2, 4\)",
        ),
        (_streams(np.zeros(HEADS, int)), "stream_mask has type int.*; it must be bool, or float"),
        (_streams(np.ones(HEADS, bool), -1), "streaming heads see -1 tokens .* stream_sink must be at least 0"),
        (_streams(np.ones(HEADS, bool), 4, 0), "a window of 0: .* stream_window at least 1"),
    ],
)
def test_streams_that_mean_nothing_are_refused(iv, message):
    with pytest.raises(ValueError, match=message):
        LM.logits(TOKENS, interventions=iv)


def test_streams_cannot_be_written_into_weights(tmp_path):
    with pytest.raises(ValueError, match="streaming heads cannot be baked"):
        save(LM, tmp_path / "out", _streams(GATES[0] > 0))
    assert normalise(CONFIG, _streams(np.zeros(HEADS, bool))).streams is None
