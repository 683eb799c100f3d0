"""Built-in English texts: what is drawn is as described, and the file of prompts is what the generator draws."""

import collections
import gzip
import itertools
import math
import os
import random
import re
import subprocess
import sys

import pytest

from retmask_jax.data import builtin
from retmask_jax.data.builtin import ENGLISH, PROMPTS, prompts, sentences
from retmask_jax.data.prompts import read_prompts
from retmask_jax.utils.files import read_object

PARTS = read_object(ENGLISH / "prompt_parts.json")
SENTENCE_PARTS = read_object(ENGLISH / "sentence_parts.json")
RECORDS = prompts()
ALONE, WITH_TEXT = RECORDS[::2], RECORDS[1::2]
SLOT = re.compile(r"\{([^{}]*)\}")


def content(record, key="messages"):
    (turn,) = record[key]
    assert turn["role"] == "user"
    return turn["content"]


def pattern(template, lists):
    """A regular expression of everything that a template becomes, with a group for each slot."""
    seen = set()

    def group(match):
        slot = match[1]
        name = slot.replace("#", "_")
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{'|'.join(sorted(map(re.escape, lists[slot.split('#')[0]]), key=len, reverse=True))})"

    pieces = re.split(r"(\{[^{}]*\})", template)
    text = "".join(SLOT.sub(group, piece) if SLOT.fullmatch(piece) else re.escape(piece) for piece in pieces)
    return re.compile(re.sub(r"\b([Aa])\\ ", r"\1n?\\ ", text))


PASSAGES = [(passage, pattern("\n".join(passage["text"]), PARTS["slots"])) for passage in PARTS["passages"]]


def passage_in(record):
    """The only passage that a record carries: (its parts, its text, slot -> value)."""
    hits = [(passage, hit) for passage, made in PASSAGES if (hit := made.search(content(record)))]
    ((passage, hit),) = hits
    return passage, hit[0], hit.groupdict()


# --- sentences ---


def test_sentences_are_different_and_the_first_are_the_same_for_every_number():
    many = sentences(20_000)
    assert len(many) == len(set(many)) == 20_000
    assert sentences(500) == many[:500] and sentences(0) == []
    assert len(set(sentences(500, seed=1)) & set(many)) < 5


def test_sentences_are_short_and_plain():
    for sentence in sentences(20_000):
        assert 6 <= len(sentence.split()) <= 14, sentence
        assert re.fullmatch(r"[A-Z][a-z,'\- ]+[a-z]\.", sentence) and "  " not in sentence, sentence
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence, re.IGNORECASE), sentence


def test_sentences_have_many_frames_and_words():
    many = sentences(5000)
    assert len(SENTENCE_PARTS["frames"]) >= 10
    assert len({word for sentence in many for word in sentence.lower().split()}) > 1500
    assert max(collections.Counter(" ".join(sentence.split()[:2]) for sentence in many).values()) < 250


def test_a_million_sentences_are_possible():
    """Every frame alone has tens of thousands of forms; together they have a thousand times what may be asked for."""
    sizes = [
        sum(math.prod(len(options) for options in lists.values()) for _, lists in forms)
        for forms in builtin._frames(SENTENCE_PARTS)
    ]
    assert min(sizes) > 50_000 and sum(sizes) > 1000 * builtin.MOST_SENTENCES
    with pytest.raises(ValueError, match="-1 sentences were asked for: ask for 0 to 1000000"):
        sentences(-1)


def test_two_hundred_thousand_sentences():
    assert len(set(sentences(200_000))) == 200_000


# --- prompts ---


def test_the_file_is_what_the_generator_draws(tmp_path, monkeypatch):
    assert read_prompts(str(PROMPTS)).records == RECORDS
    monkeypatch.setattr(builtin, "PROMPTS", tmp_path / "prompts.jsonl.gz")
    builtin.main()
    assert gzip.decompress((tmp_path / "prompts.jsonl.gz").read_bytes()) == gzip.decompress(PROMPTS.read_bytes())
    assert PROMPTS.read_bytes()[3:8] == b"\0" * 5  # neither a name nor a time stamp: equal records give equal bytes


def test_another_process_draws_the_same():
    """No order of a set or hash of a text takes part."""
    code = "from retmask_jax.data.builtin import *; print(prompts(300) + sentences(300))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == str(prompts(300) + sentences(300))


def test_prompts_are_different_and_the_first_are_the_same_for_every_number():
    assert [record["id"] for record in RECORDS] == [f"english-{i:04d}" for i in range(1, 1201)]
    assert len({content(record) for record in RECORDS}) == 1200
    assert prompts(31) == RECORDS[:31] and prompts(0) == []
    assert not {content(record) for record in prompts(40, seed=1)[1::2]} & {content(record) for record in WITH_TEXT}
    with pytest.raises(ValueError, match="1000000 prompts were asked for: ask for 0 to"):
        prompts(1_000_000)


def test_all_prompts_that_are_possible_are_different():
    most = 2 * sum(len(group["frames"]) * len(group["topics"]) for group in PARTS["requests"])
    assert len({content(record) for record in prompts(most)}) == most > 4000


def test_no_reading_comes_twice_where_few_are_possible():
    """One passage of two forms, with one detail in two layouts and one general question in one layout."""
    passage = {"kind": "note", "text": ["{x} is here."], "questions": [["Who is it?", "x"]], "general": ["any"]}
    layouts = {"question": ["{text} {question}", "{question} {text}"], "task": ["{text} {question}"]}
    parts = {"passages": [passage], "layouts": layouts, "general": {"any": ["Why?"]}, "slots": {"x": ["Ann", "Bob"]}}
    drawn = {content(record) for record in itertools.islice(builtin._readings(parts, random.Random(0)), 6)}
    assert len(drawn) == 6 and "Who is it? Bob is here." in drawn


def test_prompts_are_filled_short_and_ascii():
    for record in RECORDS:
        for key in record.keys() & {"messages", "messages_without"}:
            text = content(record, key)
            assert text.isascii() and text == text.strip() and "  " not in text, text
            assert not set("{}#") & set(text) and len(text.split()) <= 220, text
            assert not re.search(r"\ba [aeiou]|\ban (?!hour)[^aeiou]", text, re.IGNORECASE), text


def test_requests_and_topics_are_many_and_used_evenly():
    frames = [frame for group in PARTS["requests"] for frame in group["frames"]]
    topics = [topic for group in PARTS["requests"] for topic in group["topics"]]
    assert len(set(frames)) == len(frames) >= 60 and len(set(topics)) == len(topics) >= 200
    assert all(frame.count("{topic}") == 1 for frame in frames)
    topic_of_group = {frame: group["topics"] for group in PARTS["requests"] for frame in group["frames"]}
    patterns = {frame: pattern(frame, {"topic": topics}) for frame, topics in topic_of_group.items()}
    uses = collections.Counter(
        max((frame for frame, made in patterns.items() if made.search(content(record))), key=len) for record in ALONE
    )
    assert uses.keys() == set(frames) and max(uses.values()) <= 6


def test_half_of_the_prompts_carry_a_text_to_answer_from():
    assert not [record["id"] for record in ALONE if "messages_without" in record]
    used = collections.Counter()
    for record in WITH_TEXT:
        passage, text, _ = passage_in(record)
        used[passage["kind"]] += 1
        question = content(record, "messages_without")
        assert 50 <= len(text.split()) <= 130, text
        assert question in content(record).replace(text, "") and len(question) < 200, record
    assert len(used) == len(PASSAGES) >= 40 and max(used.values()) <= min(used.values()) + 1


def test_questions_stand_before_and_after_the_text():
    before = [
        content(record).index(content(record, "messages_without")) < content(record).index(passage_in(record)[1])
        for record in WITH_TEXT
    ]
    assert 150 < sum(before) < 450


def test_every_detail_that_is_asked_for_stands_in_the_text_and_not_in_the_question():
    """The question is about this text, as its names are the text's, and its answer is in the text once or more."""
    details = 0
    for record in WITH_TEXT:
        passage, text, values = passage_in(record)
        question = content(record, "messages_without")
        for ask, slot in passage["questions"]:
            if hit := pattern(ask, PARTS["slots"]).fullmatch(question):
                answer = values[slot.replace("#", "_")]
                assert hit.groupdict().items() <= values.items(), record
                assert answer in text and not re.search(rf"\b{re.escape(answer)}\b", question), record
                details += 1
    assert 400 < details < 500  # the others are general, such as a summary


def test_passages_have_questions_and_their_slots_many_values():
    for passage in PARTS["passages"]:
        slots = set(SLOT.findall("\n".join(passage["text"])))
        assert len(passage["questions"]) >= 3 and passage["general"], passage["kind"]
        for ask, answer in passage["questions"]:
            assert answer in slots and set(SLOT.findall(ask)) <= slots - {answer}, ask
    assert all(len(set(values)) == len(values) >= 30 for values in PARTS["slots"].values())
    assert {slot.split("#")[0] for p in PARTS["passages"] for slot in SLOT.findall("".join(p["text"]))} == set(
        PARTS["slots"]
    )
