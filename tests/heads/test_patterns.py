"""Scores on repeated random tokens against whole attention weights, and heads followed from token to token, by loops."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, in_float64, reference, reference_answer

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.needles import Case, Needle, Spec
from retmask_jax.generation.language_model import load
from retmask_jax.heads.detection import NoCaseCounts
from retmask_jax.heads.detectors import DETECTORS
from retmask_jax.heads.patterns import steps
from retmask_jax.heads.patterns.repeated import _mass, repeated_tokens
from retmask_jax.heads.patterns.steps import COPIES, IN_NEEDLE
from retmask_jax.heads.reading import read_batch
from retmask_jax.model.masking import normalise

LM = copying_lm()
PARAMS = in_float64(LM.params)
LENGTHS = (60, 41)


def _case(length, seed):
    """What these detectors read of a case: its length, and its seed."""
    return Case((5,) * length, (0, 0), Needle("", "", "x"), Spec(length, 0.5, 0, (), seed))


CASES = [_case(length, seed) for seed, length in enumerate(LENGTHS)]


def _by_definition(attention_LHTS, n):
    """{detector: [L, H]}: the mean over the repeated tokens of n, query by query."""
    length = attention_LHTS.shape[-1]
    queries = range(length - n, length)
    first = {query: query - n for query in queries}  # the same token's first occurrence
    return {
        "induction": np.mean([attention_LHTS[:, :, query, first[query] + 1] for query in queries], axis=0),
        "previous_token": np.mean([attention_LHTS[:, :, query, query - 1] for query in queries], axis=0),
    }


# --- repeated random tokens ---


def test_a_text_is_random_tokens_and_the_same_again():
    text = repeated_tokens(LM, 60, seed=3)
    assert len(text) == 59 and text[0] == tl.BOS
    first, again = np.split(text[1:], 2)
    assert np.array_equal(first, again) and len(set(first)) == 29 and min(first) > tl.UNK
    assert not np.array_equal(text, repeated_tokens(LM, 60, seed=4))
    assert np.array_equal(text, repeated_tokens(LM, 60, seed=3))


def test_more_tokens_than_the_vocabulary_has_come_again_in_another_order():
    text = repeated_tokens(load(GOLDEN / "qwen3"), 240, seed=0)  # no tokenizer: 59 tokens of 61 end nothing
    half = text[:120].tolist()
    assert len(text) == 240 and sorted(half[:59]) == sorted(half[59:118]) == sorted({*range(61)} - {0, 2})
    assert half[:59] != half[59:118]


def test_a_text_has_room_for_two_tokens_twice():
    assert len(repeated_tokens(LM, 5, seed=0)) == 5
    with pytest.raises(ValueError, match="4 tokens of which .* room for two tokens twice"):
        repeated_tokens(LM, 4, seed=0)


@pytest.mark.parametrize("name", ["induction", "previous_token"])
def test_scores_on_repeated_tokens_are_attention_at_the_place_of_the_definition(name):
    """Each case is a text of its own, two lengths in a batch; against whole float64 attention weights."""
    found = DETECTORS[name](LM, CASES, batch_size=BATCH)
    for case, scores_LH in zip(CASES, np.moveaxis(found.scores.per_case, -1, 0), strict=True):
        text = repeated_tokens(LM, len(case.tokens) - 1, case.spec.seed)
        _, attention = reference(PARAMS, text)
        expected = _by_definition(attention, len(text) // 2)[name]
        np.testing.assert_allclose(scores_LH, expected, atol=1e-5)
        assert expected.std() > 0.005
    assert found.reasons == {"counted": len(CASES)} and found.answers == [""] * len(CASES)


@pytest.mark.parametrize("variant", ["gemma2", "qwen3"])
def test_scores_on_repeated_tokens_are_those_of_eager_attention_in_torch(variant):
    """Also with a soft cap, and in layers whose window does not reach back to the first occurrence."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / variant, attn_implementation="eager").eval()
    lm = load(GOLDEN / variant)
    expected = {name: [] for name in ("induction", "previous_token")}
    for case in CASES:
        text = repeated_tokens(lm, len(case.tokens) - 1, case.spec.seed)
        with torch.no_grad():
            out = model.float()(torch.tensor(text[None].astype(np.int64)), output_attentions=True)
        attention = np.stack([weights[0].double().numpy() for weights in out.attentions])
        for name, scores_LH in _by_definition(attention, len(text) // 2).items():
            expected[name].append(scores_LH)
    for name, scores in expected.items():
        found = DETECTORS[name](lm, CASES, batch_size=BATCH).scores.per_case
        np.testing.assert_allclose(np.moveaxis(found, -1, 0), scores, atol=1e-5)
        assert np.max(scores) > 0.03


def test_memory_grows_with_the_length_and_not_with_its_square():
    """Of the program that scores one text, by the compiler's report: four times the length, where half of it is measured."""
    config, taken = dataclasses.replace(CONFIG, max_length=2048), {}
    for length in (256, 1024):
        numbers = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
        texts = numbers((1, length)), numbers((1,)), numbers((1,))
        asked = numbers((1, length // 2)), numbers((1, length // 2)), numbers((1, 1, 2))
        lowered = read_batch.lower(
            config, _mass, False, LM.params, None, *texts, *asked, normalise(config), np.int32(length), relative=True
        )
        taken[length] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert taken[1024] < 6 * taken[256]


# --- from token to token ---


def _needle_cases():
    """Cases whose needle is what the model says, found in its prompt, and one whose answer is wrong: two full batches."""
    cases = []
    for seed in range(2 * BATCH - 1):
        tokens = (tl.BOS, *np.random.default_rng(seed).integers(tl.UNK + 1, len(tl.VOCABULARY), 50).tolist())
        said, _ = reference_answer(PARAMS, tokens, NEW, (tl.EOS,))
        place = next((i for i, token in enumerate(tokens) if said and token == said[0]), 5)
        text = " ".join(tl.VOCABULARY[token] for token in said if token > tl.UNK)
        cases.append(Case(tokens, (place, place + 3), Needle("", "", text or "x"), Spec(51, 0.5, 0, (), seed)))
    return [*cases, dataclasses.replace(cases[0], needle=Needle("", "", "zebra"))]


NEEDLES = _needle_cases()


def _sets(case):
    """{kind: [the set of heads that retrieve at each token of the answer]}, head by head."""
    said, keys = reference_answer(PARAMS, case.tokens, NEW, (tl.EOS,))
    found = {kind: [] for kind in (IN_NEEDLE, COPIES)}
    for token, key_LH in zip(said, keys, strict=True):
        inside = {head for head in np.ndindex(key_LH.shape) if case.span[0] <= key_LH[head] < case.span[1]}
        found[IN_NEEDLE].append(inside)
        found[COPIES].append({head for head in inside if case.tokens[key_LH[head]] == token})
    return found


def _overlap(a, b):
    return len(a & b) / len(a | b) if a | b else None


def _mean(values):
    values = [value for value in values if value is not None]
    return np.mean(values) if values else None


def _runs(sets):
    """The lengths of all runs of all heads."""
    found = []
    for head in set().union(*sets):
        grouped = itertools.groupby(sets, key=lambda heads, head=head: head in heads)
        found += [len(list(group)) for active, group in grouped if active]
    return found


@pytest.fixture(scope="module")
def followed():
    return steps.follow(LM, NEEDLES, max_new_tokens=NEW, batch_size=BATCH)


def test_heads_are_followed_through_the_answers_that_count(followed):
    assert followed.outcomes[-1].startswith("wrong answer") and followed.outcomes.count("counted") >= 4
    counted = [case for case, outcome in zip(NEEDLES, followed.outcomes, strict=True) if outcome == "counted"]
    for kind, answers in followed.active.items():
        assert len(answers) == len(counted)
        for active_NLH, case in zip(answers, counted, strict=True):
            assert [{*map(tuple, np.argwhere(active_LH))} for active_LH in active_NLH] == _sets(case)[kind]
    assert sum(a.sum() for a in followed.active[IN_NEEDLE]) > sum(a.sum() for a in followed.active[COPIES]) > 0
    with pytest.raises(NoCaseCounts):
        steps.follow(LM, NEEDLES[-1:] * BATCH, max_new_tokens=NEW, batch_size=BATCH)


@pytest.mark.parametrize("kind", [IN_NEEDLE, COPIES])
def test_persistence_is_counted_from_sets_of_heads(followed, kind):
    answers, heads = followed.active[kind], [(1, 0), (1, 2)]
    sets = [[{*map(tuple, np.argwhere(active_LH))} for active_LH in active_NLH] for active_NLH in answers]
    found = steps.persistence(kind, answers, heads)
    expected = {
        "heads": [np.mean([len(step) for step in of_case]) for of_case in sets],
        "distinct": [len(set().union(*of_case)) for of_case in sets],
        "following": [_mean(_overlap(a, b) for a, b in itertools.pairwise(of_case)) for of_case in sets],
        "listed": [_mean(_overlap(step, {*heads}) for step in of_case) for of_case in sets],
        "active": [np.mean([len(step & {*heads}) / 2 for step in of_case]) for of_case in sets],
        "run": [_mean(_runs(of_case)) for of_case in sets],
    }
    for name, values in expected.items():
        number = getattr(found, name)
        assert number.value == pytest.approx(_mean(values)), name
        assert number.n == sum(value is not None for value in values) and number.low <= number.value <= number.high
    rows = steps.by_position(kind, answers, heads)
    lengths = sorted(map(len, sets))
    assert [row.position for row in rows] == [*range(lengths[-2])]
    for row in rows:
        there = [of_case[row.position] for of_case in sets if len(of_case) > row.position]
        pairs = [of_case[row.position :][:2] for of_case in sets if len(of_case) > row.position + 1]
        assert (row.heads.n, row.heads.value) == (len(there), pytest.approx(np.mean([*map(len, there)])))
        following = _mean(_overlap(*pair) for pair in pairs)
        assert row.following is following is None or row.following.value == pytest.approx(following)
        assert row.listed.value == pytest.approx(np.mean([_overlap(step, {*heads}) for step in there]))


def test_the_most_active_heads_come_first_with_their_runs(followed):
    answers = followed.active[COPIES]
    sets = [[{*map(tuple, np.argwhere(active_LH))} for active_LH in active_NLH] for active_NLH in answers]
    rows = steps.most_active(COPIES, answers, [(1, 0)])
    shares = [row.value for row in rows]
    assert shares == sorted(shares, reverse=True) and min(shares) > 0
    assert {(row.layer, row.head) for row in rows} == set().union(*itertools.chain(*sets))
    for row in rows:
        head = row.layer, row.head
        assert row.value == pytest.approx(np.mean([np.mean([head in step for step in of_case]) for of_case in sets]))
        of_head = [[step & {head} for step in of_case] for of_case in sets]
        assert row.run == pytest.approx(np.mean([run for of_case in of_head for run in _runs(of_case)]))
        assert row.listed == (head == (1, 0))
        assert row.by_position[0] == np.mean([head in of_case[0] for of_case in sets])


def test_runs_by_chance_are_those_of_all_orders():
    """Tokens of an answer in each order: as many tokens, in so many runs on average."""
    active_NLH = np.random.default_rng(0).random((5, 2, 3)) < 0.5
    orders = [active_NLH[list(order)] for order in itertools.permutations(range(5))]
    runs = [sum(itertools.chain([len(_runs([{*map(tuple, np.argwhere(x))} for x in order]))])) for order in orders]
    run, by_chance = steps.run_length(active_NLH)
    assert by_chance == pytest.approx(active_NLH.sum() / np.mean(runs)) and run == active_NLH.sum() / runs[0]
    assert np.isnan(steps.run_length(np.zeros((3, 2, 2), bool))).all()


def test_what_is_never_defined_is_none():
    """One answer of one token at which no head retrieves has no neighbours, no runs and no interval."""
    silent = [np.zeros((1, *((CONFIG.n_layers, CONFIG.n_heads))), bool)]
    found = steps.persistence(COPIES, silent, [(0, 0)])
    assert (found.following, found.run, found.shuffled) == (None, None, None)
    assert (found.heads.value, found.heads.low, found.active.value) == (0.0, None, 0.0)
    (row,) = steps.by_position(COPIES, silent, [(0, 0)])
    assert row.following is None and steps.most_active(COPIES, silent, [(0, 0)]) == []
