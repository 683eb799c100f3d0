"""Models compared on tasks and suites: one table, samples paired, suites kept, mistakes in one line."""

import html
import json
from pathlib import Path

import numpy as np
import pytest
from helpers_cut_off import Cut, stop_after
from helpers_results import evaluated

from retmask_jax.cli.main import main
from retmask_jax.evals.compare import arm_contrasts, arm_rows, headlines, model_rows
from retmask_jax.evals.measured import Measured
from retmask_jax.generation.language_model import load, save
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.model.interventions import mask_heads
from retmask_jax.reports import evaluation
from retmask_jax.reports.comparison import table, write_comparison
from retmask_jax.runs import recipes
from retmask_jax.runs.context import Context
from retmask_jax.runs.workdir import Workdir
from retmask_jax.stages import eval
from retmask_jax.stages.eval import Measurement, common_samples
from retmask_jax.utils.numbers import Number
from retmask_jax.utils.store import Store

CONFIG = str(Path(__file__).parents[1] / "tiny_small.py")
NIAH = [
    f"--config.suites.niah.{key}={value}"
    for key, value in {
        "needles": "bundled/test_needles.jsonl",
        "haystack": "bundled/test_text.txt",
        "shortest": 96,
        "longest": 128,
        "n_lengths": 2,
        "n_depths": 2,
        "max_new_tokens": 8,
    }.items()
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval") / "work"
    arguments = ["eval", f"--config={CONFIG}", f"--workdir={root}", "--compare", f"same={BUNDLED}", *NIAH]
    assert main(arguments) == 0
    return root, arguments


def test_a_model_compared_with_itself_changes_nothing(compared):
    root, _ = compared
    result = json.loads((root / "compare" / "result.json").read_text())
    assert {row["model"] for row in result["rows"]} == {"start", "same"}
    tasks = {row["task"] for row in result["rows"]}
    assert {"context short", "closed-book", "text loss"} < tasks and any(task.startswith("niah/") for task in tasks)
    for row in result["rows"]:
        assert (row["change"]["value"], row["change"]["low"], row["change"]["high"]) == (0, 0, 0)
        if row["task"] == "context short":
            assert row["mcnemar"]["n_discordant"] == 0
        if row["task"] == "text loss":
            assert row["mcnemar"] is None
    rouge = next(
        number for name, number in result["numbers"].items() if name.startswith("eval/niah/rouge") and "start" in name
    )
    assert rouge["n"] == 2 and 0.5 < rouge["value"] <= 1
    assert result["series"]["niah/rouge 128"] == {"of": "niah/rouge", "at": 128, "axis": "length (tokens)"}
    page = (root / "comparison.html").read_text()
    assert (
        "Mean over cases with its 95% interval" in page
        and "seed" not in page.split("All numbers")[0].split("Evaluation")[1]
    )
    # one panel over lengths, and a map
    assert page.count("Evaluation: niah/rouge") == 1 and "niah, ROUGE-1 recall: same" in page
    cells = [cell for cell in result["grids"] if cell["task"] == "niah, ROUGE-1 recall" and cell["model"] == "start"]
    assert sorted((cell["length"], cell["depth"]) for cell in cells) == [(96, 0), (96, 1), (128, 0), (128, 1)]
    assert all(0 <= cell["value"] <= 1 for cell in cells)


def test_a_suite_that_has_run_is_kept_when_others_are_asked_for(compared, monkeypatch, capsys):
    root, arguments = compared
    kept = sorted((root / "measured").glob("niah-*.json"))
    assert len(kept) == 1  # the same weights, masks and settings: measured once
    ran = []
    make = eval.run_suites
    monkeypatch.setattr(eval, "run_suites", lambda *a, only, **k: ran.append(only) or make(*a, only=only, **k))
    more = [
        "--config.suites.perplexity.file=bundled/test_text.txt",
        "--config.suites.perplexity.length=64",
        "--config.suites.perplexity.windows=4",
    ]
    assert main([*arguments, *more]) == 0  # another suite is no other work directory
    assert ran == ["perplexity"]
    assert any(line.startswith("perplexity/") for line in capsys.readouterr().out.splitlines())


def test_an_evaluation_that_was_stopped_asks_only_for_the_rest(tmp_path, monkeypatch):
    root = tmp_path / "work"
    settings = ["--config.eval.tasks=('closed-book',)", "--config.eval.grids=()", "--config.text.file=", *NIAH]
    settings.append("--config.suites.niah.n_depths=3")
    arguments = ["eval", f"--config={CONFIG}", f"--workdir={root}", "--compare", "same=bundled", *settings]
    for answered in (4, 12 + 4):  # first within the task, whose 16 cases come before those of the suite
        with monkeypatch.context() as patch:
            stop_after(patch, answered)
            with pytest.raises(Cut):
                main(arguments)
    assert [path.is_dir() for path in (root / "measured").iterdir()] == [True, True]
    added = stop_after(monkeypatch, 99)
    assert main(arguments) == 0 and len(added) == 2
    (file,) = (root / "measured").glob("*.json")
    # What was answered stays, also when it has been scored.
    assert sorted(len(list(Store(path))) for path in (root / "measured").iterdir() if path.is_dir()) == [6, 16]
    assert {len(one["ids"]) for one in json.loads(file.read_text())["measured"]} == {3}


def test_weights_that_are_swapped_in_place_are_measured_anew(tmp_path):
    """Models of one shape, of which only the weights after the first megabyte differ, are never taken for each other."""
    lm = load("bundled")
    heads = [(1, 0), (1, 1), (1, 2), (1, 3)]
    settings = ["--config.eval.tasks=('context short',)", "--config.eval.grids=()", "--config.text.file=", *NIAH]
    compare = f"--compare=other={tmp_path / 'other'}"
    arguments = ["eval", f"--config={CONFIG}", f"--workdir={tmp_path / 'work'}", compare, *settings]
    changes = []
    for masked in (None, mask_heads(lm.config, heads)):
        save(lm, tmp_path / "other", masked)
        assert main(arguments) == 0
        rows = json.loads((tmp_path / "work" / "compare" / "result.json").read_text())["rows"]
        changes.append({row["task"]: row["change"]["value"] for row in rows if row["model"] == "other"})
    assert set(changes[0].values()) == {0.0}
    assert changes[1]["context short"] < -0.3 and changes[1]["niah/rouge 128"] < -0.3
    assert len(list((tmp_path / "work" / "measured").glob("niah-*.json"))) == 2


def test_every_task_and_length_is_a_part_of_its_own():
    config = recipes.load_recipe(
        "tiny",
        [
            ("suites.ruler.tasks", "('vt', 'cwe')"),
            ("suites.ruler.lengths", "(512, 1024)"),
            ("suites.json_kv.lengths", "(512, 1024)"),
            ("suites.lm_eval.tasks", "('a', 'b')"),
            ("suites.helmet.path", "x"),
            ("suites.niah.needles", "y"),
        ],
    )
    parts = [(name, part[name]) for name, part in eval.suite_parts(config.suites)]
    assert [name for name, _ in parts] == ["ruler"] * 4 + ["niah"] + ["json_kv"] * 2 + ["lm_eval"] * 2 + ["helmet"]
    assert [(one.tasks, one.lengths) for name, one in parts if name == "ruler"] == [
        ((task,), (length,)) for task in ("vt", "cwe") for length in (512, 1024)
    ]
    assert [one.tasks for name, one in parts if name == "lm_eval"] == [("a",), ("b",)]
    assert parts[-1][1].lengths == config.suites.helmet.lengths  # keeps its own answers, sample by sample


def test_samples_are_paired_by_their_names():
    def suite(task, ids, *values):
        return Measured("s", task, "share", tuple(ids), np.array(values), binary=False)

    one = Measurement({"b": np.array([True, False])}, {}, [suite("a", "xyz", 1.0, 0.0, 0.5), suite("c", "x", 1.0)])
    other = Measurement({"b": np.array([True, True])}, {}, [suite("a", "zx", 0.2, 0.9)])
    samples = common_samples({"start": one, "trained": other})
    assert samples["start"]["s/a"].tolist() == [1.0, 0.5] and samples["trained"]["s/a"].tolist() == [0.9, 0.2]
    assert set(samples["start"]) == set(samples["trained"]) == {"s/a", "b"}


def test_a_model_that_cannot_run_a_suite_lacks_its_tasks_alone():
    def suite(name, *values):
        return Measured(name, "t", "share", ("x", "y"), np.array(values), binary=False)

    whole = Measurement({"b": np.array([True, False])}, {}, [suite("said", 1.0, 0.0), suite("read", 2.0, 3.0)])
    part = Measurement({"b": np.array([True, True])}, {}, [suite("said", 0.5, 0.5)], apart=("read",))
    samples = common_samples({"start": whole, "trained": whole, "part": part})
    assert set(samples["start"]) == set(samples["trained"]) == {"b", "said/t", "read/t"}
    assert set(samples["part"]) == {"b", "said/t"}
    samples["part"].pop("b")
    rows = arm_rows(samples, {"trained": ["trained"], "part": ["part"]})
    assert [row.task for row in rows if row.arm == "part"] == ["said/t"] and len(rows) == 3 + 3 + 1
    changes = evaluated([], rows).changes
    page = str(evaluation._change_table({name: changes[name] for name in ("part", "trained")}, []))
    assert page.count("<tr>") == 1 + 3 and page.count("<td>–</td>") >= 2 * 2
    _, cells = table(model_rows(samples, {name: (name, 0) for name in ("trained", "part")}), {})
    assert [row[-3:] == ["–"] * 3 for row in cells] == [True, False, True]


def test_retmask_is_compared_with_its_controls_case_by_case():
    """Two gains over the start model do not say whether one is larger than the other."""
    right = {
        "start": [0, 0, 0, 0, 1, 1],
        "r-0": [1, 1, 1, 1, 1, 1],
        "c-0": [0, 0, 1, 0, 1, 0],
        "c-1": [1, 0, 1, 0, 1, 0],
    }
    samples = {
        name: {"task": np.array(values, bool), "loss": np.array(values, float)} for name, values in right.items()
    }
    samples["c-1"].pop("loss")
    rows = arm_contrasts(samples, {"retmask": ["r-0"], "one": ["c-0"], "two": ["c-0", "c-1"]})
    assert [(row.other, row.task) for row in rows] == [("one", "task"), ("one", "loss"), ("two", "task")]
    assert [row.change.value for row in rows] == pytest.approx([4 / 6, 4 / 6, 3.5 / 6])
    assert (rows[0].mcnemar.p_value, rows[1].mcnemar, rows[2].mcnemar) == (0.125, None, None)  # 4 of 4 one way
    assert arm_contrasts(samples, {"one": ["c-0"], "two": ["c-1"]}) == []

    page = str(evaluation._contrast_table(rows))
    assert page.count("<tr>") == 1 + 2 and "0.125" in page and "+0.667" in page
    assert not evaluation._contrast_table([])


@pytest.mark.parametrize("contrast", [None, 0.5, "entropy"])
def test_contrast_decoding_masks_what_retmask_masks(monkeypatch, tmp_path, contrast):
    config = recipes.load_recipe("tiny", [("eval.contrast", repr(contrast)), ("eval.contrast_threshold", "0.2")])
    context, heads = Context(config, Workdir.open(tmp_path / "work", config)), [(1, 0), (2, 3)]
    monkeypatch.setattr(eval, "retrieval_heads", lambda context: heads)
    monkeypatch.setattr(eval, "compared", lambda context, contenders: contenders)
    contenders = eval.eval_stage(context, tmp_path)
    assert list(contenders) == [
        "start",
        "retmask-0",
        "activity_matched-0",
        *(["contrast decoding"] if contrast else []),
    ]
    assert all(contenders[name].contrast is None for name in list(contenders)[:3])
    if contrast:
        found = contenders["contrast decoding"]
        assert found.contrast.identity == (contrast, 0.2) and found.load() is context.lm
        expected = mask_heads(context.lm.config, heads).head_mask
        np.testing.assert_array_equal(found.contrast.interventions.head_mask, expected)
        assert not found.interventions.has_rows and found.interventions.head_mask is None


def test_the_table_has_every_model_and_its_test():
    samples = {"start": {"t": np.array([True] * 20 + [False] * 20)}, "new": {"t": np.array([True] * 30 + [False] * 10)}}
    header, (row,) = table(model_rows(samples, {"new": ("new", 0)}), {"t": "string match"})
    assert header == ["task", "measure", "n", "start", "new", "change", "p"]
    assert row[:3] == ["t", "string match", "40"] and row[4].startswith("0.750 [") and row[5].startswith("+0.250 [")
    assert row[6] == "0.0020"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--compare", "bundled"], "'bundled' must be NAME=FOLDER or NAME=HUB_ID"),
        (["--compare", "start=bundled"], "eval.models has 'start'"),
        (["--compare", "contrast decoding=bundled"], "eval.models has 'contrast decoding'"),
        (["--compare", "start=bundled", "--compare", "a.b/c=bundled"], "eval.models has 'start'"),
        (["--compare", "mine=bundled", "mine=other"], "--compare names 'mine' 2 times: give each model another name"),
        (["--config.suites.ruler.tasks=('niah_single_9',)"], "suites.ruler.tasks has 'niah_single_9'"),
        (["--config.suites.json_kv.lengths=(9999,)"], "suites.json_kv needs 9999 tokens, the model's context is 1024"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path, capsys):
    assert main(["eval", f"--config={CONFIG}", f"--workdir={tmp_path / 'w'}", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "w").exists()


NAMES = ("org/model-1.5", "x minus start", "mine: from memory", "b/c", "c", "модель/日本", '<b>&"$x^2$"', "_mine")


def test_any_text_may_be_the_name_of_a_model(tmp_path, capsys):
    """Through the command: the table, the page and the result have every model, whatever characters its name has."""
    names = ("org/model-v1.5", *NAMES[5:7])
    flags = ["--compare", *(f"{name}=bundled" for name in names)]
    flags += ["--config.eval.tasks=('closed-book',)", "--config.eval.grids=()"]
    assert main(["eval", f"--config={CONFIG}", f"--workdir={tmp_path / 'work'}", *flags]) == 0
    result = json.loads((tmp_path / "work/compare/result.json").read_text())
    page = html.unescape((tmp_path / "work/comparison.html").read_text())
    header = capsys.readouterr().out
    for name in names:
        assert {f"eval/closed-book/{name}", f"eval/closed-book/{name} minus start"} <= set(result["numbers"])
        assert f"{name} shows no clear change: the 95% interval contains 0 on every measure." in page and name in header
    assert "<b>" not in (tmp_path / "work/comparison.html").read_text()


def _page_of(samples, tmp_path):
    models = [name for name in samples if name != "start"]
    rows = model_rows(samples, {name: (name, 0) for name in models})
    result = evaluated(rows, arm_rows(samples, {name: [name] for name in models}))
    write_comparison(tmp_path / "page.html", {"compare": result}, "mine")
    return result, html.unescape((tmp_path / "page.html").read_text())


def test_names_of_models_and_tasks_are_never_taken_apart(tmp_path):
    """Slashes and the words of our own names in both: each model's means and changes stay its own."""
    tasks = ("a", "a/b", "ruler/niah_single_1 4096", "text loss")
    values = np.random.default_rng(0).normal(size=(1 + len(NAMES), len(tasks), 5))
    samples = {model: dict(zip(tasks, values[i], strict=True)) for i, model in enumerate(("start", *NAMES))}
    result, page = _page_of(samples, tmp_path)
    means, changes = result.means, result.changes
    assert list(means) == list(tasks) and list(changes) == list(NAMES)
    for name in NAMES:
        for task in tasks:
            assert means[task][name].value == pytest.approx(samples[name][task].mean())
            assert changes[name][task].value == pytest.approx((samples[name][task] - samples["start"][task]).mean())
    assert len(result.numbers) == len(tasks) * (1 + 2 * len(NAMES))  # no two numbers share a name
    assert all(f"<th>{name}</th>" in page for name in NAMES)
    labels = [
        task for panel, task in zip(evaluation._panels(result), tasks, strict=True) if panel == f"Evaluation: {task}"
    ]
    assert labels == list(tasks)


def test_ordinary_names_of_numbers_are_as_they_were():
    tasks, arms = ("needle long", "ruler/vt 512"), ("start", "retmask", "masked")
    rows = arm_rows({arm: dict.fromkeys(tasks, np.zeros(3)) for arm in arms}, {arm: [arm] for arm in arms[1:]})
    names = list(headlines(rows))
    means = [name for name in names if not name.endswith(" minus start")]
    assert means == [f"eval/{task}/{arm}" for arm in arms for task in tasks]
    assert "eval/ruler/vt 512/retmask minus start" in names and len(names) == 6 + 4


def test_a_legend_names_every_model():
    points = {name: [(1, Number(1.0, 0.5, 1.5, 40))] for name in NAMES}
    (legend,) = evaluation._over("t", points, "x", "y").legends
    assert [text.get_text() for text in legend.get_texts()] == list(NAMES)


def test_flags_are_settings_of_the_config():
    config = recipes.load_recipe("tiny", [("suites.lm_eval.tasks", "('a', 'b')"), ("eval.models", "{'x': 'y'}")])
    assert tuple(config.suites.lm_eval.tasks) == ("a", "b") and config.eval.models.to_dict() == {"x": "y"}
