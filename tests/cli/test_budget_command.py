"""`retmask budget`: what a model can still do where all but a list's best heads stream."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from helpers_made_up import make_up
from helpers_results import Page

import retmask_jax as rm
from retmask_jax.cli.main import main
from retmask_jax.stages.study.budget import BudgetResult
from retmask_jax.stages.study.budget_rows import TEXT

CONFIG = str(Path(__file__).parents[1] / "tiny_small.py")
SETTINGS = (f"--config={CONFIG}", "--config.budget.detectors=('copy_position',)", "--config.budget.kept=(0.0, 4, 1.0)")
COPYING = [(1, head) for head in range(8)]  # of the bundled model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bundled model's layer whose heads copy, and its last one, in two forms."""
    folder, config = tmp_path_factory.mktemp("lists"), rm.load("bundled").config
    rm.write_heads(folder / "copying.yaml", COPYING, "qrhead", config, model="bundled")
    rm.write_heads(folder / "last.tsv", [(3, head) for head in range(8)], "duoattention", config)
    return folder


@pytest.fixture(params=["made up", pytest.param("measured", marks=pytest.mark.slow)])
def detectors(request, monkeypatch):
    """Those that are asked. Without any, what the model does is made up: it answers unless most of its copying layer streams."""
    if request.param == "measured":
        return ("copy_position",)

    def streaming(mask):
        return np.zeros((4, 8)) if mask.stream_mask is None else np.asarray(mask.stream_mask)

    make_up(monkeypatch, streaming, lambda streaming_LH: streaming_LH[1].mean() > 0.5)
    return ()


def test_a_plan_measures_nothing(files, tmp_path, capsys):
    work = tmp_path / "work"
    assert main(["budget", *SETTINGS, str(files / "copying.yaml"), f"--workdir={work}", "--plan"]) == 0
    assert "left to do" in capsys.readouterr().out and not (work / "budget").exists()


def test_the_command_measures_lists_and_random_ones(detectors, files, tmp_path, capsys):
    work = tmp_path / "work"
    call = ["budget", *SETTINGS, str(files / "copying.yaml"), f"--workdir={work}", str(files / "last.tsv")]
    call.append(f"--config.budget.detectors={detectors}")
    assert main(call) == 0
    printed = capsys.readouterr().out
    result = msgspec.convert(json.loads((work / "budget/result.json").read_text()), BudgetResult)
    assert result.names == [*detectors, "copying", "last", "random"]
    assert (result.sizes, result.total, result.tasks) == ([0, 4, 16], 16, ["needle short"])
    recall = {(row.name, row.kept): row for row in result.rows if row.measure == "needle short"}
    assert recall["copying", 4].value >= 0.75 > recall["last", 4].value  # which heads need the long context; of 4 cases
    assert recall["last", 16].value == result.untouched["needle short"].value == 1
    assert ("copying", 16) not in recall and {kept for _, kept in recall} == {0, 4, 16}
    for measure in ("needle short", TEXT):
        header = next(line for line in printed.splitlines() if line.strip().startswith(f"{measure}: KV heads kept"))
        assert header.split()[-len(result.names) :] == result.names
    row = recall["copying", 4]
    assert f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" in printed
    page = Page((work / "budget.html").read_text())
    assert (
        page.drawings == ["What is left of a model whose heads stream"] and f"page: {work / 'budget.html'}" in printed
    )
    assert main(call) == 0 and "budget: unchanged since" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("kept=(0.0, 17)", "a budget of 17 KV heads: the model has 16, so its numbers lie in 0 to 16"),
        ("kept=(0.0, 1.5)", "budget.kept has 1.5; it must be a number of KV heads, of at least 0, or a share"),
        (
            "window=256",
            "streaming heads see 260 tokens, and those of needle short are at most 128: lower budget.window",
        ),
        ("window=0", "budget.window is 0; it must be a whole number of at least 1"),
        ("tasks=('nothing',)", "there is no task 'nothing' under tasks"),
        ("files=('nowhere.json',)", "file of heads nowhere.json does not exist"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(setting, message, capsys, tmp_path):
    assert main(["budget", *SETTINGS, f"--config.budget.{setting}", f"--workdir={tmp_path / 'work'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("retmask: ") and message in error
    assert not (tmp_path / "work").exists()
