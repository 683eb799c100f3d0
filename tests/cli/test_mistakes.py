"""A user's mistakes: one clear line, exit status 2, no traceback, nothing compiled, no work directory left behind."""

import errno
import json
import logging
import os
import shutil

import jax
import numpy as np
import pytest

import retmask_jax as rm
from retmask_jax.cli.main import main
from retmask_jax.hf.hub import BUNDLED


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Run the command; it must fail with one line, which is returned."""
    monkeypatch.chdir(tmp_path)
    # The command sets its logger's level for the whole process.
    monkeypatch.setattr(logging.getLogger("retmask_jax"), "level", logging.NOTSET)

    jax.numpy.asarray(np.zeros((4, 8), bool))  # handing a small array to the device may compile once in a process

    def run(*arguments, compiles=False):
        counted = []

        def count(event, *_, **__):
            counted.append(event)

        jax.monitoring.register_event_duration_secs_listener(count)
        status = main(list(arguments))
        jax.monitoring.unregister_event_duration_listener(count)
        error = capsys.readouterr().err
        line = error.strip().splitlines()[-1]
        assert status == 2, error
        assert "Traceback" not in error and line.startswith("retmask: ")
        assert compiles or not [event for event in counted if "backend_compile" in event]
        assert not (tmp_path / "work" / "config.json").exists() or compiles
        return line

    return run


def copy_model(folder, **changes):
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_model_that_is_none(refused):
    for model in ("no/such/folder/at/all", "a name with blanks/x", "./smol.gguf"):
        line = refused("detect", model)
        assert model in line and "does not exist" in line or "cannot" in line


def test_a_model_and_a_recipe_or_a_scale_without_a_model(refused):
    line = refused("run", "bundled", "--config=tiny")
    assert "bundled and --config=tiny both say what to run: leave one of them out" in line
    assert "--scale=paper goes with a MODEL" in refused("run", "--scale=paper")
    assert "invalid choice: 'huge'" in refused("run", "bundled", "--scale=huge")


def test_a_model_whose_tokenizer_cannot_write_the_built_in_texts(refused):
    assert "tokenizer cannot write 'builtin:" in refused("run", "bundled", "--workdir=work")


def test_a_built_in_text_that_does_not_exist(refused):
    line = refused("detect", "--config.tasks.detect.needles=builtin:poems", "--workdir=work")
    assert "there is no built-in text 'builtin:poems'; there are builtin:essays" in line


def test_missing_folder(refused):
    assert "no/such/folder does not exist" in refused("detect", "--config.model=./no/such/folder", "--workdir=work")


def test_folder_without_config(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json does not exist" in refused("detect", "--config.model=./empty", "--workdir=work")


def test_unsupported_family(refused, tmp_path):
    copy_model(tmp_path / "model", model_type="mamba")
    line = refused("detect", "--config.model=./model", "--workdir=work")
    assert "'mamba' is not supported (supported: gemma2, gemma3, gemma3_text, granite, llama, " in line


def test_unknown_attribute_of_a_model(refused, tmp_path):
    copy_model(tmp_path / "model", clip_qkv=8.0)
    line = refused("detect", "--config.model=./model", "--workdir=work")
    assert "clip_qkv=8.0" in line and line.endswith("or --config.ignore=clip_qkv")
    ignoring = "detect", "--config.model=./model", "--workdir=work", "--config.ignore=clip"
    assert "config.json has no 'clip', which is to be ignored" in refused(*ignoring)


def test_unknown_config_key_suggests_the_right_one(refused):
    assert "did you mean 'train.steps'?" in refused("train", "--config.train.step=3", "--workdir=work")


def test_unknown_config_and_value_of_another_type(refused):
    assert "no config named 'tiny_ful' (did you mean 'tiny_full'?)" in refused("run", "--config=tiny_ful")
    assert "train.steps is of type int" in refused("run", "--config.train.steps=many", "--workdir=work")


def test_unknown_stage_and_argument(refused):
    assert "invalid choice" in refused("detct")
    assert "unknown argument '--steps=3'" in refused("detect", "--steps=3")


def test_prompt_longer_than_the_context(refused):
    line = refused("detect", "--config.tasks.detect.lengths=(128, 4096)", "--workdir=work")
    assert "needs 4104 tokens, the model's context is 1024" in line


def test_scores_of_another_model(refused, tmp_path):
    rm.HeadScores.from_array(np.ones((2, 3))).save(tmp_path / "scores.json")
    line = refused("detect", "--config.detect.scores=./scores.json", "--workdir=work")
    assert "2 layers of 3 heads" in line and "4 of 8" in line


def test_heads_to_train_that_there_are_not(refused, tmp_path):
    line = refused("train", "--config.train.heads=retreival", "--workdir=work")
    assert "train.heads is 'retreival'; it must be all, retrieval, others, matched or a file of heads" in line
    (tmp_path / "heads.json").write_text("[[1, 0], [4, 0]]")
    line = refused("run", "--config.train.heads=heads.json", "--workdir=work")
    assert "heads.json: head [4, 0] is out of range: the model has 4 layers of 8 query heads" in line


def test_head_out_of_range(refused):
    line = refused("export", "--heads", "1-0", "4-0", "--out=out", "--workdir=work")
    assert "head (4, 0) is out of range" in line and "4 layers of 8" in line


def test_mask_of_wrong_shape():
    lm = rm.load("bundled")
    with pytest.raises(ValueError, match=r"\(3, 8\).*\(4, 8\)"):
        lm.logits(np.ones((1, 4), int), interventions=rm.Interventions(head_mask=np.zeros((3, 8), bool)))


def test_mesh_that_does_not_fit(refused):
    assert "does not fit" in refused("detect", "--config.mesh.tensor=3", "--workdir=work")


def test_work_directory_of_something_else(refused, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    assert "is not one of ours" in refused("detect", "--workdir=work")
    assert (tmp_path / "work" / "thesis.tex").read_text() == "x"


def test_stage_before_its_inputs(refused):
    assert "stage detect has no result" in refused("knockout", "--workdir=work")


def test_detection_in_which_no_case_counts(refused, tmp_path):
    lines = [json.loads(line) for line in (BUNDLED.parent / "data/detect_needles.jsonl").read_text().splitlines()]
    # Asked for what no sentence says, the model cannot give the needle's words.
    strange = [line | {"question": "the lamp was red"} for line in lines]
    (tmp_path / "needles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in strange))
    line = refused(
        "detect",
        "--config.tasks.detect.needles=./needles.jsonl",
        "--config.tasks.detect.lengths=(128,)",
        "--config.tasks.detect.per_length=8",
        "--workdir=work",
        compiles=True,
    )
    assert "none of 8 detection cases counts" in line and "wrong answer" in line


def test_settings_of_the_study_that_cannot_be_used(refused):
    run = ("study", "--workdir=work")
    assert "detectors.names has 'copi'; known detectors are copy, " in refused(
        *run, "--config.detectors.names=('copi',)"
    )
    assert "theta.detector has 'x'" in refused(*run, "--config.theta.detector=x")
    assert "there is no task 'needel' under tasks" in refused(*run, "--config.theta.tasks=('needel',)")
    assert "there is no task 'x' under tasks" in refused(*run, "--config.dynamics.task=x")
    assert "repeat a seed or 1, the task's seed" in refused(*run, "--config.detectors.seeds=(2, 1)")
    assert "detectors.cases is 0; it must be a whole number of at least 1" in refused(
        *run, "--config.detectors.cases=0"
    )
    assert "theta.factors (0.5, 2.0) lack 1" in refused(*run, "--config.theta.factors=(0.5, 2.0)")
    assert "theta.factors has -1.0; it must be a number above 0" in refused(*run, "--config.theta.factors=(1.0, -1.0)")
    assert "must be positive, finite and without repeats" in refused(*run, "--config.theta.factors=(1.0, 1.0)")
    assert "detectors.top_k is 33, the model has 32 heads" in refused(*run, "--config.detectors.top_k=33")
    assert "null_query '' has no tokens" in refused(*run, "--config.detectors.null_query=")


def test_checkpoints_that_cannot_be_measured(refused, tmp_path):
    def refused_with(name):
        return refused("dynamics", f"--config.dynamics.checkpoints=('{name}',)", "--workdir=work")

    assert "checkpoint ./step_1 is not there" in refused_with("./step_1")
    assert "no folder matches the checkpoints ./step_*" in refused_with("./step_*")
    (tmp_path / "step_1").mkdir()
    assert "config.json does not exist" in refused_with("./step_1")
    copy_model(tmp_path / "step_2", max_position_embeddings=256)
    assert "the context of checkpoint ./step_2 is 256: shorten its lengths" in refused_with("./step_2")
    copy_model(tmp_path / "step_3")
    (tmp_path / "step_3" / "tokenizer.json").unlink()
    assert "checkpoint ./step_3 has no tokenizer" in refused_with("./step_3")


def test_missing_data_file(refused):
    assert "no file matches nowhere.jsonl" in refused(
        "detect", "--config.pairs.prompts=./nowhere.jsonl", "--workdir=work"
    )
    suite = ("--config.suites.perplexity.length=64", "--config.suites.perplexity.file=./nowhere.txt")
    for wrong in (("--config.text.file=./nowhere.txt",), suite, (*suite[:1], "--config.suites.perplexity.file=/")):
        assert "does not exist" in refused("detect", *wrong, "--workdir=work")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_or_locked_disk_is_one_line(tmp_path, monkeypatch, capsys, number):
    def full(*_, **__):
        raise OSError(number, os.strerror(number), "work/config.json")

    monkeypatch.setattr("retmask_jax.runs.workdir.write_json", full)
    assert main(["detect", "--config=tiny", f"--workdir={tmp_path / 'work'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"retmask: work/config.json: {os.strerror(number)}: make room") and error.count("\n") == 1
