"""The whole command on the bundled model, at small size: results, caching, resume after a kill."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers_documents import tables

from retmask_jax.cli.main import main
from retmask_jax.training.loop import train

CONFIG = str(Path(__file__).parents[1] / "tiny_small.py")
STAGES = ("detect", "knockout", "rope", "pairs", "train", "eval", "report")


@pytest.fixture
def here(capsys):
    """The command in this process, which need not start and import again: here(*arguments) gives what `retmask` does."""

    def call(*arguments):
        capsys.readouterr()
        status = main(list(arguments))
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    return call


def retmask(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "retmask_jax.cli.main", *arguments], capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in this process: (its work directory, what it printed)."""
    root, printed = tmp_path_factory.mktemp("run") / "work", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["run", f"--config={CONFIG}", f"--workdir={root}"]) == 0
    return root, printed.getvalue()


@pytest.fixture(scope="module")
def finished_apart(tmp_path_factory):
    """The work directory of a run in a process of its own, whose bits another process repeats."""
    root = tmp_path_factory.mktemp("apart") / "work"
    done = retmask("run", f"--config={CONFIG}", f"--workdir={root}")
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def run_ids(root):
    return {stage: json.loads((root / stage / "result.json").read_text())["provenance"]["run_id"] for stage in STAGES}


def test_run_ends_with_a_table_the_report_and_a_summary(finished):
    root, output = finished
    summary = json.loads((root / "summary.json").read_text())
    assert all(set(number) == {"value", "low", "high", "n"} for number in summary.values())
    assert "knockout/needle short/retrieval" in output and str(root / "report.html") in output
    assert (
        summary["knockout/needle short/none"]["value"] > 0.8 > 0.2 > summary["knockout/needle short/retrieval"]["value"]
    )
    assert summary["knockout/context short: from memory/retrieval"]["value"] > 0.6
    assert "<html" in (root / "report.html").read_text()


def test_contrast_decoding_stands_beside_trained_models(finished):
    """Where answers are decoded, and not in the loss on text; what it answers is in none of the others' places."""
    result = json.loads((finished[0] / "eval" / "result.json").read_text())
    tasks = {
        name: {row["task"] for row in result["rows"] if row["model"] == name} for name in ("start", "contrast decoding")
    }
    assert tasks["contrast decoding"] == tasks["start"] - {"text loss"} and "niah" in tasks["contrast decoding"]
    assert "contrast decoding" in {cell["model"] for cell in result["grids"]}
    assert "eval/context short/contrast decoding minus start" in result["numbers"]
    page = (finished[0] / "report.html").read_text()
    assert "Contrast decoding, away from the model with its retrieval heads masked, " in page


@pytest.mark.slow
def test_a_finished_run_has_what_its_profile_and_its_gain_need(finished, tmp_path):
    root, _ = finished
    gain = "eval/context short/retmask minus start"
    assert main(["profile", str(root), f"--gain={gain}", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    (model,), (run,) = found["models"], found["sparsity"]["rows"]
    detected = json.loads((root / "detect" / "result.json").read_text())
    assert detected["profile"].items() <= model.items()
    assert run["gain"] == json.loads((root / "summary.json").read_text())[gain]
    assert run["weights"] == detected["provenance"]["inputs"]["weights"]


def test_a_stage_goes_on_from_the_answers_that_it_has_given(finished, tmp_path, here, monkeypatch):
    """As one that was killed, which has no result yet."""
    root = shutil.copytree(finished[0], tmp_path / "work")
    (root / "knockout/result.json").rename(tmp_path / "before.json")
    monkeypatch.setattr("retmask_jax.generation.under_masks._answer", None)  # nothing is left to be answered
    assert here("knockout", f"--config={CONFIG}", f"--workdir={root}").returncode == 0
    before, after = (json.loads(path.read_text()) for path in (tmp_path / "before.json", root / "knockout/result.json"))
    assert after["numbers"] == before["numbers"] and after["examples"] == before["examples"]
    assert after["provenance"]["run_id"] != before["provenance"]["run_id"]


def test_a_plan_says_what_is_left_to_do_and_runs_nothing(finished, tmp_path, here):
    planned = here("run", f"--config={CONFIG}", f"--workdir={finished[0]}", "--plan").stdout.splitlines()
    assert [line.split()[0] for line in planned[1:-1]] == list(STAGES) and "left to do: about 10 s on" in planned[-1]
    assert all(line.split()[-1] == "done" for line in planned[1:-1])
    fresh = here("study", f"--config={CONFIG}", f"--workdir={tmp_path / 'new'}", "--plan").stdout.splitlines()
    assert not any("done" in line for line in fresh) and not (tmp_path / "new").exists()
    assert {"detectors", "theta"} <= {line.split()[0] for line in fresh if "about" in line}
    both = here("study", f"--config={CONFIG}", f"--workdir={finished[0]}", "--plan").stdout.splitlines()
    assert [line.split()[0] for line in both if "done" in line] == ["detect", "knockout", "rope"]
    refused = here("run", f"--config={CONFIG}", f"--workdir={finished[0]}", "--plan", "--config.detect.threshold=0.3")
    assert refused.returncode == 2 and "detect.threshold" in refused.stderr


def test_a_second_run_does_nothing(finished, here):
    root, _ = finished
    before = run_ids(root)
    done = here("run", f"--config={CONFIG}", f"--workdir={root}")
    assert done.stdout.count("unchanged") == len(STAGES)
    assert run_ids(root) == before


@pytest.mark.slow
def test_the_study_goes_on_from_what_run_has_done(finished, tmp_path, here):
    """Both commands share a work directory of one config: three stages are done, five are new."""
    root = tmp_path / "copy"
    shutil.copytree(finished[0], root)
    done = here("study", f"--config={CONFIG}", f"--workdir={root}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("unchanged") == 3 and str(root / "study.html") in done.stdout
    page = (root / "study.html").read_text()
    for section in ("Retrieval heads", "Detectors", "Knock-out", "Rotary dose-response", "Query norms", "RoPE base"):
        assert f"<h2>{section}</h2>" in page
    assert "<h2>Training dynamics</h2>" not in page  # no checkpoint is named
    numbers = json.loads((root / "study.json").read_text())
    assert all(set(number) == {"value", "low", "high", "n"} for number in numbers.values())
    detected, masked = "detectors/heads shared with detect/copy", "detectors/needle short/copy masked"
    assert numbers[detected]["value"] == 1.0  # taken from detect, top_k as many as it found
    assert numbers[masked]["value"] == numbers["knockout/needle short/retrieval"]["value"]
    assert numbers["theta/needle short/factor 1"] == numbers["detectors/needle short/none"]
    assert (root / "detectors/copy.json").read_text() == (root / "detect/scores.json").read_text()
    assert run_ids(root) == run_ids(finished[0])


@pytest.mark.slow
def test_a_deleted_stage_runs_again_with_what_depends_on_it(finished, tmp_path, here):
    root = tmp_path / "copy"
    shutil.copytree(finished[0], root)
    before = run_ids(root)
    shutil.rmtree(root / "rope")
    done = here("run", f"--config={CONFIG}", f"--workdir={root}")
    assert done.returncode == 0, done.stderr[-2000:]
    after = run_ids(root)
    assert {stage for stage in STAGES if before[stage] != after[stage]} == {"rope", "report"}


def test_another_config_is_refused_and_nothing_is_lost(finished, here):
    root, _ = finished
    before = run_ids(root)
    done = here("run", f"--config={CONFIG}", f"--workdir={root}", "--config.train.steps=7")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "train.steps: 6 there, 7 here" in done.stderr
    assert run_ids(root) == before


def test_what_only_says_how_to_compute_may_change_as_our_messages_advise(finished, here):
    root, _ = finished
    before = run_ids(root)
    how = {
        "batch_size": 8,
        "kernel": "blocked",
        "train.microbatch_size": 2,
        "train.checkpoint_every": 5,
        "cpu_devices": 1,
    }
    done = here("run", f"--config={CONFIG}", f"--workdir={root}", *(f"--config.{key}={how[key]}" for key in how))
    assert done.returncode == 0 and done.stdout.count("unchanged") == len(STAGES), done.stderr[-2000:]
    assert run_ids(root) == before


def test_pages_need_no_model(undrawn, finished, tmp_path, here):
    """Neither its weights nor its config.json: the page of a run can be made where only the results are."""
    root = tmp_path / "copy"
    shutil.copytree(finished[0], root)
    (root / "report" / "result.json").unlink()
    (root / "report.html").unlink()
    away = "--config.model=./not_here"
    done = here("report", f"--config={CONFIG}", f"--workdir={root}", away)
    assert done.returncode == 0 and (root / "report.html").exists(), done.stderr[-2000:]
    done = here("detect", f"--config={CONFIG}", f"--workdir={root}", away)
    assert done.returncode == 2 and "not_here does not exist" in done.stderr


def test_a_stage_refuses_results_that_are_out_of_date(finished, tmp_path, here):
    root = tmp_path / "copy"
    shutil.copytree(finished[0], root)
    detected = root / "detect" / "result.json"
    record = json.loads(detected.read_text())
    record["provenance"]["run_id"] = "another"
    detected.write_text(json.dumps(record))
    done = here("report", f"--config={CONFIG}", f"--workdir={root}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "reads the result of knockout, which is out of date" in done.stderr


def test_pairs_that_are_gone_are_named_and_nothing_is_moved(finished, tmp_path, here):
    root = shutil.copytree(finished[0], tmp_path / "work")
    (root / "pairs/retmask-0.jsonl.gz").unlink()
    done = here("train", f"--config={CONFIG}", f"--workdir={root}", "--config.train.steps=5", "--set-aside")
    assert done.returncode == 2 and f"{root / 'pairs/retmask-0.jsonl.gz'} is gone" in done.stderr
    assert (root / "train/result.json").exists() and not (root / "set-aside").exists()


def test_only_what_is_new_is_trained(finished, tmp_path, here, monkeypatch, caplog):
    """An arm that is added leaves the others' runs as they are; a setting of training makes all of them anew, and what a
    step is computed with none."""
    root, trained = shutil.copytree(finished[0], tmp_path / "work"), []
    monkeypatch.setattr(
        "retmask_jax.stages.train.train",
        lambda *given, **named: trained.append(named["what"]) or train(*given, **named),
    )

    def files(folder="train/retmask-0"):
        return {
            path.relative_to(root / folder): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in (root / folder).rglob("*")
            if path.is_file() and path.name != "made.json"
        }

    def retrain(*flags):
        trained.clear()
        caplog.clear()
        options = (f"--config={CONFIG}", f"--workdir={root}", "--set-aside", *flags)
        planned = here("train", "--plan", *options)
        assert here("pairs", *options).returncode == 0
        done = here("train", *options)
        assert done.returncode == 0, done.stderr
        return planned.stdout, caplog.messages[-1]

    before, arms = files(), "--config.train.arms=('retmask', 'retmask_others')"
    one = _trained_on(here("train", "--plan", f"--config={CONFIG}", f"--workdir={tmp_path / 'new'}").stdout)
    planned, said = retrain(arms)
    assert trained == ["train retmask_others-0"] and files() == before and _trained_on(planned) == one
    assert said.endswith("but for retmask-0, made from what has not changed")
    result = json.loads((root / "train/result.json").read_text())
    old = json.loads((finished[0] / "train/result.json").read_text())
    assert result["runs"]["retmask-0"] == old["runs"]["retmask-0"] and len(result["runs"]) == 2
    planned, said = retrain(arms, "--config.train.steps=5")
    assert trained == ["train retmask-0", "train retmask_others-0"] and "but for" not in said
    assert {name: content for name, (content, _) in files("set-aside/train-2/retmask-0").items()} == {
        name: content for name, (content, _) in before.items()
    }
    _, said = retrain(arms, "--config.train.steps=5", "--config.train.examples=1", "--config.train.checkpoint_every=3")
    assert trained == [] and said.endswith("but for retmask-0, retmask_others-0, made from what has not changed")


def _trained_on(planned):
    """The tokens that the stage is said to train on."""
    (line,) = [line for line in planned.splitlines() if line.startswith("train")]
    return line.split("  ")


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_parameters(finished_apart, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished_apart, root)
    uninterrupted = (root / "train/retmask-0/model/model.safetensors").read_bytes()
    metrics = _metrics(root)
    shutil.rmtree(root / "train")
    process = subprocess.Popen(
        [sys.executable, "-m", "retmask_jax.cli.main", "train", f"--config={CONFIG}", f"--workdir={root}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    saved = root / "train/retmask-0/checkpoints"  # a step's folder holds this file once it is whole
    wait_for(lambda: any(saved.glob("*/commit_success.txt")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (root / "train/result.json").exists()
    done = retmask("train", f"--config={CONFIG}", f"--workdir={root}", env=os.environ | {"RETMASK_LOG": "INFO"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming at step" in done.stderr
    assert (root / "train/retmask-0/model/model.safetensors").read_bytes() == uninterrupted
    assert _metrics(root) == metrics


@pytest.mark.slow
def test_training_that_is_told_to_stop_says_so_and_goes_on(finished_apart, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished_apart, root)
    model, metrics = (root / "train/retmask-0/model/model.safetensors").read_bytes(), _metrics(root)
    shutil.rmtree(root / "train")
    command = ["train", f"--config={CONFIG}", f"--workdir={root}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "retmask_jax.cli.main", *command], stderr=subprocess.PIPE, text=True
    )
    lines = root / "train/retmask-0/metrics.jsonl"
    wait_for(lambda: lines.exists() and lines.read_text(), process)
    process.terminate()
    errors = process.communicate()[1]
    assert process.returncode == 143, errors[-2000:]
    (line,) = [line for line in errors.splitlines() if line.startswith("retmask: ")]
    assert "told to stop; a checkpoint of step" in line and "run the same command again to go on" in line
    assert retmask(*command).returncode == 0
    assert (root / "train/retmask-0/model/model.safetensors").read_bytes() == model
    assert _metrics(root) == metrics


def _metrics(root):
    """Of the only run, less the times."""
    rows = [json.loads(line) for line in (root / "train/retmask-0/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def test_export_writes_the_masked_and_the_trained_model(finished, tmp_path, here):
    import numpy as np

    import retmask_jax as rm

    root, _ = finished
    base = ("export", f"--config={CONFIG}", f"--workdir={root}")
    assert main([*base, f"--out={tmp_path / 'masked'}"]) == 0
    heads = [tuple(head) for head in json.loads((root / "detect/result.json").read_text())["heads"]]
    start, masked = rm.load("bundled"), rm.load(tmp_path / "masked")
    tokens = np.arange(4, 24)[None]
    wanted = start.logits(tokens, interventions=rm.mask_heads(start.config, heads))
    np.testing.assert_allclose(masked.logits(tokens), wanted, atol=1e-5)
    assert masked.tokenizer.chat_template == start.tokenizer.chat_template
    numbers = json.loads((root / "knockout/result.json").read_text())["numbers"]
    _check_card(tmp_path / "masked", f"{len(heads)} of its 32 attention heads", numbers, "/none", "/retrieval")

    assert main([*base, "--what=retmask-0", f"--out={tmp_path / 'trained'}"]) == 0
    trained = rm.load(tmp_path / "trained")
    assert np.abs(trained.logits(tokens) - start.logits(tokens)).max() > 1e-4
    numbers = json.loads((root / "eval/result.json").read_text())["numbers"]
    _check_card(tmp_path / "trained", "arm | `retmask`: normal answers rather than", numbers, "/start", "/retmask")
    again = here(*base, f"--out={tmp_path / 'masked'}")
    assert again.returncode == 2 and "not an empty folder" in again.stderr


def _check_card(folder, words, numbers, *ends):
    """The card has these words, and on every task the base model and this one with the intervals of these numbers."""
    card = (folder / "README.md").read_text()
    (effects,) = (table for table in tables(card) if table[0][0] == "task")
    assert words in card and len(effects) > 2
    for task, *cells in effects[1:]:
        task = task.split(" (")[0]
        for end, cell in zip(ends, cells, strict=False):
            number = next(number for name, number in numbers.items() if name.partition("/")[2] == task + end)
            assert cell == f"{number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]", (task, end)


@pytest.mark.slow
def test_export_writes_pairs_in_both_forms(finished, tmp_path):
    from retmask_jax.data.pair_formats import preference_source, read_pairs

    root, _ = finished
    ours = read_pairs(root / "pairs/retmask-0.jsonl.gz")
    command = ("export", "--what=pairs-retmask-0", f"--config={CONFIG}", f"--workdir={root}")
    assert retmask(*command, f"--out={tmp_path / 'pairs.jsonl.gz'}").returncode == 0
    assert retmask(*command, f"--out={tmp_path / 'set'}", "--format=tfds").returncode == 0
    source = preference_source(tmp_path / "set")
    assert read_pairs(tmp_path / "pairs.jsonl.gz") == ours == [source[i] for i in range(len(source))]
    missing = retmask(
        "export", "--what=pairs-nobody-0", f"--config={CONFIG}", f"--workdir={root}", f"--out={tmp_path / 'x'}"
    )
    assert missing.returncode == 2 and "nobody-0.jsonl.gz does not exist" in missing.stderr


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, "training ended before it could be killed"
        time.sleep(0.02)
