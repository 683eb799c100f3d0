"""The page of lists of heads on made-up results: what it says and draws follows the numbers."""

import dataclasses

import pytest
from helpers_results import Page, around, number, stored

from retmask_jax.reports import plotting
from retmask_jax.reports.study.arena import _figure, write_arena
from retmask_jax.stages.study.arena import ArenaResult, ArenaRow, HeadSet, SizeOverlap
from retmask_jax.stages.study.listed_heads import ListRow

MODES = ["zero", "query"]


def made(sizes=(3,), of_kv_heads=False, tied=0):
    effects = {"copy": 0.1, "theirs": 0.4, "any layer": 0.9}
    sources = dict(zip(effects, ("detector", "file", "control"), strict=True))
    rows = [
        ArenaRow(
            name=name,
            source=sources[name],
            mode=mode,
            size=size,
            recall=around(recall + 0.05 * (mode == "query")),
            change=number(recall - 0.95, recall - 1.0, recall - 0.9),
            loss=around(4.0),
            cost=number(0.02, -0.01, 0.03),
        )
        for size in sizes
        for mode in MODES
        for name, recall in effects.items()
    ]
    return ArenaResult(
        task="needle",
        reference="copy",
        sizes=list(sizes),
        modes=MODES,
        recall=around(0.95),
        loss=around(3.98, 16),
        lists=[
            ListRow(name="copy", source="detector", heads=270, cases=12, counted=9),
            ListRow(name="empty", source="detector", cases=12),
            ListRow(name="theirs", source="file", form="qrhead", heads=16, of_kv_heads=of_kv_heads),
        ],
        sets=[
            HeadSet(name=name, source=sources[name], size=size, draw=0, heads=[(0, 1), (5, 2), (29, 8)], tied=tied)
            for size in sizes
            for name in effects
        ],
        rows=rows,
        overlaps=[
            SizeOverlap(a="copy", b="theirs", size=size, shared=2, jaccard=0.5, expected=0.125, p_value=0.004)
            for size in sizes
        ],
        numbers={"arena/needle/untouched": around(0.95)},
    )


@pytest.fixture
def render(tmp_path):
    def write(result):
        write_arena(tmp_path / "arena.html", stored({"arena": result}), "some/model")
        return Page((tmp_path / "arena.html").read_text())

    return write


def test_the_page_has_a_row_per_list_and_says_whose_heads_matter(render):
    page = render(made())
    assert page.headings == ["What ablating them does", "Overlap of the lists", "The lists"]
    assert page.drawings == ["3 heads of each list ablated"]
    said = "With 3 heads ablated (zero) it is lowest for copy (0.100) and highest for any layer (0.900)."
    assert said in page.text and "untouched model, over 40 cases" in page.text
    assert "zero: writes nothing; query: has a query of zeros" in page.text
    rows = {row[0]: row for row in page.rows if row}
    assert ["copy", "a detector of this library", "270", "9 of 12"] in page.rows
    assert ["empty", "a detector of this library", "–", "0 of 12"] in page.rows
    assert ["theirs", "a file (qrhead)", "16", "–"] in page.rows
    assert ["copy", "–", "2 (0.50)"] in page.rows and ["theirs", "0.0040", "–"] in page.rows
    assert "Two random lists of 3 heads share 0.12 on average." in page.text
    assert rows["theirs"][-1] == "0-1, 5-2, 29-8"
    assert "names whole groups of query heads" not in page.text
    assert "names whole groups of query heads" in render(made(of_kv_heads=True)).text
    assert "among equals" not in page.text
    assert "theirs is cut at 3 among equals: its last head scores as 4 heads left out." in render(made(tied=4)).text
    assert len(render(made(sizes=(2, 3))).drawings) == 2


def test_the_picture_marks_every_number_once():
    result = made()
    with plotting.style():
        figure = _figure(result, 3, result.rows)
    recall, text = figure.axes
    assert [label.get_text() for label in recall.get_yticklabels()] == ["copy", "theirs", "any layer"]
    for ax, side in ((recall, "recall"), (text, "cost")):
        points = [line for line in ax.lines if line.get_marker() in plotting.MARKERS and len(line.get_xdata())]
        marked = sorted((round(line.get_ydata()[0]), line.get_xdata()[0]) for line in points)
        names = ["copy", "theirs", "any layer"]
        expected = sorted((names.index(row.name), getattr(row, side).value) for row in result.rows)
        assert marked == expected
        whiskers = [line for line in ax.lines if line.get_linewidth() == 1.2]
        assert len(whiskers) == len(result.rows)
    assert recall.lines[0].get_xdata()[0] == result.recall.value and text.lines[0].get_xdata()[0] == 0


def test_a_single_list_overlaps_with_none(render):
    result = made()
    alone = dataclasses.replace(result, lists=result.lists[:2], overlaps=[])
    assert render(alone).headings == ["What ablating them does", "The lists"]
