"""A MODEL instead of a recipe: which settings it stands for, where its results go, and that a whole stage runs on it."""

import json

import pytest

from retmask_jax.cli import plan
from retmask_jax.cli.main import main
from retmask_jax.cli.parser import name_of_results, parse, recipe_of
from retmask_jax.pipeline.registry import STAGES, run_stage
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Speed
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.runs.stage import Stage
from retmask_jax.runs.workdir import Result, Workdir
from retmask_jax.utils.numbers import Number


@pytest.mark.parametrize(
    "call, model, recipe, results",
    [
        ("run owner/Name-135M", "owner/Name-135M", "quick", "Name-135M"),
        ("detect a/b.Q4_1.gguf --scale=quick", "a/b.Q4_1.gguf", "quick", "b.Q4_1"),
        ("train --scale=paper ./folder/", "./folder/", "paper", "folder-paper"),
        ("study owner/x --config.seed=3", "owner/x", "quick", "x"),
        ("run", "bundled", "tiny", "tiny"),
        ("export --config=my/recipes/own.py --out=x", None, "my/recipes/own.py", "own"),
    ],
)
def test_what_a_call_stands_for(call, model, recipe, results):
    arguments, overrides = parse(call.split())
    name, overrides = recipe_of(arguments, overrides)
    assert (name, name_of_results(arguments, name)) == (recipe, results)
    if model is not None:
        config = load_recipe(name, overrides)
        assert config.model == model and config.seed == (3 if "seed" in call else 0)


def test_a_setting_with_blanks_is_no_model():
    arguments, overrides = parse(["run", "--config.tasks.detect.lengths=(128, 256)", "owner/x"])
    assert arguments.model == "owner/x" and overrides == [("tasks.detect.lengths", "(128, 256)")]


def test_a_stage_shows_its_heads_and_answers(tmp_path, capsys):
    settings = ("--config.tasks.detect.lengths=(128,)", "--config.tasks.detect.per_length=3")
    assert main(["detect", "--config=tiny", *settings, f"--workdir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "detect" / "result.json").read_text())
    best = result["best"][0]
    line = next(line for line in printed.splitlines() if line.split()[:2] == [str(best["layer"]), str(best["head"])])
    assert (
        f"{best['value']:.3f}" in line
        and f"[{best['low']:.3f}, {best['high']:.3f}]" in line
        and "retrieval head" in line
    )
    assert [head["value"] for head in result["best"]] == sorted((h["value"] for h in result["best"]), reverse=True)
    for example in result["examples"]:
        assert f"{example['question']}  (expected: {example['expected']})" in printed
        assert example["replies"]["reply"] in printed
    assert len(result["examples"]) == 3


def test_the_time_is_said_by_the_first_host_alone_and_only_where_a_stage_works(tmp_path, monkeypatch, capsys):
    """What all hosts must do together, such as hashing a model's files, would never end on one of them."""

    def together(*_):
        raise AssertionError("all hosts must take part in this")

    config = load_recipe("tiny")
    context = Context(config, Workdir.open(tmp_path / "work", config))
    monkeypatch.setattr(plan, "measured_speed", lambda dtype: Speed(1e6, 1e6))
    with monkeypatch.context() as patch:
        patch.setattr("retmask_jax.runs.context.first_alone", together)
        for name in ("detect", "knockout", "rope", "pairs", "train", "eval"):
            plan.say_how_long(context, STAGES[name])
            assert f"{name:<9} about" in capsys.readouterr().err

    begun, numbers = [], {"n": Number(1.0, None, None, 1)}
    stage = Stage(name="easy", work=lambda *_: Result(numbers=numbers), result=Result)
    for ran in (True, False):
        result, now = run_stage(context, stage, lambda: begun.append("said"))
        assert now == ran and result.numbers == numbers and begun == ["said"]
