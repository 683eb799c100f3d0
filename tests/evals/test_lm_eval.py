"""Tasks of lm-evaluation-harness: ours against the harness's `hf` model (torch) on the bundled model, all offline."""

import json
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from retmask_jax.data.builtin_files import path_of
from retmask_jax.evals.external import lm_eval
from retmask_jax.generation.language_model import load
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.model.interventions import all_heads, mask_heads
from retmask_jax.utils.files import read_jsonl

DATA = BUNDLED.parent / "data"


@pytest.fixture(scope="module")
def bundled():
    return load("bundled")


def _write_tasks(folder, n=6):
    """A multiple-choice and a generation task with a group of both, on needles of the bundled model."""
    needles = read_jsonl(DATA / "test_needles.jsonl")[: 4 * n]
    hay = (DATA / "test_text.txt").read_text().split("\n")
    records = []
    for i in range(n):
        own = needles[4 * i : 4 * i + 4]
        # Lengths differ, so that batches are padded; the last one is longer than the model's context.
        start = 0 if i < n - 1 else 200
        text = " ".join([*hay[:start], *hay[10 * i : 10 * i + 3 + i], *(one["needle"] for one in own)])
        text = f"<bos> {text} {own[i % 4]['question']} :"
        choices = [one["answer"] for one in own]
        records.append({"text": text, "choices": choices, "label": i % 4, "answer": choices[i % 4]})
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    head = f"""
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {folder / "data.jsonl"}}}}}
        test_split: test
        doc_to_text: "{{{{text}}}}"
    """
    choice = """
        task: tiny_choice
        output_type: multiple_choice
        doc_to_choice: choices
        doc_to_target: label
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """
    answer = """
        task: tiny_answer
        output_type: generate_until
        doc_to_target: answer
        generation_kwargs: {until: [" .", "<eos>"], max_gen_toks: 8, do_sample: false}
        metric_list: [{metric: exact_match}]
    """
    group = "group: tiny_all\ntask: [tiny_choice, tiny_answer]\naggregate_metric_list: [{metric: acc}]\n"
    for name, body in (("choice", choice), ("answer", answer)):
        (folder / f"{name}.yaml").write_text(textwrap.dedent(head) + textwrap.dedent(body))
    (folder / "group.yaml").write_text(group)
    return records


def _requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def both(bundled):
    """(our model, the harness's own on torch)."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    from retmask_jax.evals.external.lm_eval_model import HarnessModel

    theirs = HFLM(pretrained=str(bundled.source.folder), device="cpu", dtype="float32", batch_size=3)
    return HarnessModel(bundled, batch_size=5), theirs


def _asked(needle):
    return f"<bos> {needle['needle']} {needle['question']} :"


def _texts(n=9):
    hay = (DATA / "test_text.txt").read_text().split("\n")
    return [" ".join(hay[7 * i : 7 * i + 2 + 3 * i]) for i in range(n)]


# --- against the harness's own model ---


@pytest.mark.slow
def test_log_likelihoods_and_greedy_flags_are_those_of_the_harness_on_torch(both):
    ours, theirs = both
    needles = read_jsonl(DATA / "test_needles.jsonl")[:8]
    pairs = [(_asked(one), f" {word}") for one in needles for word in one["answer"].split()]
    pairs += [(_asked(one), f" {one['answer']}") for one in needles]
    pairs += [(text, " the clock was red .") for text in _texts()]
    pairs += [
        ("", "the old farmer found the lamp ."),
        ("", "<bos> the old farmer ."),
        ("the farmer ", "found the lamp ."),
    ]
    pairs += [(" ".join(_texts(40)), " the lamp ."), ("the", " ".join(_texts(40))[:4000])]  # longer than the context
    expected = theirs.loglikelihood(_requests(*pairs), disable_tqdm=True)
    actual = ours.loglikelihood(_requests(*pairs), disable_tqdm=True)
    difference = np.abs(np.array([a for a, _ in actual]) - [e for e, _ in expected])
    print(f"largest difference of {len(pairs)} log-likelihoods: {difference.max():.1e}")
    assert difference.max() < 1e-4
    assert [flag for _, flag in actual] == [flag for _, flag in expected]
    assert 0 < sum(flag for _, flag in actual) < len(pairs)
    assert ours.shortened["log-likelihood"] >= 1


@pytest.mark.slow
def test_rolling_log_likelihoods_are_those_of_the_harness(both):
    ours, theirs = both
    texts = [*_texts(), " ".join(_texts(30)), " ".join(_texts(60))]
    assert len(ours.tok_encode(texts[-1])) > 2 * ours.max_length
    expected = theirs.loglikelihood_rolling(_requests(*((text,) for text in texts)), disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(_requests(*((text,) for text in texts))), expected, rtol=1e-6)


@pytest.mark.slow
def test_answers_are_those_of_the_harness(both):
    ours, theirs = both
    texts = [_asked(one) for one in read_jsonl(DATA / "test_needles.jsonl")[:6]] + _texts()
    texts.append(" ".join(_texts(40)))  # longer than the context
    for options in ({"until": [" ."], "max_gen_toks": 12}, {"until": "the", "max_gen_toks": 5}):
        requests = _requests(*((text, options) for text in texts))
        assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
    mixed = _requests(*((text, {"until": [" ."], "max_gen_toks": 4 + i % 3}) for i, text in enumerate(texts)))
    assert ours.generate_until(mixed) == theirs.generate_until(mixed, disable_tqdm=True)
    turns = [{"role": "user", "content": "the home of anna"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.chat_template(True) == theirs.chat_template(True)


@pytest.mark.slow
def test_tasks_give_values_per_sample_and_tables_as_the_harness_reports_them(bundled, both, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    records = _write_tasks(tmp_path)
    run = lm_eval.run_lm_eval(bundled, ["tiny_all"], include_path=tmp_path, batch_size=4)
    theirs = simple_evaluate(both[1], tasks=["tiny_all"], task_manager=TaskManager(include_path=str(tmp_path)))
    names = [f"lm_eval/{name}" for name in ("tiny_choice acc", "tiny_choice acc_norm", "tiny_answer")]
    assert [one.name for one in run.measured] == names
    for one, task in zip(run.measured, ("tiny_choice", "tiny_choice", "tiny_answer"), strict=True):
        samples = theirs["samples"][task]
        assert one.ids == tuple(str(sample["doc_id"]) for sample in samples)
        assert one.binary and len(one.values) == len(records)
        assert one.values.tolist() == [sample[one.metric] for sample in samples]
        assert run.reported[task][f"{one.metric},none"] == pytest.approx(one.values.mean())
    assert run.reported["tiny_all"]["acc,none"] == theirs["groups"]["tiny_all"]["acc,none"]
    assert run.shortened == {"log-likelihood": 4, "generation": 1}
    assert run.measured[2].values.mean() > 0.5

    masked = lm_eval.run_lm_eval(
        bundled,
        ["tiny_answer"],
        include_path=tmp_path,
        batch_size=4,
        limit=4,
        interventions=mask_heads(bundled.config, all_heads(bundled.config)),
    )
    (answer,) = masked.measured
    assert answer.ids == tuple("0123") and answer.values.mean() < run.measured[2].values.mean()


def test_common_knowledge_has_120_different_questions_whose_right_answers_stand_anywhere():
    records = read_jsonl(path_of("builtin:common_knowledge"))
    assert len({record["question"] for record in records}) == len(records) == 120
    assert all(len(set(record["choices"])) == 4 for record in records)
    assert np.bincount([record["answer"] for record in records]).tolist() == [30] * 4


@pytest.mark.slow
def test_common_knowledge_is_scored_as_the_harness_scores_it(bundled, both):
    from lm_eval import simple_evaluate

    accuracy, normed = lm_eval.run_lm_eval(bundled, ["common_knowledge"], batch_size=8, limit=12).measured
    theirs = simple_evaluate(both[1], tasks=[lm_eval._common_knowledge()], limit=12)["samples"]["common_knowledge"]
    assert accuracy.values.tolist() == [sample["acc"] for sample in theirs]
    assert normed.values.tolist() == [sample["acc_norm"] for sample in theirs]


@pytest.mark.slow
def test_unknown_tasks_and_folders_are_named(bundled, tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="no task no_such_task"):
        lm_eval.run_lm_eval(bundled, ["no_such_task"], batch_size=1)
    with pytest.raises(ValueError, match="is no folder"):
        lm_eval.run_lm_eval(bundled, ["x"], include_path=tmp_path / "none", batch_size=1)
