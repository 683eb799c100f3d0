"""Needle cases: spans, depths and lengths, each checked by a search written independently of the builder."""

import dataclasses
import json
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.needles import (
    Needle,
    Spec,
    answer_span,
    build_cases,
    draw_specs,
    question_case,
    read_needles,
    read_sentences,
)
from retmask_jax.data.prompter import Prompter

PUBLISHED = os.environ.get("RETMASK_PUBLISHED")
needs_published = pytest.mark.skipif(not PUBLISHED, reason="RETMASK_PUBLISHED is not set")

NEEDLES = [
    Needle(
        "The best thing to do in Oslo is to see the White Ship.", "What is best in Oslo?", "see the white ship", "Oslo"
    ),
    Needle("The secret word of Anna is maple-umbrella 7.", "What is the word of Anna?", "maple-umbrella 7", "Anna"),
    Needle(
        "The duke of Rome hides gold, silver and a lamp.", "What does Rome hide?", "gold, silver and a lamp", "Rome"
    ),
]
WITHOUT_KEYS = [dataclasses.replace(needle, key=None) for needle in NEEDLES]


def _sentences(n=300):
    """Sentences of prose, every tenth about one of the needles' keys."""
    sentences = tl.haystack_text(np.random.default_rng(0), n)
    keys = [needle.key for needle in NEEDLES]
    plain = [s.capitalize().replace(" .", ".") for s in sentences]
    return [f"In {keys[i % 3]}, {s}" if i % 10 == 0 else s for i, s in enumerate(plain)]


SENTENCES = _sentences()


def _byte_pairs(vocab_size, template="{{ bos_token }}USER: {{ messages[0]['content'] }}\nBOT:", normalizer=None):
    """A byte-level BPE tokenizer trained on the haystack; like its template, it begins a text with <s>."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.normalizer = normalizer
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>"], initial_alphabet=alphabet)
    model.train_from_iterator(SENTENCES, trainer)
    model.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=True),
            tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", chat_template=template)


@pytest.fixture(scope="module")
def large():
    return Prompter(_byte_pairs(600), "{context}\n\n{question}")


@pytest.fixture(scope="module")
def small():
    return Prompter(_byte_pairs(280), "{context}\n\n{question}")


def _text(prompter, case):
    return prompter.tokenizer.decode(case.tokens)


def _hay(prompter, case):
    """The sentences of a prompt of `large` or `small`, in order, the needle among them."""
    context = _text(prompter, case).split("USER: ")[1].split("\n\n")[0]
    return [s if s.endswith(".") else s + "." for s in context.split(". ")]


def _grid(lengths, depths, **options):
    return draw_specs(NEEDLES, lengths, depths, per_length=None, **options)


# --- spans ---


def _is_tightest(tokenizer, case):
    """The span's text holds the answer, and loses it without its first or its last token."""
    start, end = case.span
    pieces = [tokenizer.decode(case.tokens[a:b]).lower() for a, b in ((start, end), (start + 1, end), (start, end - 1))]
    return [case.needle.answer.lower() in piece for piece in pieces] == [True, False, False]


def test_span_is_exactly_the_answer_part(large, small):
    for prompter in (large, small):
        cases = build_cases(prompter, SENTENCES, NEEDLES, _grid([400, 700], [0.0, 0.3, 1.0], distractors=2))
        assert all(_is_tightest(prompter.tokenizer, case) for case in cases)
        assert len({case.span for case in cases}) > 6  # many places, not one


@pytest.mark.parametrize("prompt", ["{context}\n\n{question}", "{question}\n\n{context}"])
def test_statement_and_question_are_found_where_they_stand(large, small, prompt):
    """Also where a sentence of the haystack is the question itself."""
    sentences = [*SENTENCES[:10], NEEDLES[1].question, *SENTENCES[10:]]
    for prompter in (dataclasses.replace(one, prompt=prompt) for one in (large, small)):
        for case in build_cases(prompter, sentences, NEEDLES, _grid([400], [0.0, 0.5]), shuffle=False):
            statement, question = (
                prompter.tokenizer.decode(case.tokens[slice(*span)]) for span in (case.statement, case.question)
            )
            assert case.needle.needle in statement and len(statement) < len(case.needle.needle) + 3
            assert case.needle.question in question and len(question) < len(case.needle.question) + 3
            assert case.statement[0] <= case.span[0] and case.span[1] <= case.statement[1]
            ends = case.question[1] >= len(case.tokens) - 6, case.question[0] <= 10
            assert ends == (prompt.startswith("{context}"), prompt.startswith("{question}"))


def test_a_question_that_a_template_changes_has_no_span():
    tokenizer = _byte_pairs(300, "{{ messages[0]['content'] | upper }}")
    assert question_case(Prompter(tokenizer), NEEDLES[0]).question == (0, 0)


def test_span_of_whole_word_tokens_equals_a_search_for_the_ids():
    """Distractors hold the same words, so only the place inside the right sentence will do."""
    rng = np.random.default_rng(1)
    needles = [Needle(**record) for record in tl.needle_records(rng, 8)]
    prompter = Prompter(tl.build_tokenizer())
    specs = draw_specs(needles, [200], [0.2, 0.8], per_length=8, distractors=4)
    for case in build_cases(prompter, tl.haystack_text(rng, 60), needles, specs):
        sentence = [tl.VOCABULARY.index(word) for word in case.needle.needle.split()]
        tokens = list(case.tokens)
        found = [i for i in range(len(tokens)) if tokens[i : i + len(sentence)] == sentence]
        assert [(i + 5, i + 10) for i in found] == [case.span]
        assert [tl.VOCABULARY[i] for i in tokens[slice(*case.span)]] == case.needle.answer.split()


def test_answer_part_is_found_whatever_its_case(large):
    answers = "see the white ship", "See the White Ship", "SEE THE WHITE SHIP"
    cases = [
        build_cases(large, SENTENCES, [dataclasses.replace(NEEDLES[0], answer=answer)], [Spec(300, 0.5, 0, (), 3)])[0]
        for answer in answers
    ]
    assert {case.span for case in cases} == {cases[0].span}
    assert large.tokenizer.decode(cases[0].tokens[slice(*cases[0].span)]).strip(" .") == "see the White Ship"


def test_span_behind_letters_that_grow_in_lower_case():
    """Lower-case 'İ' is two characters long."""
    text = "İzmir, İstanbul: is it oak or Ash then"
    start, end = answer_span(text, [(i, i + 1) for i in range(len(text))], Needle("OAK or ash", "which", "ash"))
    assert text[start:end] == "Ash"


def test_absent_or_ambiguous_answer_raises():
    needle = Needle("oak or ash", "which", "oak")
    offsets = [(i, i + 1) for i in range(40)]
    assert answer_span("is it oak or ash then", offsets, needle) == (6, 9)
    for text, changed, words in (
        ("is it oak or elm then", {}, "needle 'oak or ash' occurs 0 times"),
        ("oak or ash, oak or ash", {}, "needle 'oak or ash' occurs 2 times"),
        ("is it oak or ash then", {"answer": "elm"}, "answer part 'elm' occurs 0 times"),
        ("oak or oak", {"needle": "oak or oak"}, "answer part 'oak' occurs 2 times"),
        ("is it oak or ash then", {"answer": ""}, "answer part '' occurs"),
    ):
        with pytest.raises(ValueError, match=words):
            answer_span(text, offsets, dataclasses.replace(needle, **changed))


def test_a_text_is_not_built_around_a_question_without_a_statement(large):
    with pytest.raises(
        ValueError, match=re.escape("'Where?' has no needle, the statement that a text is to hold: give")
    ):
        build_cases(large, SENTENCES, [Needle("", "Where?", "rome")], [Spec(300, 0.5, 0, (), 3)])


def test_counted_tokens_are_those_of_the_encoding(large):
    """Also where the tokenizer's file asks for truncation."""
    text = " ".join(SENTENCES[:40])
    for prompter in (large, dataclasses.replace(large, chat=False)):
        prompter.tokenizer.backend_tokenizer.enable_truncation(10)
        assert prompter.count(text) == len(prompter.encode(text)[0]) > 100


# --- depth, length and what stands in the haystack ---


def _place(prompter, case):
    """(sentences before the needle, sentences in all besides it)."""
    hay = _hay(prompter, case)
    return hay.index(case.needle.needle), len(hay) - 1


def test_needle_stands_at_its_depth(large):
    for case in build_cases(large, SENTENCES, NEEDLES, _grid([350, 800], [0.0, 0.25, 0.5, 1.0])):
        before, others = _place(large, case)
        assert others >= 8
        assert abs(before - case.spec.depth * others) <= 0.5


def test_released_form_places_all_but_the_last_depth_at_the_start(large):
    cases = build_cases(large, SENTENCES, NEEDLES, _grid([400], [0.0, 0.5, 0.9, 1.0]), at_start=True)
    for case in cases:
        before, others = _place(large, case)
        assert before == (others if case.spec.depth == 1 else 0)


@pytest.mark.parametrize("distractors", [0, 2])
def test_prompts_fill_their_length_to_within_a_sentence(large, small, distractors):
    for prompter in (large, small):
        longest = max(len(prompter.tokenizer(s)["input_ids"]) for s in SENTENCES)
        cases = build_cases(
            prompter, SENTENCES, NEEDLES, _grid([300, 301, 302, 450, 900], [0.5], distractors=distractors)
        )
        missing = [case.spec.length - len(case.tokens) for case in cases]
        assert min(missing) >= 0
        assert max(missing) < longest
        assert len(set(missing)) > 1


def test_prompts_stay_within_their_length_where_joining_costs_tokens():
    """A tokenizer that strips its text: the space between sentences, a token of its own, shows in no single sentence."""
    prompter = Prompter(_byte_pairs(257, normalizer=tokenizers.normalizers.Strip()), "{context}\n\n{question}")
    longest = max(map(len, SENTENCES)) + 1
    for case in build_cases(prompter, SENTENCES, NEEDLES, _grid([1500, 2501], [0.5])):
        assert 0 <= case.spec.length - len(case.tokens) < longest
        assert _is_tightest(prompter.tokenizer, case)


def test_prompts_fill_their_length_where_joining_saves_tokens():
    """A tokenizer that puts a space before its text, as Llama-2's: a sentence costs a token more alone than in a text."""
    space = tokenizers.normalizers.Prepend(" ")
    prompter = Prompter(_byte_pairs(600, normalizer=space), "{context}\n\n{question}")
    assert len(prompter.tokenizer("  The")["input_ids"]) > len(prompter.tokenizer(" The")["input_ids"])
    longest = max(len(prompter.tokenizer(s)["input_ids"]) for s in SENTENCES)
    for case in build_cases(prompter, SENTENCES, NEEDLES, _grid([900, 1802], [0.5])):
        assert 0 <= case.spec.length - len(case.tokens) < longest


def test_text_order_is_kept_unless_shuffled(large):
    specs = _grid([500], [0.5])
    kept = [s for s in SENTENCES if "Oslo" not in s]
    hay = [s for s in _hay(large, build_cases(large, SENTENCES, NEEDLES, specs, shuffle=False)[0])]
    hay.remove(NEEDLES[0].needle)
    assert hay == kept[: len(hay)]
    shuffled = _hay(large, build_cases(large, SENTENCES, NEEDLES, specs)[0])
    shuffled.remove(NEEDLES[0].needle)
    assert shuffled != kept[: len(shuffled)]
    assert set(shuffled) <= set(kept)


def test_sentences_about_the_keys_are_left_out(large):
    cases = build_cases(large, SENTENCES, NEEDLES, _grid([1500], [0.5], distractors=1))
    for case in cases:
        keys = [NEEDLES[i].key for i in (case.spec.needle, *case.spec.distractors)]
        hay = _hay(large, case)
        stated = [s for s in hay if any(key in s for key in keys)]
        assert sorted(stated) == sorted(NEEDLES[i].needle for i in (case.spec.needle, *case.spec.distractors))
        (other,) = {needle.key for needle in NEEDLES} - set(keys)
        assert any(other in s for s in hay)  # what nobody asks about may be mentioned


def test_without_keys_the_whole_haystack_is_used(large):
    specs = draw_specs(WITHOUT_KEYS, [1500], [0.5], per_length=None)
    for case in build_cases(large, SENTENCES, WITHOUT_KEYS, specs):
        assert {key for key in ("Oslo", "Anna", "Rome") for s in _hay(large, case) if f"In {key}," in s} >= {
            "Oslo",
            "Anna",
        }


def test_distractors_stand_in_the_haystack_and_have_other_keys(large):
    twins = [*NEEDLES, dataclasses.replace(NEEDLES[0], needle="The second thing in Oslo is to see the white ship.")]
    specs = draw_specs(twins, [400], [0.5], per_length=8, distractors=2)
    places = set()
    for case in build_cases(large, SENTENCES, twins, specs):
        keys = [twins[i].key for i in (case.spec.needle, *case.spec.distractors)]
        assert len(set(keys)) == 3
        hay = _hay(large, case)
        assert [hay.count(twins[i].needle) for i in case.spec.distractors] == [1, 1]
        places |= {hay.index(twins[i].needle) / len(hay) for i in case.spec.distractors}
    assert max(places) - min(places) > 0.5  # anywhere, not beside the needle
    with pytest.raises(ValueError, match="3 distractors are wanted, only 2"):
        draw_specs(twins, [400], [0.5], per_length=8, distractors=3)


# --- specs ---


def test_specs_of_the_full_grid_and_of_a_number_per_length():
    grid = draw_specs(NEEDLES, [100, 200], [0.0, 0.5, 1.0], per_length=None)
    cells = sorted((spec.length, spec.depth, spec.needle) for spec in grid)
    assert cells == [(length, depth, i) for length in (100, 200) for depth in (0.0, 0.5, 1.0) for i in range(3)]
    some = draw_specs(NEEDLES, [100, 200], [0.1, 0.9], per_length=6)
    for length in (100, 200):
        here = [spec for spec in some if spec.length == length]
        assert [spec.depth for spec in here] == [0.1, 0.9] * 3
        assert sorted(spec.needle for spec in here) == [0, 0, 1, 1, 2, 2]
    assert len({spec.seed for spec in grid}) == len(grid)


def test_specs_depend_on_the_seed_alone():
    def draw(seed):
        return draw_specs(NEEDLES, [100, 200], [0.1, 0.9], per_length=12, distractors=1, seed=seed)

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_models_with_other_tokenizers_get_the_same_cases(large, small):
    """Where both fit the same sentences the texts are equal; else one haystack is the other's beginning."""
    specs = _grid([700], [1.0], distractors=1)
    for few, many in zip(
        build_cases(small, SENTENCES, NEEDLES, specs), build_cases(large, SENTENCES, NEEDLES, specs), strict=True
    ):
        planted = [NEEDLES[i].needle for i in (few.spec.needle, *few.spec.distractors)]
        few_hay = [s for s in _hay(small, few) if s not in planted]
        many_hay = [s for s in _hay(large, many) if s not in planted]
        assert 3 < len(few_hay) < len(many_hay)
        assert many_hay[: len(few_hay)] == few_hay

    words = tl.build_tokenizer()
    other_ids = json.loads(words.backend_tokenizer.to_str())
    vocabulary = list(other_ids["model"]["vocab"])
    other_ids["model"]["vocab"] = {word: i for i, word in enumerate(vocabulary[:4] + vocabulary[:3:-1])}
    for token in other_ids["added_tokens"]:
        token["id"] = other_ids["model"]["vocab"][token["content"]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(other_ids))
    renumbered = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=words.chat_template, bos_token="<bos>", eos_token="<eos>"
    )
    rng = np.random.default_rng(2)
    needles, sentences = [Needle(**r) for r in tl.needle_records(rng, 6)], tl.haystack_text(rng, 60)
    specs = draw_specs(needles, [150], [0.1, 0.6], per_length=6, distractors=2)
    ours, theirs = (build_cases(Prompter(t), sentences, needles, specs) for t in (words, renumbered))
    assert [words.decode(c.tokens) for c in ours] == [renumbered.decode(c.tokens) for c in theirs]
    assert [c.tokens for c in ours] != [c.tokens for c in theirs]
    assert [c.span for c in ours] == [c.span for c in theirs]


# --- prompts ---


def test_chat_prompts_are_the_tokenizers_own_template(large):
    (case,) = build_cases(large, SENTENCES, NEEDLES[:1], [Spec(200, 0.5, 0, (), 0)])
    content = _text(large, case).split("USER: ")[1].removesuffix("\nBOT:")
    messages = [{"role": "user", "content": content}]
    ids = large.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(case.tokens) == ids
    assert case.tokens.count(large.tokenizer.bos_token_id) == 1
    assert content.endswith(f"\n\n{NEEDLES[0].question}")


def test_template_options_reach_the_template():
    template = "{{ messages[0]['content'] }}{% if enable_thinking %} think{% else %} answer{% endif %}"
    tokenizer = _byte_pairs(300, template)
    texts = [
        Prompter(tokenizer, template_kwargs={"enable_thinking": flag}).render("Some text.", "What?")
        for flag in (True, False)
    ]
    assert texts == ["Some text. What? think", "Some text. What? answer"]


def test_base_models_get_the_bare_text(large):
    prompter = dataclasses.replace(large, chat=False)
    (case,) = build_cases(prompter, SENTENCES, NEEDLES[:1], [Spec(200, 0.0, 0, (), 0)])
    text = _text(prompter, case)
    assert text.startswith("<s>" + NEEDLES[0].needle)
    assert text.endswith(NEEDLES[0].question)
    assert _is_tightest(prompter.tokenizer, case)


def test_closed_book_question_has_no_context(large):
    case = question_case(large, NEEDLES[1])
    assert _text(large, case) == f"<s>USER: {NEEDLES[1].question}\nBOT:"
    assert case.span == case.statement == (0, 0)
    assert large.tokenizer.decode(case.tokens[slice(*case.question)]).strip() == NEEDLES[1].question
    assert case.spec.length == len(case.tokens)


# --- mistakes, each one line ---


def _message(function, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_prompter_mistakes():
    assert "no tokenizer" in _message(Prompter, None)
    assert "character offsets" in _message(Prompter, types.SimpleNamespace(is_fast=False, chat_template="x"))
    bare = tl.build_tokenizer()
    bare.chat_template = None
    assert "no chat template" in _message(Prompter, bare)
    assert Prompter(bare, chat=False).render("a", "b") == "a b"
    for template, there in (
        ("{context}", "{context}"),
        ("x", "none"),
        ("{question} {context.a}", "{context.a}, {question}"),
        ("{context} {question} {0}", "{0}, {context}, {question}"),
    ):
        assert _message(Prompter, bare, template, chat=False).endswith(f"it has {there}")
    assert "is no format string" in _message(Prompter, bare, "{context", chat=False)
    assert Prompter(bare, "{{{question}}} {context}", chat=False).render("a", "b") == "{b} a"


def test_a_chat_template_that_refuses_is_one_line():
    strict = _byte_pairs(300, "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert _message(Prompter(strict).render_messages, messages).endswith("of the roles system, user: no system")


def test_lengths_that_cannot_be_met(large):
    specs = [Spec(20, 0.5, 0, (), 0)]
    assert "of 20 tokens has no room" in _message(build_cases, large, SENTENCES, NEEDLES, specs)
    few = SENTENCES[1:10]
    assert "too few for a case of 900" in _message(build_cases, large, few, NEEDLES, [Spec(900, 0.5, 0, (), 0)])
    room = sum(len(large.tokenizer(s)["input_ids"]) for s in few)
    (case,) = build_cases(large, few, NEEDLES, [Spec(room + 60, 0.5, 0, (), 0)])
    assert len(_hay(large, case)) == len(few) + 1  # all of it is enough


def test_sentences_of_a_file(tmp_path):
    path = tmp_path / "hay.txt"
    path.write_text("One thing. Is it so?  Yes!\nA last\nline\n")
    assert read_sentences(path) == ["One thing.", "Is it so?", "Yes!", "A last\nline"]
    path.write_text(" \n ")
    assert "has no text" in _message(read_sentences, path)
    assert "does not exist" in _message(read_sentences, tmp_path / "missing.txt")


def test_needles_of_a_file(tmp_path):
    path = tmp_path / "needles.jsonl"
    released = {"needle": "The oak is old.", "question": "What is old?", "real_needle": "the oak"}
    ours = {"needle": "Ann is in Rome.", "question": "Where is Ann?", "answer": "Rome", "key": "Ann", "memory": "Oslo"}
    path.write_text("\n".join(map(json.dumps, (released, ours))))
    assert read_needles(path) == [
        Needle("The oak is old.", "What is old?", "the oak"),
        Needle("Ann is in Rome.", "Where is Ann?", "Rome", "Ann", "Oslo"),
    ]
    path.write_text(json.dumps(ours) + '\n{"needle": "x", "question": "y"}\n')
    assert "line 2" in _message(read_needles, path)
    path.write_text("")
    assert "no needles" in _message(read_needles, path)


@needs_published
def test_published_needles_and_haystack(small):
    folder = Path(PUBLISHED) / "needles"
    needles = read_needles(folder / "needles.jsonl")
    assert len(needles) == 3
    assert needles[2].answer[0] != needles[2].needle[needles[2].needle.lower().index(needles[2].answer.lower())]
    sentences = [s for path in sorted(folder.glob("haystack*.txt")) for s in read_sentences(path)]
    specs = draw_specs(needles, [5000, 8000], [0.0, 0.5, 1.0], per_length=3)
    cases = build_cases(small, sentences[:400], needles, specs)
    assert len(cases) == 6
    for case in cases:
        assert _is_tightest(small.tokenizer, case)
        depth = case.span[0] / len(case.tokens)
        assert abs(depth - case.spec.depth) < 0.15
        assert len(case.tokens) <= case.spec.length
