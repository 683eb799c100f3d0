"""Answers against references in any script: English as rouge-score has it, others by words or characters."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from retmask_jax.data.answers import holds, rouge1_recall, rouge_tokens, words
from retmask_jax.data.needles import Case, Needle, Spec, build_cases, draw_specs, question_case, read_sentences
from retmask_jax.data.needles import read_needles as read
from retmask_jax.data.prompter import Prompter
from retmask_jax.data.tasks import task_cases
from retmask_jax.generation.language_model import load
from retmask_jax.heads import conditions, copy_score, detection

# language -> (answer, a sentence with it, a sentence with a longer or another word that only begins like it)
SCRIPTS = {
    "Russian": ("красный кот", "Это красный кот, да.", "Это красный котёл, да."),
    "Greek": ("ΟΔΌΣ", "Η οδός είναι εδώ.", "Η οδοστρωσία είναι εδώ."),
    "Arabic": ("بيت كبير", "هذا بيت كبير.", "هذا بيت كبيرة."),
    "Hebrew": ("בית", "זה בית.", "זה ביתו."),
    "Persian": ("می‌خواهم", "من می‌خواهم بروم", "من می‌خواهمش"),
    "Hindi": ("हिन्दी", "यह हिन्दी है।", "यह हिन्द है।"),
    "Bengali": ("বাংলা", "এটি বাংলা।", "এটি বাংলার।"),
    "Tamil": ("தமிழ்", "இது தமிழ்.", "இது தமிழர்."),
    "Korean": ("서울", "답은 서울, 입니다.", "답은 서울역 입니다."),
    "German": ("STRASSE", "Die Straße hier.", "Die Straßenbahn hier."),
    "Vietnamese": ("nước", "Đây là nu\u031bo\u031b\u0301c.", "Đây là nưa."),
    "Japanese": ("東京タワー", "答えは東京ﾀﾜｰです。", "答えは東京タクシーです。"),
    "Chinese": ("北京", "他在北京工作", "他在京北工作"),
    "Thai": ("กรุงเทพ", "เมืองหลวงคือกรุงเทพมหานคร", "เมืองหลวงคือกรุงทอง"),
    "Khmer": ("ភ្នំពេញ", "ទីក្រុងភ្នំពេញនេះ", "ទីក្រុងភ្នំនេះ"),
    "digits": ("2024", "在２０２４年", "在12024年"),
    "Arabic digits": ("2024", "عام ٢٠٢٤", "عام ٢٠٢"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_text_of_any_script_recalls_itself(script):
    for text in SCRIPTS[script]:
        assert rouge1_recall(text, text) == 1.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_answer_is_found_as_whole_words_or_among_characters_of_scripts_without_spaces(script):
    answer, right, wrong = SCRIPTS[script]
    cases = [Case((1,), (0, 1), Needle("", "", answer, memory=answer), Spec(0, 0.0, 0, (), 0))] * 2
    for field in ("answer", "memory"):
        assert conditions.hits([right, wrong], cases, field).tolist() == [True, False]
    assert rouge1_recall(right, answer) == 1.0 and rouge1_recall(wrong, answer) < 1.0 + (script == "Chinese")


def test_marks_stay_with_their_letters():
    assert words("हिन्दी") == ["हिन्दी"] and words("กำนี้") == [*map("".join, ("กํ", "า", "นี้"))]
    assert words("\u0301a") == ["a"] and words("कि") != words("की") and not holds("की", "कि") and not holds("कि", "क")
    assert words("é") == words("e\u0301") == ["é"]


def test_what_joins_letters_is_no_border_and_what_parts_them_is():
    assert (
        words("می‌خواهم") == ["میخواهم"]
        and words("東京・大阪") == list("東京大阪")
        and words("co\u200dop") == ["co", "op"]
    )
    assert words("a_b c²") == ["a_b", "c2"] and rouge_tokens("a_b c² 1Ⅳ") == ["a", "b", "c", "1iv"]


def test_words_of_english_are_runs_as_before():
    assert words("The cat_1, isn't 3.5!") == ["the", "cat_1", "isn", "t", "3", "5"]
    assert not holds("concatenate", "cat") and holds("A CAT", "a cat") and not holds("cat a", "a cat")
    assert not holds("котлета", "кот") and holds("кот, да", "КОТ") and not holds("anything", "!!!")


_ENGLISH = RougeScorer(["rouge1"], use_stemmer=True)
# All that rouge-score reads, and any sign that is neither letter nor digit nor mark.
_SIGNS = st.characters(categories=["P", "S", "Z", "Cc", "Cf", "No"])
_TEXTS = st.text(st.one_of(st.characters(max_codepoint=127), st.sampled_from("aAbeingsed  "), _SIGNS), max_size=60)


@given(_TEXTS, _TEXTS)
def test_english_is_scored_bit_for_bit_as_by_rouge_score(answer, reference):
    assert rouge_tokens(answer) == _ENGLISH._tokenizer.tokenize(answer)
    assert rouge1_recall(answer, reference) == _ENGLISH.score(reference, answer)["rouge1"].recall


def test_the_texts_of_the_package_are_scored_as_by_rouge_score():
    from retmask_jax.hf.hub import BUNDLED

    texts = [s for path in sorted((BUNDLED.parent / "data").glob("*.txt")) for s in read_sentences(path)[:200]]
    texts += [
        "“Running” — he said—isn’t the runners’ job… really?",
        "naive co-operation, 1,234 items; U.S.A. e.g. x=y_2",
    ]
    assert len(texts) > 100
    for answer, reference in zip(texts, np.roll(texts, 1), strict=True):
        assert rouge1_recall(answer, str(reference)) == _ENGLISH.score(str(reference), answer)["rouge1"].recall


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_found_in_itself_whatever_stands_around(text, other):
    assert holds(f"{other} {text} {other}", text) == bool(words(text))
    assert rouge1_recall(f"{other} {text}", text) == float(bool(rouge_tokens(text)))
    assert all(token and not token.isspace() and " " not in token for token in words(text) + rouge_tokens(text))


@given(
    st.lists(
        st.sampled_from(["кот", "котлета", "дом", "नमस्ते", "नम", "cat", "東", "เท", "ค่า", "ค"]), min_size=1, max_size=6
    )
)
def test_words_are_found_as_an_independent_reading_of_spaced_text_finds_them(parts):
    """Words with spaces between them need no rules of scripts: a word is there or not. Of unspaced ones any part is."""
    spaced = [part for part in parts if part not in ("東", "เท", "ค่า", "ค")]
    for wanted in ("кот", "дом", "नम", "cat"):
        assert holds(" ".join(parts), wanted) == (wanted in spaced)


# --- answers without words ---


@pytest.fixture(scope="module")
def prompter():
    return Prompter(load("bundled").tokenizer, "{context} {question}", chat=False)


@pytest.mark.parametrize("answer", ["!!!", "🎉", "", "…", "\u0301"])
def test_an_answer_without_words_is_refused_by_name(answer, prompter, tmp_path):
    path, line = tmp_path / "needles.jsonl", {"needle": f"the sign is {answer} .", "question": "the sign"}
    path.write_text("".join(json.dumps(line | {"answer": text}) + "\n" for text in ("oak", answer)))
    with pytest.raises(ValueError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}, line 2: the answer {answer!r} has no letter or digit") and (
        "\n" not in str(refused.value)
    )
    needle = Needle(line["needle"], line["question"], answer)
    specs = draw_specs([needle], [64], [0.5], per_length=1)
    for build in (lambda: build_cases(prompter, ["a b ."], [needle], specs), lambda: question_case(prompter, needle)):
        with pytest.raises(ValueError, match="^needle 'the sign is .*: the answer .* has no letter or digit"):
            build()
    with pytest.raises(ValueError, match="the memory '!' has no letter"):
        question_case(prompter, Needle("", "the sign", "oak", memory="!"))


def test_sentences_end_in_other_scripts_too(tmp_path):
    path = tmp_path / "hay.txt"
    path.write_text("東京は大きい。大阪も！本当？はい。\nयह है। वह है। English 3.5 ends. Here!", encoding="utf-8")
    expected = ["東京は大きい。", "大阪も！", "本当？", "はい。", "यह है।", "वह है।", "English 3.5 ends.", "Here!"]
    assert read_sentences(path) == expected


def test_cases_of_another_script_count_and_are_right(prompter, tmp_path):
    """From a file of needles to outcomes: what is answered right counts for detection and for recall."""
    needles = [
        {"needle": "Секретное слово Анны — красный кот.", "question": "Слово Анны?", "answer": "красный кот"},
        {"needle": "東京の秘密は青い海です。", "question": "秘密は?", "answer": "青い海"},
        {"needle": "राम का रंग नीला है।", "question": "रंग?", "answer": "नीला"},
    ]
    path = tmp_path / "needles.jsonl"
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in needles), encoding="utf-8")
    assert len(read(path)) == 3
    for one in needles:
        assert copy_score._outcome(one["needle"], one["answer"], cut=False) == detection.COUNTED
        assert copy_score._outcome("другое нечто 大阪 हरा", one["answer"], cut=False) == "wrong answer"
    section = type("task", (), {"needles": "n", "lengths": (), "prefix": False})
    cases = task_cases(prompter, section, lambda _: path)
    assert conditions.hits([one["needle"] for one in needles], cases).all()
