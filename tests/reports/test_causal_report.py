"""The sections on ablated heads and rotary pairs: the words, tables and pictures of every experiment of a study."""

import dataclasses

import pytest
from helpers_results import (
    KINDS,
    around,
    condition_row,
    knockout_result,
    make_results,
    number,
    rope_result,
    rope_row,
    stored,
)

from retmask_jax.heads.knockout import Spared
from retmask_jax.reports import plotting
from retmask_jax.reports.knockout import knockout_section, only_zero
from retmask_jax.reports.report import write_report
from retmask_jax.reports.rope import rope_section
from retmask_jax.stages.knockout import MinimalSet, TaskMean
from retmask_jax.stages.rope import CostRow, DoseMean, Spectrum

HEADS = [(1, 2), (0, 3), (2, 1)]


@pytest.fixture(scope="module")
def knocked_out():
    """Every way to ablate heads, a curve and a smallest set."""
    result = knockout_result((4, 8), ("needle",), idle=3)
    rows, means = list(result.rows), list(result.means)
    for mode in ("mean", "query", "query_mean"):
        for kind in ("retrieval", "activity-matched"):
            rows.append(condition_row(0.4, kind, experiment=mode))
            means.append(TaskMean.of(around(0.4), task="needle", kind=kind, experiment=mode))
    curve = [condition_row(0.9, "none", experiment="curve")] + [
        condition_row(0.8 / n, kind, experiment="curve", heads=[(0, i) for i in range(n)])
        for n in (1, 2, 4)
        for kind in ("highest-scoring", "random", "random")
    ]
    minimal = MinimalSet(
        task="needle",
        heads=[(1, 2), (0, 3)],
        steps=[Spared(head=(2, 1), recall=0.05)],
        limit=0.09,
        searched=20,
        recall={"none": around(0.9), "all retrieval heads": around(0.1), "smallest set": around(0.15)},
    )
    return dataclasses.replace(result, rows=rows, means=means, curve=curve, minimal=minimal)


@pytest.fixture(scope="module")
def rotated():
    """Both sites, windows, coverage, patches, matched pairs and costs."""
    result = rope_result(("needle",), (0.3, 0.2, 0.4))
    means = list(result.means)
    rows = [
        dataclasses.replace(row, variance=None if row.kind == "none" else 0.1 * row.k, heads=HEADS)
        for row in result.rows
    ]
    rows += [dataclasses.replace(row, site="projection", variance=None) for row in rows if row.experiment == "dose"]
    for k in (1, 2, 4):
        for kind in ("lowest", "highest", "control heads, lowest", "random"):
            dose = {"task": "needle", "experiment": "dose", "kind": kind, "k": k, "site": "projection"}
            means.append(DoseMean.of(around(0.5), **dose))
        matched = {"kind": "matched", "experiment": "matched", "k": k}
        rows.append(rope_row(0.8, **matched, pairs=[0, 3], variance=0.1 * k))
        means.append(DoseMean.of(around(0.88), task="needle", site="rotary", **matched))
    for i in range(4):
        for kind in ("window", "control heads, window"):
            rows.append(rope_row(0.8, kind, experiment="windows", draw=i, pairs=[7 - 2 * i, 6 - 2 * i]))
    rows += [rope_row(0.8, "lowest", experiment="coverage", heads=HEADS[:n]) for n in (1, 2, 3)]
    rows += [
        rope_row(0.8, kind, experiment="patches", heads=[head]) for head in HEADS for kind in ("lowest", "highest")
    ]
    costs = [
        CostRow(task="needle", kind=kind, k=1, perplexity_increase=around(0.05), recall_drop=around(0.4), ratio=ratio)
        for kind, ratio in (("lowest", around(0.125)), ("highest", None))
    ]
    spectra = [Spectrum(task="needle", centre=around(0.21), width=around(0.1))]
    return dataclasses.replace(result, rows=rows, means=means, costs=costs, spectra=spectra)


def _section(make, *arguments):
    with plotting.style():
        return make(*arguments)


def test_results_are_read_back_as_they_were_written(knocked_out, rotated):
    results = {"knockout": knocked_out, "rope": rotated}
    for stage, found in stored(results).items():
        assert vars(found) == vars(results[stage])


def test_modes_stand_next_to_zero_and_not_among_its_kinds(knocked_out):
    html = _section(knockout_section, knocked_out, HEADS)
    assert 'aria-label="Ways to ablate heads: needle"' in html
    assert "<td>retrieval, mean</td>" in html and "<td>activity-matched, query</td>" in html
    assert [mean.kind for mean in only_zero(knocked_out.means)] == list(KINDS)
    assert "mean: writes its mean over text" in html and "query: has a query of zeros" in html


def test_the_curve_and_the_smallest_set_are_reported(knocked_out):
    html = _section(knockout_section, knocked_out, HEADS)
    assert 'aria-label="Number of heads: needle"' in html
    assert (
        "sparing one head at a time while recall stays at most 0.090, ends with 2 heads: 1-2, 0-3. It spared 2-1."
        in html
    )
    assert "0.150 [" in html and "A smaller set may exist" in html


def test_without_them_the_section_is_as_before():
    html = _section(knockout_section, knockout_result((4, 8), ("needle",), idle=3), HEADS)
    assert "Ways to ablate" not in html and "greedy" not in html and "Number of heads" not in html


def test_every_rotary_experiment_has_its_picture_and_words(rotated):
    html = _section(rope_section, rotated)
    for name in ("needle", "needle: controls", "needle: zeroed in the projections"):
        assert f'aria-label="Rotary pairs: {name}"' in html
    for name in ("Parts of the spectrum", "Variance removed", "Coverage", "Single heads"):
        assert f'aria-label="{name}: needle"' in html
    assert "centres at 0.210 [" in html
    assert "<td>matched</td><td>4</td><td>2</td><td>0.400</td>" in html  # for k = 4: two other pairs
    assert "<td>lowest</td><td>1</td>" in html and "<td>0.125 [" in html and "<td>–</td>" in html
    assert "control heads" not in html.split("Share of variance of")[1].split("</table>")[0]


def test_a_control_that_does_not_match_is_called_none(rotated):
    assert "control for it here" not in _section(rope_section, rotated)
    rows = [dataclasses.replace(row, variance=0.1) if row.kind == "matched" else row for row in rotated.rows]
    html = _section(rope_section, dataclasses.replace(rotated, rows=rows))
    assert "nearest sets carry 0.100 of 0.200 (2 pairs), 0.100 of 0.400 (4 pairs). So they are no control" in html


def test_a_spectrum_without_harm_has_no_centre(rotated):
    without = dataclasses.replace(rotated, spectra=[Spectrum(task="needle", centre=None, width=None)])
    assert "No window lowers recall on needle." in _section(rope_section, without)


def test_the_report_holds_a_study_of_both(undrawn, knocked_out, rotated, tmp_path):
    results = make_results(tasks=("needle",), changes={"needle": (0.1, 0.05, 0.15)})
    write_report(tmp_path / "report.html", results | {"knockout": knocked_out, "rope": rotated}, "tiny")
    text = (tmp_path / "report.html").read_text()
    head = text.split("<h2>")[0]
    assert "Masked heads, retrieval: recall on needle" in head and "retrieval, mean" not in head
    assert "Knock-out" in text and "Rotary dose-response" in text
    assert number(0.5).low is None
