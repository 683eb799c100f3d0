"""`retmask arena`, which compares lists of heads, and `retmask export --what=scores`, which writes them for others."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import yaml
from helpers_made_up import make_up
from helpers_results import Page, detected

import retmask_jax as rm
from retmask_jax.cli.main import main
from retmask_jax.cli.parser import HEAD_FORMS, parse, recipe_of
from retmask_jax.heads import knockout
from retmask_jax.heads.lists.formats import written_forms
from retmask_jax.runs.workdir import Provenance
from retmask_jax.stages.study.arena import ArenaResult
from retmask_jax.utils.files import write_json

CONFIG = str(Path(__file__).parents[1] / "tiny_small.py")
SETTINGS = (f"--config={CONFIG}", "--config.arena.detectors=('copy_position',)", "--config.arena.modes=('zero',)")
BEST = [(1, 0), (1, 1), (1, 2), (1, 3)]  # of the bundled model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bundled model's best heads and its last ones, in two forms."""
    folder, config = tmp_path_factory.mktemp("lists"), rm.load("bundled").config
    rm.write_heads(folder / "best.yaml", BEST, "qrhead", config, model="bundled")
    rm.write_heads(folder / "last.tsv", [(3, head) for head in range(8)], "duoattention", config)
    rm.write_heads(folder / "more.json", [(0, head) for head in range(8)], "list", config)
    return folder


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("retmask: ")
        return error

    return run


@pytest.mark.parametrize(
    ("call", "model", "files"),
    [
        ("arena owner/x a.json b.yaml", "owner/x", ("a.json", "b.yaml")),
        ("arena owner/x --config.arena.heads=4 a.json --workdir=w b.yaml", "owner/x", ("a.json", "b.yaml")),
        ("arena --config=tiny a.json b.yaml", "bundled", ("a.json", "b.yaml")),
        ("arena a.json --config=tiny", "bundled", ("a.json",)),
        ("arena --config=tiny", "bundled", ()),
        ("arena owner/x", "owner/x", ()),
    ],
)
def test_files_stand_anywhere_after_the_model_or_beside_a_recipe(call, model, files):
    arguments, overrides = parse(call.split())
    recipe, overrides = recipe_of(arguments, overrides)
    assert recipe == ("tiny" if model == "bundled" else "quick")
    assert tuple(arguments.files) == files
    assert dict(overrides).get("model", "bundled") == model


@pytest.fixture(params=["made up", pytest.param("measured", marks=pytest.mark.slow)])
def detectors(request, monkeypatch):
    """Those that are asked. Without any, what the model does is made up: it answers unless all of the best heads are masked."""
    if request.param == "measured":
        return ("copy_position",)

    def masked(mask):
        return np.zeros((4, 8)) if mask.head_mask is None else np.asarray(mask.head_mask)

    make_up(monkeypatch, masked, lambda masked_LH: masked_LH[tuple(zip(*BEST, strict=True))].all())
    monkeypatch.setattr(knockout, "activity", lambda lm, rows, **how: np.arange(32.0).reshape(4, 8))
    return ()


def test_the_command_compares_lists(detectors, files, tmp_path, capsys):
    work = tmp_path / "work"
    call = ["arena", *SETTINGS, str(files / "best.yaml"), f"--workdir={work}", str(files / "last.tsv")]
    call.append(f"--config.arena.detectors={detectors}")
    assert main(call) == 0
    printed = capsys.readouterr().out
    result = msgspec.convert(json.loads((work / "arena/result.json").read_text()), ArenaResult)
    assert [(row.name, row.form, row.of_kv_heads) for row in result.lists] == [
        *((name, "", False) for name in detectors),
        ("best", "qrhead", False),
        ("last", "duoattention", True),
    ]
    assert result.sizes == [4] and result.recall.value == 1
    by_name = {row.name: row for row in result.rows}
    assert by_name["best"].recall.value == 0 and by_name["last"].recall.value == 1
    assert {one.name: one.heads for one in result.sets}["last"] == [(3, head) for head in range(4)]
    for row in result.rows:
        line = next(line for line in printed.splitlines() if line.startswith(f"{row.name} "))
        assert f"{row.recall.value:.3f} [{row.recall.low:.3f}, {row.recall.high:.3f}]" in line
        assert f"{row.cost.value:+.3f}" in line
    page = Page((work / "arena.html").read_text())
    assert page.headings[:3] == ["What ablating them does", "Overlap of the lists", "The lists"]
    assert page.drawings == ["4 heads of each list ablated"] and f"page: {work / 'arena.html'}" in printed
    assert main(call) == 0 and "arena: unchanged since" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_measured_stays_where_a_list_is_added(files, tmp_path):
    work, results = tmp_path / "work", []
    call = ["arena", *SETTINGS, f"--workdir={work}", str(files / "best.yaml"), str(files / "last.tsv")]
    for more in ((), (str(files / "more.json"),)):
        assert main([*call, *more]) == 0
        results.append(msgspec.convert(json.loads((work / "arena/result.json").read_text()), ArenaResult))
    before, after = results
    assert [row.name for row in after.lists][-1] == "more" and (work / "set-aside/arena-1/result.json").exists()
    rows = [{row.name: row for row in result.rows if row.name in ("best", "last")} for result in (before, after)]
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_mistakes_are_one_line_before_anything_is_measured(files, refused, tmp_path):
    call = ["arena", *SETTINGS, f"--workdir={tmp_path / 'work'}"]
    assert "file of heads nowhere.json does not exist" in refused(*call, "nowhere.json")
    rm.HeadScores.from_array(np.ones((2, 3))).save(tmp_path / "other.json")
    line = refused(*call, tmp_path / "other.json")
    assert "scores 2 layers of 3 heads, the model has 4 of 8: give scores of this architecture" in line
    (tmp_path / "kv.tsv").write_text("0.5\t0.5\n" * 4)
    assert "scores 4 layers of 2 KV heads, the model has 4 of 4" in refused(*call, tmp_path / "kv.tsv")
    (tmp_path / "words.txt").write_text("heads")
    assert "words.txt has no heads in a form that is known here: locos" in refused(*call, tmp_path / "words.txt")
    line = refused(*call, files / "best.yaml", "--config.arena.heads=5")
    assert "arena.heads has 5, the list best has 4 heads" in line
    assert "is given twice" in refused(*call, files / "best.yaml", files / "best.yaml")
    assert "arena.modes is ('one',); it must have some of zero" in refused(*call, "--config.arena.modes=('one',)")
    assert "unknown argument '--heads=3'" in refused(*call, "--heads=3")
    assert not (tmp_path / "work").exists()


# --- export ---


def test_export_turns_files_into_the_forms_of_others(files, tmp_path, capsys):
    config = rm.load("bundled").config
    assert set(HEAD_FORMS) == set(written_forms())  # which the parser lists without an import
    for form in HEAD_FORMS:
        out = tmp_path / form
        call = ["export", "bundled", "--what=scores", f"--scores={files / 'best.yaml'}", f"--format={form}"]
        assert main([*call, f"--out={out}"]) == 0
        assert f"wrote {out}: " in capsys.readouterr().out
        found = rm.read_heads(out, config)
        chosen = found.heads if found.scores is None else found.scores.heads(threshold=1)
        assert set(chosen) == set(BEST), form
    assert yaml.safe_load((tmp_path / "qrhead").read_text())["model_name_or_path"] == "bundled"


def test_export_writes_what_detection_found_and_of_scores_the_heads_that_it_chooses(files, tmp_path):
    scores = np.linspace(0, 0.5, 32).reshape(4, 8)
    heads = [(3, 7), (3, 6)]
    write_json(tmp_path / "work/detect/result.json", vars(detected(heads, provenance=Provenance(settings={}))))
    rm.HeadScores.from_array(scores).save(tmp_path / "work/detect/scores.json")
    write_json(tmp_path / "work/config.json", {})
    config = rm.load("bundled").config

    def export(form, *arguments):
        out = tmp_path / f"{form}{len(arguments)}"
        assert main(["export", "bundled", "--what=scores", f"--format={form}", f"--out={out}", *arguments]) == 0
        return rm.read_heads(out, config)

    work = f"--workdir={tmp_path / 'work'}"
    assert export("list", work).heads == heads
    np.testing.assert_array_equal(export("locos", work).scores.mean, scores.astype(np.float32))
    given = f"--scores={tmp_path / 'work/detect/scores.json'}"
    assert export("qrhead", given, "--config.detect.threshold=0.45").heads == [(3, 7), (3, 6), (3, 5), (3, 4)]
    assert export("list", "--heads", "2-1", "0-3").heads == [(2, 1), (0, 3)]


def test_exports_that_do_not_go_together_are_refused(files, refused, tmp_path):
    call = ["export", "bundled", f"--out={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"]
    line = refused(*call, "--what=scores", "--format=tfds")
    assert "--format=tfds does not go with --what=scores, whose formats are retmask, headkv" in line
    line = refused(*call, "--format=qrhead")
    assert "--format=qrhead does not go with --what=masked, whose formats are released, tfds" in line
    assert "goes with --what=scores alone, and --what is masked" in refused(*call, f"--scores={files / 'best.yaml'}")
    line = refused(*call, "--what=scores", f"--scores={files / 'best.yaml'}", "--heads", "1-0")
    assert "both say which heads: leave one of them out" in line
    assert "stage detect has no result" in refused(*call, "--what=scores")
    rm.HeadScores.from_array(np.full((4, 8), 0.01)).save(tmp_path / "low.json")
    line = refused(*call, "--what=scores", f"--scores={tmp_path / 'low.json'}", "--format=list")
    assert "no head reaches detect.threshold 0.1: the best score is 0.010" in line
    assert "head [4, 0] is out of range" in refused(*call, "--what=scores", "--heads", "4-0")
    assert "invalid choice: 'npy'" in refused(*call, "--what=scores", "--format=npy")
    assert not (tmp_path / "out").exists()
