"""The bridge to HELMET on a miniature checkout, whose files have the functions that HELMET's have."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_tiny import copying_lm, in_float64, reference_answer

from retmask_jax.data import tiny_language as tl
from retmask_jax.evals import scoring
from retmask_jax.evals.external import helmet
from retmask_jax.evals.external.helmet_means import CATEGORIES, MEANS, helmet_means
from retmask_jax.evals.measured import Measured
from retmask_jax.model.interventions import Interventions, all_heads, mask_heads, stack
from retmask_jax.utils.store import Store

LENGTH, NEW = 64, 6
SETS = {  # category -> (data sets, stop_new_line, chat)
    "recall": (("ruler_niah_mk_2", "json_kv"), True, False),
    "cite": (("alce_asqa_700", "alce_qampari_700"), False, True),
    "longqa": (("narrativeqa_130772", "infbench_qa_eng"), False, False),
}


def _records(n, words):
    """Contexts of so many words, the answer in them."""
    rng = np.random.default_rng(0)
    needles = tl.needle_records(rng, n)
    hay = " ".join(tl.haystack_text(rng, 40)).split()
    return [
        {
            "context": " ".join([one["needle"], *hay[i : i + words + 3 * i]]),
            "question": one["question"],
            "answer": one["answer"].split(),
            "size": 7,
        }
        for i, one in enumerate(needles)
    ]


def _write(folder, records):
    checkout = shutil.copytree(
        Path(__file__).parents[1] / "helmet_miniature", folder, ignore=shutil.ignore_patterns("__*")
    )
    (checkout / "configs").mkdir()
    (checkout / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for category, (names, stop, chat) in SETS.items():
        files = ["nowhere.jsonl" if name == "alce_qampari_700" else "test.jsonl" for name in names]
        lines = {
            "datasets": ",".join(names),
            "test_files": ",".join(files),
            "demo_files": "," * (len(names) - 1),
            "input_max_length": f"{LENGTH},{LENGTH}",
            "generation_max_length": NEW,
            "use_chat_template": chat,
            "stop_new_line": stop,
        }
        (checkout / f"configs/{category}_short.yaml").write_text(
            "".join(f"{k}: {json.dumps(v)}\n" for k, v in lines.items())
        )
    return checkout


class _Spy:
    """generate_stream, and the prompts it was given."""

    def __init__(self, monkeypatch):
        self.prompts, self._stream = [], scoring.generate_stream
        monkeypatch.setattr(scoring, "generate_stream", self)

    def __call__(self, config, params, requests, **options):
        self.prompts += [tuple(request.tokens) for request in requests]
        return self._stream(config, params, requests, **options)


def _prompts(lm, records, chat=False):
    """The tokens of the prompts, written out: of a long one the end of the context is missing."""
    rows = []
    for record in records:
        question = f"{record['question']}" + ("" if chat else f" {record['question']} :")
        ids = [lm.tokenizer.encode(text) for text in (record["context"], question)]
        around = [tl.BOS] if chat else []
        end = [*ids[1], *(lm.tokenizer.encode(":") if chat else [])]
        rows.append((*around, *ids[0][: LENGTH - NEW - len(around) - len(end)], *end))
    return rows


def _answers(lm, prompts, **masks):
    """By the slow reference, one row at a time."""
    params = in_float64(lm.params)
    answers = [reference_answer(params, row, NEW, lm.config.eos_ids, **masks)[0] for row in prompts]
    return [lm.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]


def test_exact_prompts_go_to_the_model_and_answers_are_scored_after_their_prefix(tmp_path, monkeypatch):
    lm, records, spy = copying_lm(), _records(4, 30), _Spy(monkeypatch)
    checkout = _write(tmp_path / "helmet", records)
    run = helmet.run_helmet(lm, checkout, [LENGTH], ["recall"], folder=tmp_path / "out", batch_size=4)
    prompts = _prompts(lm, records)
    assert max(len(row) for row in prompts) == LENGTH - NEW and min(len(row) for row in prompts) < LENGTH - NEW
    assert sorted(spy.prompts) == sorted(prompts)  # the second data set has the same ones
    outputs = [f"{r['question']} :{text}" for r, text in zip(records, _answers(lm, prompts), strict=True)]
    (written,) = (tmp_path / "out").rglob("json_kv*.json")
    assert [row["output"] for row in json.loads(written.read_text())["data"]] == outputs
    values = [np.mean([word in text for word in r["answer"]]) for r, text in zip(records, outputs, strict=True)]
    recall, kv = run.measured
    assert (recall.name, recall.metric, kv.task) == ("helmet/ruler_niah_mk_2 64", "ruler_recall", "json_kv")
    assert recall.ids == ("0", "1", "2", "3") and not recall.missing
    (note,) = run.notes
    assert "recall_short.yaml" in note and "stop_new_line is not read by HELMET" in note
    np.testing.assert_allclose(recall.values, values)

    # What was answered is not generated again; under a mask all is.
    spy.prompts.clear()
    none = Interventions.none(lm.config)
    with Store(tmp_path / "out/answers" / scoring.mask_hash(lm.config, none)) as answers:
        job = helmet._Job(lm, none, 4, answers, None)
        rows = [np.array(row, np.int32) for row in prompts]
        options = {"max_new_tokens": NEW, "until": [], "temperature": 0.0, "top_p": 1.0}
        kept = helmet._answers(job, rows, options, f"json_kv {LENGTH}")
        new = [row[-9:] for row in rows]
        more = helmet._answers(job, [*new, *rows, np.full(510, 5, np.int32)], options, f"json_kv {LENGTH}")
    assert [one["output"] for one in kept] == _answers(lm, prompts) and more[4:8] == kept and more[8] is None
    assert sorted(spy.prompts) == sorted(prompt[-9:] for prompt in prompts)
    spy.prompts.clear()
    iv = mask_heads(lm.config, all_heads(lm.config))
    masked = helmet.run_helmet(
        lm, checkout, [LENGTH], ["recall"], folder=tmp_path / "out", batch_size=4, interventions=iv, stop_new_line=True
    )
    assert "answers end at a new line" in masked.notes[0]
    assert sorted(spy.prompts) == sorted(prompts) and masked.measured[0].ids == recall.ids
    (_, written) = sorted((tmp_path / "out").rglob("json_kv*.json"), key=lambda path: path.stat().st_mtime)
    masked_outputs = [row["output"] for row in json.loads(written.read_text())["data"]]
    expected = _answers(lm, prompts, head_mask=np.asarray(iv.head_mask))
    assert masked_outputs == [f"{r['question']} :{t}" for r, t in zip(records, expected, strict=True)] != outputs


def test_a_chat_template_leaves_the_prefix_out_and_what_is_missing_is_said(tmp_path, monkeypatch):
    lm, records, spy = copying_lm(), _records(4, 20), _Spy(monkeypatch)
    checkout = _write(tmp_path / "helmet", records)
    run = helmet.run_helmet(lm, checkout, [LENGTH], ["cite", "longqa"], folder=tmp_path / "out", batch_size=4)
    prompts = _prompts(lm, records, chat=True)
    assert sorted(spy.prompts) == sorted(prompts + _prompts(lm, records)) and run.notes == []
    texts = _answers(lm, prompts)
    shares = [np.mean([word in text for word in r["answer"]]) for r, text in zip(records, texts, strict=True)]
    tasks = {one.task: one for one in run.measured}
    np.testing.assert_allclose(tasks["alce_asqa str_em"].values, shares)
    assert list(tasks["alce_asqa citation_rec"].missing) == ["needs an 11B entailment model: ask for citations"]
    (why,) = tasks["alce_qampari qampari_rec_top5"].missing
    assert "FileNotFoundError" in why and "nowhere.jsonl" in why
    cite = helmet_means(run.measured)[LENGTH]["categories"]["cite"]
    assert cite["value"] is None and list(cite["parts"]) == ["alce_asqa str_em"] and len(cite["missing"]) == 5

    # What a judge says counts where it judged these answers.
    assert len(tasks["narrativeqa"].values) == 0 and "needs a judge" in str(tasks["narrativeqa"].missing)
    assert len(tasks["infbench_qa"].values) == 4
    (path,) = (tmp_path / "out").rglob("narrativeqa*.json")
    (folder,) = (tmp_path / "out/scores").iterdir()
    part, scores = CATEGORIES["longqa"][0], Store(folder)
    (kept,) = (scores[key] for key in scores if "narrativeqa" in key[0])

    judged = json.loads(path.read_text())
    for row, given in zip(judged["data"], (2, 3, 0, None), strict=True):
        row["gpt-4-scores"] = None if given is None else {"fluency": 1, "correctness": given}
    judge = path.with_name(path.stem + "-gpt4eval_o.json")
    judge.write_text(json.dumps(judged))
    scored = helmet._measured(part, LENGTH, kept)
    assert scored.values.tolist() == [2 / 3, 1, 0] and scored.ids == ("0", "1", "2")
    assert scored.missing == {"no score from HELMET": 1}
    judged["data"][0]["output"] += " else"
    judge.write_text(json.dumps(judged))
    assert len(helmet._measured(part, LENGTH, kept).values) == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lengths": [1024]}, "HELMET at 1024 tokens: the model's context is 512"),
        ({"lengths": []}, "HELMET at no tokens"),
        ({"categories": ["recal"]}, "no category recal; it has recall, rag"),
        ({"checkout": "."}, "is no checkout of HELMET"),
        ({"interventions": "rows"}, "a suite runs under one mask"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, options, why):
    lm = copying_lm()
    arguments = {
        "lengths": [LENGTH],
        "categories": ["recall"],
        "checkout": Path(__file__).parents[1] / "helmet_miniature",
    } | options
    if "interventions" in options:
        arguments["interventions"] = stack([mask_heads(lm.config, [])] * 2)
    with pytest.raises(ValueError, match=why):
        helmet.run_helmet(lm, folder=tmp_path / "out", batch_size=2, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_length_that_a_config_lacks_is_named():
    short = SimpleNamespace(entries=[{"input_max_length": length} for length in (8192, 16384)])
    helmet._check_lengths(short, "recall", [8192, 131072])  # the longest is in another file
    with pytest.raises(ValueError, match=r"no recall at 8000 tokens; this config of it has \[8192, 16384\]"):
        helmet._check_lengths(short, "recall", [8000, 8192])


# --- means ---

# The table of arXiv 2601.11020 at 128K: (base, trained), in the order of HELMET's categories here.
PAPER = {
    "recall": (95.13, 95.44),
    "rag": (58.58, 59.71),
    "rerank": (13.73, 18.16),
    "cite": (3.09, 5.25),
    "longqa": (42.69, 43.84),
    "summ": (27.81, 33.45),
    "icl": (83.80, 84.92),
}


def _of(category, value, n=2):
    """Every part of a category with this mean, in per cent."""
    return [
        Measured("helmet", part.task, part.metric, tuple(map(str, range(n))), np.full(n, value / 100), False, 131072)
        for part in CATEGORIES[category]
    ]


@pytest.mark.parametrize("column", [0, 1])
def test_means_are_those_of_the_paper(column):
    measured = [one for category, row in PAPER.items() for one in _of(category, row[column])]
    means = helmet_means(measured)[131072]["means"]
    assert round(means["all seven"]["value"], 2) == pytest.approx((46.40, 48.68)[column], abs=0.011)
    assert round(means["judge-free"]["value"], 2) == pytest.approx((50.87, 52.70)[column], abs=0.011)
    assert means["all seven"]["missing"] == [] and means["all seven"]["n"] == 2 * sum(map(len, CATEGORIES.values()))


def test_a_missing_part_leaves_no_mean_and_data_sets_weigh_the_same():
    measured = [one for category in MEANS["judge-free"] for one in _of(category, 50.0)]
    citations = [one for one in measured if "citation" not in one.task]
    found = helmet_means(citations)[131072]
    assert found["means"]["no other model"]["value"] == 50 and found["means"]["judge-free"]["value"] is None
    assert found["means"]["judge-free"]["missing"][0] == "cite: alce_asqa citation_rec: not run"
    assert found["means"]["all seven"]["missing"][-1] == "summ: multi_lexsum: not run"
    (first, *rest) = _of("recall", 100.0, n=7)
    few = Measured("helmet", first.task, first.metric, ("0",), np.zeros(1), True, 131072, {"too long": 6})
    recall = helmet_means([few, *rest])[131072]["categories"]["recall"]
    assert recall["value"] == 75 and recall["left out"] == [f"{first.task}: 6 samples, too long"]
