"""`retmask doctor` reports what is installed and what to do, with exit status 1 where nothing would work; help for typing
mistakes."""

import json
import re
import shlex

import pytest

from retmask_jax.cli import doctor, parser
from retmask_jax.cli.main import main
from retmask_jax.runs import recipes


def test_this_machine_works_and_is_described(tmp_path, capsys):
    assert main(["doctor", "--json", f"--workdir={tmp_path}"]) == 0
    found = {(one["part"], one["name"]): one for one in json.loads(capsys.readouterr().out)}
    assert found["devices", "device 0"]["value"] == "the bundled model answers 'fig'"
    assert found["devices", "attention, float32"]["value"] == "blocked kernel"
    assert found["software", "jax"]["value"][0].isdigit() and "GiB free" in found["disk", "results"]["value"]
    assert {part for part, _ in found} == {"software", "devices", "disk", "hub", "extras"}


def test_what_is_needed_and_missing_ends_with_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "PACKAGES", ("jax", "no-such-package"))
    monkeypatch.setattr(doctor, "_ANSWER", "oak")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor", f"--workdir={tmp_path}"]) == 1
    said = capsys.readouterr()
    assert "no-such-package: not installed; pip install no-such-package" in said.err
    assert "the bundled model answers 'fig'; jax and jaxlib" in said.err and "not installed" in said.out


def test_an_accelerator_that_jax_does_not_use_is_reported(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(doctor, "_SIGNS", {"gpu": (str(tmp_path / "nvidia[0-9]*"),)})
    assert "pip install 'retmask_jax[gpu]'" in doctor._unused()
    monkeypatch.setattr(doctor, "_SIGNS", {"tpu": (str(tmp_path / "accel[0-9]*"),)})
    assert doctor._unused() == ""


def test_a_hub_that_does_not_answer_is_no_failure(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    findings = doctor._hub()
    assert "does not answer" in findings[-1].value and not doctor.failed(findings)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in doctor._hub()[-1].value


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["detec"], "did you mean 'detect'?"),
        (["detect", "--config=tinny"], "did you mean 'tiny'?"),
        (["detect", "--config.detect.treshold=1"], "did you mean 'detect.threshold'?"),
        (["detect", "--config.learning_rate=1"], "did you mean 'train.learning_rate'?"),
        (["detect", "--workdr=x"], "did you mean --workdir?"),
    ],
)
def test_typing_mistakes_are_understood(arguments, meant, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert meant in error and error.count("\n") == 1


@pytest.mark.parametrize("stage", [None, *parser.STAGES])
def test_examples_of_the_help_are_right_and_stages_take_a_line(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["--help"] if stage is None else [stage, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    if stage is None:
        for name, text in parser.STAGES.items():
            assert re.search(rf"^  {name} +{re.escape(text)}$", shown, re.MULTILINE)
    examples = re.findall(r"^  retmask (.*?)(?:   +.*)?$", shown.split("examples:")[1], re.MULTILINE)
    assert examples
    for example in examples:
        arguments, overrides = parser.parse(shlex.split(example))
        if not example.endswith("FOLDER") and "config" in arguments:
            recipes.load_recipe(*parser.recipe_of(arguments, overrides))
