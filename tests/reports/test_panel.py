"""Findings over several studies, on made-up results: where they hold, what they rest on, and the page."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers_results import around, detect_result, make_results, number
from helpers_study import detectors_result, dynamics_result, theta_result

from retmask_jax.cli.main import main
from retmask_jax.heads.conditions import Contrast
from retmask_jax.heads.detectors import Agreement
from retmask_jax.heads.scores import HeadScores
from retmask_jax.reports.panel import findings as panels
from retmask_jax.reports.panel import page, sources
from retmask_jax.reports.panel.findings import Finding, agreement, evaluate, groups
from retmask_jax.runs.workdir import Provenance
from retmask_jax.stages.knockout import ControlContrast
from retmask_jax.stages.rope import DoseContrast
from retmask_jax.utils import stats
from retmask_jax.utils.files import write_json

COLAB = Path(__file__).parents[2] / "colab"
UP, ACROSS = (0.4, 0.3, 0.5), (0.01, -0.02, 0.04)


def _study(root, effect=UP, p=1e-6):
    """Writes the work directory of a study; effect and p of what masking the retrieval heads and ablating the lowest pairs
    does."""
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
        DoseContrast(change=number(*effect), p_value=p if k == 4 else 0.9, task="needle", site=site, k=k, kind=kind)
        for site in ("rotary", "projection")
        for k in (2, 4)
        for kind in ("highest", "random")
    ]
    pairs = [Agreement("copy", "mass", 0.5 + value, 0.9), Agreement("copy", "gradient", 0.2, None)]
    dynamics = dynamics_result("needle", (100, 200, 300))
    detect = detect_result((4, 8), 20, 0.1)
    rope_numbers = made["rope"].numbers | {"rope/needle/centre of mass of the windows": around(0.2)}
    eval_numbers = {"eval/needle/retmask minus start": number(*effect)}
    results = {
        "detect": dataclasses.replace(
            detect, n_kv_heads=4, provenance=Provenance(inputs={"weights": f"weights of {root.name}"})
        ),
        "detectors": dataclasses.replace(detectors_result(("copy", "mass"), "needle"), agreement=pairs),
        "knockout": dataclasses.replace(made["knockout"], rows=rows, contrasts=controls),
        "rope": dataclasses.replace(made["rope"], n_pairs=16, contrasts=doses, numbers=rope_numbers),
        "theta": dataclasses.replace(theta_result("needle", ACROSS), theta=1e4),
        "dynamics": dataclasses.replace(
            dynamics, numbers=dynamics.numbers | {"dynamics/step 100/top score": number(0.2)}
        ),
        "eval": dataclasses.replace(made["eval"], numbers=eval_numbers),
    }
    for stage, result in results.items():
        write_json(root / stage / "result.json", result)
    write_json(root / "config.json", {"model": root.name})
    HeadScores.from_array(detect.mean).save(root / "detect" / "scores.json")
    return root


@pytest.fixture
def roots(tmp_path):
    return [
        _study(tmp_path / "llama-0"),
        _study(tmp_path / "llama-1", (0.3, 0.2, 0.4)),
        _study(tmp_path / "qwen-0", ACROSS, 0.4),
    ]


@pytest.fixture
def members(roots):
    return sources.read_studies(roots)


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
        return Contrast(change=number(0.05, 0.01, 0.1), p_value=0.04 if member.model == "llama-0" else 0.9)

    rows = evaluate(Finding("small", measure), members).rows
    assert [row.holds for row in rows] == [False] * 3 and rows[0].q == pytest.approx(0.12)
    below = Finding("below", lambda m: Contrast(change=number(-0.4, -0.5, -0.3), p_value=1e-9), "below")
    assert evaluate(below, members).holds == 3
    absent = Finding("absent", lambda m: measure(m) if m.model == "qwen-0" else None)
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


def test_studies_without_a_task_are_named_and_what_they_lack_is_said(members, roots, tmp_path):
    with pytest.raises(ValueError, match="llama-0: knockout has no task 'other'; it has needle, closed"):
        panels.panel(members, "other", None)
    for stage in ("rope", "detectors", "theta"):
        (roots[1] / stage / "result.json").unlink()
    found = panels.panel(sources.read_studies(roots), "needle", "closed")
    assert found.lacking == {
        "RoPE base": ["llama-1"],
        "agreement of detectors": ["llama-1"],
        "a quarter of the pairs: highest leave more recall than lowest": ["llama-1"],
        "and random more than lowest": ["llama-1"],
    }
    assert "llama-1" not in found.centres and found.findings[-1].of == 2
    detected = dataclasses.replace(
        detect_result((4, 8), 20, 0.1), rope_base=5e5, provenance=Provenance(inputs={"weights": "w"})
    )
    write_json(roots[1] / "detect" / "result.json", detected)  # by a version that notes the base
    assert [row.theta for row in sources.read_studies(roots)] == [1e4, 5e5, 1e4]
    with pytest.raises(ValueError, match="empty is neither a work directory with results nor a folder of records"):
        (tmp_path / "empty").mkdir()
        sources.read_studies([tmp_path / "empty"])
    with pytest.raises(ValueError, match="2 of the sources are of a model called llama-0: leave all but one"):
        write_json(tmp_path / "record.json", members[0])
        sources.read_studies([*roots, tmp_path / "record.json"])


def test_the_command_reports_each_finding_and_writes_the_page(roots, tmp_path, capsys):
    paths = [str(root) for root in roots]
    assert main(["panel", *paths, "--task=needle", "--closed_book=closed", f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert (
        "Masking the retrieval heads lowers recall: in 2 of 3 models; not in qwen-0 (+0.010 [−0.020, +0.040], q 0.4000)."
        in (said.replace("\N{NO-BREAK SPACE}", " "))
    )
    assert "Closed-book recall stays: in 3 of 3 models." in said and "Without" not in said
    written = (tmp_path / "out" / "panel.html").read_text()
    for name in ("Head scores of every model", "closed-book recall stays", "Centre of mass", "Agreement of detectors"):
        assert f'aria-label="{name}"' in written
    assert json.loads((tmp_path / "out" / "panel.json").read_text())["task"] == "needle"
    assert main(["panel", str(tmp_path / "out")]) == 2
    assert "is neither a work directory with results nor a folder of records" in capsys.readouterr().err


def test_records_say_what_their_work_directories_say(undrawn, roots, members, tmp_path, capsys):
    """But for the head scores, which are in no record; beside work directories too."""
    asked = ["--task=needle", "--closed_book=closed", "--gain=eval/needle/retmask minus start"]
    kept = tmp_path / "kept"
    for member in members:
        write_json(kept / f"{member.model}.json", member)
    assert main(["panel", *map(str, roots), *asked, f"--out={tmp_path / 'a'}"]) == 0
    first = capsys.readouterr().out
    assert main(["panel", str(kept), *asked, f"--out={tmp_path / 'b'}"]) == 0
    assert capsys.readouterr().out.replace("/b/", "/a/") == first
    mixed = [str(kept / "llama-0.json"), *map(str, roots[1:])]
    assert main(["panel", *mixed, *asked, f"--out={tmp_path / 'c'}"]) == 0
    results = [json.loads((tmp_path / name / "panel.json").read_text()) for name in "abc"]
    assert results[0] == results[1] == results[2] and results[0]["sparsity"]["n_models"] == 3
    pages = [(tmp_path / name / "panel.html").read_text() for name in "abc"]
    assert ["Head scores of every model" in page for page in pages] == [True, False, True]
    assert ["Not shown" in page for page in pages] == [False, True, True] and "Without llama-0: scores of all" in pages[
        2
    ]
    assert all("Training dynamics: best head" in page and "Gain against sparsity" in page for page in pages)
    assert main(["panel", str(kept), "--task=needle", "--closed_book=", "--gain=eval/needle/retmask"]) == 2
    assert "the most similar names are eval/needle/retmask minus start" in capsys.readouterr().err


def test_a_record_of_before_has_what_it_has(members):
    """Without tests of differences, the base and agreements: models and centres are shown, and what is not is said."""
    numbers = {name: found for name, found in members[0].numbers.items() if "minus" not in name}
    old = dataclasses.replace(members[0], numbers=numbers, p_values={}, theta=None, agreement=[], model="old")
    found = panels.panel([old, members[2]], "needle", None)
    assert found.models[0].recall == members[0].numbers["knockout/needle/none"] and found.centres["old"].value == 0.2
    assert all(row.of == 1 for row in found.findings) and set(map(tuple, found.lacking.values())) == {("old",)}
    assert {"RoPE base", "agreement of detectors", "masking the retrieval heads lowers recall"} <= found.lacking.keys()
    assert "Without old: RoPE base." in page.left_out(found)
    assert panels.panel([old], "needle", None).findings == []


def test_the_records_of_this_repository_hold_the_findings_of_their_page():
    read = sources.read_studies([COLAB / "panel"])
    stored = json.loads((COLAB / "panel/panel.json").read_text())
    found = panels.panel(read, stored["task"], stored["closed_book"])
    assert len(found.findings) == len(stored["findings"]) == 8
    kept = {(finding["name"], row["model"]): row for finding in stored["findings"] for row in finding["rows"]}
    assert {
        (finding.name, row.model): dataclasses.asdict(row) for finding in found.findings for row in finding.rows
    } == kept
    assert {name: dataclasses.asdict(centre) for name, centre in found.centres.items()} == stored["centres"]
    assert [row.theta for row in found.models] == [
        row["theta"] for row in sorted(stored["models"], key=lambda m: m["model"])
    ]
