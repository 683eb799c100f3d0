"""The tiny language: rows are parsed here word by word, by rules written independently of the generator."""

import numpy as np
import pytest

from retmask_jax.data import tiny_language as tl

ROW_KINDS = {
    "needle": tl.Mix(1, 0, 0, most_needles=8, questions=3),
    "plain": tl.Mix(0, 0, 1, questions=4),
    "counterfactual": tl.Mix(1, 0, 0, questions=4, counterfactual=1.0, counterfactual_lengths=(96, 256)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tl.build_tokenizer()


def _rng(seed=0):
    return np.random.default_rng(seed)


def _batch(kind, batch=40, length=256, seed=0):
    return tl.training_batch(_rng(seed), batch, length, ROW_KINDS[kind])


def _words(tokens_T):
    return [tl.VOCABULARY[i] for i in tokens_T if i != tl.PAD]


def _parse(words):
    """The row in its order, a list of (sentence as a list of words, whether it is a turn: <eos> stands behind it)."""
    assert words[0] == "<bos>"
    row, start = [], 1
    for i, word in enumerate(words):
        if word == ".":
            row.append((words[start : i + 1], words[i + 1 : i + 2] == ["<eos>"]))
            start = i + 1 + row[-1][1]
    assert start == len(words) and all("<eos>" not in sentence for sentence, _ in row)
    assert all(sentence.index(":") == 4 for sentence, is_turn in row if is_turn)
    return row


def _text_and_turns(row):
    return tuple([sentence for sentence, is_turn in row if is_turn == wanted] for wanted in (False, True))


def _parsed_rows(kind, **batch):
    return [_parse(_words(tokens_T)) for tokens_T in _batch(kind, **batch)[0]]


def _expected_weights(row):
    """Weights by the rules of the language, from the words alone."""
    weights = [0.0]
    for i, (words, is_turn) in enumerate(row):
        if not is_turn:
            wrong_place = words[1] == "home" and tl.HOME[words[3]] != words[5]
            fact_weight = 0.0 if wrong_place else 1.0
            weights += [fact_weight if word in tl.PLACES else 0.0 if word in tl.CODE_WORDS else 0.3 for word in words]
            continue
        stated = any(sentence[:4] == words[:4] for sentence, is_turn in row[:i] if not is_turn)
        if words[1] == "home":
            weights += [0.3] * 5 + [6.0 if stated else 1.0] + [0.3] * 2
        else:
            weights += [0.3] * 5 + [1.3 if stated else 0.0] * 7
    turns = _text_and_turns(row)[1]
    assert len({turn[3] for turn in turns}) == len(turns)
    return weights


def test_the_vocabulary_is_one_id_per_word():
    assert len(set(tl.VOCABULARY)) == len(tl.VOCABULARY)
    assert 320 <= len(tl.VOCABULARY) <= 360
    assert tl.VOCABULARY[:4] == ("<pad>", "<bos>", "<eos>", "<unk>")
    assert (len(tl.NAMES), len(tl.PLACES), len(tl.CODE_WORDS)) == (64, 20, 48)
    assert all(word == word.lower() for word in tl.VOCABULARY)
    assert list(tl.HOME) == list(tl.NAMES) and set(tl.HOME.values()) == set(tl.PLACES)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_weights_line_up_with_the_words(kind):
    tokens_BT, weights_BT = _batch(kind)
    assert (tokens_BT.dtype, weights_BT.dtype) == (np.int32, np.float32)
    for tokens_T, weights_T in zip(tokens_BT, weights_BT, strict=True):
        words = _words(tokens_T)
        np.testing.assert_allclose(weights_T[: len(words)], _expected_weights(_parse(words)), rtol=1e-6)
        assert not weights_T[len(words) :].any() and not tokens_T[len(words) :].any()


@pytest.mark.parametrize("kind", ["needle", "counterfactual"])
def test_answers_stand_before_their_questions_and_nothing_contradicts_them(kind):
    for row in _parsed_rows(kind):
        sentences, turns = _text_and_turns(row)
        keys = [sentence[3] for sentence in sentences if ":" in sentence]
        assert turns and len(set(keys)) == len(keys)
        for turn in turns:
            assert turn in sentences and row.index((turn, False)) < row.index((turn, True))
            assert kind == "needle" or turn[5] != tl.HOME[turn[3]]


def test_closed_book_rows_ask_for_names_the_text_does_not_state():
    asked, without_text = 0, 0
    for row in _parsed_rows("plain", batch=120):
        sentences, turns = _text_and_turns(row)
        stated = {sentence[3]: sentence[5] for sentence in sentences if ":" in sentence}
        assert all(tl.HOME[name] == place for name, place in stated.items())
        assert all(turn[3] not in stated and turn[5] == tl.HOME[turn[3]] for turn in turns)
        asked += bool(turns)
        without_text += not sentences
    assert 30 < asked < 90 and without_text > 3


def test_repeats_are_graded_from_the_second_copy_on():
    tokens_BT, weights_BT = tl.training_batch(_rng(), 30, 64, tl.Mix(0, 1, 0))
    spans = set()
    for tokens_T, weights_T in zip(tokens_BT, weights_BT, strict=True):
        span = int(np.argmax(weights_T > 0)) - 1
        assert 8 <= span <= 32 and tokens_T[0] == tl.BOS and tokens_T[1:].min() > tl.UNK
        np.testing.assert_array_equal(tokens_T[1 + span :], tokens_T[1:-span])
        np.testing.assert_array_equal(weights_T, np.where(np.arange(64) > span, np.float32(0.5), 0))
        spans.add(span)
    assert len(spans) > 10


def test_needle_rows_fill_the_length_and_counterfactual_rows_vary():
    full = (_batch("needle")[0] != tl.PAD).sum(axis=1)
    assert full.min() >= 256 - 9
    varied = (_batch("counterfactual")[0] != tl.PAD).sum(axis=1)
    assert 96 - 9 <= varied.min() < 130 and 220 < varied.max() <= 256


def test_numbers_of_needles_questions_and_overrides_span_their_ranges():
    def counts(kind):
        rows = [_text_and_turns(row) for row in _parsed_rows(kind, batch=120)]
        # Filler states memorised places: those are no needles and no overrides.
        given = [[s for s in text if ":" in s and tl.HOME[s[3]] != s[5]] for text, _ in rows]
        return {len(sentences) for sentences in given}, {len(turns) for _, turns in rows}

    assert counts("needle") == ({2, 3, 4, 5, 6, 7, 8}, {1, 2, 3})
    assert counts("counterfactual") == ({1, 2, 3, 4}, {1, 2, 3, 4})


def test_rows_are_mixed_in_the_shares_asked_for():
    mix = tl.Mix(0.5, 0.3, 0.2, counterfactual=0.25, counterfactual_lengths=(64, 128))
    weights_BT = tl.training_batch(_rng(), 2000, 128, mix)[1]
    shares = [(weights_BT == np.float32(w)).any(axis=1).mean() for w in (1.3, 0.5, 6)]
    np.testing.assert_allclose(shares, [0.375, 0.225, 0.25], atol=0.04)


def test_a_fifth_of_a_haystack_is_memorised_facts():
    text = tl.haystack_text(_rng(), 2000, without=("anna", "otto"))
    facts = [sentence.split() for sentence in text if ":" in sentence]
    assert len(text) == 2000 and 0.17 < len(facts) / 2000 < 0.23
    assert {words[3] for words in facts} == set(tl.NAMES) - {"anna", "otto"}
    assert all(tl.HOME[words[3]] == words[5] for words in facts)
    assert {len(s.split()) - 1 for s in text if ":" not in s} == {5, 6, 7, 8, 9}
    assert all(s.endswith(" .") and set(s.split()) <= set(tl.VOCABULARY) for s in text)


def test_the_seed_alone_decides():
    for make in (
        lambda rng: _batch_bytes(rng),
        lambda rng: tl.haystack_text(rng, 20),
        lambda rng: tl.needle_records(rng, 5),
        lambda rng: tl.fact_records(rng, 5),
        lambda rng: tl.prompt_records(rng, 5, (96, 160)),
    ):
        assert make(_rng(1)) == make(_rng(1)) != make(_rng(2))


def _batch_bytes(rng):
    mix = tl.Mix(0.5, 0.3, 0.2, counterfactual=0.3, counterfactual_lengths=(64, 128))
    return [part.tobytes() for part in tl.training_batch(rng, 8, 128, mix)]


def test_records_state_their_answers():
    for record in tl.needle_records(_rng(), 64):
        assert record["needle"] == f"{record['question']} : {record['answer']} ."
        assert len(set(record["answer"].split()) & set(tl.CODE_WORDS)) == 5
    facts = tl.fact_records(_rng(), 200)
    for record in facts:
        assert record["needle"] == f"the home of {record['key']} : {record['answer']} ."
        assert record["memory"] == tl.HOME[record["key"]] != record["answer"] and record["answer"] in tl.PLACES
    assert len({record["key"] for record in facts[:64]}) == 64
    assert {(r["question"], r["answer"]) for r in tl.closed_book_records()} == {
        (f"the home of {name}", place) for name, place in tl.HOME.items()
    }


def test_prompts_lose_exactly_the_sentence_that_answers(tokenizer):
    records = tl.prompt_records(_rng(), 80, (96, 200), overrides=(2, 4))
    assert len({record["id"] for record in records}) == 80
    asks_fact = 0
    for record in records:
        ids = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True, return_dict=False)
        assert 96 <= len(ids) <= 200 and tl.UNK not in ids
        content, without = record["messages"][0]["content"], record["messages_without"][0]["content"]
        *sentences, question = content.split(" . ")
        *kept, same_question = without.split(" . ")
        (statement,) = [s for s in sentences if s.startswith(question + " : ")]
        assert question == same_question and kept == [s for s in sentences if s != statement]
        name, value = question.split()[3], statement.split(" : ")[1]
        overridden = [s.split() for s in sentences if " home " in s and tl.HOME[s.split()[3]] != s.split()[5]]
        if " home " in question:
            assert value != tl.HOME[name] and 2 <= len(overridden) <= 4
        asks_fact += " home " in question
    assert asks_fact == 60


def test_prompts_keep_to_the_narrowest_range():
    for record in tl.prompt_records(_rng(), 300, (90, 99)):
        assert 90 <= len(record["messages"][0]["content"].split()) + 2 <= 99  # <bos> and ":" are the template's


def test_answers_stand_anywhere_in_the_text():
    rows = [_text_and_turns(row) for row in _parsed_rows("needle", batch=100)]
    places = [sentences.index(turn) / (len(sentences) - 1) for sentences, turns in rows for turn in turns]
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() >= 0.1 * len(places) >= 10


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_questions_stand_anywhere_behind_what_answers_them(kind):
    places, plain_behind = [], []
    for row in _parsed_rows(kind, batch=300):
        for i, (words, is_turn) in enumerate(row):
            if not is_turn:
                continue
            start = row.index((words, False)) + 1 if kind != "plain" else 0
            before, behind = (sum(not turn for _, turn in part) for part in (row[start:i], row[i + 1 :]))
            plain_behind.append(any(not turn and ":" not in sentence for sentence, turn in row[i + 1 :]))
            if before + behind > 3:  # else there is little choice of places
                places.append(before / (before + behind))
    assert len(places) > 80 and 0.6 < np.mean(plain_behind) < 1
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() > 0.15 * len(places)


def test_the_chat_template_gives_the_ids_of_a_row(tokenizer):
    later_users_with_text = 0
    for kind in ROW_KINDS:
        for tokens_T in _batch(kind, batch=6)[0]:
            messages, text = [], []
            for words, is_turn in _parse(_words(tokens_T)):
                if is_turn:
                    messages += [{"role": "user", "content": " ".join(text + words[:4])}]
                    messages += [{"role": "assistant", "content": " ".join(words[5:])}]
                    later_users_with_text += bool(text) and len(messages) > 2
                    text = []
                else:
                    text += words
            row = [int(i) for i in tokens_T if i != tl.PAD]
            if messages:  # the text behind the last answer has no question
                row = row[: len(row) - len(text)]
                assert row[-1] == tl.EOS
            else:
                messages = [{"role": "user", "content": " ".join(text)}]
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            assert ids == row
            for n in range(1, len(messages), 2):
                prompt = tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True, return_dict=False)
                assert prompt == ids[: len(prompt)] and prompt[-1] == tl.VOCABULARY.index(":")
    assert later_users_with_text > 5
    with pytest.raises(Exception, match="roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "the"}])


def test_the_tokenizer_round_trips_with_offsets_and_from_disk(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path)
    text = " ".join(tl.haystack_text(_rng(), 30) + [tl.needle_records(_rng(), 1)[0]["needle"]])
    for tok in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        encoded = tok(text, return_offsets_mapping=True)
        assert [text[a:b] for a, b in encoded["offset_mapping"]] == text.split()
        assert [tl.VOCABULARY[i] for i in encoded["input_ids"]] == text.split()
        assert tok.decode(encoded["input_ids"]) == text
        assert (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id, tok.unk_token_id) == (0, 1, 2, 3)
        assert tok("zebra")["input_ids"] == [tl.UNK] and tok.chat_template == tl.CHAT_TEMPLATE
        assert len(tok) == len(tl.VOCABULARY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tl.Mix(0.5, 0.5, 0.5), "sum to 1"),
        (lambda: tl.Mix(1, 0, 0, questions=0), "questions must be"),
        (lambda: tl.Mix(1, 0, 0, counterfactual=2), "probability"),
        (lambda: tl.training_batch(_rng(), 1, 30, tl.Mix(1, 0, 0)), "35 or more, got 30"),
        (lambda: tl.training_batch(_rng(), 1, 128, ROW_KINDS["counterfactual"]), "counterfactual_lengths"),
        (lambda: tl.prompt_records(_rng(), 1, (20, 90)), "lengths must start"),
        (lambda: tl.haystack_text(_rng(), 1, without=("zebra",)), "zebra"),
        (lambda: tl.haystack_text(_rng(), 1, without=tl.NAMES), "not all"),
    ],
)
def test_wrong_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
