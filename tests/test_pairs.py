"""Contrastive pairs: sampling under masks, and what is kept."""

import numpy as np
import pytest
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, in_float64, reference_answer

from retmask_jax.data import tiny_language as tl
from retmask_jax.haystack import Prompter
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.pairs import make_demonstrations, make_pairs, sample_responses

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


def _sample(variants, temperature=1.5, seed=7, **options):
    return sample_responses(
        LM, PROMPTER, PROMPTS, variants, temperature=temperature, top_p=1.0, max_new_tokens=NEW, batch_size=BATCH,
        seed=seed, **options,
    )  # fmt: skip


# --- responses ---


def test_rows_of_one_batch_equal_runs_of_one_model():
    """A row's draw depends on its own mask only: its neighbours may be of another model."""
    mixed = _sample({"normal": NORMAL, "ablated": ABLATED})
    only_normal = _sample({"normal": NORMAL, "ablated": NORMAL})
    only_ablated = _sample({"normal": ABLATED, "ablated": ABLATED})
    assert mixed["normal"] == only_normal["normal"]
    assert mixed["ablated"] == only_ablated["ablated"]
    assert all(a["text"] != b["text"] for a, b in zip(mixed["ablated"], only_normal["ablated"], strict=True))


def test_draws_depend_on_seed_variant_and_prompt_alone():
    first = _sample({"a": NORMAL, "b": NORMAL})
    assert _sample({"a": NORMAL, "b": NORMAL}) == first
    fewer = sample_responses(
        LM, PROMPTER, PROMPTS[:2], {"a": NORMAL, "b": NORMAL}, temperature=1.5, top_p=1.0, max_new_tokens=NEW,
        batch_size=BATCH, seed=7,
    )  # fmt: skip
    assert fewer == {name: responses[:2] for name, responses in first.items()}
    for other in (first["b"], _sample({"a": NORMAL, "b": NORMAL}, seed=8)["a"]):
        assert all(x["text"] != y["text"] for x, y in zip(first["a"], other, strict=True))


@pytest.mark.parametrize("key", ["messages", "messages_without"])
def test_cold_responses_equal_the_slow_reference(key):
    found = _sample({"normal": NORMAL, "ablated": ABLATED}, temperature=0.0, messages_key=key)
    finished = set()
    for name, mask in (("normal", NORMAL), ("ablated", ABLATED)):
        head_mask = np.asarray(mask.fill(CONFIG).head_mask)
        for prompt, response in zip(PROMPTS, found[name], strict=True):
            row = [tl.BOS, *map(tl.VOCABULARY.index, prompt[key][0]["content"].split()), tl.VOCABULARY.index(":")]
            tokens, _ = reference_answer(in_float64(LM.params), row, NEW, (tl.EOS,), head_mask=head_mask)
            assert response["text"].split() == [tl.VOCABULARY[i] for i in tokens if i > tl.UNK]
            assert response["finished"] == (len(tokens) < NEW)
            finished.add(response["finished"])
    if key == "messages":
        assert finished == {True, False}


def test_a_prompt_that_leaves_no_room_raises_before_sampling():
    with pytest.raises(ValueError, match="the longest prompt has 48 tokens; with 465 new ones it exceeds .* of 512"):
        sample_responses(
            LM, PROMPTER, PROMPTS, {"normal": NORMAL}, temperature=1.0, top_p=1.0, max_new_tokens=465, batch_size=BATCH,
            seed=0,
        )  # fmt: skip


# --- pairs ---


def _responses(*texts):
    return [{"text": text, "finished": i % 2 == 0} for i, text in enumerate(texts)]


def test_pairs_that_differ_are_kept_and_the_others_counted():
    prompts = [{"id": str(i), "messages": [{"role": "user", "content": f"q{i}"}]} for i in range(6)]
    chosen = _responses("oslo", "", "rome", "same", " \n", "paris ")
    rejected = _responses("rome", "x", "  ", "same", "", "paris")
    records, counts = make_pairs(prompts, chosen, rejected)
    assert counts == {"kept": 2, "empty": 3, "identical": 1}
    assert records == [
        {"id": "0", "messages": prompts[0]["messages"], "chosen": "oslo", "chosen_finished": True, "rejected": "rome",
         "rejected_finished": True},
        {"id": "5", "messages": prompts[5]["messages"], "chosen": "paris ", "chosen_finished": False,
         "rejected": "paris", "rejected_finished": False},
    ]  # fmt: skip
    assert make_pairs([], [], []) == ([], {"kept": 0, "empty": 0, "identical": 0})
    with pytest.raises(ValueError):
        make_pairs(prompts, chosen[:5], rejected)


def test_demonstrations_drop_empty_answers_only():
    prompts = [{"id": str(i), "messages": []} for i in range(3)]
    records, counts = make_demonstrations(prompts, _responses("oslo", " ", "rome"))
    assert counts == {"kept": 2, "empty": 1}
    assert [(record["id"], record["chosen"]) for record in records] == [("0", "oslo"), ("2", "rome")]
