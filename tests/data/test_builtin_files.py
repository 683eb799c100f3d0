"""The texts of the package: what their records promise, and how a config names them."""

import re
from types import SimpleNamespace

import pytest

from retmask_jax.data.answers import holds, words
from retmask_jax.data.builtin_files import haystack, path_of
from retmask_jax.data.needles import read_needles, read_sentences
from retmask_jax.data.prompts import read_prompts
from retmask_jax.data.tasks import task_cases

COMMON = set(
    "a about after again all already also an and any are as at be been before by did do does every for from had has have "
    "her him his how in into is it its itself just likely most my next no not of off on one or out over own she so some than "
    "that the their them then there they this to too up was we were what when where which while who whom whose why will with "
    "within would he him i us our still always never once only".split()
)


def needles(name):
    return read_needles(path_of(f"builtin:{name}"))


def stems(text):
    return {re.sub(r"(ing|ed|es|s|ly)$", "", word)[:5] for word in words(text) if word not in COMMON}


def test_an_unknown_built_in_text_is_refused_by_name():
    with pytest.raises(ValueError, match="no built-in text 'builtin:poems'; there are builtin:essays, builtin:needles"):
        path_of("builtin:poems")


def test_names_of_files_and_of_the_tiny_models_data_stay_paths():
    assert str(path_of("data/x.txt")) == "data/x.txt" and path_of("bundled/test_text.txt").is_file()


def test_essays_are_long_and_repeat_no_sentence():
    sentences = read_sentences(path_of("builtin:essays"))
    assert sum(len(sentence.split()) for sentence in sentences) >= 15_000
    assert len({*sentences}) == len(sentences)
    assert all(sentence.isascii() and sentence[-1] in ".!?" for sentence in sentences)


def test_the_sentences_without_end_are_enough_for_any_length():
    few, many = (haystack("builtin:sentences", (length,)) for length in (1000, 100_000))
    assert many[: len(few)] == few and len({*many}) == len(many)
    assert sum(len(sentence.split()) for sentence in many) > 100_000 / 1.5  # a word is hardly more than 1.5 tokens


@pytest.mark.parametrize(("name", "least"), [("needles", 24), ("codes", 40), ("facts", 60), ("indirect", 24)])
def test_every_statement_has_its_answer_once_and_differs_from_the_others(name, least):
    records = needles(name)
    assert len(records) >= least
    for field in ("needle", "question", "answer"):
        assert len({getattr(record, field) for record in records}) == len(records)
    essays = path_of("builtin:essays").read_text().lower()
    for record in records:
        assert record.needle.count(record.answer) == 1 and not holds(record.question, record.answer)
        assert not holds(record.beginning, record.answer)
        if name != "facts":  # whose answers are words that any text may have
            assert record.answer.lower() not in essays
        assert record.key in record.needle


def test_statements_of_needles_are_as_long_as_the_papers():
    assert all(15 <= len(record.needle.split()) <= 40 for record in needles("needles"))


def test_a_fact_is_stated_wrongly_and_asked_for_from_memory():
    for fact, asked in zip(needles("facts"), needles("closed_book"), strict=True):
        assert fact.needle == f"{fact.prefix} {fact.answer}."
        assert (asked.question, asked.answer, asked.prefix) == (fact.question, fact.memory, fact.prefix)
        assert not holds(fact.memory, fact.answer) and not holds(fact.answer, fact.memory)


def test_an_indirect_question_shares_no_word_with_its_statement():
    for record in needles("indirect"):
        assert not stems(record.needle) & stems(f"{record.question} {record.prefix}"), record


def test_prompts_are_read_as_a_users_own():
    read = read_prompts("builtin:prompts", resolve=path_of)
    assert len(read.records) == 1200 and sum("messages_without" in record for record in read.records) == 600


class Words:
    """A tokenizer of words and blanks, which makes the blank before a number a token, as some models' do."""

    is_fast, chat_template, unk_token_id = True, None, None

    def __call__(self, text, return_offsets_mapping=False, **_):
        spans = [match.span() for match in re.finditer(r" (?=\d)|\d| ?[^\s\d]+|\s+", text)]
        return {"input_ids": [hash(text[a:b]) for a, b in spans], "offset_mapping": spans}

    @property
    def backend_tokenizer(self):
        def batch(texts, **_):
            return [self(text)["input_ids"] for text in texts]

        return SimpleNamespace(no_truncation=lambda: None, no_padding=lambda: None, encode_batch_fast=batch)


def test_a_begun_reply_ends_where_the_answers_first_token_begins():
    from retmask_jax.data.prompter import make_prompter

    prompter = make_prompter(Words(), chat=None, template_kwargs={})
    task = {"lengths": (90,), "depths": (0.5,), "per_length": 3, "distractors": 0, "seed": 0}
    task |= {"haystack": "builtin:essays", "shuffle": True, "at_start": False}

    def last(name, n, **changes):
        cases = task_cases(prompter, SimpleNamespace(needles=f"builtin:{name}", **task | changes))
        assert all(len(case.tokens) <= 90 for case in cases)
        return [case.tokens[-n:] for case in cases], cases

    blank = hash(" ")
    ends, cases = last("codes", 1, prefix=True)
    assert ends == [(blank,)] * 3  # the blank before the code, which is no token of the answer
    assert [case.tokens[slice(*case.span)] for case in cases] == [tuple(map(hash, c.needle.answer)) for c in cases]
    ends, cases = last("needles", 1, prefix=True)
    assert ends == [(hash(f" {case.needle.beginning.split()[-1]}"),) for case in cases]
    assert not {blank, *(end for (end,) in ends)} & {end for (end,) in last("codes", 1, prefix=False)[0]}
    bare = task_cases(prompter, SimpleNamespace(needles="builtin:closed_book", lengths=(), prefix=True))
    assert bare[0].tokens[-1] == hash(" is")


def test_both_ways_to_ask_a_model_use_the_same_templates():
    from retmask_jax.configs import default

    from retmask_jax.data.prompter import CHAT, PLAIN

    prompt = default.get_config().prompt
    assert (prompt.template, prompt.plain_template) == (CHAT, PLAIN)
