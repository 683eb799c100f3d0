"""What all benchmarks share: runs in turn, ratios, bounds, the table and the JSON of a report."""

import json
from types import SimpleNamespace

import pytest

from retmask_jax.benchmarks import harness
from retmask_jax.benchmarks.harness import Bound, Report, Row, Timed, alternate, speed_row


def test_contenders_alternate_after_collecting_garbage_and_the_first_run_stands_apart(monkeypatch):
    calls = []
    monkeypatch.setattr(harness, "gc", SimpleNamespace(collect=lambda: calls.append("collected")))
    timed = alternate({name: lambda name=name: calls.append(name) or len(calls) for name in ("ours", "peer")}, 3)
    assert calls == ["collected", "ours", "collected", "peer"] * 4
    assert [timed[name].result for name in ("ours", "peer")] == [2, 4]
    assert all(len(timed[name].runs) == 3 for name in timed)


def test_ratio_is_of_medians():
    row = speed_row("x", Timed(9.0, (1.0, 2.0, 30.0)), Timed(8.0, (50.0, 6.0, 5.0)), work=12, what="cases", target=4)
    assert (row.ours, row.peer, row.ratio) == (2.0, 6.0, 3.0)
    assert row.facts["cases/s"] == 6 and row.facts["cases/s of peer"] == 2
    assert not row.target.holds and not Report("b", {}, [row]).violated  # a missed target is no disagreement


@pytest.mark.parametrize(
    "value, relation, limit, holds",
    [
        (1e-6, "<=", 1e-6, True),
        (2e-6, "<=", 1e-6, False),
        (0.999, ">=", 0.999, True),
        (2, "==", 1, False),
        (float("nan"), "<=", 1, False),
        (float("nan"), ">=", 1, False),
    ],
)
def test_bounds(value, relation, limit, holds):
    assert Bound("x", value, relation, limit).holds == holds


def test_table_and_json(tmp_path):
    wrong = Bound("difference", float("nan"), "<=", 1e-6)
    rows = [
        Row("one", "bytes", 3 * 2**20, bounds=(Bound("growth", 2.0, "<=", 2.2),)),
        Row("two", "bytes", 2**20, 2**22, 0.25, Bound("ratio", 0.25, "<=", 0.5), (wrong,)),
    ]
    report = Report("memory", {"size": "30m"}, rows)
    header, texts = harness.table_rows(report)
    assert list(header) == ["memory", "ours", "peer", "ratio", "target", "must hold"]  # nothing ran first
    assert texts[0] == ["one", "3 MiB", "", "", "", "growth 2 <= 2.2"]
    assert texts[1] == ["two", "1 MiB", "4 MiB", "0.25x", "<= 0.5", "difference nan VIOLATES <= 1e-06"]
    harness.write_report(report, tmp_path / "out.json")
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["violated"] == ["two: difference nan VIOLATES <= 1e-06"]
    assert stored["rows"][1]["target"]["holds"] and not stored["rows"][1]["bounds"][0]["holds"]
    assert stored["environment"]["versions"]["jax"] and stored["environment"]["devices"]
