"""Detection against a slow reference: whole rows without a cache, attention weights in full, a loop over steps and heads.

The model copies tokens of its prompt but was never trained, so what it answers is taken as the right answer of a case.
"""

import collections
import dataclasses
import json

import numpy as np
import pytest
import tokenizers
import transformers
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, in_float64, reference_answer

from retmask_jax.benchmarks.detect import bundled_cases
from retmask_jax.data import tiny_language as tl
from retmask_jax.data.answers import rouge1_recall
from retmask_jax.data.needles import Case, Needle, Spec, build_cases, draw_specs
from retmask_jax.data.prompter import Prompter
from retmask_jax.generation.drafts import answer_batch
from retmask_jax.generation.language_model import load
from retmask_jax.heads.copy_score import copy_score, detect, detect_plain
from retmask_jax.heads.detection import COUNTED, stability
from retmask_jax.heads.scores import HeadScores

LM = copying_lm()
NO_SPEC = Spec(0, 0.0, 0, (), 0)


def _row(seed, length, words, eos=0):
    """A prompt of few words, so that they repeat; `eos` of them are <eos>, in the last third."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice(rng.integers(4, CONFIG.vocab_size, words), length)
    tokens[rng.permutation(np.arange(2 * length // 3, length - 1))[:eos]] = tl.EOS
    return tuple(map(int, tokens))


PROMPTS = [_row(seed, 20 + 4 * seed, words=6 + 3 * seed, eos=3 * (seed % 3)) for seed in range(10)]
SPANS = [(length // 4, 3 * length // 4) for length in map(len, PROMPTS)]


@pytest.fixture(scope="module")
def slow():
    """{released: (tokens, strongest keys [n, L, H]) per prompt} of the reference."""
    params = in_float64(LM.params)
    stops = {False: (tl.EOS,), True: ()}
    return {
        released: [reference_answer(params, prompt, NEW, stop_ids) for prompt in PROMPTS]
        for released, stop_ids in stops.items()
    }


def _cases(answers):
    return [
        Case(prompt, span, Needle("", "", answer), NO_SPEC)
        for prompt, span, answer in zip(PROMPTS, SPANS, answers, strict=True)
    ]


def _filled(cases):
    """The cases with others that do not count, the longest one among them: batches of one shape share a program."""
    longest = Case(PROMPTS[-1], SPANS[-1], Needle("", "", "zebra"), NO_SPEC)
    return [*cases, *[longest] * (BATCH - len(cases))]


def _text(tokens):
    return " ".join(tl.VOCABULARY[i] for i in tokens if i > tl.UNK)


def _detect(cases, lm=LM, **options):
    return detect(lm, cases, max_new_tokens=NEW, batch_size=BATCH, **options)


def _slow_score(prompt, span, tokens, strongest, released):
    """[L][H], by the sentences of METHODS, one step and head at a time."""
    start, end = span
    score = np.zeros((CONFIG.n_layers, CONFIG.n_heads))
    for layer in range(CONFIG.n_layers):
        for head in range(CONFIG.n_heads):
            copied = []
            for step, token in enumerate(tokens):
                key = int(strongest[step, layer, head])
                if start <= key < end and prompt[key] == token:
                    copied.append(token)
            if released:
                score[layer, head] = len(copied) / (end - start)
            else:
                score[layer, head] = len(set(copied)) / len(set(prompt[start:end]))
    return score


@pytest.mark.parametrize("released", [False, True])
def test_detection_equals_the_slow_reference(slow, released):
    found = _detect(_cases([_text(tokens) or "x" for tokens, _ in slow[released]]), released=released)
    assert found.answers == [_text(tokens) for tokens, _ in slow[released]]
    counted = [i for i, answer in enumerate(found.answers) if answer]
    assert [i for i, outcome in enumerate(found.outcomes) if outcome == COUNTED] == counted
    expected = [_slow_score(PROMPTS[i], SPANS[i], *slow[released][i], released) for i in counted]
    np.testing.assert_allclose(found.scores.per_case, np.stack(expected, axis=-1), atol=1e-6)
    assert (found.scores.mean > 0).sum() >= 4  # there is something to compare


def test_eos_ends_an_answer_unless_released(slow):
    lengths = [len(tokens) for tokens, _ in slow[False]]
    cut_short = [i for i, n in enumerate(lengths) if n < NEW]
    assert 0 < len(cut_short) < len(PROMPTS)
    answers = _detect(_cases([_text(tokens) for tokens, _ in slow[True]]), released=True).answers
    assert all(answers[i].startswith(_text(slow[False][i][0])) for i in cut_short)
    assert max(len(answers[i].split()) - lengths[i] for i in cut_short) > 3


def test_only_the_released_form_counts_a_repeated_copy_again(slow):
    """One prompt token, copied again and again by one head, is the whole needle."""
    tokens, strongest = slow[True][0]
    copies = {}
    for step, layer, head in np.ndindex(strongest.shape):
        key = strongest[step, layer, head]
        if key < len(PROMPTS[0]) and PROMPTS[0][key] == tokens[step]:
            copies.setdefault((layer, head, key), []).append(step)
    (layer, head, key), steps = max(copies.items(), key=lambda item: len(item[1]))
    assert len(steps) > 1
    case = Case(PROMPTS[0], (int(key), int(key) + 1), Needle("", "", _text(tokens)), NO_SPEC)
    scores = {released: _detect(_filled([case]), released=released).scores.mean for released in (False, True)}
    assert scores[True][layer, head] == len(steps)
    assert scores[False][layer, head] == scores[False].max() == 1


def test_plain_detection_and_the_fast_one_are_equal(slow):
    """On cases that count and cases that do not; with answers that the fast one reads, and others that it decodes."""
    cases = _cases([_text(tokens) or "x" for tokens, _ in slow[False]])
    cases[3] = dataclasses.replace(cases[3], needle=Needle("", "", "nothing of it"))
    plain, fast = detect_plain(LM, cases, max_new_tokens=NEW), _detect(cases)
    assert plain == fast
    assert {COUNTED, "wrong answer, cut at the token limit"} <= set(plain.outcomes)
    assert (plain.scores.mean > 0).sum() >= 4


@pytest.mark.slow
def test_plain_detection_and_the_fast_one_are_equal_on_the_bundled_model():
    """Its answers are the needle's words and a full stop, so that most of them are read in one pass."""
    lm, cases = load("bundled"), bundled_cases(96, depths=3, needles=1)
    plain, fast = detect_plain(lm, cases, max_new_tokens=NEW), detect(lm, cases, max_new_tokens=NEW, batch_size=1)
    assert plain == fast and plain.outcomes == [COUNTED] * 3
    assert sorted(plain.scores.heads(top_k=4)) == [(1, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.slow
def test_cases_of_a_small_model_are_read_by_one_program():
    lm, cases = load("bundled"), [*bundled_cases(96, depths=3, needles=1), *bundled_cases(192, depths=3, needles=1)]
    before = answer_batch._cache_size()
    detect(lm, cases, max_new_tokens=NEW, batch_size=2)
    assert answer_batch._cache_size() == before + 1


# --- which cases count ---


def _renamed(names):
    """The tiny language's tokenizer with other texts for some ids."""
    state = json.loads(LM.tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {names.get(i, word): i for word, i in state["model"]["vocab"].items()}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), tl.SPECIALS, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_why_cases_do_not_count(slow):
    """Prompts 0 and 4 answer with three or more words; the third word of 0 is given a text that ends in a newline."""
    (first, _), (other, _) = slow[False][0], slow[False][4]
    newline = first[2]
    assert newline not in first[:2] and newline not in other and len(other) == NEW
    lm = LM.replace(tokenizer=_renamed({newline: "end\n"}))
    begun, right = _text(first[:2]), _text(other)
    cases = _cases([begun] * 10)

    def outcome(number, answer, lm=lm, released=False):
        wanted = dataclasses.replace(cases[number], needle=Needle("", "", answer))
        sure = dataclasses.replace(cases[4], needle=Needle("", "", right))
        found = _detect(_filled([sure, wanted]), lm=lm, released=released)
        assert found.outcomes[0] == COUNTED and COUNTED not in found.outcomes[2:]
        assert found.reasons == collections.Counter(found.outcomes)
        assert (found.scores.counts == found.reasons[COUNTED]).all()
        return found.answers[1], found.outcomes[1]

    assert outcome(0, begun) == (begun, COUNTED)
    assert outcome(0, "nothing of it") == (begun, "wrong answer")
    assert outcome(4, "nothing of it") == (right, "wrong answer, cut at the token limit")
    blank = LM.replace(tokenizer=_renamed({token: "\n" * (n + 1) for n, token in enumerate(sorted({*first}))}))
    answer, reason = outcome(0, begun, lm=blank)
    assert (answer.strip(), reason) == ("", "empty answer")
    longer, reason = outcome(0, begun, released=True)
    assert longer.split()[:3] == [*begun.split(), "end"] and len(longer.split()) == NEW
    assert reason == COUNTED


def test_a_line_end_before_the_first_word_ends_no_answer(slow):
    """As Gemma-3 begins its answers; of the fast detection and of the plain one."""
    tokens, strongest = slow[False][0]
    leading = tokens[0]
    end = next((i for i, token in enumerate(tokens) if i and token == leading), len(tokens))
    said, lm = _text(tokens[1:end]), LM.replace(tokenizer=_renamed({leading: "\n"}))
    case = dataclasses.replace(_cases([""] * 10)[0], needle=Needle("", "", said))
    fast, plain = _detect(_filled([case]), lm=lm), detect_plain(lm, _filled([case]), max_new_tokens=NEW)
    assert fast == plain and fast.answers[0].split() == said.split() and end > 1
    wanted = _slow_score(PROMPTS[0], SPANS[0], tokens[:end], strongest[:end], False)
    np.testing.assert_allclose(fast.scores.mean, wanted, atol=1e-6)


def test_copies_after_a_newline_do_not_score(slow):
    tokens, strongest = slow[False][0]
    newline = tokens[2]
    lm = LM.replace(tokenizer=_renamed({newline: "end\n"}))
    case = dataclasses.replace(_cases([""] * 10)[0], needle=Needle("", "", _text(tokens[:2])))
    short = _slow_score(PROMPTS[0], SPANS[0], tokens[:2], strongest[:2], False)
    np.testing.assert_allclose(_detect(_filled([case]), lm=lm).scores.mean, short, atol=1e-6)
    assert (short != _slow_score(PROMPTS[0], SPANS[0], tokens, strongest, False)).any()


def test_no_counted_case_raises_with_the_reasons():
    with pytest.raises(
        ValueError, match="none of 10 detection cases counts: .*'wrong answer, cut at the token limit': "
    ):
        _detect(_cases(["nothing of it"] * 10))


def test_more_than_half_of_the_answer_must_be_there(slow):
    words = list(dict.fromkeys(_text(slow[False][4][0]).split()))[:2]
    assert len(words) == 2
    cases = _cases([""] * 10)
    answers = " ".join(words), f"{words[0]} zebra", f"{words[0]} {words[1]} zebra"
    cases = [dataclasses.replace(cases[4], needle=Needle("", "", answer)) for answer in answers]
    counted = [outcome == COUNTED for outcome in _detect(_filled(cases)).outcomes]
    assert counted == [True, False, True, False]


def test_rouge_recall_is_of_the_reference_with_stems():
    assert rouge1_recall("He WALKED in parks, and far beyond them", "walks in the park") == 0.75
    assert rouge1_recall("walks in the park", "he walked in parks, and far beyond them") == 3 / 8
    assert rouge1_recall("", "walks") == 0


def test_models_answer_inside_their_chat_template():
    rng = np.random.default_rng(0)
    needles = [Needle(**record) for record in tl.needle_records(rng, 4)]
    specs = draw_specs(needles, [60], [0.5], per_length=4)
    cases = build_cases(Prompter(LM.tokenizer), tl.haystack_text(rng, 30), needles, specs)
    params = in_float64(LM.params)
    expected = []
    for case in cases:
        words = LM.tokenizer.decode(case.tokens, skip_special_tokens=True).removesuffix(" :").split()
        row = [tl.BOS, *map(tl.VOCABULARY.index, words), tl.VOCABULARY.index(":")]
        expected.append(_text(reference_answer(params, row, NEW, (tl.EOS,))[0]))
    cases = [
        dataclasses.replace(case, needle=dataclasses.replace(case.needle, answer=answer))
        for case, answer in zip(cases, expected, strict=True)
    ]
    assert _detect(cases).answers == expected


# --- the score of one case ---


def _score(prompt, span, tokens, keys, released=False):
    """Score of one head whose strongest keys are `keys`."""
    return float(copy_score(np.array(prompt), span, np.array(tokens), np.array(keys)[:, None, None], released)[0, 0])


@pytest.mark.parametrize(
    ("tokens", "keys", "set_form", "released"),
    [
        ([7, 8, 9], [2, 3, 4], 1, 1),  # the whole needle
        ([7, 8], [2, 3], 2 / 3, 2 / 3),
        ([7, 7, 7, 7], [2, 2, 2, 2], 1 / 3, 4 / 3),  # a repeat is a copy in the released form only
        ([7, 8, 9, 7], [2, 3, 4, 2], 1, 4 / 3),
        ([8, 7], [2, 3], 0, 0),  # looks into the needle, at another token
        ([7, 8], [0, 5], 0, 0),  # equal tokens outside the span
        ([7, 8, 9], [2, 9, 10], 1 / 3, 1 / 3),  # keys after the prompt are generated tokens
        ([7], [5], 0, 0),  # the end of the span is outside
        ([], np.zeros(0, int), 0, 0),
    ],
)
def test_copy_score_of_examples(tokens, keys, set_form, released):
    prompt, span = [7, 5, 7, 8, 9, 8], (2, 5)
    assert _score(prompt, span, tokens, keys) == pytest.approx(set_form)
    assert _score(prompt, span, tokens, keys, released=True) == pytest.approx(released)


def test_a_needle_token_that_occurs_twice_is_one_of_the_set():
    prompt, span = [5, 7, 8, 7, 5], (1, 4)
    assert _score(prompt, span, [7, 8], [3, 2]) == 1
    assert _score(prompt, span, [7, 8], [3, 2], released=True) == pytest.approx(2 / 3)
    assert _score(prompt, span, [7, 7], [1, 3]) == 0.5


def test_heads_are_scored_apart():
    keys_NLH = np.array([[[1, 0], [2, 1]], [[2, 2], [2, 0]]])
    score_LH = copy_score(np.array([5, 7, 8]), (1, 3), np.array([7, 8]), keys_NLH)
    assert score_LH.dtype == np.float32
    assert score_LH.tolist() == [[1, 0.5], [0.5, 0.5]]


def test_stability_compares_growing_parts_with_the_whole():
    steady, early, late = [0.5, 0.5, 0.5, 0.5], [1.0, 0, 0, 0], [0, 0, 0, 0.8]
    scores = HeadScores(np.array([[steady, early, late]]))
    by_threshold = [(1, 2, 0.5), (2, 2, 0.5), (3, 2, 0.5), (4, 1, 1.0)]
    for steps in (4, 10):  # never more rows than cases
        rows = stability(scores, steps, threshold=0.3)
        assert [(row.cases, row.heads, row.jaccard) for row in rows] == by_threshold
    assert [row.jaccard for row in stability(scores, 4, top_k=1)] == [0, 1, 1, 1]
    assert [row.cases for row in stability(scores, 2, top_k=1)] == [2, 4]


def test_stability_of_heads_with_different_numbers_of_cases():
    """Head 1 counted two cases: its second is the last it has."""
    scores = HeadScores([[[0.5, 0.5, 0.5, 0.5], [0.0, 0.8], [0.0, 0.0, 1.0]]])
    rows = stability(scores, 4, threshold=0.33)
    assert [(row.cases, row.heads) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 3)]
    assert [row.jaccard for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_no_cases_at_all_are_refused_like_cases_that_do_not_count():
    with pytest.raises(ValueError, match="none of 0 detection cases counts"):
        detect(LM, [], max_new_tokens=NEW, batch_size=BATCH)
