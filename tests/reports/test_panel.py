"""Findings over several studies, on made-up results: where they hold, what they rest on, and the page."""

import dataclasses
import json

import pytest
from helpers_results import around, detect_result, make_results, number
from helpers_study import detectors_result, dynamics_result, theta_result

from retmask_jax.cli.main import main
from retmask_jax.heads.conditions import Contrast
from retmask_jax.heads.detectors import Agreement
from retmask_jax.reports.panel import findings as panels
from retmask_jax.reports.panel import sources
from retmask_jax.reports.panel.findings import Finding, Member, agreement, evaluate, groups
from retmask_jax.stages.knockout import ControlContrast
from retmask_jax.stages.rope import DoseContrast, Spectrum
from retmask_jax.utils import stats
from retmask_jax.utils.files import write_json

UP, ACROSS = (0.4, 0.3, 0.5), (0.01, -0.02, 0.04)


def _study(name, effect=UP, p=1e-6):
    """A study; effect and p of what masking the retrieval heads and ablating the lowest pairs does."""
    made, (value, low, high) = make_results(tasks=("needle", "closed")), effect
    changes = {"needle": (number(-value, -high, -low), p), "closed": (number(*ACROSS), 0.5)}
    rows = [row for row in made["knockout"].rows if row.kind in ("none", "retrieval", "any layer")]
    for i, row in enumerate(rows):
        if row.kind == "retrieval":
            change, p_value = changes[row.task]
            rows[i] = dataclasses.replace(row, change=change, mcnemar=dataclasses.replace(row.mcnemar, p_value=p_value))
    controls = [
        ControlContrast(change=number(*effect), p_value=p, task="needle", kind=kind, experiment="zero")
        for kind in ("none", "any layer", "layer-matched")
    ]
    doses = [
        DoseContrast(change=number(*effect), p_value=p, task="needle", site=site, k=k, kind=kind)
        for site in ("rotary", "projection")
        for k in (2, 4)
        for kind in ("highest", "random")
    ]
    pairs = [Agreement("copy", "mass", 0.5 + value, 0.9), Agreement("copy", "gradient", 0.2, None)]
    dynamics = dynamics_result("needle", (100, 200, 300))
    first = dataclasses.replace(dynamics.rows[0], emergence=None)
    return Member(
        name=name,
        detect=dataclasses.replace(detect_result((4, 8), 20, 0.1), n_kv_heads=4),
        detectors=dataclasses.replace(detectors_result(("copy", "mass"), "needle"), agreement=pairs),
        knockout=dataclasses.replace(made["knockout"], rows=rows, contrasts=controls),
        rope=dataclasses.replace(
            made["rope"],
            n_pairs=16,
            contrasts=doses,
            spectra=[Spectrum(task="needle", centre=around(0.2), width=around(0.1))],
        ),
        theta=dataclasses.replace(theta_result("needle", ACROSS), theta=1e4),
        dynamics=dataclasses.replace(dynamics, rows=[first, *dynamics.rows[1:]]),
    )


@pytest.fixture
def members():
    return [_study("llama-0"), _study("llama-1", (0.3, 0.2, 0.4)), _study("qwen-0", ACROSS, 0.4)]


def test_a_finding_holds_where_the_interval_and_the_adjusted_p_say_so(members):
    found = panels.panel(members, "needle", "closed")
    by_name = {row.name: row for row in found.findings}
    assert len(by_name) == 6  # no study has the other controls
    necessary = by_name["masking the retrieval heads lowers recall"]
    assert [row.holds for row in necessary.rows] == [True, True, False] and (necessary.holds, necessary.of) == (2, 3)
    # a drop of recall is reported as positive
    assert (necessary.rows[0].value, necessary.rows[0].low, necessary.rows[0].high) == UP
    assert [row.q for row in necessary.rows] == stats.benjamini_hochberg([1e-6, 1e-6, 0.4]).tolist()
    stays = by_name["closed-book recall stays"]
    assert stays.holds == 3 and stays.expected == "on"
    assert found.centres["qwen-0"].value == 0.2 and found.models[0].theta == 1e4


def test_an_interval_above_0_is_not_enough_after_adjustment(members):
    def measure(member):
        return Contrast(change=number(0.05, 0.01, 0.1), p_value=0.04 if member.name == "llama-0" else 0.9)

    rows = evaluate(Finding("small", measure), members).rows
    assert [row.holds for row in rows] == [False] * 3 and rows[0].q == pytest.approx(0.12)
    below = Finding("below", lambda m: Contrast(change=number(-0.4, -0.5, -0.3), p_value=1e-9), "below")
    assert evaluate(below, members).holds == 3
    absent = Finding("absent", lambda m: measure(m) if m.name == "qwen-0" else None)
    assert evaluate(absent, members).of == 1


def test_agreement_is_over_the_models_that_have_both(members):
    copy_mass, copy_gradient = agreement(members)
    assert (copy_mass.n_models, copy_mass.jaccard.mean) == (3, pytest.approx((0.9 + 0.8 + 0.51) / 3))
    assert (copy_mass.jaccard.low, copy_mass.jaccard.high) == (0.51, 0.9)
    assert copy_gradient.spearman is None


def test_seeds_of_an_architecture_are_a_group():
    assert groups(["llama-1", "qwen3-0", "llama-0", "olmo"]) == {
        "llama": ["llama-1", "llama-0"],
        "olmo": ["olmo"],
        "qwen3": ["qwen3-0"],
    }


def _write(member, root):
    """The work directory of a study."""
    for stage, result in vars(member).items():
        if stage != "name":
            write_json(root / stage / "result.json", result)
    scores = {f"{i}-{j}": [float(v)] for i, row in enumerate(member.detect.mean) for j, v in enumerate(row)}
    write_json(root / "detect" / "scores.json", scores)


def test_studies_without_a_stage_or_task_are_named(members, tmp_path):
    with pytest.raises(ValueError, match="llama-0: knockout has no task 'other'; it has needle, closed"):
        panels.panel(members, "other", None)
    _write(members[0], tmp_path / "x")
    (tmp_path / "x/rope/result.json").unlink()
    with pytest.raises(ValueError, match="x has no result of rope: run `retmask study` there first"):
        sources.read_studies([tmp_path / "x"])


def test_the_command_reports_each_finding_and_writes_the_page(members, tmp_path, capsys):
    for member in members:
        _write(member, tmp_path / member.name)
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
    assert sources.read_studies([tmp_path / "llama-0", tmp_path / "qwen-0"]) == [members[0], members[2]]
