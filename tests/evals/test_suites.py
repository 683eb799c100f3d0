"""Suites other than RULER: needle heat maps, key-value recall, re-ranking, loss by position, and their config section."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_samples import ESSAY, byte_pairs, said_by, text_of
from helpers_tiny import BATCH, CONFIG, copying_lm, copying_params, in_float64, reference
from scipy import stats as scipy_stats

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.needles import Needle
from retmask_jax.data.prompter import Prompter
from retmask_jax.evals import perplexity, scoring
from retmask_jax.evals.external import helmet
from retmask_jax.evals.suites import json_kv, niah, registry, rerank, samples
from retmask_jax.evals.suites.questions import Question, read_questions
from retmask_jax.generation.decode import Generated
from retmask_jax.generation.language_model import from_params
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.utils.store import Store

# --- needle in a haystack ---


def test_even_grid_is_the_usual_one():
    lengths, depths = niah.even_grid(1000, 128_000)
    assert (len(lengths), len(depths)) == (40, 10)
    assert (lengths[0], lengths[-1], depths[0], depths[-1]) == (1000, 128_000, 0, 1)
    assert {math.floor(b - a) for a, b in zip(lengths, lengths[1:], strict=False)} <= {3256, 3257}
    with pytest.raises(ValueError, match="5 lengths from 10 to 13"):
        niah.even_grid(10, 13, 5, 2)


def test_heat_map_holds_the_mean_recall_of_each_cell(monkeypatch):
    """ROUGE-1 recall is the share of the reference's words that the answer has."""
    rng = np.random.default_rng(1)
    needles = [Needle(**record) for record in tl.needle_records(rng, 8)]
    cases = niah.niah_cases(
        Prompter(tl.build_tokenizer()), tl.haystack_text(rng, 80), needles, (96, 160), (0.0, 0.5, 1.0), per_cell=2
    )
    assert sorted((c.spec.length, c.spec.depth) for c in cases) == sorted(
        (n, d) for n in (96, 160) for d in (0.0, 0.5, 1.0) * 2
    )
    words = [case.needle.answer.split() for case in cases]
    share = [i % 6 for i in range(len(cases))]  # so many of five words, so the last one has all
    said = [" ".join(some[:n]) for some, n in zip(words, share, strict=True)]
    monkeypatch.setattr(niah, "answers", lambda lm, prompts, interventions, **options: said)
    measured = niah.run_niah(copying_lm(), cases, max_new_tokens=8)
    assert [one.name for one in measured] == ["niah/rouge 96", "niah/exact 96", "niah/rouge 160", "niah/exact 160"]
    cells = {(cell.length, cell.depth): cell for cell in niah.heat_map(measured)}
    exact = {(cell.length, cell.depth): cell.value for cell in niah.heat_map(measured, "exact")}
    for cell in cells:
        here = [i for i, case in enumerate(cases) if (case.spec.length, case.spec.depth) == cell]
        assert cells[cell].value == pytest.approx(np.mean([share[i] / 5 for i in here])) and cells[cell].n == 2
        assert exact[cell] == np.mean([share[i] == 5 for i in here])
    with pytest.raises(
        ValueError, match=f"needle in a haystack needs 560 tokens, the model's context is {CONFIG.max_length}"
    ):
        niah.run_niah(copying_lm(), cases, max_new_tokens=400)


# --- key-value recall ---


def test_objects_fill_their_length_and_hold_the_pair_that_is_asked_for():
    for prompter in (byte_pairs(900), byte_pairs(310, False)):
        for sample in json_kv.json_kv_samples(prompter, 2500, 3):
            text = text_of(prompter, sample)
            pairs = json.loads(text[text.index("{") : text.rindex("}") + 1])
            key = re.search(r'the key "([^"]+)"', text)[1]
            assert (pairs[key],) == sample.references and len(pairs) == sample.units + 1
            assert said_by(prompter, sample)[0].strip(" {,\n").startswith(f'"{key}": "{pairs[key]}"')
            assert 0 <= 2400 - len(sample.tokens) < prompter.count(f',\n "{key}": "{pairs[key]}"') + 40


def test_pairs_stand_anywhere_and_depend_on_the_seed_alone():
    prompter, places = byte_pairs(900), []
    some = json_kv.json_kv_samples(prompter, 1200, 120, max_new_tokens=20)
    for sample in some:
        pairs = json.loads(re.search(r"{.*?}", text_of(prompter, sample), re.DOTALL)[0])
        places.append(list(pairs.values()).index(sample.references[0]) / len(pairs))
    jitter = np.random.default_rng(0).random(len(places)) / (some[0].units + 1)
    assert scipy_stats.kstest(np.array(places) + jitter, "uniform").pvalue > 0.01
    again = json_kv.json_kv_samples(byte_pairs(310), 1200, 2, max_new_tokens=20)
    assert [s.references for s in again] == [s.references for s in some[:2]]


def test_json_kv_counts_values_that_occur_in_the_answer(monkeypatch):
    lm = from_params(CONFIG, None, byte_pairs(900).tokenizer)
    given = {}

    def answer(lm, some, **options):
        given.update(options)
        return [f"It is {some[0].references[0].upper()}.", some[0].references[0][:-1]]

    monkeypatch.setattr(samples, "answer", answer)
    (one,) = json_kv.run_json_kv(lm, byte_pairs(900), lengths=(480,), n=2, interventions="mask", batch_size=7)
    assert (one.name, one.values.tolist(), one.binary) == ("json_kv/one key 480", [1, 0], True)
    assert (given["interventions"], given["batch_size"]) == ("mask", 7)


# --- re-ranking ---


PASSAGES = (
    ("3", "the queen sang .", 0),
    ("31", "oslo is here .", 3),
    ("p-3", "a city by the sea .", 2),
    ("p", "the north .", 1),
)
QUERIES = [
    {
        "query": "where is oslo",
        "passages": [dict(zip(("id", "text", "relevance"), row, strict=True)) for row in PASSAGES],
    },
    {"query": "none", "passages": [{"id": "1", "text": "a", "relevance": 0}]},
]


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text("\n".join(map(json.dumps, QUERIES)))
    return rerank.read_queries(path)


def test_orders_are_read_from_answers_of_any_form():
    ids = ["3", "31", "p-3", "p"]
    for answer, order in (
        ("31 > 3 > p", ["31", "3", "p"]),
        (" [p-3], [p], [31].", ["p-3", "p", "31"]),
        ("ID31 > IDp-3 > ID99 > ID3 > ID31", ["31", "p-3", "3"]),
        ("1. 3\n2. 31\n3. p", ["3", "31", "p"]),
        ("1) [p]\n\n2) [3]", ["p", "3"]),
        ("3.", ["3"]),
        ("The best is p-3; 313 and q-3 are not.", ["p-3"]),
        ("I cannot say", []),
    ):
        assert rerank.parse_order(answer, ids) == order, answer
    assert rerank.parse_order("1. 3\n2. 1\n3. 2", ["1", "2", "3"]) == ["3", "1", "2"]
    assert rerank.parse_order("ID7 > 7", ["7", "ID7"]) == ["ID7", "7"]


def test_ndcg_equals_a_worked_example():
    """DCG = sum of relevance / log2(rank + 1), over that of the best order; what is not named adds nothing."""
    pytest.importorskip("pytrec_eval")
    labels = {"3": 0, "31": 3, "p-3": 2, "p": 1}
    best = 3 / 1 + 2 / math.log2(3) + 1 / 2
    assert rerank.ndcg(["31", "p-3", "p", "3"], labels) == pytest.approx(1)
    assert rerank.ndcg(["3", "31", "p", "p-3"], labels) == pytest.approx(
        (3 / math.log2(3) + 1 / 2 + 2 / math.log2(5)) / best
    )
    assert rerank.ndcg(["p"], labels) == pytest.approx(1 / best)
    assert rerank.ndcg(["x", "31"], labels) == pytest.approx(3 / math.log2(3) / best)
    assert rerank.ndcg([], labels) == 0
    many = {str(i): int(i == 11) for i in range(12)}
    assert rerank.ndcg(list(many), many) == 0  # rank 12 is after the tenth


def test_prompts_show_passages_in_random_order_and_only_as_many_as_fit(queries):
    prompter = byte_pairs(900)
    (whole, _), (cut, _) = (rerank.rerank_samples(prompter, queries, n, max_new_tokens=20) for n in (None, 170))
    shown = re.findall(r"\[ID: ([\w-]+)\] (.*)", text_of(prompter, whole))
    assert dict(shown) == {p["id"]: p["text"] for p in QUERIES[0]["passages"]} and set(whole.references) == set(
        dict(shown)
    )
    assert {
        tuple(re.findall(r"ID: ([\w-]+)\]", text_of(prompter, rerank.rerank_samples(prompter, queries, seed=seed)[0])))
        for seed in range(8)
    } > {tuple(dict(shown))}
    assert len(cut.tokens) <= 150 and cut.references == ("3", "31", "p-3", "p")[: cut.units] and 1 <= cut.units < 4


def test_rerank_scores_answers_and_says_what_is_missing(monkeypatch, queries):
    pytest.importorskip("pytrec_eval")
    lm = from_params(CONFIG, None, byte_pairs(900).tokenizer)
    monkeypatch.setattr(rerank, "answer", lambda lm, some, **options: ["31 > p" for _ in some])
    (one,) = rerank.run_rerank(lm, byte_pairs(900), queries)
    assert one.values == pytest.approx([(3 + 1 / math.log2(3)) / (3 + 2 / math.log2(3) + 1 / 2)])
    assert (one.ids, dict(one.missing)) == (("0-0",), {"no relevant passage": 1})
    with pytest.raises(ValueError, match="no query has a relevant passage"):
        rerank.run_rerank(lm, byte_pairs(900), queries[1:])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"query": "a"}, "line 1: it must have query, and passages"),
        ({"query": "a", "passages": [{"id": 1, "text": "b", "relevance": 0.5}]}, "relevance 0.5"),
        ({"query": "a", "passages": [{"id": 1, "text": "b", "relevance": 1}] * 2}, "2 passages with 1 ids"),
        ({"query": "a", "passages": []}, "0 passages"),
    ],
)
def test_wrong_queries_are_named(tmp_path, record, words):
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=words):
        rerank.read_queries(tmp_path / "q.jsonl")


# --- questions ---


def test_questions_of_all_three_forms(tmp_path):
    simple = [
        {"question": "who?", "answers": ["Ann", "Ann", "Bo"], "context": ["d1", "d2"]},
        {"question": "q", "answer": "x", "context": "d2"},
    ]
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "p1",
                        "qas": [
                            {"question": "a?", "answers": [{"text": "A"}, {"text": "A"}]},
                            {"question": "n?", "answers": [], "is_impossible": True},
                        ],
                    },
                    {"context": "p2", "qas": []},
                ]
            }
        ]
    }
    rows = [{"question": "a?", "context": "p1", "answers": {"text": ["A"], "answer_start": [0]}}]
    hotpot = [{"question": "h?", "answer": "yes", "context": [["T", ["s1.", " s2."]], ["U", ["s3."]]]}]
    columns = [
        {"question": "h?", "answer": "yes", "context": {"title": ["T", "U"], "sentences": [["s1.", " s2."], ["s3."]]}}
    ]
    path = tmp_path / "q.json"
    for content, items, documents in (
        (simple, (Question("who?", ("Ann", "Bo"), (0, 1)), Question("q", ("x",), (1,))), ("d1", "d2")),
        (squad, (Question("a?", ("A",), (0,), (0, 1)),), ("p1", "p2")),
        (rows, (Question("a?", ("A",), (0,)),), ("p1",)),
        (hotpot, (Question("h?", ("yes",), (0, 1)),), ("T\ns1. s2.", "U\ns3.")),
        (columns, (Question("h?", ("yes",), (0, 1)),), ("T\ns1. s2.", "U\ns3.")),
    ):
        path.write_text(json.dumps(content))
        found = read_questions(path)
        assert (found.items, found.documents) == (items, documents)
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, simple)))
    assert len(read_questions(tmp_path / "q.jsonl").items) == 2
    for content, words in (
        ("[]", "holds no questions"),
        ('[{"question": "a"}]', "record 1: it must have"),
        ("{}", "SQuAD"),
        ('{"data": [{}]}', "wrong at 'paragraphs'"),
        ("[", "is not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_questions(path)


# --- loss by position ---


def _naive_losses(row, head_mask=None):
    """Loss of each token after the first, in float64, one row at a time."""
    logits, _ = reference(in_float64(copying_params()), row, head_mask)
    return [math.log(np.exp(logits[t]).sum()) - logits[t, row[t + 1]] for t in range(len(row) - 1)]


TEXT = tl.haystack_text(np.random.default_rng(3), 40)


def test_buckets_are_powers_of_two_and_cover_every_position_once():
    assert perplexity.position_buckets(9) == [(1, 2), (2, 4), (4, 8), (8, 9)]
    for length in (2, 3, 8, 64, 100):
        covered = [t for first, end in perplexity.position_buckets(length) for t in range(first, end)]
        assert covered == list(range(1, length))


def test_loss_by_position_equals_a_naive_loop():
    lm, masked = copying_lm(), mask_heads(CONFIG, [(1, 0), (0, 2)])
    windows = perplexity.text_windows(lm.tokenizer, TEXT, 24, 5)
    for interventions in (None, masked):
        mask = None if interventions is None else np.asarray(interventions.head_mask)
        measured = perplexity.run_positions(lm, windows, batch_size=BATCH, interventions=interventions)
        assert [one.task for one in measured] == [
            "all",
            *(f"positions {x}" for x in ("1-1", "2-3", "4-7", "8-15", "16-23")),
        ]
        for i, row in enumerate(windows):
            losses = _naive_losses(row, mask)
            parts = [losses, losses[:1], losses[1:3], losses[3:7], losses[7:15], losses[15:]]
            assert [one.values[i] for one in measured] == pytest.approx([np.mean(part) for part in parts], rel=1e-4)


def test_sliding_loss_equals_a_naive_loop():
    """Every token after the first window's context is predicted once, from at least 14 tokens of text."""
    lm = copying_lm()
    windows = perplexity.sliding_windows(lm.tokenizer, TEXT, 24, 9)
    one = perplexity.run_sliding(lm, windows, 9, batch_size=BATCH)
    ids = lm.tokenizer(" ".join(TEXT), add_special_tokens=False)["input_ids"]
    assert len(one.values) == 1 + (len(ids) - 23) // 9
    expected, start = [], 14
    while start + 9 <= len(ids):
        context = [tl.BOS, *ids[start - 14 : start]]
        expected.append(np.mean(_naive_losses(np.array(context + ids[start : start + 9]))[-9:]))
        start += 9
    assert one.values == pytest.approx(expected, rel=1e-4)
    assert len(perplexity.sliding_windows(lm.tokenizer, TEXT, 24, 9, 3)) == 3
    with pytest.raises(ValueError, match=r"a stride of 23 in windows of 24 tokens: it must be in 1..22"):
        perplexity.sliding_windows(lm.tokenizer, TEXT, 24, 23)
    with pytest.raises(ValueError, match="a window of 9999 needs 9998"):
        perplexity.sliding_windows(lm.tokenizer, TEXT, 9999, 9)


# --- the config section ---


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(ESSAY))
    needles = tl.needle_records(np.random.default_rng(0), 6)
    (tmp_path / "needles.jsonl").write_text("\n".join(map(json.dumps, needles)))
    (tmp_path / "queries.jsonl").write_text(json.dumps(QUERIES[0]))
    (tmp_path / "qa.json").write_text(json.dumps([{"question": "q?", "answer": "x", "context": "x is here"}] * 2))
    return tmp_path


def _section(*overrides):
    return load_recipe("default", [(f"suites.{key}", str(value)) for key, value in overrides]).suites


def test_all_suites_are_off_by_default():
    section = _section()
    assert registry.suites_on(section) == registry.suite_files(section) == []
    assert registry.run_suites(None, None, section, None, batch_size=1) == []
    registry.check_suites(section)
    registry.check_context(section, 1)


def test_suites_that_are_on_run_with_their_settings(monkeypatch, files):
    calls = {}
    for name in ("run_ruler", "run_niah", "run_json_kv", "run_rerank", "run_positions", "run_sliding"):

        def run(*given, name=name, **options):
            calls[name] = (given, options)
            return name if name == "run_sliding" else [name]

        monkeypatch.setattr(registry, name, run)
    monkeypatch.setattr(registry, "ndcg", lambda order, labels: 1.0)
    tasks = "vt", "qa_1", "niah_single_2"
    section = _section(
        ("ruler.tasks", tasks),
        ("ruler.lengths", (600, 900)),
        ("ruler.n", 7),
        ("ruler.essay", "text.txt"),
        ("ruler.qa_1", "qa.json"),
        ("niah.needles", "needles.jsonl"),
        ("niah.haystack", "text.txt"),
        ("niah.shortest", 100),
        ("niah.longest", 200),
        ("niah.n_lengths", 2),
        ("niah.n_depths", 3),
        ("niah.max_new_tokens", 9),
        ("json_kv.lengths", (512,)),
        ("json_kv.n", 5),
        ("rerank.file", "queries.jsonl"),
        ("rerank.length", 2000),
        ("perplexity.file", "text.txt"),
        ("perplexity.length", 16),
        ("perplexity.windows", 3),
        ("perplexity.stride", 4),
    )
    assert registry.suite_files(section) == ["needles.jsonl", "qa.json", "queries.jsonl", "text.txt"]
    lm = SimpleNamespace(config=SimpleNamespace(max_length=2000))
    prompter = Prompter(tl.build_tokenizer())
    found = registry.run_suites(lm, prompter, section, files.joinpath, batch_size=3, interventions="mask")
    assert found == ["run_ruler", "run_niah", "run_json_kv", "run_rerank", "run_positions", "run_sliding"]
    assert all(given[0] is lm and (o["batch_size"], o["interventions"]) == (3, "mask") for given, o in calls.values())
    ruler = calls["run_ruler"][1]
    assert (ruler["tasks"], ruler["lengths"], ruler["n"], ruler["haystack"]) == (tasks, (600, 900), 7, ESSAY)
    assert set(ruler["questions"]) == {"qa_1"}
    assert [(c.spec.length, c.spec.depth) for c in calls["run_niah"][0][1]] == [
        (n, d) for n in (100, 200) for d in (0, 0.5, 1)
    ]
    assert calls["run_rerank"][0][3] == 2000 and len(calls["run_rerank"][0][2]) == 1
    assert (calls["run_positions"][0][1].shape, calls["run_sliding"][0][1].shape) == ((3, 16), (3, 16))
    lm.config.max_length = 1999
    with pytest.raises(ValueError, match="suites.rerank needs 2000 tokens, the model's context is 1999"):
        registry.run_suites(lm, prompter, section, files.joinpath, batch_size=3)


def test_suites_whose_answers_are_decoded_take_a_contrast(monkeypatch, files):
    """It reaches the decoding of each of them; a suite that reads given texts refuses it."""
    used, lm = [], copying_lm().replace(config=dataclasses.replace(CONFIG, max_length=2000))

    def stream(config, params, requests, *, contrast=None, **options):
        used.append(contrast)
        return ((i, Generated(np.array([7]), np.int32(1), np.int32(-1))) for i in range(len(requests)))

    monkeypatch.setattr(scoring, "generate_stream", stream)
    monkeypatch.setattr(registry, "ndcg", lambda order, labels: 1.0)
    monkeypatch.setattr(rerank, "ndcg", lambda order, labels: 1.0)
    contrast = ContrastDecoding(mask_heads(lm.config, [(1, 0)]), 0.5)
    suites = {
        "ruler": [("ruler.tasks", ("vt",)), ("ruler.lengths", (1500,)), ("ruler.n", 1)],
        "niah": [("niah.needles", "needles.jsonl"), ("niah.haystack", "text.txt"), ("niah.shortest", 400)]
        + [("niah.longest", 450), ("niah.n_lengths", 1), ("niah.n_depths", 1)],
        "json_kv": [("json_kv.lengths", (500,)), ("json_kv.n", 1), ("json_kv.max_new_tokens", 8)],
        "rerank": [("rerank.file", "queries.jsonl"), ("rerank.length", 400)],
    }
    assert set(suites) == {name for name, suite in registry.SUITES.items() if suite.decodes}
    for name, overrides in suites.items():
        used.clear()
        given = lm, byte_pairs(600), _section(*overrides), files.joinpath
        registry.run_suites(*given, batch_size=1, contrast=contrast)
        assert used == [contrast], name
    job = helmet._Job(lm, mask_heads(lm.config, []), 1, Store(), Store(), contrast)
    used.clear()
    helmet._answers(job, [np.array([5, 6])], {"max_new_tokens": 2}, "json_kv")
    assert used == [contrast]
    section = _section(("perplexity.file", "text.txt"), ("perplexity.length", 16))
    with pytest.raises(ValueError, match="suite perplexity reads given texts"):
        registry.run_suites(lm, Prompter(lm.tokenizer), section, files.joinpath, batch_size=1, contrast=contrast)


def test_results_under_a_contrast_are_kept_apart():
    none, mask = Interventions(), mask_heads(CONFIG, [(1, 0)])
    contrasts = [None, *(ContrastDecoding(mask, *of) for of in ((0.5, 0.1), (0.5, 0.2), ("entropy", 0.1)))]
    contrasts.append(ContrastDecoding(none, 0.5, 0.1))
    assert len({scoring.mask_hash(CONFIG, none, contrast) for contrast in contrasts}) == len(contrasts)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([("ruler.tasks", ("vt", "vtt"))], "suites.ruler.tasks has 'vtt'; RULER has niah_single_1"),
        (
            [("ruler.tasks", ("niah_single_2",))],
            "'niah_single_2', which reads a text: set suites.ruler.essay to a file",
        ),
        ([("ruler.tasks", ("qa_2",))], "'qa_2', which reads a text: set suites.ruler.qa_2 to a file"),
        ([("ruler.tasks", ("vt",)), ("ruler.lengths", ())], r"suites.ruler.lengths is \(\)"),
        ([("niah.needles", "a")], "suites.niah.haystack is not"),
        ([("niah.needles", "a"), ("niah.haystack", "b"), ("niah.n_lengths", 0)], "0 lengths from 1000 to 128000"),
        ([("json_kv.lengths", (100, 100))], r"suites.json_kv.lengths is \(100, 100\)"),
        ([("perplexity.file", "a"), ("perplexity.stride", 4095)], "suites.perplexity.stride is 4095; .* 1..4094"),
    ],
)
def test_settings_that_cannot_work_are_named(overrides, words):
    with pytest.raises(ValueError, match=words):
        registry.check_suites(_section(*overrides))
