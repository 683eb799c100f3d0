"""What suites ask of a model, against a loop over single rows; options of tasks. lm-eval is not needed here."""

import sys

import jax
import numpy as np
import pytest
import scipy.special
from helpers_tiny import BATCH, NEW, copying_lm, in_float64, reference, reference_answer

from retmask_jax.data import tiny_language as tl
from retmask_jax.evals import scoring
from retmask_jax.evals.external import lm_eval
from retmask_jax.evals.scoring import GenerationOptions
from retmask_jax.model.interventions import all_heads, mask_heads, stack
from retmask_jax.utils import memory

LENGTHS = (1, 3, 9, 20, 33, 47, 58)


def _pairs(config):
    rng = np.random.default_rng(0)
    pairs = []
    for n in LENGTHS:
        row = rng.integers(4, config.vocab_size, n + 4).tolist()
        pairs.append((row[:n], row[n : n + 1 + n % 4]))
    return pairs


def _greedy(lm, prompt, n):
    """The first n tokens of the answer, by the slow reference."""
    return reference_answer(in_float64(lm.params), prompt, n)[0]


def _naive(lm, pairs, head_mask=None):
    """By the slow reference of one row at a time."""
    found, params = [], in_float64(lm.params)
    for context, continuation in pairs:
        row = [*context, *continuation]
        logps_TV = scipy.special.log_softmax(reference(params, np.array(row), head_mask)[0], axis=-1)
        before = np.arange(len(context) - 1, len(row) - 1)
        chosen = logps_TV[before, continuation]
        found.append((chosen.sum(), bool((logps_TV[before].argmax(axis=1) == continuation).all())))
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_batches_give_what_a_loop_over_rows_gives(masked):
    lm = copying_lm()
    iv = mask_heads(lm.config, [(1, 0), (0, 2)]) if masked else None
    pairs = _pairs(lm.config)
    pairs += [(context, _greedy(lm, context, 2)) for context, _ in pairs[1:4]]
    # Most likely up to the last token.
    pairs += [(context, [*_greedy(lm, context, 1), tl.UNK]) for context, _ in pairs[1:2]]
    expected = _naive(lm, pairs, iv and np.asarray(iv.head_mask))
    found = scoring.continuation_logprobs(lm, pairs, iv, batch_size=BATCH)
    np.testing.assert_allclose([a for a, _ in found], [e for e, _ in expected], atol=1e-4)
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    if not masked:
        assert [flag for _, flag in found][-4:] == [True, True, True, False]


def test_what_is_longer_than_the_context_loses_its_beginning():
    lm = copying_lm()
    rng = np.random.default_rng(1)
    room = lm.config.max_length
    context, continuation = (rng.integers(4, lm.config.vocab_size, n).tolist() for n in (room + 9, 5))
    fitting = (context[-(room + 1 - 5) :], continuation)  # the last token is predicted, not read
    assert scoring.is_too_long((context, continuation), room) and not scoring.is_too_long(fitting, room)
    long, short, shorter = scoring.continuation_logprobs(
        lm, [(context, continuation), fitting, (fitting[0][1:], continuation)], batch_size=3
    )
    assert long == short != shorter
    assert scoring.last_tokens([1, 2, 3], 2) == [2, 3] and scoring.last_tokens([1, 2, 3], 5) == [1, 2, 3]
    with pytest.raises(ValueError, match=f"a continuation of {room + 1} tokens exceeds the model's context of {room}"):
        scoring.continuation_logprobs(lm, [([1], [4] * (room + 1))], batch_size=1)
    with pytest.raises(ValueError, match="a context of 0 and a continuation of 1 tokens: both need one"):
        scoring.continuation_logprobs(lm, [([], [4])], batch_size=1)


def test_out_of_memory_is_tried_again_in_half_the_batch(monkeypatch):
    lm, pairs, scores, sizes = copying_lm(), _pairs(copying_lm().config), scoring._scores, []

    def full(lm, rows, *rest):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: allocating 12345 bytes")
        return scores(lm, rows, *rest)

    expected = scoring.continuation_logprobs(lm, pairs, batch_size=BATCH)
    monkeypatch.setattr(scoring, "_scores", full)
    found = scoring.continuation_logprobs(lm, pairs, batch_size=BATCH)
    np.testing.assert_allclose([a for a, _ in found], [e for e, _ in expected], atol=1e-4)
    assert sizes == [4, 2, 2, 2, 2]
    monkeypatch.setattr(scoring, "_scores", lambda *_: full(lm, [None] * 3))
    with pytest.raises(memory.OutOfMemory, match="one row is too many"):
        scoring.continuation_logprobs(lm, pairs, batch_size=1)


def test_answers_end_at_the_first_stop_and_at_special_tokens():
    lm = copying_lm()
    rng = np.random.default_rng(2)
    prompts = [rng.integers(4, lm.config.vocab_size, n).tolist() for n in (40, 7, 23, 60, 12)]
    texts = [lm.tokenizer.decode(_greedy(lm, prompt, NEW)) for prompt in prompts]
    words = [text.split() for text in texts]
    until = [f" {words[0][3]}", f" {words[2][2]}"]
    assert scoring.answers(lm, prompts, max_new_tokens=NEW, batch_size=BATCH, until=until) == [
        min((text.split(stop)[0] for stop in until), key=len) for text in texts
    ]
    assert scoring.cut("a b c b", ["b", "", "x"]) == "a " and scoring.cut("a b", []) == "a b"
    assert scoring.stop_ids(lm, ["<unk>", "the", "<eos>"]) == [tl.EOS, tl.UNK]
    shared = mask_heads(lm.config, all_heads(lm.config))
    assert scoring.answers(lm, prompts, shared, max_new_tokens=NEW, batch_size=BATCH) != texts
    with pytest.raises(ValueError, match="a suite runs under one mask"):
        scoring.answers(lm, prompts, stack([shared] * 5), max_new_tokens=NEW, batch_size=BATCH)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ((), 256, 0.0, 1.0)),
        (
            {"until": "\n", "max_gen_toks": 7, "do_sample": False, "temperature": 0.7, "top_k": 5},
            (("\n",), 7, 0.0, 1.0),
        ),
        ({"until": ["a", "b"], "max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9}, (("a", "b"), 3, 0.5, 0.9)),
        ({"max_gen_toks": 4, "max_tokens": 9, "temperature": 0.0, "top_p": 0.9}, ((), 4, 0.0, 1.0)),
    ],
)
def test_options_of_tasks(kwargs, expected):
    options = GenerationOptions.from_kwargs(kwargs, 512)
    assert (options.until, options.max_new_tokens, options.temperature, options.top_p) == expected


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"num_beams": 4, "repetition_penalty": 1.1}, "has num_beams, repetition_penalty, which is not supported"),
        ({"temperature": 0.5, "top_k": 5}, "has top_k"),
        ({"do_sample": True}, "wants do_sample at temperature 0"),
        ({"max_gen_toks": 512}, "512 new tokens; the model's context of 512 leaves no room"),
    ],
)
def test_options_that_cannot_be_followed_are_named(kwargs, why):
    with pytest.raises(ValueError, match=why):
        GenerationOptions.from_kwargs(kwargs, 512)


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'retmask_jax\[eval\]'"):
        lm_eval.run_lm_eval(copying_lm(), ["arc_easy"], batch_size=1)


def test_logged_samples_become_values_per_sample():
    samples = [
        {"doc_id": i, "filter": name, "metrics": ["acc", "f1", "words"], "acc": i % 2, "f1": 0.5 * i, "words": (1, 2)}
        | ({"f1": float("nan")} if i == 2 else {})
        for name in ("none", "strict")
        for i in range(3)
    ]
    measured = lm_eval._measured("task", samples)
    assert [one.task for one in measured] == ["task acc", "task f1", "task acc (strict)", "task f1 (strict)"]
    accuracy, f1 = measured[:2]
    assert accuracy.binary and accuracy.values.tolist() == [0, 1, 0] and accuracy.ids == ("0", "1", "2")
    assert (f1.binary, f1.values.tolist(), f1.ids) == (False, [0, 0.5], ("0", "1"))
    assert f1.missing == {"no number from the harness": 1}
    only = lm_eval._measured("task", [{"doc_id": 3, "filter": "none", "metrics": ["acc"], "acc": 1.0}])
    assert only[0].name == "lm_eval/task" and only[0].metric == "acc"
