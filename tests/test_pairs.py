"""Contrastive pairs: sampling under masks, what is kept, token rows and the order of batches."""

import collections

import numpy as np
import pytest
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, in_float64, reference_answer

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.preferences import batches, encode_pairs
from retmask_jax.haystack import Prompter
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.pairs import Question, draws, make_demonstrations, make_pairs, sample, usable

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
    records = sample(
        LM, questions, masks, temperature=temperature, top_p=1.0, max_new_tokens=NEW, batch_size=BATCH
    )  # fmt: skip
    return {tuple(record["key"]): record for record in records}


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
        head_mask = np.asarray(mask.fill(CONFIG).head_mask)
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
    with pytest.raises(ValueError, match="each of 3 prompts has more than 31 tokens, the model's context less"):
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
        {"id": "0", "messages": prompts[0]["messages"], "chosen": "oslo", "chosen_finished": True, "rejected": "rome",
         "rejected_finished": True},
        {"id": "5", "messages": prompts[5]["messages"], "chosen": "paris ", "chosen_finished": False,
         "rejected": "paris", "rejected_finished": False},
    ]  # fmt: skip
    assert counts == {"kept": 2, "empty": 3, "identical": 1}
    with pytest.raises(ValueError):
        list(make_pairs(prompts, chosen[:5], rejected, counts))


def test_demonstrations_drop_empty_answers_only():
    prompts = [{"id": str(i), "messages": []} for i in range(3)]
    counts = collections.Counter()
    records = list(make_demonstrations(prompts, _responses("oslo", " ", "rome"), counts))
    assert counts == {"kept": 2, "empty": 1}
    assert [(record["id"], record["chosen"]) for record in records] == [("0", "oslo"), ("2", "rome")]


# --- token rows ---


def _record(prompt, chosen, rejected, finished=(True, True)):
    return {
        "messages": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected,
        "chosen_finished": finished[0], "rejected_finished": finished[1],
    }  # fmt: skip


def _encode(records, max_tokens=40, max_prompt_tokens=20):
    return encode_pairs(PROMPTER, records, eos_id=tl.EOS, max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens)


def _split(rows, i):
    """(words before the answer, words the loss counts, words behind) of row i."""
    tokens, mask = rows.tokens[i], rows.loss_mask[i]
    at = np.flatnonzero(mask)
    words = [tl.VOCABULARY[token] for token in tokens]
    assert mask[at[0] : at[-1] + 1].all()
    return " ".join(words[: at[0]]), " ".join(words[at[0] : at[-1] + 1]), set(words[at[-1] + 1 :])


def test_loss_counts_exactly_the_answer_and_its_end():
    rows = _encode([
        _record("the home of anna", "oslo", "fig elm oak", finished=(True, False)),
        _record("every duke slept again near the lamp", "rome paris", "lima", finished=(False, True)),
    ])  # fmt: skip
    assert _split(rows.chosen, 0) == ("<bos> the home of anna :", "oslo <eos>", {"<eos>"})
    assert _split(rows.rejected, 0) == ("<bos> the home of anna :", "fig elm oak", {"<eos>"})
    assert _split(rows.chosen, 1)[:2] == ("<bos> every duke slept again near the lamp :", "rome paris")
    assert _split(rows.rejected, 1)[:2] == ("<bos> every duke slept again near the lamp :", "lima <eos>")
    assert (rows.cut, rows.prompts_cut, len(rows)) == (0, 0, 2)


def test_long_prompts_keep_their_end():
    rows = _encode([_record("amber apple ash bean birch", "oslo", "rome")], max_prompt_tokens=3)
    assert _split(rows.chosen, 0)[0] == "bean birch :"
    assert rows.prompts_cut == 1
    exact = _encode([_record("amber apple ash bean birch", "oslo", "rome")], max_prompt_tokens=7)
    assert _split(exact.chosen, 0)[0] == "<bos> amber apple ash bean birch :"
    assert exact.prompts_cut == 0


def test_long_answers_are_cut_and_have_no_end():
    records = [
        _record("anna", "fig elm oak ash", "fig elm oak"),  # 3 tokens of prompt
        _record("anna", "fig elm oak ash yew plum", "fig"),
    ]
    rows = _encode(records, max_tokens=7)
    assert _split(rows.chosen, 0)[1] == "fig elm oak ash"  # 4 answer tokens fit, the end does not
    assert _split(rows.rejected, 0)[1] == "fig elm oak <eos>"
    assert _split(rows.chosen, 1)[1] == "fig elm oak ash"
    assert rows.cut == 2
    assert rows.chosen.tokens.shape == (2, 7)  # never wider than the limit


def test_both_sides_have_one_width():
    long = " ".join(["fig"] * 90)
    for chosen, rejected in ((long, "oslo"), ("oslo", long)):
        rows = _encode([_record("anna", chosen, rejected)], max_tokens=1024)
        shapes = [x.shape for side in (rows.chosen, rows.rejected) for x in (side.tokens, side.loss_mask)]
        assert shapes == [(1, 128)] * 4  # 3 + 90 + 1 tokens, rounded up to limit the number of programs
        assert rows.chosen.loss_mask.sum() == len(chosen.split()) + 1
        assert rows.cut == 0


# --- batches ---


def _stream(loader, steps):
    return [loader[step]["row"].tolist() for step in range(steps)]


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (5, 5)])
def test_every_example_comes_once_an_epoch_and_epochs_differ(size, batch):
    examples = {"row": np.arange(size), "twice": 2 * np.arange(size)[:, None]}
    loader = batches(examples, batch, seed=0)
    order = [row for rows in _stream(loader, -(-3 * size // batch)) for row in rows]
    epochs = [order[i * size : (i + 1) * size] for i in range(3)]
    assert all(collections.Counter(epoch) == collections.Counter(range(size)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert list(range(size)) not in epochs
    assert (loader[1]["twice"] == 2 * loader[1]["row"][:, None]).all()


def test_a_batch_depends_on_seed_and_step_alone():
    examples = {"row": np.arange(12)}
    walked = _stream(batches(examples, 4, seed=3), 9)
    assert [batches(examples, 4, seed=3)[step]["row"].tolist() for step in (8, 2, 5)] == [walked[i] for i in (8, 2, 5)]
    assert _stream(batches(examples, 4, seed=4), 9) != walked


def test_too_few_examples_raise():
    with pytest.raises(
        ValueError, match="3 examples are fewer than a batch of 4: add prompts or lower train.batch_size"
    ):
        batches({"row": np.arange(3)}, 4, seed=0)
