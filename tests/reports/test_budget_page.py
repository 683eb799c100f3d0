"""The page of budgets of keys on made-up results: what it says and draws follows the numbers."""

import dataclasses

import numpy as np
import pytest
from helpers_results import Page, around, number, stored

from retmask_jax.reports import plotting
from retmask_jax.reports.study.budget import budget_figure, write_budget
from retmask_jax.stages.study.budget import BudgetResult
from retmask_jax.stages.study.budget_rows import TEXT, BudgetRow, BudgetSet, Enough, Margin
from retmask_jax.stages.study.listed_heads import ListRow

SIZES, TOTAL = [0, 9, 90], 90
RECALL = {"copy": [0.1, 0.9, 0.95], "theirs": [0.1, 0.5], "random": [0.1, 0.2, 0.95]}


def made(shift=0.0):
    """shift: of the share that one list keeps, as where layers slide."""
    rows = []
    for measure in ("needle", TEXT):
        for name, recall in RECALL.items():
            for kept, value in zip(SIZES, recall, strict=False):
                share = 0.2 + 0.8 * kept / TOTAL + (shift if name == "theirs" and kept == 9 else 0)
                rise = 0.3 * (1 - value)
                row = around(value) if measure == "needle" else around(3.5 + rise, 8)
                change = (
                    number(value - 0.95, value - 1, value - 0.9) if measure == "needle" else number(rise, rise, rise)
                )
                rows.append(BudgetRow.of(row, name=name, measure=measure, kept=kept, share=share, change=change))
    return BudgetResult(
        tasks=["needle"],
        sink=4,
        window=64,
        total=TOTAL,
        sizes=SIZES,
        lists=[
            ListRow(name="copy", source="detector", heads=270, cases=12, counted=9),
            ListRow(name="theirs", source="file", form="qrhead", heads=16),
        ],
        sets=[
            BudgetSet(name=name, draw=0, k=2 * size if name != "random" else 0, kv_heads=[(i, 1) for i in range(size)])
            for name, recall in RECALL.items()
            for size in SIZES[: len(recall)]
        ],
        untouched={"needle": around(0.95), TEXT: around(3.5, 8)},
        rows=rows,
        margins=[
            Margin.of(number(0.7, 0.5, 0.8), name="copy", measure="needle"),
            Margin.of(number(0.3, -0.1, 0.6), name="theirs", measure="needle"),
            Margin.of(number(-0.21, -0.3, -0.1), name="copy", measure=TEXT),
        ],
        enough=[
            Enough(name="copy", task="needle", kept=9, share=0.28),
            Enough(name="theirs", task="needle", kept=None, share=None),
            Enough(name="random", task="needle", kept=90, share=1.0),
        ],
        numbers={},
    )


@pytest.fixture
def render(tmp_path):
    def write(result):
        write_budget(tmp_path / "budget.html", stored({"budget": result}), "some/model")
        return Page((tmp_path / "budget.html").read_text())

    return write


def test_the_page_says_what_streams_and_from_which_budget_on_recall_is_kept(render):
    page = render(made())
    title = "What is left of a model whose heads stream"
    assert page.headings == [title, "The lists"] and page.drawings == [title]
    for said in (
        "A streaming head sees the first 4 tokens of its row and its last 64 keys.",
        "where all heads stream and 20.0% of the keys are kept.",
        "Recall of needle stays at 90% of that or more from so many keys on: copy: 28.0% (9 of 90 KV heads); theirs: at no "
        "budget that was measured; random: 100.0% (90 of 90 KV heads).",
        "mean over the budgets (higher is better): copy +0.700 [+0.500, +0.800]; theirs +0.300 [−0.100, +0.600] (no clear "
        "difference).",
        "The loss on plain text less that with as many random KV heads, mean over the budgets (lower is better): copy −0.210",
    ):
        assert said in page.text, said
    rows = {tuple(row[:2]): row for row in reversed(page.rows) if row}  # of the first table
    assert rows["9", "28.0%"][3].startswith("0.500 [") and rows["90", "100.0%"][3] == "–"
    assert ["copy", "a detector of this library", "270", "9 of 12"] in page.rows and ["copy", "9", "18"] in page.rows
    assert any(row[:2] == ["9", "28.0% to 29.0%"] for row in render(made(shift=0.01)).rows)
    without = dataclasses.replace(made(), rows=[row for row in made().rows if row.kept])
    assert "Recall of needle of the untouched model is 0.950" in render(without).text


def test_the_picture_has_a_line_with_its_interval_for_each_list_and_the_untouched_model():
    result = made()
    with plotting.style():
        figure = budget_figure(result)
    assert [ax.get_ylabel() for ax in figure.axes] == ["recall of needle (n = 40)", "rise of the text loss (n = 8)"]
    for ax, measure in zip(figure.axes, result.untouched, strict=True):
        untouched, *lines = ax.lines
        assert untouched.get_linestyle() == ":" and untouched.get_ydata()[0] == (0.95 if measure == "needle" else 0)
        assert [line.get_label() for line in lines] == list(RECALL) and len({line.get_color() for line in lines}) == 3
        for line, band, name in zip(lines, ax.collections, RECALL, strict=True):
            rows = [row for row in result.rows if (row.measure, row.name) == (measure, name)]
            shown = [row.change if measure == TEXT else row for row in rows]
            np.testing.assert_allclose(line.get_xdata(), [100 * row.share for row in rows])
            np.testing.assert_allclose(line.get_ydata(), [one.value for one in shown])
            edges = band.get_paths()[0].vertices[:, 1]
            assert {round(one.low, 6) for one in shown} | {round(one.high, 6) for one in shown} <= set(edges.round(6))
