"""The page of the causal study on made-up results: what it says follows the numbers; panels hold what they draw."""

import numpy as np
import pytest
from helpers_results import DOWN, Page, around, make_results, number, stored
from markupsafe import Markup

from retmask_jax.heads.detectors import DETECTORS
from retmask_jax.reports import plotting
from retmask_jax.reports.study import write_study

TEST = {"b": 3, "c": 1, "n_discordant": 4, "p_value": 0.03}


def detectors_result(names, task, empty=()):
    counted = [name for name in names if name not in empty]
    values = {name: 0.1 * i for i, name in enumerate(counted)}
    rows = [
        {
            "name": name,
            "outcomes": {"wrong answer": 20} if name in empty else {"counted": 20},
            "timed": 20,
            "counted": 0 if name in empty else 20,
            "seconds": 4.0,
            "cases_per_second": 5.0,
            "reused": name == "copy",
            "heads": [[1, 0]],
            "shared": None if name in empty else 0.5,
            "profile": None if name in empty else {"gini": None if name == "gradient" else 0.8},
        }
        for name in names
    ]
    masked = [{"task": task, "kind": "none", **around(0.9), "change": number(0, 0, 0), "mcnemar": TEST}]
    masked += [
        {"task": task, "kind": name, **around(value), "change": number(*DOWN), "mcnemar": TEST}
        for name, value in values.items()
    ]
    pairs = [
        {"a": a, "b": b, "jaccard": 0.25, "spearman": None if a == "argmax" else -0.125}
        for i, a in enumerate(counted)
        for b in counted[i + 1 :]
    ]
    steps = [{"cases": n, "heads": 3, "jaccard": n / 20} for n in (5, 10, 20)]
    return {
        "top_k": 3,
        "cases": 20,
        "rows": rows,
        "masked": masked,
        "agreement": pairs,
        "stability": dict.fromkeys(counted, steps),
        "over_seeds": {counted[0]: {"n": 2, "jaccard": 0.75}},
        "numbers": {f"detectors/{task}/{name} masked": around(value) for name, value in values.items()},
    }


def utility_result(shape, n_pairs=8):
    comparison = {
        "n": 3,
        "n_other": 29,
        "cohens_d": 1.25,
        "permutation": {"value": 0.5, "expected": 0.125, "p_value": 0.004},
        "partial_spearman": around(0.3, 4),
        "pair_cohens_d": [None, *np.linspace(-1, 2, n_pairs - 1)],
        "pair_p_value": [0.01] * n_pairs,
        "pair_adjusted_p": [0.02] * 3 + [0.2] * (n_pairs - 3),
        "pair_retrieval": [1.0] * n_pairs,
        "pair_other": [0.5] * n_pairs,
    }
    return {
        "heads": [[1, 0], [1, 1], [1, 2]],
        "norms": np.random.default_rng(0).normal(5, 1, shape).tolist(),
        "max_length": 4096,
        "wavelengths": {"full": [6.28 * 10.0**i for i in range(n_pairs)]},
        "comparison": comparison,
        "undefined": None,
        "numbers": {"utility/Cohen's d": number(1.25, n=3)},
    }


def theta_result(task, change):
    factors = (0.25, 1.0, 4.0)
    return {
        "theta": 5e5,
        "factors": list(factors),
        "detector": "copy",
        "threshold": 0.1,
        "rows": [
            {
                "task": task,
                "factor": f,
                "theta": 5e5 * f,
                **around(0.8),
                "mcnemar": TEST,
                "change": number(*(change if f == 4 else (0, 0, 0))),
            }
            for f in factors
        ],
        "heads": [
            {"factor": f, "theta": 5e5 * f, "heads": [[1, 0]], "counted": 20, "cases": 20, "top": 0.9, "jaccard": 1.0}
            for f in factors
        ],
        "numbers": {f"theta/{task}/factor {f:g}": around(0.8) for f in factors},
    }


def dynamics_result(task, steps, loss=True):
    rows = [
        {
            "name": f"step_{step}",
            "step": step,
            "layers": 4,
            "heads_per_layer": 8,
            "cases": 20,
            "counted": 20,
            "heads": [[1, 0]] * i,
            "top": None if i == 0 else 0.2 * i,
            "gini": 0.5,
            "jaccard": 0.2 * i,
            "emergence": 0.2 * i,
            "recall": {"none": around(0.2 * i), "masked": around(0.0)} if task else None,
            "text_loss": around(3 - 0.2 * i) if loss else None,
        }
        for i, step in enumerate(steps)
    ]
    numbers = {f"dynamics/step {step}/heads": number(float(i)) for i, step in enumerate(steps)}
    return {
        "detector": "copy_position",
        "threshold": 0.1,
        "task": task,
        "final": [[1, 0]] * (len(steps) - 1),
        "rows": rows,
        "numbers": numbers,
    }


def study_results(shape=(4, 8), task="needle", names=tuple(DETECTORS), empty=(), steps=(100, 200, 400, 800)):
    made = make_results(shape=shape, tasks=(task,))
    dynamics = dynamics_result(task, steps) if steps else {"rows": [], "numbers": {}}
    return {name: made[name] for name in ("detect", "knockout", "rope")} | {
        "detectors": detectors_result(names, task, empty),
        "utility": utility_result(shape),
        "theta": theta_result(task, DOWN),
        "dynamics": dynamics,
    }


@pytest.fixture
def render(tmp_path, monkeypatch):
    """The page, without its drawings, of results with changes."""
    monkeypatch.setattr(plotting, "inline", lambda figure, name: Markup('<img alt="{}">').format(name))

    def write(change=lambda results: None, **options):
        results = study_results(**options)
        change(results)
        write_study(tmp_path / "study.html", stored(results), "some/model")
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
        "Dynamics: emergence",
        "Dynamics: heads",
        "Dynamics: recall",
        "Dynamics: text loss",
        "Knock-out: needle",
        "Rotary pairs: needle",
    ):
        assert name in found.drawings
    numbers = {name for result in study_results().values() for name in result["numbers"]}
    assert numbers <= {row[0] for row in found.rows}


def test_detectors_are_told_apart_by_what_masking_their_heads_does(render):
    found = render(names=("copy", "mass", "logit", "gradient"), empty=("logit",))
    assert (
        "Recall on needle is 0.900 untouched. With a detector's heads masked it is lowest for copy (0.000) and highest for "
        "gradient (0.200)."
    ) in found.text
    assert (
        "No case counts for logit: left out" in found.text and "The scores of copy are those of the stage" in found.text
    )
    cells = {row[0]: row for row in found.rows}
    assert cells["logit"][1:] == ["0 of 20", "4.0", "5.00", *["–"] * 6]
    assert cells["gradient"][4] == "–" and cells["copy"][4] == "0.800" and cells["copy"][6] == "0.750 (2 seeds)"


def test_one_detector_has_nothing_to_agree_with(render):
    assert "lowest for mass (0.000)." in render(names=("mass",)).text


def test_norms_and_bases_are_judged_by_their_tests(render):
    found = render()
    assert (
        "differ from the 29 others' by +0.500 (Cohen's d +1.25); of that their layers alone explain +0.125."
        in found.text
    )
    assert "After adjustment over all pairs p is below 0.05 for 3 of 8 rotary pairs." in found.text
    assert "By its 95% interval alone recall on needle changes at 2,000,000 (−0.100 [−0.150, −0.050])." in found.text


def test_nothing_clear_nothing_comparable_and_no_checkpoints(render):
    def change(results):
        results["utility"] |= {"comparison": None, "undefined": "one head"}
        results["theta"] = theta_result("needle", (0.02, -0.03, 0.07))

    found = render(change, steps=())
    assert "Nothing is compared: one head." in found.text and "Query norms of rotary pairs" not in found.drawings
    assert "Recall on needle does not clearly change: every 95% interval contains 0." in found.text
    assert "Training dynamics" not in found.headings and not any("Dynamics" in name for name in found.drawings)


def test_dynamics_say_when_half_of_the_score_is_reached(render):
    assert "Their mean score first reaches half of its final 0.600 at step 400." in render().text
    assert (
        "Dynamics: recall"
        not in render(lambda results: results.update(dynamics=dynamics_result(None, (1, 2)))).drawings
    )


def test_large_results_fit(tmp_path, monkeypatch):
    drawn, inline = {}, plotting.inline
    monkeypatch.setattr(plotting, "inline", lambda figure, name: inline(drawn.setdefault(name, figure), name))
    long = "multi_key needle in a haystack of essays, eight times as long"
    results = study_results(shape=(32, 32), task=long, steps=(1000, 10_000, 500_000, 4_000_000))
    write_study(tmp_path / "study.html", results, "some/model")
    text = (tmp_path / "study.html").read_text()
    assert len(text) < 1_500_000 and "http" not in text and "mathdefault" not in text
    for name, figure in drawn.items():
        box, width, height = figure.get_tightbbox(), *figure.get_size_inches()
        assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02, name
        assert height < 7, name
    agreement = [text.get_text() for text in drawn["Agreement of detectors"].axes[0].texts]
    # argmax has no rank correlation with 4 others
    assert agreement.count("0.25") == 28 and agreement.count("−0.12") == 28 - 4
