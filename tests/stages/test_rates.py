"""The stage `rates`: which learning rate is chosen, and that it is chosen on what `eval` does not report."""

import json
from pathlib import Path

import pytest
from helpers_results import number

from retmask_jax.cli.main import main
from retmask_jax.data.needles import read_sentences
from retmask_jax.evals.compare import ArmRow
from retmask_jax.pipeline.registry import STAGES, check_config
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.stages.rates import choose

CONFIG = str(Path(__file__).parents[1] / "tiny_small.py")
TRIED = ("--config.rates.learning_rates=(1e-5, 1e-3)", "--config.rates.tasks=('needle short',)")


def rows(changes):
    """changes: {rate: {task: change}}."""
    start = [ArmRow(arm="start", task=task, mean=number(0.5), change=None) for task in next(iter(changes.values()))]
    return start + [
        ArmRow(arm=f"{rate:g}", task=task, mean=number(0.5), change=number(change))
        for rate, of_rate in changes.items()
        for task, change in of_rate.items()
    ]


@pytest.mark.parametrize(
    ("gains", "losses", "chosen"),
    [
        ((0.1, 0.3, 0.2), (0.0, 0.01, 0.02), 1e-5),  # the highest mean gain
        ((0.1, 0.3, 0.2), (0.0, 0.06, 0.05), 3e-5),  # of those that spare the text
        ((0.1, 0.1, 0.1), (0.0, 0.0, 0.0), 3e-6),  # of equal ones the lowest
        ((0.0, 0.3, 0.2), (0.2, 0.1, 0.3), 3e-6),  # none spares the text
        ((-0.3, -0.2, -0.1), (0.0, 0.0, 0.0), 3e-5),  # none gains
    ],
)
def test_the_rate_that_gains_most_and_spares_the_text_is_chosen(gains, losses, chosen):
    rates = (1e-5, 3e-6, 3e-5)
    order = (3e-6, 1e-5, 3e-5)
    changes = {
        rate: {"a": 2 * gain, "b": 0.0, "b: from memory": 9.0 * rate, "text loss": loss}
        for rate, gain, loss in zip(order, gains, losses, strict=True)
    }
    assert choose(rows(changes), rates, most_loss=0.05) == chosen


def test_without_a_text_gains_alone_count():
    assert choose(rows({1e-5: {"a": 0.1}, 1e-4: {"a": 0.2}}), (1e-5, 1e-4), most_loss=0.0) == 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("rates.tasks", "('context short',)")], "rates.tasks has 'context short', which eval reports"),
        ([("rates.tasks", "('nothing',)")], "there is no task 'nothing' under tasks"),
        ([("rates.learning_rates", "(1e-5, 1e-5)")], "repeat a rate"),
        ([("rates.learning_rates", "(0.0,)")], "rates.learning_rates has 0.0; it must be a number above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_every_stage(changes, words):
    with pytest.raises(ValueError, match=words):
        check_config(load_recipe("tiny", changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "rates.learning_rates is empty: name several rates"),
        ([("rates.learning_rates", "(1e-5,)")], "rates.tasks is empty"),
        (
            [("rates.learning_rates", "(1e-5,)"), ("rates.tasks", "('niah',)"), ("train.arms", "('no_fact',)")],
            "train.arms lacks retmask",
        ),
    ],
)
def test_the_stage_alone_refuses_what_it_cannot_do(changes, words):
    config = load_recipe("tiny", changes)
    with pytest.raises(ValueError, match=words):
        STAGES["rates"].check_run(config)


@pytest.mark.slow
def test_rates_are_tried_on_the_pairs_and_the_chosen_one_suits_the_next_stage(tmp_path, capsys, monkeypatch):
    for stage in ("detect", "knockout", "pairs"):
        assert main([stage, f"--config={CONFIG}", f"--workdir={tmp_path}", *TRIED]) == 0
    read, seen = read_sentences, []
    monkeypatch.setattr("retmask_jax.stages.rates.read_sentences", lambda path: seen.append(path) or read(path))
    assert main(["rates", f"--config={CONFIG}", f"--workdir={tmp_path}", *TRIED]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "rates/result.json").read_text())
    assert [row["arm"] for row in result["rows"] if row["task"] == "needle short"] == ["start", "1e-05", "0.001"]
    assert len(seen) == 3  # the start model and both rates read the text
    losses = {row["arm"]: row["mean"]["value"] for row in result["rows"] if row["task"] == "text loss"}
    own = json.loads((tmp_path / "knockout/result.json").read_text())["numbers"]["knockout/text loss/none"]["value"]
    assert losses["start"] != own and losses["0.001"] != losses["1e-05"]  # other windows, other models
    chosen = result["chosen"]
    assert result["last"] == pytest.approx(chosen / 10)
    flags = [f"--config.train.learning_rate={chosen:g}", f"--config.train.final_learning_rate={result['last']:g}"]
    assert " ".join(flags) in printed
    metrics = [(tmp_path / f"rates/{name}/retmask-0/metrics.jsonl").read_text() for name in ("1e-05", "0.001")]
    assert metrics[0] != metrics[1]
    assert main(["train", f"--config={CONFIG}", f"--workdir={tmp_path}", *TRIED, *flags]) == 0
    trained = (tmp_path / "train/retmask-0/metrics.jsonl").read_text().splitlines()
    tried = (tmp_path / f"rates/{chosen:g}/retmask-0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in trained] == [json.loads(line)["loss"] for line in tried]
    assert len(list((tmp_path / "measured").glob("reference-*"))) == 1  # which the three runs share
    assert not list(tmp_path.glob("*/**/reference"))
    assert main(["rates", f"--config={CONFIG}", f"--workdir={tmp_path}", *TRIED, *flags]) == 0
    assert "rates: unchanged since" in capsys.readouterr().out
