"""The HTML report on made-up results: what it says follows the numbers, and it is one closed page."""

import dataclasses
import html.parser
import io
import re
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers_results import (
    ACROSS,
    ALL_ARMS,
    DOWN,
    UP,
    Page,
    eval_result,
    make_results,
    number,
    stored,
    train_results,
    training_step,
)
from markupsafe import Markup

from retmask_jax.reports import evaluation, plotting, training
from retmask_jax.reports import html as page
from retmask_jax.reports.report import write_report
from retmask_jax.runs.workdir import Example
from retmask_jax.stages.eval import Helmet, HelmetMean, Place
from retmask_jax.stages.train import Run
from retmask_jax.utils.numbers import McNemar


@pytest.fixture
def render(tmp_path, monkeypatch):
    """Text of a page; drawings whose name does not start with `draw` are empty images, which is quicker."""
    inline = plotting.inline

    def write(model="some/model", draw="nothing", **options):
        path = tmp_path / "report.html"
        empty = Markup('<img alt="{}">')
        monkeypatch.setattr(
            plotting,
            "inline",
            lambda figure, name: inline(figure, name) if name.startswith(draw) else empty.format(name),
        )
        write_report(path, stored(make_results(**options)), model)
        return path.read_text()

    return write


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The page of one arm and seed."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, make_results(), "some/model")
    return path.read_text()


def test_every_number_of_every_stage_is_in_the_last_table(small):
    numbers = {name: value for result in make_results().values() for name, value in result.numbers.items()}
    shown = {row[0]: row[1:] for row in Page(small).rows if row[0] in numbers}
    assert shown == {
        name: [
            "–" if getattr(value, key) is None else f"{getattr(value, key):.6g}"
            for key in ("value", "low", "high", "n")
        ]
        for name, value in numbers.items()
    }


def test_sections_and_drawings(small):
    found = Page(small)
    assert found.headings == [
        "Retrieval heads",
        "Knock-out",
        "Rotary dose-response",
        "Preference pairs",
        "Training",
        "Evaluation",
        "All numbers",
    ]
    assert found.drawings == [
        "Head scores",
        "Sorted head scores",
        "Lorenz curve",
        "Stability",
        "Detection cases",
        "Knock-out: needle",
        "Knock-out: facts: from memory",
        "Knock-out: text loss",
        "Head activity",
        "Rotary pairs: needle",
        "Pairs kept",
        "Loss, preference",
        "Margin",
        "Accuracy",
        "Evaluation: needle",
        "Evaluation: facts: from memory",
        "Evaluation: text loss",
        "Changes: needle, facts: from memory",
        "Changes: text loss",
        "niah: start",
        "niah: retmask-0",
    ]


def test_head_maps_tell_the_number_of_every_head_and_its_interval_where_there_is_one(small):
    by_name = {
        attributes["aria-label"].split(",")[0]: attributes
        for _, attributes in Page(small).tags
        if "data-tips" in attributes
    }
    assert list(by_name) == ["Head scores", "Head activity"]
    results = make_results()
    scores, texts = results["detect"].mean, by_name["Head scores"]["data-tips"].split("|")
    assert by_name["Head scores"]["data-heads"] == str(len(scores[0])) and len(texts) == np.size(scores)
    assert texts[8] == "mean score 0.900 [0.859,\N{NO-BREAK SPACE}0.943]"  # head 1-0
    assert texts[9:] == [f"mean score {score:.3f}" for score in np.ravel(scores)[9:]]
    nats = by_name["Head activity"]["data-tips"].split("|")
    assert nats == [f"change of {value:.3g} nats" for value in np.ravel(results["knockout"].activity)]


def test_the_cells_of_a_head_map_lie_where_they_are_drawn():
    """Measured in a picture: the box of the tooltips is that of the colours."""
    with plotting.style():
        values_LH = np.ones((4, 8))
        figure = plotting.head_map("Ones", values_LH, [], "one")
        figure.axes[0].images[0].set_cmap(matplotlib.colors.ListedColormap(["#ff0000"]))
        shown = str(plotting.drawn({"Ones": figure}, "", {"Ones": plotting.Tips(values_LH.astype(str).tolist())}))
        figure.savefig(picture := io.BytesIO(), format="png", dpi=72)
    red_YX = (plt.imread(io.BytesIO(picture.getvalue()))[..., :3] == [1, 0, 0]).all(axis=-1)
    red_YX[:, int(0.82 * red_YX.shape[1]) :] = False  # the bar of colours
    (top, left), (height, width) = np.argwhere(red_YX).min(axis=0), red_YX.shape
    bottom, right = np.argwhere(red_YX).max(axis=0) + 1
    expected = {
        "left": left / width,
        "top": top / height,
        "width": (right - left) / width,
        "height": (bottom - top) / height,
    }
    for side, share in expected.items():
        assert float(re.search(rf"\b{side}:([\d.]+)%", shown)[1]) == pytest.approx(100 * share, abs=1)


def test_a_page_without_head_maps_has_no_script():
    assert "<script" not in page.document("title", [page.section("a", ["b"])])


def test_the_page_is_closed_and_small(small):
    assert "http" not in small and len(small) < 600_000
    for tag, attributes in Page(small).tags:
        assert tag not in ("link", "iframe") and (tag != "script" or not attributes)
        for name in ("href", "xlink:href", "src"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png"))


def test_names_that_a_user_gives_are_escaped(render):
    text = render(
        model='<script>x</script> & "y"',
        draw="Knock-out",
        tasks=("<i>$a$ & b_{c}",),
        arms=("<u>",),
        changes={"<i>$a$": UP},
    )
    assert "<script>x" not in text and text.count("<script>") == 1 and "<i>" not in text and "<u>" not in text
    found = Page(text)
    assert 'Retrieval heads of <script>x</script> & "y"' in found.text
    assert "Knock-out: <i>$a$ & b_{c}" in found.drawings  # and the dollars did not turn it into a formula
    assert "&lt;i&gt;$a$ &amp; b_{c}</text>" in text


@pytest.mark.parametrize(
    "shift, said",
    [
        (UP, "Training with retmask raises recall on needle (+0.100 [+0.050, +0.150])."),
        (DOWN, "Training with retmask lowers recall on needle (−0.100 [−0.150, −0.050])."),
        (ACROSS, "Training with retmask shows no clear change: the 95% interval contains 0 on every measure."),
        ((0.0, 0.0, 0.0), "Training with retmask shows no clear change: the 95% interval contains 0 on every measure."),
    ],
)
def test_the_training_sentence_follows_the_interval(render, shift, said):
    assert said in Page(render(tasks=(), changes={"needle": shift})).text


def test_clear_and_unclear_changes_are_told_apart(small):
    said = Page(small).text
    assert (
        "Training with retmask raises recall on needle (+0.100 [+0.050, +0.150]) and lowers facts: from memory "
        "(−0.100 [−0.150, −0.050]); the 95% interval contains 0 on 1 other measure."
    ) in said
    assert "Masking the 3 retrieval heads lowers recall on needle (−0.700 [" in said
    assert "Without the highest quarter of the pairs it is higher than without the lowest: +0.100" in said
    assert "The set still changed between 10 and 20 cases (Jaccard 0.75)." in said
    assert (
        "heads are idle: masking one of them alone changes the text's log-probabilities by less than 10% of what"
        in said
    )
    assert "3 of 32 heads are idle" in said
    assert "prove little" not in said


def test_many_draws_show_their_mean_and_median_p(small):
    row = next(row for row in Page(small).rows if row[:2] == ["needle", "any layer (3 draws)"])
    assert row[2].startswith("0.890 [") and row[3:] == ["0.000", "0.5000", "0.2500"]


def test_several_seeds_share_one_map_per_arm(render):
    text = render(tasks=(), seeds=(0, 1), draw="niah")
    drawings = Page(text).drawings
    assert drawings[-2:] == ["niah: start", "niah: retmask"]
    start, arm = text[text.index('aria-label="niah: start"') :].split('aria-label="niah: retmask"')
    assert start.count(">0.70</text>") == 6 and arm.count(">0.45</text>") == 6  # the mean of 0.7 and 0.2
    assert (
        "2 training seeds" in text
        and "Over all lengths and depths of niah recall is 0.700 (start), 0.450 (retmask)." in text
    )


def test_supervised_runs_have_a_loss_alone(render):
    drawings = Page(render(arms=("sft_unfiltered",))).drawings
    assert "Loss, supervised" in drawings and not {"Loss, preference", "Margin", "Accuracy"} & set(drawings)


def test_one_counted_case_no_threshold_and_mostly_idle_heads(render):
    said = Page(render(counted=1, threshold=None, idle=20, gap=ACROSS)).text
    assert "Without the highest quarter of the pairs it is not clearly different from that without the lowest" in said
    assert "With 1 counted case nothing tells how stable this set is." in said
    assert "they have the highest scores, the last of them 0.700" in said
    assert "With most heads idle, masks of any layer prove little" in said


def test_given_scores_have_no_detection_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "inline", lambda figure, name: Markup('<img alt="{}">').format(name))
    results = make_results()
    numbers = {name: n for name, n in results["detect"].numbers.items() if name != "detect/cases counted"}
    results["detect"] = dataclasses.replace(results["detect"], outcomes={}, numbers=numbers)
    write_report(tmp_path / "report.html", results, "some/model")
    found = Page((tmp_path / "report.html").read_text())
    assert "The scores were given, of 20 cases; none was measured here." in found.text
    assert "Detection cases" not in found.drawings


def test_nothing_trained_and_no_tasks(render):
    found = Page(render(tasks=(), arms=(), changes={"text loss": ACROSS}))
    assert "No arm is trained." in found.text
    assert "Knock-out: text loss" in found.drawings and "Evaluation: text loss" in found.drawings
    assert not any(name.startswith(("Changes", "Pairs", "Loss")) for name in found.drawings)


def test_runs_say_how_many_parameters_were_trained():
    """Results of older versions do not."""
    result = make_results(arms=("retmask", "no_fact"))["train"]
    result.runs["retmask-0"] = dataclasses.replace(result.runs["retmask-0"], trained_parameters=1234567)
    shown = {row[0]: row[4] for row in Page(training.training_section(result)).rows if row[1:2] == ["30"]}
    assert shown == {"retmask-0": "1,234,567", "no_fact-0": "–"}


@pytest.mark.slow
def test_large_results_fit(tmp_path, monkeypatch):
    """Every arm, several seeds, 32 x 32 heads, long names: nothing is cut off or crowded, and the page stays small."""
    drawn, inline = {}, plotting.inline
    monkeypatch.setattr(plotting, "inline", lambda figure, name: inline(drawn.setdefault(name, figure), name))
    long = "multi_key needle in a haystack of essays, eight times as long"
    changes = {long: UP} | {"b": ACROSS, "c": ACROSS, "d": ACROSS, "text loss": DOWN}
    results = make_results(shape=(32, 32), tasks=(long,), arms=ALL_ARMS, seeds=(0, 1), n_steps=200, changes=changes)
    write_report(tmp_path / "report.html", results, "some/model")
    assert (tmp_path / "report.html").stat().st_size < 1_500_000
    for name, figure in drawn.items():
        box, width, height = figure.get_tightbbox(), *figure.get_size_inches()
        assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02, name
        assert height < 7, name  # inches: two rows of panels fit on a printed page
    ticks = drawn["Head scores"].axes[0].get_xticks()
    assert 4 <= len(ticks) <= 11 and all(tick == int(tick) for tick in ticks)


def test_a_kind_and_its_arm_share_a_colour_and_others_differ():
    assert plotting.colour("any layer") == plotting.colour("any_layer")
    assert plotting.colour("layer-matched") == plotting.colour("layer_matched")
    assert plotting.colour("retrieval") == plotting.colour("retmask")
    assert len({plotting.colour(arm) for arm in ("start", *ALL_ARMS)}) == 8


def test_a_large_drawing_becomes_an_image():
    with plotting.style():
        steps = [training_step(i, float(x)) for i, x in enumerate(np.random.default_rng(0).normal(size=5000))]
        run = Run(arm="retmask", seed=0, examples=1, answers_cut=0, prompts_cut=0, steps=steps)
        text = plotting.inline(training.curves("Loss", [run], lambda step: step.loss, "nats"), "a <b>")
    assert re.match(r'<img width="\d+" alt="a &lt;b&gt;" src="data:image/png;base64,', text) and len(text) < 300_000


def test_smoothing_is_a_centred_mean():
    values = np.random.default_rng(0).normal(size=100)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(100)]
    np.testing.assert_allclose(training.smooth(values), expected)
    assert training.smooth([3.0]) == [3.0]


def test_how_numbers_are_written():
    assert page.signed(-0.0001) == "0.000" and page.signed(-0.25) == "−0.250"
    assert page.interval(number(3.0)) == "3" and page.change(number(0.5)) == "+0.500"
    assert page.p_value(5e-5) == "< 0.0001" and page.exact(None) == page.fixed(None) == "–"


def test_importing_the_report_loads_no_plotting():
    code = (
        "import sys, retmask_jax.reports.report; assert 'matplotlib' not in sys.modules and 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_pairs_say_what_was_left_out_and_cut():
    pairs, _ = train_results(("retmask",), (0,), 4)
    section = training.pairs_section(pairs)
    assert "some were left out: 3 redacted." in section
    assert re.search(r"normal-0</td>\s*<td[^>]*>7</td>\s*<td[^>]*>40", section)
    none_left = dataclasses.replace(pairs, left_out={"redacted": 0})
    assert "left out" not in training.pairs_section(none_left)


def test_suites_have_their_own_units_and_what_is_missing_is_told(tmp_path):
    results = make_results(
        tasks=("needle",), changes={"needle": UP, "perplexity/256-511": ACROSS, "helmet/json_kv 8192": UP}
    )
    entry, lacking = helmet_mean(51.5), helmet_mean(None, "narrativeqa: not run")
    helmet = {"8192": Helmet({"recall": entry, "longqa": lacking}, {"all seven": lacking, "judge-free": entry})}
    results["eval"] = dataclasses.replace(
        results["eval"],
        metrics={"perplexity/256-511": "nats per token", "helmet/json_kv 8192": "substring exact match"},
        missing={"start": {"helmet/narrativeqa 8192": {"no file": 100}}},
        helmet={"start": helmet, "retmask-0": helmet},
    )
    write_report(tmp_path / "report.html", stored(results), "tiny")
    text = html.unescape((tmp_path / "report.html").read_text())
    assert "start, helmet/narrativeqa 8192: 100 samples are missing, no file." in text
    assert "<td>retmask-0</td><td>8192</td><td>51.50 (0.00)</td><td>–</td><td>–</td><td>51.50 (0.00)</td>" in text
    assert "Missing parts: narrativeqa: not run." in text
    assert "substring exact match (n = 40)" in text and "nats per token (n = 40)" in text
    assert "recall on perplexity" not in text


def test_a_task_of_several_lengths_is_one_panel_with_a_line_per_model(tmp_path):
    tasks = {"ruler/vt 512": UP, "ruler/vt 1024": ACROSS, "ruler/cwe 512": UP}
    results = make_results(tasks=("needle",), changes=tasks)
    places = {
        "ruler/vt 512": ("ruler/vt", 512),
        "ruler/vt 1024": ("ruler/vt", 1024),
        "ruler/cwe 512": ("ruler/cwe", 512),
    }
    series = {task: Place(of, at, "length (tokens)") for task, (of, at) in places.items()}
    panels = evaluation._panels(dataclasses.replace(results["eval"], series=series))
    assert list(panels) == ["Evaluation: ruler/vt", "Evaluation: ruler/cwe 512"]
    line = panels["Evaluation: ruler/vt"].axes[0].get_lines()[0]
    assert line.get_xdata().tolist() == [512, 1024] and line.get_label() == "start"


def test_single_models_show_the_exact_test_and_helmet_its_change():
    result = eval_result(("new",), (0,), {"needle": UP, "loss": UP})
    test = McNemar(7, 1, 8, 0.0312)
    rows = [dataclasses.replace(row, mcnemar=test if row.task == "needle" else None) for row in result.rows]
    table = evaluation._change_table(result.changes, rows)
    assert re.search(r"<td>needle</td><td>[^<]*</td><td>0.0312</td>", table)
    assert re.search(r"<td>loss</td><td>[^<]*</td><td>–", table)
    assert evaluation._helmet_cell(helmet_mean(53.78), helmet_mean(51.5)) == "53.78 (+2.28)"
    assert evaluation._helmet_cell(helmet_mean(53.78), helmet_mean(None)) == "53.78"


def helmet_mean(value, *missing):
    return HelmetMean(value, 100, {}, list(missing), [])


def test_replies_stand_in_a_table_with_what_was_expected_and_no_html_of_theirs():
    asked = Example(question="Who?", expected="Ann", replies={"untouched": "Ann.", "masked": "<b>Bob</b>"})
    shown = str(page.replies([asked]))
    assert [word in shown for word in ("expected", "untouched", "masked", "&lt;b&gt;Bob")] == [True] * 4
    assert "<b>" not in shown and str(page.replies([])) == ""
    unknown = Example(question="Write a poem.", replies={"preferred": "A", "rejected": "B"})
    assert "expected" not in page.replies([unknown])
