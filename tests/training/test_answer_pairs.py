"""Contrastive pairs: sampling under masks, and what is kept."""

import collections

import numpy as np
import pytest
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, in_float64, reference_answer

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.prompter import Prompter
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.model.masking import normalise
from retmask_jax.training.pairs import Question, draws, make_demonstrations, make_pairs, sample, usable

LM = copying_lm()
PROMPTER = Prompter(LM.tokenizer)
NORMAL, ABLATED = Interventions(), mask_heads(CONFIG, [(1, 0), (1, 2), (0, 1)])
WORDS = tl.VOCABULARY[4:]


def _prompts():
    """Conversations of few words, some of them <eos>, so that a model that copies may stop; and a shorter version."""
    rng = np.random.default_rng(5)
    prompts = []
    for i in range(3):
        words = [str(word) for word in rng.choice([*rng.choice(WORDS, 8), "<eos>"], 30 + 8 * i)]
        texts = " ".join(words), " ".join(words[:12])
        messages = [[{"role": "user", "content": text}] for text in texts]
        prompts.append({"id": f"p{i}", "messages": messages[0], "messages_without": messages[1]})
    return prompts


PROMPTS = _prompts()


def _questions(variants, prompts=PROMPTS, seed=7, key="messages"):
    numbers, tokens = usable(PROMPTER, prompts, [key], CONFIG.max_length - NEW)
    return [
        Question((seed, name), prompts[i]["id"], prompts[i][key], tokens[key][i], int(draws(seed, stream, 3)[i]))
        for stream, name in enumerate(variants)
        for i in numbers
    ]


def _sample(variants, temperature=1.5, questions=None, **options):
    """{key: record}; variants: {name: mask}."""
    questions = _questions(variants, **options) if questions is None else questions
    masks = {(seed, name): mask for name, mask in variants.items() for seed in (7, 8)}
    records = sample(LM, questions, masks, temperature=temperature, top_p=1.0, max_new_tokens=NEW, batch_size=BATCH)
    return dict(records)


def _texts(records, name):
    return [record["text"] for key, record in sorted(records.items()) if key[1] == name]


# --- responses ---


def test_rows_of_one_batch_equal_runs_of_one_model():
    """A row's draw depends on its own mask only: its neighbours may be of another model."""
    mixed = _sample({"normal": NORMAL, "ablated": ABLATED})
    only_normal = _sample({"normal": NORMAL, "ablated": NORMAL})
    only_ablated = _sample({"normal": ABLATED, "ablated": ABLATED})
    assert _texts(mixed, "normal") == _texts(only_normal, "normal")
    assert _texts(mixed, "ablated") == _texts(only_ablated, "ablated")
    assert all(a != b for a, b in zip(_texts(mixed, "ablated"), _texts(only_normal, "ablated"), strict=True))


def test_draws_depend_on_seed_variant_and_prompt_alone():
    both = {"a": NORMAL, "b": NORMAL}
    first = _sample(both)
    assert sorted(first) == [(7, name, f"p{i}") for name in "ab" for i in range(3)]
    some = [
        question for question in _questions(both) if (question.variant[1], question.id) in (("b", "p1"), ("a", "p2"))
    ]
    assert _sample(both, questions=some[::-1]) == {question.key: first[question.key] for question in some}
    for other in (_texts(first, "b"), _texts(_sample(both, seed=8), "a")):
        assert all(x != y for x, y in zip(_texts(first, "a"), other, strict=True))
    assert draws(7, 1, 5)[:3].tolist() == draws(7, 1, 3).tolist() != draws(7, 2, 3).tolist()


@pytest.mark.parametrize("key", ["messages", "messages_without"])
def test_cold_responses_equal_the_slow_reference(key):
    found = _sample({"normal": NORMAL, "ablated": ABLATED}, temperature=0.0, key=key)
    finished = set()
    for name, mask in (("normal", NORMAL), ("ablated", ABLATED)):
        head_mask = normalise(CONFIG, mask).head_BLH[0]
        for prompt in PROMPTS:
            response = found[7, name, prompt["id"]]
            row = [tl.BOS, *map(tl.VOCABULARY.index, prompt[key][0]["content"].split()), tl.VOCABULARY.index(":")]
            tokens, _ = reference_answer(in_float64(LM.params), row, NEW, (tl.EOS,), head_mask=head_mask)
            assert response["text"].split() == [tl.VOCABULARY[i] for i in tokens if i > tl.UNK]
            assert (response["finished"], response["tokens"]) == (len(tokens) < NEW, len(tokens))
            finished.add(response["finished"])
    if key == "messages":
        assert finished == {True, False}


def test_prompts_that_are_too_long_are_left_out():
    both = ["messages", "messages_without"]
    numbers, tokens = usable(PROMPTER, PROMPTS, both, 48)
    assert numbers == [0, 1, 2]
    assert [len(row) for row in tokens["messages"]] == [32, 40, 48]
    assert {len(row) for row in tokens["messages_without"]} == {14}
    assert usable(PROMPTER, PROMPTS, both, 47) == ([0, 1], {key: rows[:2] for key, rows in tokens.items()})
    with pytest.raises(ValueError, match="each of 3 prompts has more than 31 tokens, which the model's context leaves"):
        usable(PROMPTER, PROMPTS, both, 31)
    assert usable(PROMPTER, PROMPTS, ["messages_without"], 31)[0] == [0, 1, 2]


# --- pairs ---


def _responses(*texts):
    return [{"text": text, "finished": i % 2 == 0} for i, text in enumerate(texts)]


def test_pairs_that_differ_are_kept_and_the_others_counted():
    prompts = [{"id": str(i), "messages": [{"role": "user", "content": f"q{i}"}]} for i in range(6)]
    chosen = _responses("oslo", "", "rome", "same", " \n", "paris ")
    rejected = _responses("rome", "x", "  ", "same", "", "paris")
    counts = collections.Counter()
    assert list(make_pairs(prompts, chosen, rejected, counts)) == [
        {
            "id": "0",
            "messages": prompts[0]["messages"],
            "chosen": "oslo",
            "chosen_finished": True,
            "rejected": "rome",
            "rejected_finished": True,
        },
        {
            "id": "5",
            "messages": prompts[5]["messages"],
            "chosen": "paris ",
            "chosen_finished": False,
            "rejected": "paris",
            "rejected_finished": False,
        },
    ]
    assert counts == {"kept": 2, "empty": 3, "identical": 1}
    with pytest.raises(ValueError):
        list(make_pairs(prompts, chosen[:5], rejected, counts))


def test_demonstrations_drop_empty_answers_only():
    prompts = [{"id": str(i), "messages": []} for i in range(3)]
    counts = collections.Counter()
    records = list(make_demonstrations(prompts, _responses("oslo", " ", "rome"), counts))
    assert counts == {"kept": 2, "empty": 1}
    assert [(record["id"], record["chosen"]) for record in records] == [("0", "oslo"), ("2", "rome")]
