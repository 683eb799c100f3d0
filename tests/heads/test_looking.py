"""What heads look at, against a slow reference (whole rows, float64, no cache) and against torch's eager attention."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from conftest import VARIANTS
from helpers_tiny import CONFIG, copying_lm, in_float64, reference, reference_answer

import retmask_jax as rm
from retmask_jax.data import tiny_language as tl
from retmask_jax.data.needles import Case, Needle, Spec
from retmask_jax.heads.looking.looks import look_at, question_of
from retmask_jax.hf.packaged_models import MODELS
from retmask_jax.hf.tokenizer import token_texts

LM = copying_lm()
PROMPT = [int(token) for token in np.random.default_rng(3).choice(np.arange(4, 60), 50)]
HEADS = [(1, 0), (0, 3), (1, 2)]
NEW = 10
MASK_LH = np.zeros((CONFIG.n_layers, CONFIG.n_heads), bool)
MASK_LH[tuple(np.transpose(HEADS))] = True


def looks_of(lm=LM, prompt=PROMPT, answer=None, heads=HEADS, **options):
    return look_at(lm, question_of(lm, prompt, answer, heads, **{"max_new_tokens": NEW} | options))


@pytest.fixture(scope="module")
def found():
    return looks_of()


@pytest.fixture(scope="module")
def slow(found):
    """For each answer: (logits of the predicting rows untouched, and masked, the weights [N,L,H,S] in its own model)."""
    params, masks = in_float64(LM.params), {"untouched": None, "masked": MASK_LH}
    by_name = {}
    for reply in found.replies:
        row = np.array([*PROMPT, *reply.tokens])
        rows = slice(len(PROMPT) - 1, len(row) - 1)
        passes = {name: reference(params, row, head_mask=mask) for name, mask in masks.items()}
        logits = {name: logits_TV[rows] for name, (logits_TV, _) in passes.items()}
        by_name[reply.name] = logits, passes[reply.name][1][:, :, rows].transpose(2, 0, 1, 3)
    return by_name


def test_both_answers_are_those_of_plain_greedy_decoding(found):
    params = in_float64(LM.params)
    expected = [reference_answer(params, PROMPT, NEW, (tl.EOS,), head_mask=mask)[0] for mask in (None, MASK_LH)]
    ends = [[tl.EOS] if len(answer) < NEW else [] for answer in expected]
    assert [reply.tokens.tolist() for reply in found.replies] == [a + b for a, b in zip(expected, ends, strict=True)]
    assert [reply.name for reply in found.replies] == ["untouched", "masked"]
    assert found.replies[0].tokens.tolist() != found.replies[1].tokens.tolist()


def test_attention_of_the_chosen_heads_is_that_of_whole_rows(found, slow):
    for reply in found.replies:
        weights_NLHS = slow[reply.name][1]
        expected = np.stack([weights_NLHS[:, layer, head] for layer, head in HEADS], axis=-1)
        np.testing.assert_allclose(reply.attention, expected, atol=1e-5)
        np.testing.assert_array_equal(reply.attention[0, len(PROMPT) :], 0)


def test_the_strongest_keys_of_every_head_and_their_weights(found, slow):
    for reply in found.replies:
        weights_NLHS = slow[reply.name][1]
        n = len(weights_NLHS)
        there = reply.keys >= 0
        expected = np.minimum(len(PROMPT) + np.arange(n), 64)[:, None, None]
        assert (there.sum(axis=-1) == expected).all()
        taken = np.take_along_axis(weights_NLHS, np.maximum(reply.keys, 0), axis=-1)
        np.testing.assert_allclose(reply.weights, np.where(there, taken, 0), atol=1e-5)
        largest_NLHK = -np.sort(-weights_NLHS, axis=-1)[..., :64]
        np.testing.assert_allclose(reply.weights[..., : largest_NLHK.shape[-1]], largest_NLHK, atol=1e-5)


def test_probabilities_are_those_of_both_models(found, slow):
    for reply in found.replies:
        for model, logits_NV in slow[reply.name][0].items():
            odds = np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True))
            expected = (odds / odds.sum(axis=1, keepdims=True))[np.arange(len(reply.tokens)), reply.tokens]
            np.testing.assert_allclose(reply.probabilities[model], expected, rtol=1e-4, atol=1e-7)


def test_an_answer_that_is_given_is_read_and_not_decoded(slow):
    given = [9, 30, 9, 12]
    found = looks_of(answer=given)
    first, masked = found.replies
    assert (first.name, first.tokens.tolist(), masked.name) == ("given", given, "masked")
    row = np.array([*PROMPT, *given])
    weights = reference(in_float64(LM.params), row)[1][1, 0, len(PROMPT) - 1 : -1]
    np.testing.assert_allclose(first.attention[..., 0], weights, atol=1e-5)
    assert looks_of(answer="anna oslo").replies[0].texts == [" anna", " oslo"]


@pytest.mark.parametrize("span", [None, (25, 48)])
def test_heads_are_chosen_by_what_they_copy_in_this_prompt(found, span):
    """One step and head at a time: distinct tokens of the answer that stand at the head's strongest key in the span."""
    prompt = PROMPT if span is None else Case(tuple(PROMPT), span, Needle("", "", "x"), Spec(0, 0.0, 0, (), 0))
    chosen = looks_of(prompt=prompt, heads=None)
    first, end = span or (0, len(PROMPT))
    said = [int(token) for token in chosen.replies[0].tokens if token != tl.EOS]
    copied = np.zeros(MASK_LH.shape)
    for layer, head in np.ndindex(copied.shape):
        keys = [int(key) for key in chosen.replies[0].keys[:, layer, head, 0]]
        copied[layer, head] = len(
            {t for t, key in zip(said, keys, strict=False) if first <= key < end and PROMPT[key] == t}
        )
    whole = len(set(PROMPT[first:end])) if span else len(set(said) & set(PROMPT))
    np.testing.assert_allclose(chosen.scores.mean, copied / whole, rtol=1e-6)
    assert chosen.heads == [head for head in chosen.scores.heads(top_k=8) if copied[head]]
    assert copied.any() and not copied.all() and chosen.span == span
    assert looks_of(prompt=prompt, heads=1).heads == chosen.heads[:1]


def test_scores_that_are_given_choose_the_heads(tmp_path):
    scores = rm.HeadScores.from_array(np.arange(8.0).reshape(2, 4))
    scores.save(tmp_path / "scores.json")
    for given in (scores, tmp_path / "scores.json"):
        found = looks_of(heads=2, scores=given)
        assert found.heads == [(1, 3), (1, 2)] and found.scores == scores and found.scored == "score"


def test_another_prompt_and_other_heads_compile_nothing(compiles):
    other = question_of(
        LM, PROMPT[3:], None, [(0, 0), (0, 1), (1, 1)], max_new_tokens=NEW
    )  # an array of another length
    looks_of()
    compiles.clear()
    look_at(LM, other)
    assert not compiles


def test_conversations_and_beginnings_pass_through_the_template():
    lm = rm.load("bundled")
    text = "the home of anna : oslo . the home of anna"
    ids = lm.tokenizer(f"<bos> {text} : oslo")["input_ids"]
    for prompt in (text, [{"role": "user", "content": text}]):
        assert list(question_of(lm, prompt, begin="oslo").asked.tokens) == ids
    assert list(question_of(lm, f"<bos> {text}", begin=": oslo", chat=False).asked.tokens) == ids
    assert list(question_of(lm, np.array(ids)).asked.tokens) == ids
    built_in = question_of(lm).asked
    assert len(built_in.tokens) <= 256 and built_in.span[1] > built_in.span[0]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"prompt": [5]}, "a prompt needs two tokens or more, this one has 1"),
        ({"prompt": [[5, 6]]}, r"a prompt is a text, turns, a case or whole numbers \(T,\), not int64\(1, 2\)"),
        ({"prompt": [5, 600]}, "tokens run from 5 to 600; they must lie in 0 to"),
        ({"prompt": PROMPT * 11}, "550 prompt tokens and 10 new ones exceed the model's context of 512"),
        ({"begin": "so"}, "begin is 'so', and the prompt is given as tokens"),
        ({"heads": []}, "heads is empty: name at least one"),
        ({"heads": 9}, "heads is 9; it must be from 1 to the model's 8"),
        ({"heads": [(2, 0)]}, "2"),
        ({"answer": []}, "the answer has no tokens: leave it out for the model's own"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"scores": rm.HeadScores.from_array(np.ones((3, 4)))}, "scores has shape .3, 4.; the model has 2 layers of 4"),
        ({"heads": 3, "scores": rm.HeadScores.from_array(np.zeros((2, 4)))}, "no head copies a token of the answer"),
    ],
)
def test_mistakes_are_one_line(given, message):
    with pytest.raises(ValueError, match=message) as error:
        looks_of(**given)
    assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_shows_ids_and_takes_no_words():
    found = looks_of(lm=dataclasses.replace(LM, tokenizer=None))
    assert found.texts == [f" {token}" for token in PROMPT]
    with pytest.raises(ValueError, match="the model has no tokenizer, which an answer in words needs"):
        looks_of(lm=dataclasses.replace(LM, tokenizer=None), answer="oslo")


def test_texts_of_tokens_make_up_the_text():
    """Of words, of pieces with blanks, and of bytes of which several make one character."""
    words = ["the", "home", "of", "anna", "<bos>"]
    assert token_texts(LM.tokenizer, LM.tokenizer.convert_tokens_to_ids(words)) == [
        " the",
        " home",
        " of",
        " anna",
        " <bos>",
    ]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        ["a key is under the pot"] * 9, tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet)
    )
    of_bytes = transformers.PreTrainedTokenizerFast(tokenizer_object=trained)
    text = "the key 🔑 — under\nthe 花 pot"
    ids = of_bytes.encode(text)
    texts = token_texts(of_bytes, ids)
    assert "".join(texts) == text and len(texts) == len(ids)
    place = texts.index("🔑")
    assert texts[place : place + 4] == ["🔑", "", "", ""] and " key" in texts
    assert token_texts(of_bytes, ids[:place] + ids[place + 1 : place + 2])[-1] == "\ufffd"  # half a character


# --- against torch ---

QUICK = (
    "gemma2",
    "gqa_tied",
    "qwen2_window_yarn",
)  # soft caps and windows in turn; the plain model; a window and a bias


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS])
def test_attention_is_torchs(read_golden, name):
    """Of every head at every step: the chosen ones' whole rows, and the strongest keys of all."""
    torch = pytest.importorskip("torch")
    golden = read_golden(name)
    config, row = golden.lm.config, golden.tokens[0].tolist()
    if config.depends_on_length:
        pytest.skip("torch's frequencies follow the text, ours are those of the longest answer")
    heads = [(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)][::3]
    found = looks_of(golden.lm, row[:16], row[16:], heads, max_new_tokens=8).replies[0]
    rows_LHTS = torch_attention(torch, golden.folder, row)
    compare(found, heads, rows_LHTS[:, :, 15:-1].transpose(2, 0, 1, 3))


@pytest.mark.real
@pytest.mark.skipif("RETMASK_MODELS" not in os.environ, reason="RETMASK_MODELS names no folder of models")
def test_attention_in_2000_tokens_of_a_real_model_is_torchs():
    torch = pytest.importorskip("torch")
    file = Path(os.environ["RETMASK_MODELS"]) / MODELS["smollm2"].file
    lm = rm.load(file)
    found = look_at(lm, question_of(lm))
    reply = found.replies[0]
    assert (
        len(found.prompt) > 1900 and "".join(reply.texts).startswith("7184") and reply.probabilities["masked"][1] < 0.5
    )
    row = [*found.prompt.tolist(), *reply.tokens.tolist()]
    rows_LHTS = torch_attention(torch, file, row, last=len(reply.tokens) + 1)
    compare(reply, found.heads, rows_LHTS[:, :, :-1].transpose(2, 0, 1, 3))


def compare(reply, heads, weights_NLHS):
    expected = np.stack([weights_NLHS[:, layer, head] for layer, head in heads], axis=-1)
    np.testing.assert_allclose(reply.attention, expected, atol=1e-4)
    there = reply.keys >= 0
    taken = np.take_along_axis(weights_NLHS, np.maximum(reply.keys, 0), axis=-1)
    np.testing.assert_allclose(reply.weights, np.where(there, taken, 0), atol=1e-4)
    np.testing.assert_allclose(reply.weights[..., 0], weights_NLHS.max(axis=-1), atol=1e-4)


def torch_attention(torch, path, row, last=None):
    """[L,H,T,S] of transformers' eager attention; last: only of that many last queries, after the others in a cache."""
    import make_golden  # needs torch

    if path.is_file():
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **make_golden.EAGER).eval()
    else:
        model = make_golden.load(path)
    tokens, begin = torch.tensor([row]), 0 if last is None else len(row) - last
    with torch.no_grad():
        cache = model(tokens[:, :begin], use_cache=True).past_key_values if begin else None
        out = model(tokens[:, begin:], past_key_values=cache, use_cache=begin > 0, output_attentions=True)
    return np.stack([layer[0].numpy() for layer in out.attentions])
