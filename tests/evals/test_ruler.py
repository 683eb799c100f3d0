"""RULER's tasks: lengths, answers, places and scores, each checked against the text that the model gets."""

import collections
import re

import numpy as np
import pytest
from helpers_samples import ESSAY, byte_pairs, said_by, text_of
from helpers_tiny import BATCH, CONFIG, NEW, copying_params, in_float64, reference_answer
from scipy import stats as scipy_stats

from retmask_jax.evals.suites import ruler, samples
from retmask_jax.evals.suites.questions import Question, Questions
from retmask_jax.evals.suites.ruler import TASKS, ruler_samples, run_ruler, score
from retmask_jax.evals.suites.words import ADJECTIVES, NOISE, NOUNS, word_order
from retmask_jax.generation.language_model import from_params
from retmask_jax.model.interventions import mask_heads

DOCUMENTS = tuple(f"Page {i}. " + " ".join(ESSAY[i % 250 : i % 250 + 3 + i % 4]) for i in range(120))
QA = Questions(
    tuple(
        Question(f"What is on page {i}?", (DOCUMENTS[i].split()[2], "nothing"), (i, i + 40), (i + 1,)) for i in range(9)
    ),
    DOCUMENTS,
)
TEXTS = {"haystack": ESSAY, "qa": QA}
LENGTH = 2600
# RULER's generation lengths and number of references.
PUBLISHED = {
    "niah_single_1": (128, 1),
    "niah_single_2": (128, 1),
    "niah_single_3": (128, 1),
    "niah_multikey_1": (128, 1),
    "niah_multikey_2": (128, 1),
    "niah_multikey_3": (128, 1),
    "niah_multivalue": (128, 4),
    "niah_multiquery": (128, 4),
    "vt": (30, 5),
    "cwe": (120, 10),
    "fwe": (50, 3),
    "qa_1": (32, 2),
    "qa_2": (32, 2),
}


@pytest.fixture(scope="module", params=[(900, True), (310, False)], ids=["chat", "small"])
def prompter(request):
    return byte_pairs(*request.param)


def _unit(task, prompter):
    """Most tokens that one unit of haystack can cost."""
    count = prompter.count
    if task in ("niah_single_1", "vt"):
        return count("\n" + NOISE)
    if task == "niah_multikey_2":
        return count("\nOne of the secret numbers for tranquil-tambourine is: 1234567.") + 7
    if task == "niah_multikey_3":
        return count("\nOne of the secret uuids for  is: .") + 2 * 36  # at most a token for each digit
    if task == "cwe":
        return count(" 123. skateboardxylophone") + 12
    if task == "fwe":
        return 7
    return (
        count(f"\n\nDocument 12:\n{max(DOCUMENTS, key=count)}") if task.startswith("qa") else max(map(count, ESSAY)) + 1
    )


@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_their_length_to_within_a_unit_and_hold_the_answers(task, prompter):
    room = LENGTH - PUBLISHED[task][0]
    for sample in ruler_samples(task, prompter, LENGTH, 3, **TEXTS):
        text = text_of(prompter, sample)
        assert (sample.max_new_tokens, len(sample.references)) == PUBLISHED[task]
        assert 0 <= room - len(sample.tokens) < _unit(task, prompter)
        assert sample.tokens.tolist() == prompter.encode(text.removeprefix("<s>") if not prompter.chat else text)[0]
        missing = [reference for reference in sample.references if reference not in text]
        assert not missing or missing == ["nothing"]
        assert text.startswith("<s>USER: ") == prompter.chat


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_prompts_of_131072_tokens(task):
    prompter = byte_pairs(8000)
    many = tuple(f"Page {i}. " + " ".join(ESSAY[i % 250 : i % 250 + 12]) for i in range(2500))
    documents = Questions(QA.items, many)
    (sample,) = ruler_samples(task, prompter, 131_072, 1, haystack=ESSAY, qa=documents)
    assert 0 <= 131_072 - sample.max_new_tokens - len(sample.tokens) < 4 * _unit(task, prompter)


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_spans_hold_the_needles_that_are_asked_for(task, prompter):
    for sample in ruler_samples(task, prompter, LENGTH, 3, **TEXTS):
        text, said = text_of(prompter, sample), said_by(prompter, sample)
        found = [re.search(r"One of the secret \w+ for ([\w-]+) is: ([\w-]+)\.", part).groups() for part in said]
        assert [value for _, value in found] == list(sample.references)
        keys = {key for key, _ in found}
        question = text[text.rindex("What ") :]
        assert all(question.count(key) == 2 for key in keys)  # in the question and in the answer's beginning
        stated = re.findall(r"secret \w+ for ([\w-]+) is: ", text)
        wanted = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(task, 1)
        assert len(stated) == (sample.units + 1 if task[-1] in "23" and "multikey" in task else wanted)
        assert len(keys) == (4 if task == "niah_multiquery" else 1)
        uuids = task in ("niah_single_3", "niah_multikey_3")
        assert all(
            re.fullmatch(r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}" if uuids else r"\d{7}", r) for r in sample.references
        )


def test_chain_of_variables_leads_to_the_value(prompter):
    for sample in ruler_samples("vt", prompter, LENGTH, 3):
        text = text_of(prompter, sample)
        value = re.search(r"have the value (\d{5}), namely:$", text)[1]
        example = text[: text.rindex("The text below")]
        holders: dict[str, bool] = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            holders[name] = source == value or holders.get(source, False)
        assert {name for name, holds in holders.items() if holds} == set(sample.references)
        answered = re.search(r"namely: ((?:[A-Z]{3} ?){5})\n", example)[1].split()
        assert len(answered) == 5 and not set(answered) & set(sample.references)
        assert [s.strip() for s in said_by(prompter, sample)] == re.findall(
            r"VAR \w{5} = (?:VAR )?\w{5}", text[text.rindex("The text below") :]
        )


@pytest.mark.parametrize(("length", "often", "rare"), [(LENGTH, 6, 1), (4600, 30, 3)])
def test_common_words_occur_as_often_as_published(length, often, rare):
    prompter = byte_pairs(900)
    sample = ruler_samples("cwe", prompter, length, 1)[0]
    text = text_of(prompter, sample)
    listed = re.findall(r"(\d+)\. (\w+)", text[text.rindex("A numbered list") : text.rindex("Question:")])
    assert [int(place) for place, _ in listed] == list(range(1, len(listed) + 1))
    counts = collections.Counter(word for _, word in listed)
    assert {word for word, n in counts.items() if n == often} == set(sample.references)
    assert set(counts.values()) == {often, rare} and len(counts) == 10 + sample.units
    shown = text[: text.rindex("A numbered list")]
    answered = re.findall(r"\d+\. (\w+)", shown[shown.index("Answer:") :])
    example = collections.Counter(re.findall(r"\d+\. (\w+)", shown[: shown.index("Question:")]))
    assert {word for word, _ in example.most_common(10)} == set(answered) and len(answered) == 10


def test_words_never_occur_in_one_another():
    words = ADJECTIVES + NOUNS
    assert not [(a, b) for a in words for b in words if a in b and a != b] and len(set(words)) == len(words)
    common, others = word_order(np.random.default_rng(0), 10, 20_000)
    assert len({*common, *others}) == 20_010
    assert not [word for word in others for part in common if word.startswith(part) or word.endswith(part)]


def test_coded_words_follow_a_zeta_distribution():
    prompter = byte_pairs(900)
    sample = ruler_samples("fwe", prompter, 6000, 1)[0]
    text = text_of(prompter, sample)
    words = text[text.index("ones. ") + 6 : text.index("\nQuestion")].split()
    assert len(words) == sample.units
    counts = collections.Counter(words).most_common()
    assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == list(sample.references)
    expected = [counts[0][1] / rank**2 for rank in range(1, len(counts) + 1)]
    assert np.abs(np.array([n for _, n in counts]) - expected).max() < 2


def test_questions_stand_with_their_documents_and_neighbours_first(prompter):
    for number, sample in enumerate(ruler_samples("qa_1", prompter, LENGTH, 4, qa=QA)):
        text = text_of(prompter, sample)
        shown = [int(i) for i in re.findall(r"Document \d+:\nPage (\d+)\.", text)]
        assert {number, number + 40, number + 1} <= set(shown) and len(set(shown)) == len(shown) == sample.units + 2
        assert [s.strip() for s in said_by(prompter, sample)] == [DOCUMENTS[number], DOCUMENTS[number + 40]]
        assert QA.items[number].question in text[text.rindex("Question:") :]


def test_samples_depend_on_seed_and_number_not_on_the_tokenizer_or_their_neighbours():
    for task in TASKS:
        large, small = (ruler_samples(task, byte_pairs(*p), LENGTH, 3, 5, **TEXTS) for p in ((900, True), (310, False)))
        assert [s.references for s in large] == [s.references for s in small]
        assert [s.id for s in large] == ["5-0", "5-1", "5-2"]
        again = ruler_samples(task, byte_pairs(900), LENGTH, 1, 5, **TEXTS, first=2)[0]
        assert again.tokens.tolist() == large[2].tokens.tolist()
        other = ruler_samples(task, byte_pairs(900), LENGTH, 3, 6, **TEXTS)
        assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(large, other, strict=True))


def _p_uniform(lines_before, units, seed=0):
    """p-value that a place among `units` lines is uniform: with a random part each place is a number in [0, 1)."""
    drawn = (np.array(lines_before) + np.random.default_rng(seed).random(len(units))) / (np.array(units) + 1)
    return scipy_stats.kstest(drawn, "uniform").pvalue


def test_needles_stand_anywhere_with_equal_probability(monkeypatch):
    prompter = byte_pairs(900)

    def p_value():
        chosen = ruler_samples("niah_single_1", prompter, 500, 200)
        lines = [text_of(prompter, s).split("\n")[1:] for s in chosen]
        before = [next(i for i, line in enumerate(some) if line.startswith("One of")) for some in lines]
        return _p_uniform(before, [s.units for s in chosen])

    assert p_value() > 0.01
    monkeypatch.setattr(ruler, "places", lambda rng, n: np.sort(rng.random(n) ** 2))
    assert p_value() < 1e-5  # the test would see it


def test_scores_are_the_published_ones():
    assert score("niah_multivalue", "They are 11, 33 and FOUR.", ["11", "22", "33", "four"]) == 0.75
    assert score("vt", "abcde FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"]) == 0.4
    assert score("niah_single_1", "1234568", ["1234567"]) == 0
    assert score("qa_1", "In Oslo, I think", ["bergen", "oslo"]) == 1
    assert score("qa_2", "no idea", ["bergen", "oslo"]) == 0
    with pytest.raises(ValueError, match="RULER has no task 'nih'; it has niah_single_1, "):
        score("nih", "", [])


def test_what_cannot_be_made_raises():
    prompter = byte_pairs(900)
    for task, length, texts, words in (
        ("niah_single_2", 2000, {}, "niah_single_2 needs a text: set suites.ruler.essay"),
        ("qa_1", 2000, {"haystack": ESSAY}, "qa_1 needs a file of questions"),
        ("vt", 200, {}, r"RULER vt: 200 tokens, 30 of them new, have no room for the \d+ that"),
        ("qa_1", 90_000, TEXTS, "all 118 units of haystack do not fill 90000 tokens"),
        ("nope", 90_000, TEXTS, "RULER has no task 'nope'"),
    ):
        with pytest.raises(ValueError, match=words):
            ruler_samples(task, prompter, length, 1, **texts)


def test_run_scores_every_task_and_length(monkeypatch):
    prompter, asked = byte_pairs(310), []
    lm = from_params(CONFIG, None, prompter.tokenizer)

    def half_right(lm, given, *, interventions, **_):
        asked.append((len(given), interventions))
        return [
            " ".join(s.references[: (len(s.references) + 1) // 2]).upper() if i else "" for i, s in enumerate(given)
        ]

    monkeypatch.setattr(samples, "answer", half_right)
    lm = lm.replace(config=CONFIG.__class__(**{**vars(CONFIG), "max_length": LENGTH}))
    measured = run_ruler(
        lm,
        prompter,
        tasks=("niah_multiquery", "qa_1", "niah_single_1"),
        lengths=(2000, LENGTH),
        n=3,
        haystack=ESSAY,
        questions={"qa_1": QA},
        interventions="mask",
    )
    names = [one.name for one in measured]
    assert names[:3] == ["ruler/niah_multiquery 2000", f"ruler/niah_multiquery {LENGTH}", "ruler/qa_1 2000"]
    assert [one.values.tolist() for one in measured[::2]] == [[0, 0.5, 0.5], [0, 1, 1], [0, 1, 1]]
    assert [one.binary for one in measured[::2]] == [False, True, True] and measured[0].ids == ("0-0", "0-1", "0-2")
    assert asked == [(3, "mask")] * 6
    with pytest.raises(ValueError, match=f"RULER needs {LENGTH + 1} tokens, the model's context is {LENGTH}"):
        run_ruler(lm, prompter, tasks=("vt",), lengths=(LENGTH + 1,), n=1)


def test_answers_are_the_models_own_under_the_mask_given():
    """Prompts of several lengths in one batch, against greedy decoding written from the equations."""
    prompter, params = byte_pairs(330), copying_params()
    lm = from_params(CONFIG, params, prompter.tokenizer)
    rng = np.random.default_rng(0)
    some = [samples.Sample(str(n), rng.integers(7, 300, n), (), NEW) for n in (30, 64, 51)]
    for mask in (None, np.array([[0, 0, 0, 0], [1, 0, 0, 0]], bool)):
        expected = [
            prompter.tokenizer.decode(
                reference_answer(in_float64(params), s.tokens, NEW, CONFIG.eos_ids, head_mask=mask)[0]
            )
            for s in some
        ]
        masked = None if mask is None else mask_heads(CONFIG, [(1, 0)])
        assert samples.answer(lm, some, batch_size=BATCH, interventions=masked) == expected
    with pytest.raises(ValueError, match=r"samples allow \[4, 8\] new tokens"):
        samples.answer(lm, [some[0], samples.Sample("b", some[1].tokens, (), 4)], batch_size=2)


def test_search_finds_the_last_size_that_fits_in_few_steps():
    rng = np.random.default_rng(0)
    for most in (1, 2, 50, 5000):
        sizes = 30 + np.concatenate([[0], np.cumsum(rng.integers(1, 60, most))])
        for room in (30, 31, int(sizes[most // 2]), int(sizes[-1]) - 1, int(sizes[-1]), 10**9):
            for guess in (1, most // 3, most):
                tried = []
                found = samples.most_units(lambda n: tried.append(n) or int(sizes[n]), room, 0, most, guess)
                assert found == np.searchsorted(sizes, room, side="right") - 1
                assert len(tried) <= 14
