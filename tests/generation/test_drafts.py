"""Answers from drafts are those of plain greedy decoding, whatever is drafted, and end where an answer ends."""

import textwrap

import numpy as np
import pytest
from helpers_processes import environment, printed

from retmask_jax.generation import continuations
from retmask_jax.generation import drafts as module
from retmask_jax.generation.decode import generate_many
from retmask_jax.generation.drafts import Ends, answer_drafts
from retmask_jax.generation.prefill import share_prefixes
from retmask_jax.model.config import ModelConfig

NEW, WIDTH, VOCABULARY = 8, 5, 41


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def lm(request, random_model):
    """Sliding layers and full ones in turn, and two of the ids end an answer."""
    return random_model(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            mlp_size=20,
            n_layers=request.param,
            n_heads=4,
            n_kv_heads=2,
            head_dim=4,
            max_length=256,
            layer_pattern=("sliding", "full"),
            window=11,
            eos_ids=(7, 23),
        )
    )


@pytest.fixture(scope="module")
def prompts():
    """Some begin alike, others do not."""
    rng = np.random.default_rng(4)
    hay = rng.integers(0, VOCABULARY, 90).tolist()
    some = [[*hay[:n], *rng.integers(0, VOCABULARY, 10).tolist()] for n in (80, 90, 70, 88)]
    some += [rng.integers(0, VOCABULARY, n).tolist() for n in (70, 99)]
    assert share_prefixes(some)[0].prefix
    return some


@pytest.fixture(scope="module")
def plain(lm, prompts):
    return generate_many(lm.config, lm.params, prompts, batch_size=4, max_new_tokens=NEW, probe=True)


def _answers(lm, prompts, drafts, line_ends=(), words=None):
    line_end_V, word_V = np.zeros(VOCABULARY, bool), np.ones(VOCABULARY, bool)
    line_end_V[list(line_ends)] = True
    if words is not None:
        word_V[:] = False
        word_V[list(words)] = True
    ends = Ends.of(lm.config, line_end_V, word_V)
    return answer_drafts(lm, prompts, drafts, ends, max_new_tokens=NEW, width=WIDTH, batch_size=4)


def _assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.argmax, theirs.argmax)
        assert int(ours.stops) == int(theirs.stops)


def test_no_draft_changes_an_answer(lm, prompts, plain):
    """Drafts that are empty, wrong at once, right for a while, right and stopping, and longer than what is read."""
    ended = [[*one.tokens.tolist(), *([int(one.stops)] if one.stops >= 0 else [])] for one in plain]
    assert {len(one.tokens) < NEW for one in plain} == {True, False}  # both kinds of end
    wrong = [[(token + 1) % VOCABULARY for token in one] for one in ended]
    partly = [[*one[: i % 4], 40, 39] for i, one in enumerate(ended)]
    for drafts in ([()] * len(prompts), wrong, partly, ended, [[*one, 3, 3, 3] for one in ended]):
        _assert_equal(_answers(lm, prompts, drafts), plain)


def test_small_batches_go_on_together(lm, prompts, plain, monkeypatch):
    """Of prompts that begin alike a CPU reads two at a time; what goes on after the drafts is decoded in one batch."""
    calls, decode = [], module._decode_rows
    monkeypatch.setattr(module, "_decode_rows", lambda *args: calls.append(len(args[6].done_B)) or decode(*args))
    _assert_equal(_answers(lm, prompts, [()] * len(prompts)), plain)
    assert calls == [4]


def test_rows_are_refilled_as_answers_end(lm, monkeypatch):
    """Of texts with two beginnings, whose caches differ in length; what drafts have ended is not decoded, nor is what fills
    a batch. One program decodes them all."""
    rng = np.random.default_rng(6)
    hay = [rng.integers(0, VOCABULARY, n).tolist() for n in (90, 200)]
    prompts = [[*hay[i % 2], *rng.integers(0, VOCABULARY, 6).tolist()] for i in range(26)]
    plain = generate_many(lm.config, lm.params, prompts, batch_size=4, max_new_tokens=NEW, probe=True)
    assert {len(one.tokens) < NEW for one in plain} == {True, False}
    drafts = [one.tokens.tolist()[: i % 6] for i, one in enumerate(plain)]  # so that they end at different times
    states, decode = [], module._decode_rows
    monkeypatch.setattr(module, "_decode_rows", lambda *args: states.append(args[6]) or decode(*args))
    before = decode._cache_size()
    _assert_equal(_answers(lm, prompts, drafts), plain)
    assert decode._cache_size() == before + 1
    busy = [int((~rows.done_B).sum()) for rows in states]
    assert all(n >= 3 for n in busy[:-1]) and len(states) < 26 / 2  # two rows are read at a time


def test_what_goes_on_after_a_beginning_has_the_room_it_needs_and_no_more(lm, monkeypatch):
    """In several parts, the last of which is padded, after half of the beginning and after nearly all of it."""
    rng = np.random.default_rng(9)
    hay, kinds = rng.integers(0, VOCABULARY, 160).tolist(), ((70, 40), (80, 38), (155, 34), (160, 33))
    prompts = [[*hay[:n], *rng.integers(0, VOCABULARY, m).tolist()] for n, m in kinds]
    monkeypatch.setattr(continuations, "_CHUNK", {"cpu": 16})
    monkeypatch.setattr(continuations, "_SLOTS_STEP", 1)
    slots, read = [], continuations._prefix_cache
    monkeypatch.setattr(
        continuations, "_prefix_cache", lambda *args, **named: slots.append(named["slots"]) or read(*args, **named)
    )
    plain = generate_many(lm.config, lm.params, prompts, batch_size=4, max_new_tokens=NEW, probe=True)
    _assert_equal(_answers(lm, prompts, [()] * len(prompts)), plain)
    assert slots == [192 + 3 * 16]  # whose beginning it is goes on from its last token, next to a row of 34 more


def test_a_line_end_ends_an_answer_after_its_first_word(lm, prompts, plain):
    """In a draft or after it, in batches of every kind; before the first word it is passed over."""
    said = [one.tokens.tolist() for one in plain]
    row = max(range(len(said)), key=lambda i: len(set(said[i])))
    later = next(token for token in said[row] if token != said[row][0])
    cuts = [tokens[1:].index(later) + 1 if later in tokens[1:] else None for tokens in said]
    assert None in cuts
    for drafts in ([()] * len(prompts), said):
        found = _answers(lm, prompts, drafts, line_ends=(later,))
        for ours, theirs, cut in zip(found, plain, cuts, strict=True):
            stop = int(theirs.stops) if cut is None else later
            assert ours.tokens.tolist() == theirs.tokens[:cut].tolist() and int(ours.stops) == stop
        _assert_equal(_answers(lm, prompts, drafts, line_ends=(later,), words=()), plain)


def test_what_was_found_is_told_as_it_comes(lm, prompts, plain):
    told = {}
    ends = Ends.of(lm.config, np.zeros(VOCABULARY, bool), np.ones(VOCABULARY, bool))
    answer_drafts(
        lm,
        prompts,
        [()] * len(prompts),
        ends,
        max_new_tokens=NEW,
        width=WIDTH,
        batch_size=4,
        note=lambda i, one: told.setdefault(i, one.tokens.tolist()) and "",
    )
    assert told == {i: one.tokens.tolist() for i, one in enumerate(plain)}


@pytest.mark.parametrize("prompts, drafts", [([[1]], []), ([[]], [[1]])])
def test_prompts_and_drafts_must_match(lm, prompts, drafts):
    with pytest.raises(ValueError, match="need as many drafts"):
        _answers(lm, prompts, drafts)


def test_a_prompt_that_leaves_no_room_is_refused(lm):
    with pytest.raises(ValueError, match="exceed the model's context"):
        _answers(lm, [[1] * 250], [()])


_ON_A_MESH = textwrap.dedent("""
    import numpy as np, retmask_jax as rm
    from retmask_jax.generation import drafts
    from retmask_jax.generation.decode import generate_many
    from retmask_jax.model.sharding import make_mesh

    hay = np.random.default_rng(4).integers(16, 256, 150).tolist()
    prompts = [[*hay[:n], n] for n in (150, 140, 130, 120, 110, 100, 90, 80)]
    lm = rm.load("bundled", mesh=make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "context": 1}))
    ends = drafts.Ends.of(lm.config, *np.array([[False], [True]]).repeat(lm.config.vocab_size, axis=1))
    calls, decode = [], drafts._decode_rows
    drafts._decode_rows = lambda *args: calls.append(len(args[6].done_B)) or decode(*args)
    options = {"max_new_tokens": 6, "batch_size": 8}
    found = drafts.answer_drafts(lm, prompts, [()] * len(prompts), ends, width=4, **options)
    expected = generate_many(lm.config, lm.params, prompts, probe=True, **options)
    half = [one.tokens.tolist() if i % 3 else () for i, one in enumerate(expected)]
    for drafted in (found, drafts.answer_drafts(lm, prompts, half, ends, width=6, max_new_tokens=6, batch_size=4)):
        for ours, theirs in zip(drafted, expected, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.argmax, theirs.argmax)
    assert calls[0] == 8 and calls[1:] and set(calls[1:]) == {4}, calls
""")


@pytest.mark.slow
def test_on_a_mesh_small_batches_go_on_together():
    printed("-c", _ON_A_MESH, env=environment(2))
