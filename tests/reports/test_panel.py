"""Findings over several studies, on made-up results: where they hold, what they rest on, and the page."""

import dataclasses
import json

import msgspec
import pytest
from helpers_results import around, detect_result, number
from retmask_jax.reports.findings import Finding, Member, agreement, evaluate, groups

from retmask_jax.cli import commands
from retmask_jax.cli.main import main
from retmask_jax.reports import findings as panels
from retmask_jax.utils import stats

UP, ACROSS = (0.4, 0.3, 0.5), (0.01, -0.02, 0.04)


def _contrast(ends, p, **names):
    return {"change": number(*ends), "p_value": p, **names}


def _study(effect=UP, p=1e-6):
    """Results of one study; effect and p of what masking the retrieval heads and the lowest pairs does."""
    masked = number(-effect[0], -effect[2], -effect[1])
    rows = [
        {"task": "needle", "kind": "retrieval", "experiment": "zero", "change": masked, "mcnemar": {"p_value": p}},
        {
            "task": "closed",
            "kind": "retrieval",
            "experiment": "zero",
            "change": number(*ACROSS),
            "mcnemar": {"p_value": 0.5},
        },
    ]
    kinds = ("none", "any layer", "layer-matched")
    knockout = {
        "rows": rows,
        "contrasts": [_contrast(effect, p, task="needle", kind=kind, experiment="zero") for kind in kinds],
        "numbers": {
            f"knockout/{task}/{kind}": around(0.9) for task in ("needle", "closed") for kind in (*kinds, "retrieval")
        },
    }
    names = ("none", "centre of mass of the windows")
    rope = {
        "n_pairs": 16,
        "numbers": {f"rope/needle/{name}": around(0.2) for name in names},
        "contrasts": [
            _contrast(effect, p, task="needle", site=site, k=k, kind=kind)
            for site in ("rotary", "projection")
            for k in (2, 4)
            for kind in ("highest", "random")
        ],
    }
    pairs = [
        {"a": "copy", "b": "mass", "jaccard": 0.5 + effect[0], "spearman": 0.9},
        {"a": "copy", "b": "gradient", "jaccard": 0.2, "spearman": None},
    ]
    dynamics = [
        {"step": step, "top": step / 300, "emergence": None if step == 100 else 0.5} for step in (100, 200, 300)
    ]
    return {
        "detect": dataclasses.replace(detect_result((4, 8), 20, 0.1), n_kv_heads=4),
        "detectors": {"agreement": pairs},
        "knockout": knockout,
        "rope": rope,
        "theta": {"theta": 1e4},
        "dynamics": {"rows": dynamics},
    }


@pytest.fixture
def members():
    return [
        Member("llama-0", _study()),
        Member("llama-1", _study((0.3, 0.2, 0.4))),
        Member("qwen-0", _study(ACROSS, 0.4)),
    ]


def test_a_finding_holds_where_the_interval_and_the_adjusted_p_say_so(members):
    found = panels.panel(members, "needle", "closed")
    by_name = {row["name"]: row for row in found["findings"]}
    assert len(by_name) == 6  # no study has the other controls
    necessary = by_name["masking the retrieval heads lowers recall"]
    assert [row["holds"] for row in necessary["rows"]] == [True, True, False] and (
        necessary["holds"],
        necessary["of"],
    ) == (2, 3)
    # a drop of recall is told as positive
    assert necessary["rows"][0] | {"low": 0.3, "high": 0.5} == necessary["rows"][0]
    assert [row["q"] for row in necessary["rows"]] == stats.benjamini_hochberg([1e-6, 1e-6, 0.4]).tolist()
    stays = by_name["closed-book recall stays"]
    assert stays["holds"] == 3 and stays["expected"] == "on"
    assert found["centres"]["qwen-0"]["value"] == 0.2 and found["models"][0]["theta"] == 1e4


def test_an_interval_above_0_is_not_enough_after_adjustment(members):
    def measure(member):
        return _contrast((0.05, 0.01, 0.1), 0.04 if member.name == "llama-0" else 0.9)

    rows = evaluate(Finding("small", measure), members)["rows"]
    assert [row["holds"] for row in rows] == [False] * 3 and rows[0]["q"] == pytest.approx(0.12)
    below = Finding("below", lambda m: _contrast((-0.4, -0.5, -0.3), 1e-9), "below")
    assert evaluate(below, members)["holds"] == 3
    absent = Finding("absent", lambda m: measure(m) if m.name == "qwen-0" else None)
    assert evaluate(absent, members)["of"] == 1


def test_agreement_is_over_the_models_that_have_both(members):
    copy_mass, copy_gradient = agreement(members)
    assert (copy_mass["n_models"], copy_mass["jaccard"]["mean"]) == (3, pytest.approx((0.9 + 0.8 + 0.51) / 3))
    assert (copy_mass["jaccard"]["low"], copy_mass["jaccard"]["high"]) == (0.51, 0.9)
    assert copy_gradient["spearman"] is None


def test_seeds_of_an_architecture_are_a_group():
    assert groups(["llama-1", "qwen3-0", "llama-0", "olmo"]) == {
        "llama": ["llama-1", "llama-0"],
        "olmo": ["olmo"],
        "qwen3": ["qwen3-0"],
    }


def test_studies_without_a_stage_or_task_are_named(members):
    with pytest.raises(ValueError, match="llama-0: knockout has no task 'other'; it has needle, closed"):
        panels.panel(members, "other", None)
    with pytest.raises(ValueError, match="x has no result of rope: run `retmask study` there first"):
        panels.panel([Member("x", {k: v for k, v in _study().items() if k != "rope"})], "needle", None)


def test_the_command_tells_each_finding_and_writes_the_page(members, tmp_path, capsys):
    for member in members:
        for stage, result in member.results.items():
            folder = tmp_path / member.name / stage
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(result, default=msgspec.to_builtins))
        scores = {
            f"{i}-{j}": [float(v)] for i, row in enumerate(member.results["detect"]["mean"]) for j, v in enumerate(row)
        }
        (tmp_path / member.name / "detect" / "scores.json").write_text(json.dumps(scores))
    roots = [str(tmp_path / member.name) for member in members]
    assert main(["panel", *roots, "--task=needle", "--closed_book=closed", f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert (
        "Masking the retrieval heads lowers recall: in 2 of 3 models; not in qwen-0 (+0.010 [−0.020, +0.040], q 0.4000)."
        in (said.replace("\N{NO-BREAK SPACE}", " "))
    )
    assert "Closed-book recall stays: in 3 of 3 models." in said
    page = (tmp_path / "out" / "panel.html").read_text()
    for name in ("Head scores of every model", "closed-book recall stays", "Centre of mass", "Agreement of detectors"):
        assert f'aria-label="{name}"' in page
    assert json.loads((tmp_path / "out" / "panel.json").read_text())["task"] == "needle"
    assert main(["panel", str(tmp_path / "out")]) == 2
    assert "is no work directory with results" in capsys.readouterr().err
    assert commands.sources.read_studies([tmp_path / "llama-0"])[0].results.keys() == members[0].results.keys()
