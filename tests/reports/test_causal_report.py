"""The sections on heads and rotary pairs: what every experiment of a study comes to in words, tables and pictures."""

import numpy as np
import pytest
from helpers_results import KINDS, around, knockout_result, make_results, number, rope_result

from retmask_jax.reports import plotting
from retmask_jax.reports.causal_report import knockout_section, only_zero, rope_section
from retmask_jax.reports.report import write_report

HEADS = [[1, 2], [0, 3], [2, 1]]


def _test(p):
    return {"b": 3, "c": 1, "n_discordant": 4, "p_value": p}


@pytest.fixture(scope="module")
def knocked_out():
    """Every way to take heads out, a curve and a smallest set."""
    result = knockout_result((4, 8), ("needle",), idle=3)
    for mode in ("mean", "query"):
        for kind in ("retrieval", "activity-matched"):
            result["rows"].append(
                {
                    "task": "needle",
                    "kind": kind,
                    "draw": 0,
                    "experiment": mode,
                    "q": 0.25,
                    "mcnemar": _test(0.125),
                    **around(0.4),
                    "change": around(-0.5),
                }
            )
            result["numbers"][f"knockout/needle/{kind}, {mode}"] = around(0.4)
    result["curve"] = [{"task": "needle", "kind": "none", "heads": [], **around(0.9)}] + [
        {"task": "needle", "kind": kind, "heads": [[0, i] for i in range(n)], **around(0.8 / n)}
        for n in (1, 2, 4)
        for kind in ("highest-scoring", "random", "random")
    ]
    recall = {"none": around(0.9), "all retrieval heads": around(0.1), "smallest set": around(0.15)}
    result["minimal"] = {
        "task": "needle",
        "heads": [[1, 2], [0, 3]],
        "steps": [{"head": [2, 1], "recall": 0.05}],
        "limit": 0.09,
        "searched": 20,
        "recall": recall,
    }
    return result


@pytest.fixture(scope="module")
def rotated():
    """Both sites, windows, coverage, patches, matched pairs and costs."""
    result = rope_result(("needle",), (0.3, 0.2, 0.4))
    rows = result["rows"]
    for row in rows:
        row |= {"variance": None if row["kind"] == "none" else 0.1 * row["k"], "q": 0.5, "heads": HEADS}
    rows += [row | {"site": "projection", "variance": None} for row in rows if row["experiment"] == "dose"]
    for k in (1, 2, 4):
        for kind in ("lowest", "highest", "control heads, lowest", "random"):
            result["numbers"][f"rope/needle/{kind} {k} pairs, projection site"] = around(0.5)
        rows.append(
            rows[1] | {"kind": "matched", "experiment": "matched", "k": k, "pairs": [0, 3], "variance": 0.1 * k}
        )
        result["numbers"][f"rope/needle/matched {k} pairs"] = around(0.88)
    for i in range(4):
        for kind in ("window", "control heads, window"):
            rows.append(rows[1] | {"kind": kind, "experiment": "windows", "draw": i, "pairs": [7 - 2 * i, 6 - 2 * i]})
    for name, value in (("centre of mass", 0.21), ("width", 0.1)):
        result["numbers"][f"rope/needle/{name} of the windows"] = around(value)
    rows += [rows[1] | {"experiment": "coverage", "heads": HEADS[:n]} for n in (1, 2, 3)]
    rows += [
        rows[1] | {"kind": kind, "experiment": "patches", "heads": [head]}
        for head in HEADS
        for kind in ("lowest", "highest")
    ]
    result["costs"] = [
        {
            "task": "needle",
            "kind": kind,
            "k": 1,
            "perplexity_increase": around(0.05),
            "recall_drop": around(0.4),
            "ratio": ratio,
        }
        for kind, ratio in (("lowest", around(0.125)), ("highest", None))
    ]
    return result


def _section(make, *arguments):
    with plotting.style():
        return make(*arguments)


def test_modes_stand_beside_zero_and_not_among_its_kinds(knocked_out):
    html = _section(knockout_section, knocked_out, HEADS)
    assert 'aria-label="Ways to take heads out: needle"' in html
    assert "<td>retrieval, mean</td>" in html and "<td>activity-matched, query</td>" in html
    zero = only_zero({name.rsplit("/", 1)[1]: n for name, n in knocked_out["numbers"].items()}, knocked_out["rows"])
    assert list(zero) == list(KINDS)
    assert "mean: writes its mean over text" in html and "query: has a query of zeros" in html


def test_the_curve_and_the_smallest_set_are_told(knocked_out):
    html = _section(knockout_section, knocked_out, HEADS)
    assert 'aria-label="Number of heads: needle"' in html
    assert (
        "sparing one head at a time while recall stays at most 0.090, ends with 2 heads: 1-2, 0-3. It spared 2-1."
        in html
    )
    assert "0.150 [" in html and "A smaller set may exist" in html


def test_without_them_the_section_is_as_before():
    html = _section(knockout_section, knockout_result((4, 8), ("needle",), idle=3), HEADS)
    assert "Ways to take" not in html and "greedy" not in html and "Number of heads" not in html


def test_every_rotary_experiment_has_its_picture_and_words(rotated):
    html = _section(rope_section, rotated)
    for name in ("needle", "needle: controls", "needle: zeroed in the projections"):
        assert f'aria-label="Rotary pairs: {name}"' in html
    for name in ("Parts of the spectrum", "Variance taken out", "Coverage", "Single heads"):
        assert f'aria-label="{name}: needle"' in html
    assert "centres at 0.210 [" in html
    assert "<td>matched</td><td>4</td><td>2</td><td>0.400</td>" in html  # for k = 4: two other pairs
    assert "<td>lowest</td><td>1</td>" in html and "<td>0.125 [" in html and "<td>–</td>" in html
    assert "control heads" not in html.split("Share of variance of")[1].split("</table>")[0]


def test_a_spectrum_without_harm_has_no_centre(rotated):
    numbers = {name: n for name, n in rotated["numbers"].items() if "windows" not in name}
    assert "No window lowers recall on needle." in _section(rope_section, rotated | {"numbers": numbers})


def test_the_report_holds_a_study_of_both(knocked_out, rotated, tmp_path):
    results = make_results(tasks=("needle",), changes={"needle": (0.1, 0.05, 0.15)})
    write_report(tmp_path / "report.html", results | {"knockout": knocked_out, "rope": rotated}, "tiny")
    text = (tmp_path / "report.html").read_text()
    head = text.split("<h2>")[0]
    assert "Masked heads, retrieval: recall on needle" in head and "retrieval, mean" not in head
    assert np.all([name in text for name in ("Knock-out", "Rotary dose-response")])
    assert number(0.5)["low"] is None
