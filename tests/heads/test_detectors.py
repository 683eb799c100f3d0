"""Detectors against float64 references: whole rows, attention weights in full, loops over heads and positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, in_float64, reference, reference_answer

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.needles import Needle, build_cases, draw_specs
from retmask_jax.data.prompter import Prompter
from retmask_jax.generation.language_model import from_params
from retmask_jax.heads import detectors
from retmask_jax.heads.copy_score import detect, words_of
from retmask_jax.heads.detection import COUNTED
from retmask_jax.heads.detectors import DETECTORS, agreement, copy_forced, over_seeds, query_focused
from retmask_jax.heads.reading import measure_answers
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.sharding import plain_shapes

LM = copying_lm()
PARAMS = in_float64(LM.params)
HEADS = CONFIG.n_layers, CONFIG.n_heads


def _built_cases(n=5, seed=0, length=60):
    rng = np.random.default_rng(seed)
    needles = [Needle(**record) for record in tl.needle_records(rng, n)]
    specs = draw_specs(needles, [length], [0.2, 0.8], per_length=n)
    return build_cases(Prompter(LM.tokenizer), tl.haystack_text(rng, 30), needles, specs)


CASES = _built_cases()


def _copied_cases():
    """Cases whose gold answer is one token that the model says, found in its prompt; the last one is another token."""
    cases = []
    for case in CASES:
        (said,), _ = reference_answer(PARAMS, case.tokens, 1)
        places = [i for i, token in enumerate(case.tokens) if token == said]
        cases += [dataclasses.replace(case, span=(places[0], places[0] + 1))] if places else []
    assert len(cases) >= 3
    other = next(i for i, token in enumerate(cases[-1].tokens) if token != said)
    return [*cases, dataclasses.replace(cases[-1], span=(other, other + 1))]


def _forced(case):
    """The gold answer after its prompt, and the positions that predict it."""
    row = np.array([*case.tokens, *words_of(case)])
    return row, np.arange(len(case.tokens) - 1, len(row) - 1)


def _run(name, cases, **options):
    return DETECTORS[name](LM, cases, batch_size=BATCH, **options)


def _per_case(found):
    return np.moveaxis(found.scores.per_case, -1, 0)


@pytest.mark.parametrize("answer", ["itself", "other"])
def test_copies_that_are_read_afterwards_score_exactly_as_those_of_decoding(answer):
    """Also where the model says something else than the needle, or nothing. All rows are padded to one width."""
    built = _built_cases(length=50)
    said = [reference_answer(PARAMS, case.tokens, NEW, (tl.EOS,))[0] for case in built]
    texts = [" ".join(tl.VOCABULARY[i] for i in tokens if i > tl.UNK) for tokens in said]
    assert sum(map(bool, texts)) >= 3
    if answer == "other":
        texts = ["nothing of it", *texts[1:]]
    cases = [
        dataclasses.replace(case, needle=dataclasses.replace(case.needle, answer=text))
        for case, text in zip(built, texts, strict=True)
    ]
    silent = dataclasses.replace(cases[0], tokens=(*cases[0].tokens[:-30], *[tl.EOS] * 30))
    decoded = detect(LM, [*cases, silent], max_new_tokens=NEW, batch_size=BATCH, read=False)
    forced = copy_forced(LM, [*cases, silent], max_new_tokens=NEW, batch_size=BATCH)
    assert forced.scores == decoded.scores and decoded.scores.mean.max() > 0
    assert (forced.answers, forced.outcomes) == (decoded.answers, decoded.outcomes)
    assert decoded.outcomes[-1] == "empty answer"


def test_copy_position_is_hits_at_the_very_token_over_all_tokens():
    """Two needles of other lengths are pooled; equal tokens elsewhere are no hits."""
    start = CASES[0].span[0]
    cases = [*CASES[1:], dataclasses.replace(CASES[0], span=(start, start + 2))]
    hits, events = np.zeros((len(cases), *HEADS)), 0
    for n, case in enumerate(cases):
        row, positions = _forced(case)
        _, attention = reference(PARAMS, row)
        for t, position in enumerate(positions):
            hits[n] += attention[:, :, position].argmax(-1) == case.span[0] + t
            events += 1
    found = _run("copy_position", cases)
    assert len({len(words_of(case)) for case in cases}) > 1 and hits.sum() > 0
    np.testing.assert_allclose(found.scores.mean, hits.sum(0) / events, atol=1e-6)
    np.testing.assert_allclose(_per_case(found), hits * len(cases) / events, atol=1e-6)


def test_argmax_is_of_the_last_prompt_position_and_mass_of_all_that_predict():
    """Spans of the answers' lengths, most of them moved to where a head looks."""
    expected, moved = {"argmax": [], "mass": []}, [CASES[0]]
    for case in CASES[1:]:
        key = int(reference(PARAMS, np.array(case.tokens))[1][1, 0, -1].argmax())
        start = min(key, len(case.tokens) - len(words_of(case)))
        moved.append(dataclasses.replace(case, span=(start, start + len(words_of(case)))))
    for case in moved:
        row, positions = _forced(case)
        _, attention = reference(PARAMS, row)
        keys = attention[:, :, positions[0]].argmax(-1)
        expected["argmax"].append((keys >= case.span[0]) & (keys < case.span[1]))
        expected["mass"].append(attention[:, :, positions, slice(*case.span)].sum(-1).mean(-1))
    assert 0 < np.sum(expected["argmax"]) < np.size(expected["argmax"])
    for name, values in expected.items():
        np.testing.assert_allclose(_per_case(_run(name, moved)), values, atol=1e-5)


def test_query_focused_is_mass_from_the_question_to_the_statement_less_that_of_a_null_query():
    """Long enough for what a question and the null query have in front of them to be computed once."""
    expected, null = [], LM.tokenizer.encode("the of", add_special_tokens=False)
    cases = _built_cases(3, length=120)
    for case in cases:
        begin, end = case.question
        masses = []
        for query in (case.tokens[begin:end], null):
            _, attention = reference(PARAMS, np.array([*case.tokens[:begin], *query]))
            masses.append(attention[:, :, begin:, slice(*case.statement)].sum(-1).mean(-1))
        expected.append(masses[0] - masses[1])
    found = query_focused(LM, cases, batch_size=BATCH, null_query="the of")
    np.testing.assert_allclose(_per_case(found), expected, atol=1e-5)
    with pytest.raises(ValueError, match="null_query '' has no tokens"):
        query_focused(LM, CASES, null_query="")


def test_logit_is_the_direct_path_of_what_is_read_in_the_needle_against_elsewhere():
    cases, expected = [dataclasses.replace(CASES[0], span=(0, 0)), *_copied_cases()], []
    scale_E, embedding_VE = PARAMS["norm"]["scale"], PARAMS["embed"]["embedding"]
    o_LHDE = PARAMS["blocks"]["0"]["attn"]["o"]["kernel"].reshape(*HEADS, CONFIG.head_dim, -1)
    for case in cases[1:-1]:
        row, positions = _forced(case)
        kept = []
        _, attention = reference(PARAMS, row, kept=kept)
        *values, states_TE = kept
        score = np.zeros(HEADS)
        for layer, head in np.ndindex(HEADS):
            for t in positions:
                direction_E = embedding_VE[row[t + 1]] * scale_E / np.sqrt((states_TE[t] ** 2).mean() + CONFIG.norm_eps)
                reads_SD = attention[layer, head, t, : t + 1, None] * values[layer][: t + 1, head // 2]
                added_S = reads_SD @ o_LHDE[layer, head] @ direction_E
                inside = added_S[slice(*case.span)].sum()
                elsewhere = (added_S.sum() - inside) / t  # of one token, as the needle is
                score[layer, head] += (inside - elsewhere) / len(positions)
        expected.append(score)
    found = _run("logit", cases)
    assert found.outcomes == ["no needle"] + [COUNTED] * len(expected) + ["wrong answer"]
    np.testing.assert_allclose(_per_case(found), expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_elsewhere_counts_as_many_tokens_as_the_needle_has():
    case = dataclasses.replace(CASES[0], tokens=(5,) * 10, span=(4, 6))
    parts_NLH2 = np.array([[3.0, 7.0], [1.0, 10.0]]).reshape(2, 1, 1, 2)  # 8 and 9 tokens elsewhere
    expected = np.mean([3 - 2 / 8 * (7 - 3), 1 - 2 / 9 * (10 - 1)])
    np.testing.assert_allclose(detectors._contrast(parts_NLH2, case), [[expected]])


def test_contributions_add_up_to_the_logit():
    """Layers of two kinds, one without RoPE, and a tail, norms before and after, with an offset, scales. The embeddings
    lie in one half of the width and the unembedding in the other, and the MLPs write nothing: heads alone make the
    logits."""
    config = ModelConfig(
        vocab_size=31,
        hidden_size=16,
        mlp_size=8,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=4,
        max_length=128,
        norm_placement="both",
        norm_offset=1.0,
        layer_pattern=("sliding", "full"),
        window=5,
        embed_scale=4.0,
        residual_scale=0.6,
        logit_scale=2.5,
        rope_pattern=(False, True),
    )
    tokens = np.random.default_rng(0).integers(0, 31, (1, 20))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), plain_shapes(config))
    for block in (*params["blocks"].values(), *params["tail"].values()):
        block["mlp"]["down"]["kernel"][:] = 0
    params["embed"]["embedding"][:, 8:] = 0
    params["lm_head"]["kernel"][:8] = 0
    prompt, answer = tuple(tokens[0, :14].tolist()), tuple(tokens[0, 14:].tolist())
    lm = from_params(config, jax.tree.map(jnp.asarray, params))
    (found,) = measure_answers(lm, [prompt], [answer], detectors._contributions, spans=[((3, 9), (0, 99))], values=True)
    logits_TV = np.asarray(lm.logits(tokens))[0, 13:-1]
    expected = logits_TV[np.arange(6), answer]
    np.testing.assert_allclose(found[1][..., 1].sum((1, 2)), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected).max() > 0.1
    assert found[0].tolist() == logits_TV.argmax(-1).tolist()


def test_gradient_equals_small_differences_of_every_gate():
    expected, step = np.zeros((len(CASES), *HEADS)), 1e-4
    for n, case in enumerate(CASES):
        row, positions = _forced(case)
        for index in np.ndindex(HEADS):
            gate = np.zeros(HEADS)
            gate[index] = step
            ends = [_logprob(row, positions, sign * gate) for sign in (1, -1)]
            expected[n][index] = -(ends[0] - ends[1]) / (2 * step)
    found = _run("gradient", CASES)
    np.testing.assert_allclose(_per_case(found), expected, atol=2e-3)
    assert np.abs(expected).max() > 1


def _logprob(row, positions, gate):
    logits_TV, _ = reference(PARAMS, row, head_mask=gate)
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return logp_TV[positions, row[positions + 1]].sum()


@pytest.mark.parametrize("name", ["copy_position", "argmax", "mass", "query_focused", "gradient"])
def test_cases_without_a_needle_are_told_apart(name):
    cases = [dataclasses.replace(CASES[0], span=(0, 0), statement=(0, 0)), *CASES]
    found = _run(name, cases)
    assert found.outcomes == ["no needle"] + [COUNTED] * len(CASES)
    assert found.answers == [case.needle.answer for case in cases]
    assert (found.scores.counts == len(CASES)).all()
    with pytest.raises(ValueError, match="none of 1 detection cases counts: {'no needle': 1}"):
        _run(name, cases[:1])


def test_a_question_that_cannot_look_at_the_needle_is_told_apart():
    case = CASES[0]
    early = dataclasses.replace(case, question=(0, 2))
    none = dataclasses.replace(case, question=(0, 0))
    found = _run("query_focused", [early, *CASES, none])
    assert found.outcomes == ["question before the needle", *[COUNTED] * len(CASES), "no question"]


# --- agreement ---


def test_agreement_of_head_sets_and_ranks():
    scores = {
        "a": HeadScores.from_array([[4.0, 3.0, 2.0, 1.0]]),
        "b": HeadScores.from_array([[40.0, 30.0, 20.0, 10.0]]),
        "c": HeadScores.from_array([[1.0, 2.0, 3.0, 4.0]]),
    }
    found = agreement(scores, top_k=3)
    assert [(pair.a, pair.b) for pair in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert (found[0].jaccard, found[0].spearman) == (1.0, pytest.approx(1))
    assert (found[1].jaccard, found[1].spearman) == (0.5, pytest.approx(-1))


def test_seeds_are_compared_in_pairs():
    runs = [HeadScores.from_array([row]) for row in ([4.0, 3, 2, 1], [4.0, 3, 2, 1], [4.0, 1, 2, 3])]
    found = over_seeds(runs, top_k=2)
    assert found.n == 3 and found.common == [(0, 0)]
    assert found.jaccard == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert found.spearman == pytest.approx((1 + 0.2 + 0.2) / 3)
    with pytest.raises(ValueError, match="1 runs cannot be compared"):
        over_seeds(runs[:1], top_k=2)
