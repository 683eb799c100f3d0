"""`retmask look`: a page and a few lines; a user's mistakes in one line, before weights are read."""

import json
import re

import numpy as np
import pytest

import retmask_jax as rm
from retmask_jax.cli.main import main

TEXT = "the old farmer found the lamp . the home of anna : oslo . the wolf slept near the bed . the home of anna"


def written(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_the_command_writes_the_page_of_a_text_and_prints_the_answers(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "new" / "page.html"
    flags = (f"--file={tmp_path / 'text.txt'}", "--heads=1-0,1-1,1-2,1-3", "--new_tokens=2", f"--out={out}")
    assert main(["look", "bundled", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["untouched:  oslo .", "masked:  berlin ."] and lines[-1] == f"wrote {out}"
    assert re.fullmatch(r"masked heads, by copy score in this prompt: 1-0 \d\.\d\d, 1-1 .*, 1-3 \d\.\d\d", lines[2])
    data = written(out)
    assert data["chosen"] == [8, 9, 10, 11] and data["span"] is None and len(data["tokens"]) == 27
    same = rm.look(rm.load("bundled"), TEXT, heads=[(1, 0), (1, 1), (1, 2), (1, 3)], max_new_tokens=2)
    same.save(tmp_path / "same.html")
    assert written(tmp_path / "same.html") == data


def test_heads_scores_and_answers_are_given_or_found(tmp_path, capsys, monkeypatch):
    scores_LH = np.zeros((4, 8))
    scores_LH[2, 3], scores_LH[0, 1], scores_LH[3, 7] = 0.5, 0.4, 0.05
    rm.HeadScores.from_array(scores_LH).save(tmp_path / "scores.json")
    (tmp_path / "heads.json").write_text("[[3, 1], [0, 7]]")
    monkeypatch.setattr("retmask_jax.cli.looking.find_heads", lambda lm, **_: rm.HeadScores.from_array(scores_LH[::-1]))
    common = ["look", "bundled", f"--prompt={TEXT}", "--new_tokens=2", f"--out={tmp_path / 'page.html'}"]
    expected = {
        (f"--scores={tmp_path / 'scores.json'}",): [(2, 3), (0, 1), (3, 7)],
        (f"--scores={tmp_path / 'scores.json'}", "--heads=1"): [(2, 3)],
        (f"--heads={tmp_path / 'scores.json'}",): [(2, 3), (0, 1)],
        (f"--heads={tmp_path / 'heads.json'}", "--answer=rome ."): [(3, 1), (0, 7)],
        ("--find", "--heads=2"): [(1, 3), (3, 1)],
    }
    for flags, heads in expected.items():
        assert main([*common, *flags]) == 0
        data, said = written(tmp_path / "page.html"), capsys.readouterr().out
        assert data["chosen"] == [8 * layer + head for layer, head in heads]
        given = "--answer=rome ." in flags
        assert (data["replies"][0]["name"] == "given") == given and said.startswith(
            "given:  rome ." if given else "untouched:  oslo"
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--heads=33",), "heads is 33; it must be from 1 to the model's 32, or a list of heads"),
        (("--heads=9-0",), "(9, 0)"),
        (("--heads=gone.json",), "file of heads gone.json does not exist"),
        (("--scores=gone.json",), "file of heads gone.json does not exist"),
        (("--file=gone.txt",), "prompt file gone.txt does not exist"),
        (("--prompt=", "--plain"), "a prompt needs two tokens or more"),
        (("--length=2000",), "leaves no room in the model's 1024"),
        (("--length=64", "--begin=so"), "begin is 'so', and the prompt is given as tokens"),
        (("--new_tokens=0",), "max_new_tokens is 0; it must be at least 1"),
        (("--out=.",), "--out is the folder .: name a file in it, such as look.html"),
        (("--prompt=a", "--length=9"), "not allowed with argument"),
        (("--config.seed=1",), "look reads no config"),
    ],
)
def test_mistakes_are_one_line_before_any_weight_is_read(capsys, compiles, monkeypatch, flags, message):
    monkeypatch.setattr("retmask_jax.cli.looking.load", None)
    assert main(["look", "bundled", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("retmask: ") and message in line and not compiles
