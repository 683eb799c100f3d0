"""Prefill in chunks equals a pass over whole rows, windows in rings included; prompts that share beginnings."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retmask_jax.generation.batching import pad_rows
from retmask_jax.generation.decode import generate_many
from retmask_jax.generation.prefill import common_prefix, prefill, share_prefixes, slots_for
from retmask_jax.heads.reading import read_answers
from retmask_jax.model.attention import Probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import hidden_rows
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kv_cache import empty_cache
from retmask_jax.model.masking import normalise
from retmask_jax.model.sharding import param_shapes
from retmask_jax.model.transformer import hidden

CHUNK = 8


@pytest.fixture(scope="module")
def windowed(random_model):
    """Sliding layers, and full ones without RoPE, in turn, with a window that is no multiple of a chunk."""
    return random_model(
        ModelConfig(
            vocab_size=41,
            hidden_size=16,
            mlp_size=20,
            n_layers=4,
            n_heads=4,
            n_kv_heads=2,
            head_dim=4,
            max_length=200,
            layer_pattern=("sliding", "full"),
            window=11,
            rope_pattern=(True, False),
            residual_scale=0.7,
        )
    )


@pytest.fixture(scope="module")
def one_group(windowed):
    """Two layers that are the whole pattern, as early checkpoints of a model that grows."""
    params = windowed.params | {"blocks": jax.tree.map(lambda leaf: leaf[:1], windowed.params["blocks"])}
    return windowed.replace(config=dataclasses.replace(windowed.config, n_layers=2), params=params)


# What is read before the rows is itself read from the start.
@pytest.mark.parametrize(
    "start, times, model",
    [
        (5, CHUNK, "one_group"),
        *(pytest.param(*case, "windowed", marks=pytest.mark.slow) for case in ((0, 1), (5, 1), (5, CHUNK))),
    ],
)
def test_chunks_and_rings_equal_one_pass(request, close, start, times, model):
    """Rows of different lengths, some of which end chunks before others; states, probes and the next step agree. Also where
    more positions are asked for than a chunk has. Some heads stream, others in each row. A pass over a part of the positions
    gives them, too, and a model of one group has nothing before it."""
    lm = request.getfixturevalue(model)
    config, params = lm.config, lm.params
    rng = np.random.default_rng(start)
    tokens_BT = rng.integers(0, 41, (4, 45)).astype(np.int32)
    end_B = np.array([45, 9, 30, 17])
    rows_BP = np.tile(np.array([[44, 7], [8, 5], [29, 12], [16, 15]]) - start, times)
    stream_BLH = rng.random((4, 4, 4))[:, : config.n_layers] < 0.5
    masks = normalise(config, Interventions(stream_mask=stream_BLH, stream_sink=2, stream_window=6))
    # With the token of the next step, which no earlier place sees.
    longer_BT = np.pad(tokens_BT, ((0, 0), (0, 1)))
    np.put_along_axis(longer_BT, end_B[:, None], tokens_BT[:, :1], axis=1)
    asked = Probe(rows_BP + start)

    @jax.jit
    def at_once(params):
        rows = hidden_rows(config, params, tokens_BT, masks, asked.rows_BP, probe=asked)
        return hidden(config, params, longer_BT, masks, probe=asked), rows

    full, rows = at_once(params)

    @jax.jit
    def chunked(params, head_BT, tail_BT):
        cache = empty_cache(config, 4, start + slots_for(tail_BT.shape[1], CHUNK) + 1, jnp.float32)
        if start:
            ends_B = jnp.full(4, start)
            cache = prefill(config, params, head_BT, ends_B, masks, cache, jnp.zeros((4, 1), int), chunk=CHUNK).cache
        first_B = jnp.full(4, start) if start else None
        out = prefill(
            config,
            params,
            tail_BT,
            jnp.asarray(end_B),
            masks,
            cache,
            jnp.asarray(rows_BP),
            start_B=first_B,
            probe=Probe(jnp.asarray(rows_BP)),
            chunk=CHUNK,
        )
        more = hidden(
            config,
            params,
            tokens_BT[:, :1],
            masks,
            cache=out.cache,
            start_B=jnp.asarray(end_B),
            end_B=jnp.asarray(end_B) + 1,
        )
        return out, more.x_BTE[:, 0]

    out, next_BE = chunked(params, tokens_BT[:, :start], tokens_BT[:, start:])
    assert out.cache["blocks"]["0"].slots == config.window and out.cache["blocks"]["1"].slots > 45
    for found in (out, rows):
        close(found.x_BPE, np.take_along_axis(np.asarray(full.x_BTE), asked.rows_BP[..., None], axis=1), 1e-5)
        np.testing.assert_array_equal(found.probed.keys, full.probed.keys)
    close(out.rms_BP, rows.rms_BP, 1e-5)
    close(next_BE, full.x_BTE[np.arange(4), end_B], 1e-5)


def test_rows_of_the_last_layer_equal_those_of_a_whole_pass(five_layers, close):
    """Of the model as repeats of one layer, and of the same model as repeats of two layers and a tail."""
    lm = five_layers[0]
    rng = np.random.default_rng(3)
    tokens_BT = rng.integers(0, 31, (3, 20)).astype(np.int32)
    rows_BP = np.array([[19, 4, 0], [7, 8, 9], [2, 2, 18]])
    masks = normalise(lm.config, Interventions(head_mask=rng.random((3, 5, 4)) < 0.3))
    probe = Probe(rows_BP, spans_BN2=np.array([[[0, 4], [2, 9]]] * 3), top=2)
    full = jax.jit(lambda params: hidden(lm.config, params, tokens_BT, masks, probe=probe))(lm.params)
    expected_BPE = np.take_along_axis(np.asarray(full.x_BTE), rows_BP[..., None], axis=1)
    for config, params in ((grouped.config, grouped.params) for grouped in five_layers):
        run = jax.jit(lambda params: hidden_rows(config, params, tokens_BT, masks, rows_BP, probe=probe))
        rows = run(params)
        close(rows.x_BPE, expected_BPE, 1e-5)
        np.testing.assert_array_equal(rows.probed.keys, full.probed.keys)
        close(rows.probed.mass, full.probed.mass, 1e-5)


@pytest.mark.parametrize("pattern, times", [(("full",), 2), (("sliding", "sliding", "sliding", "full"), 3)])
def test_layers_that_are_alike_are_traced_once(pattern, times):
    """Wherever a program of chunks and a probe has them: one of each kind, and the last one of the rows asked for."""
    sizes = dict.fromkeys(("hidden_size", "mlp_size", "vocab_size"), 16) | {
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 4,
    }
    config = ModelConfig(**sizes, n_layers=12, max_length=64, layer_pattern=pattern, window=6)
    rows_BP = np.array([[39, 3]])

    def run(params, tokens_BT):
        cache = empty_cache(config, 1, 48, jnp.float32)
        asked = jnp.asarray(rows_BP)
        return prefill(
            config, params, tokens_BT, jnp.array([40]), normalise(config), cache, asked, probe=Probe(asked), chunk=CHUNK
        )

    shapes = nn.unbox(param_shapes(config)), jax.ShapeDtypeStruct((1, 40), jnp.int32)
    assert jax.jit(run).lower(*shapes).as_text().count("func.func private @_through_block") == times


# --- shared beginnings ---


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=12))
def test_sharing_covers_every_prompt_once_and_never_costs_more(cases):
    """Prompts from three texts, each cut somewhere and continued by tokens of its own."""
    texts = [[100 + t] * 300 for t in range(3)]
    prompts = [(*texts[t][:kept], *[i] * own, 7) for i, (t, kept, own) in enumerate(cases)]
    groups = share_prefixes(prompts)
    assert sorted(i for group in groups for i in group.members) == list(range(len(prompts)))
    cost = 0
    for group in groups:
        cost += len(group.prefix)
        for i, start in zip(group.members, group.starts, strict=True):
            assert prompts[i][:start] == group.prefix[:start] and start < len(prompts[i])
            cost += len(prompts[i]) - start
    assert cost <= sum(map(len, prompts))


def test_variants_of_one_haystack_are_read_once():
    hay = list(range(1000, 1400))
    prompts = [(*hay[:depth], 1, 2, 3, *hay[depth:], 9) for depth in (80, 100, 200, 300, 400)]
    (group,) = share_prefixes(prompts)
    starts = dict(zip(group.members, group.starts, strict=True))
    assert group.prefix in (prompts[3][:-1], prompts[4][:-1])  # which share equally much
    assert [starts[i] for i in range(3)] == [80, 100, 200] and 300 in (starts[3], starts[4])


@pytest.mark.parametrize("a, b, n", [((1, 2), (1, 2, 3), 2), ((), (1,), 0), ((5, 1), (5, 2), 1), ((4,), (5,), 0)])
def test_common_prefix(a, b, n):
    assert common_prefix(a, b) == n


@pytest.fixture(scope="module")
def prompts():
    """With and without a shared beginning."""
    rng = np.random.default_rng(4)
    hay = rng.integers(0, 41, 90).tolist()
    some = [[*hay[:n], *rng.integers(0, 41, 10).tolist()] for n in (80, 90, 70, 88)]
    some += [rng.integers(0, 41, n).tolist() for n in (70, 99)]
    assert share_prefixes(some)[0].prefix
    return some


@pytest.fixture(scope="module")
def decoded(windowed, prompts):
    options = {"batch_size": 4, "max_new_tokens": 7, "stop_ids": (), "probe": True}
    return generate_many(windowed.config, windowed.params, prompts, **options)


@pytest.fixture(scope="module")
def best_next(windowed, prompts):
    """The model's best token at each place of an answer after each prompt, in one pass without a cache."""

    def best(answers):
        rows, lengths = pad_rows([[*p, *a] for p, a in zip(prompts, answers, strict=True)], pad_id=0, least=107)
        best_BT = np.asarray(windowed.logits(rows, lengths)).argmax(axis=-1)
        return [
            best_BT[b, len(p) - 1 : len(p) + len(a) - 1] for b, (p, a) in enumerate(zip(prompts, answers, strict=True))
        ]

    return best


def test_generation_equals_decoding_without_a_cache(decoded, best_next):
    """Prompts that fill the rings many times over: every token is the best next one."""
    for result, best_N in zip(decoded, best_next([result.tokens for result in decoded]), strict=True):
        np.testing.assert_array_equal(result.tokens, best_N)


def test_reading_answers_equals_decoding_them(windowed, prompts, decoded):
    """Prompts with and without a shared beginning, answers of different lengths, sliding layers."""
    answers = [result.tokens[: 2 + i].tolist() for i, result in enumerate(decoded)]
    found = read_answers(windowed, prompts, answers, batch_size=3)
    for read, result, answer in zip(found, decoded, answers, strict=True):
        np.testing.assert_array_equal(read.predicted, answer)
        np.testing.assert_array_equal(read.argmax, result.argmax[: len(answer)])


def test_other_answers_are_read_as_given(windowed, prompts, decoded, best_next):
    """Where the model would say something else, its own choice shows."""
    answers = [((result.tokens[: 2 + i] + 1 + np.arange(2 + i)) % 41).tolist() for i, result in enumerate(decoded)]
    expected = best_next(answers)
    for read, best_N in zip(read_answers(windowed, prompts, answers, batch_size=3), expected, strict=True):
        np.testing.assert_array_equal(read.predicted, best_N)
    assert any((best_N != np.array(answer)).any() for best_N, answer in zip(expected, answers, strict=True))


@pytest.mark.parametrize("prompts, answers", [([[1]], []), ([[]], [[1]]), ([[1]], [[]])])
def test_prompts_and_answers_must_match(windowed, prompts, answers):
    with pytest.raises(ValueError, match="need as many answers"):
        read_answers(windowed, prompts, answers)
