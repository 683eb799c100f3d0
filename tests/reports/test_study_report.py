"""The page of the causal study on made-up results: what it says follows the numbers; panels hold what they draw."""

import dataclasses

import pytest
from helpers_results import Page, stored
from helpers_study import dynamics_result, study_results, theta_result
from markupsafe import Markup

from retmask_jax.reports import plotting
from retmask_jax.reports.study.page import StudyResults, write_study


@pytest.fixture
def render(tmp_path, monkeypatch):
    """The page, without its drawings, of results with changes."""
    monkeypatch.setattr(plotting, "inline", lambda figure, name: Markup('<img alt="{}">').format(name))

    def write(change=lambda results: None, **options):
        results = study_results(**options)
        change(results)
        write_study(tmp_path / "study.html", StudyResults(**stored(results)), "some/model")
        return Page((tmp_path / "study.html").read_text())

    return write


def test_sections_and_drawings(render):
    found = render()
    assert found.headings == [
        "Retrieval heads",
        "Detectors",
        "Knock-out",
        "Rotary dose-response",
        "Query norms",
        "RoPE base",
        "Token by token",
        "Training dynamics",
        "All numbers",
    ]
    for name in (
        "Agreement of detectors",
        "Heads of each detector masked: needle",
        "Time of detectors",
        "Stability of detectors",
        "Query norms",
        "Query norms of rotary pairs",
        "RoPE base: needle",
        "RoPE base: heads",
        "Heads that copy at each token",
        "Overlap of the heads from token to token",
        "Dynamics: emergence",
        "Dynamics: heads",
        "Dynamics: recall",
        "Dynamics: text loss",
        "Knock-out: needle",
        "Rotary pairs: needle",
    ):
        assert name in found.drawings
    numbers = {name for result in stored(study_results()).values() for name in result.numbers}
    assert numbers <= {row[0] for row in found.rows}


def test_detectors_are_told_apart_by_what_masking_their_heads_does(render):
    found = render(names=("copy", "mass", "logit", "gradient"), empty=("logit",))
    assert (
        "Recall on needle is 0.900 untouched. With a detector's heads masked it is lowest for copy (0.000) and highest for "
        "gradient (0.200)."
    ) in found.text
    assert (
        "No case counts for logit, which the comparisons leave out." in found.text
        and "The scores of copy are those of the stage" in found.text
    )
    cells = {row[0]: row for row in found.rows if len(row) > 5}
    assert cells["logit"][1:] == ["0 of 20", "4.0", "5.00", *["–"] * 6]
    assert cells["gradient"][4] == "–" and cells["copy"][4] == "0.800" and cells["copy"][6] == "0.750 (2 seeds)"


def test_one_detector_has_nothing_to_agree_with(render):
    assert "lowest for mass (0.000)." in render(names=("mass",)).text


def test_norms_and_bases_are_judged_by_their_tests(render):
    found = render()
    assert (
        "the 29 other heads differ by +0.500 (Cohen's d +1.25); the layers of the heads alone explain +0.125 of that."
        in found.text
    )
    assert "After adjustment over all pairs p is below 0.05 for 3 of 8 rotary pairs." in found.text
    assert (
        "Judged by the 95% interval alone, recall on needle changes at 2,000,000 (−0.100 [−0.150, −0.050])."
        in found.text
    )


def test_nothing_clear_nothing_comparable_and_no_checkpoints(render):
    def change(results):
        results["utility"] = dataclasses.replace(results["utility"], comparison=None, undefined="one head")
        results["theta"] = theta_result("needle", (0.02, -0.03, 0.07))

    found = render(change, steps=())
    assert "Nothing is compared: one head." in found.text and "Query norms of rotary pairs" not in found.drawings
    assert "Recall on needle does not clearly change: every 95% interval contains 0." in found.text
    assert "Training dynamics" not in found.headings and not any("Dynamics" in name for name in found.drawings)


def test_heads_are_followed_from_token_to_token(render):
    found = render()
    assert "20 of 21 cases count, other cases of the task than those on which the heads were found" in found.text
    assert (
        "a head copies 0.600 [0.559, 0.643] tokens in a row, 0.600 [0.559, 0.643] if their order were random."
        in found.text
    )
    rows = [[cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in found.rows]
    copies = [row for row in rows if row[0] == "copies"]
    assert [row[1:4] for row in copies if row[1].isdigit()] == [
        [str(i + 1), str(20 - i), f"{0.9 - 0.1 * i:.3f} [{0.859 - 0.1 * i:.3f}, {0.943 - 0.1 * i:.3f}]"]
        for i in range(5)
    ]
    assert copies[-1][4] == "–"  # nothing follows the last token
    assert ["mass", "1-0", "0.900 [0.859, 0.943]", "20", "yes"] in rows

    def silent(results):
        empty = {"rows": [], "persistence": [], "active": [], "numbers": {}, "outcomes": {"empty answer": 3}}
        results["per_step"] = dataclasses.replace(results["per_step"], **empty)

    found = render(silent)
    assert "0 of 3 cases count" in found.text and "Heads that copy at each token" not in found.drawings


def test_dynamics_say_when_half_of_the_score_is_reached(render):
    assert "Their mean score first reaches half of its final 0.600 at step 400." in render().text
    assert (
        "Dynamics: recall"
        not in render(lambda results: results.update(dynamics=dynamics_result(None, (1, 2)))).drawings
    )


@pytest.mark.slow
def test_large_results_fit(tmp_path, monkeypatch):
    drawn, inline = {}, plotting.inline
    monkeypatch.setattr(plotting, "inline", lambda figure, name: inline(drawn.setdefault(name, figure), name))
    long = "multi_key needle in a haystack of essays, eight times as long"
    results = study_results(shape=(32, 32), task=long, steps=(1000, 10_000, 500_000, 4_000_000))
    write_study(tmp_path / "study.html", StudyResults(**stored(results)), "some/model")
    text = (tmp_path / "study.html").read_text()
    assert len(text) < 1_500_000 and "http" not in text and "mathdefault" not in text
    for name, figure in drawn.items():
        box, width, height = figure.get_tightbbox(), *figure.get_size_inches()
        assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02, name
        assert height < 7, name
    agreement = [text.get_text() for text in drawn["Agreement of detectors"].axes[0].texts]
    # argmax has no rank correlation with the 6 after it
    assert agreement.count("0.25") == 45 and agreement.count("−0.12") == 45 - 6
