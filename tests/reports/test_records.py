"""Records of made-up work directories, and the tables and the picture that are made from them."""

import dataclasses
import hashlib
import json
import re

import pytest
from helpers_documents import tables
from helpers_results import ACROSS, ALL_ARMS, UP, make_results, number

from retmask_jax.evals.compare import ArmContrast
from retmask_jax.reports.panel import records
from retmask_jax.reports.panel.tables import every_table, gains, main, markdown, masks, rotary, training
from retmask_jax.runs.workdir import Provenance
from retmask_jax.utils.files import write_json
from retmask_jax.utils.numbers import McNemar

GAIN = "eval/needle short/retmask minus start"


def _tested(row):
    """A row of right or wrong answers of a trained model has a test."""
    binary = row.task != "text loss" and row.arm != "start"
    return dataclasses.replace(row, mcnemar=McNemar(9, 1, 10, 0.012)) if binary else row


@pytest.fixture
def work(tmp_path):
    """A work directory of all stages, of a model in one file."""
    changes = {"needle short": UP, "closed-book": ACROSS, "text loss": ACROSS}
    made = make_results(tasks=("needle short", "closed-book"), arms=ALL_ARMS[:2], changes=changes)
    made["eval"] = dataclasses.replace(made["eval"], rows=[_tested(row) for row in made["eval"].rows])
    (tmp_path / "tiny.gguf").write_bytes(b"weights")
    for stage, result in made.items():
        inputs = {"weights": "0123456789abcdef"}
        provenance = Provenance(stage=stage, inputs=inputs, versions={"jax": "0.9"}, created="2026-01-02T03:04:05Z")
        write_json(tmp_path / "work" / stage / "result.json", dataclasses.replace(result, provenance=provenance))
    write_json(tmp_path / "work/config.json", {"model": str(tmp_path / "tiny.gguf"), "detect": {"threshold": 0.1}})
    return tmp_path / "work"


@pytest.fixture
def record(work):
    return records.record_of("tiny", work)


def test_a_record_has_every_number_and_says_what_it_is_of(work, record, tmp_path):
    stored = {path.parent.name: json.loads(path.read_text()) for path in work.glob("*/result.json")}
    numbers = {name: found for stage in stored.values() for name, found in stage["numbers"].items()}
    assert {name: dataclasses.asdict(found) for name, found in record.numbers.items() if name in numbers} == numbers
    assert record.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert (record.weights, record.file, record.total_heads) == ("0123456789abcdef", "tiny.gguf", 32)
    assert record.settings == {"model": "tiny.gguf", "detect.threshold": 0.1}
    assert record.stages["eval"] == {"jax": "0.9", "created": "2026-01-02", "seconds": 0.0}
    assert str(tmp_path) not in json.dumps(dataclasses.asdict(record))
    assert record.p_values["eval/needle short/retmask-0 minus start"] == 0.012
    assert "eval/text loss/retmask-0 minus start" not in record.p_values
    assert record.p_values["rope/needle short/highest minus lowest 2 pairs"] == 0.5


def test_changes_are_also_given_by_seed_where_there_are_several(work):
    result = make_results(tasks=("needle short",), seeds=(0, 1), changes={"needle short": UP})["eval"]
    rows = [_tested(row) for row in result.rows]
    write_json(work / "eval/result.json", dataclasses.replace(result, rows=rows))
    record = records.record_of("tiny", work)
    (header, row) = training(record)
    assert header[3:] == ["retmask", "retmask-0", "retmask-1"]
    assert row[3] == "+0.100 [+0.050, +0.150]" and row[4] == f"{row[3]}, p 0.012" == row[5]


def test_retmask_against_a_control_is_in_the_record_and_in_the_table(work):
    result = make_results(tasks=("needle short",), changes={"needle short": UP})["eval"]
    test = McNemar(9, 1, 10, 0.012)
    row = ArmContrast(other="any_layer", task="needle short", change=number(0.2, 0.1, 0.3, 10), mcnemar=test)
    write_json(work / "eval/result.json", dataclasses.replace(result, contrasts=[row]))
    header, cells = training(records.record_of("tiny", work))
    assert header[-1] == "retmask minus any_layer" and cells[-1] == "+0.200 [+0.100, +0.300], p 0.012"


def test_a_record_is_written_and_read_back(work, record, tmp_path, capsys):
    records.main([str(work), "--name=tiny", f"--out={tmp_path / 'out'}"])
    write_json(tmp_path / "out/panel.json", {"task": "needle"})  # which is no record, and passed over
    assert records.read_records([tmp_path / "out"]) == [record]
    assert records.read_records([tmp_path / "out/tiny.json"]) == [record]
    with pytest.raises(ValueError, match="panel.json is no record of a run"):
        records.read_records([tmp_path / "out/panel.json"])
    (tmp_path / "tiny.gguf").unlink()
    with pytest.raises(SystemExit):
        records.main([str(work), f"--out={tmp_path / 'out'}"])
    assert "tiny.gguf is not there, so its sha256 is not known" in capsys.readouterr().err


def test_tables_show_the_numbers_of_their_record(record):
    p_values = record.p_values | {"knockout/needle short/retrieval": 0.00012}
    record = dataclasses.replace(record, p_values=p_values)
    numbers = record.numbers
    header, row = masks([record])
    cells = dict(zip(header, row, strict=True))
    found = numbers["knockout/needle short/retrieval"]
    assert cells["retrieval heads masked"] == f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}], p 0.00012"
    assert cells["heads, Gini"] == "3 of 32 heads, 0.87" and cells["n"] == str(numbers["knockout/needle short/none"].n)
    assert cells["lowest-scoring"] == "–"  # not measured
    found = numbers["rope/needle short/highest minus lowest quarter"]
    assert rotary([record])[1][2] == f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    header, *rows = training(record)
    assert header[2:] == ["tiny, start", *ALL_ARMS[:2]] and {row[0] for row in rows} >= {"needle short", "closed-book"}
    change = numbers[GAIN]
    of_task = next(row for row in rows if row[0] == "needle short")
    assert of_task[3] == f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}], p 0.012"
    (shown,) = tables(markdown(masks([record])))
    assert shown == masks([record]) and markdown([["model"]]) == ""


def test_a_record_without_a_stage_has_no_row_of_it(record):
    without = dataclasses.replace(
        record, numbers={name: n for name, n in record.numbers.items() if name.startswith("detect/")}
    )
    assert masks([without, record]) == masks([record]) and rotary([without]) == rotary([]) and training(without) == []
    assert gains([without, record], GAIN)[0] == gains([record], GAIN)[0]


def test_gain_against_sparsity_is_a_row_for_each_model_and_a_picture(record, tmp_path, capsys):
    for i, heads in enumerate((1.0, 8.0)):
        numbers = record.numbers | {
            "detect/heads": number(heads),
            GAIN: number(0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05),
        }
        other = dataclasses.replace(record, model=f"model-{i}", weights=str(i), numbers=numbers)
        write_json(tmp_path / f"out/{i}.json", other)
    main([str(tmp_path / "out"), f"--gain={GAIN}", f"--figure={tmp_path / 'gain.png'}"])
    printed = capsys.readouterr().out
    assert "| model-0 | 0.871 | 0.031 | +0.000 [-0.050, +0.050] | 40 |" in printed
    assert "| model-1 | 0.871 | 0.250 | +0.100 [+0.050, +0.150] | 40 |" in printed
    assert "Descriptive only: 2 models, too few" in printed and (tmp_path / "gain.png").exists()
    drawn = (tmp_path / "gain.svg").read_text()
    assert all(words in drawn for words in ("share of heads above the threshold", "model-1 (n = 40)"))
    both = records.read_records([tmp_path / "out"])
    assert len(every_table(both, GAIN)) == 5 and not re.search(r"\bnan\b", printed)


def test_stages_that_a_record_lacks_are_added_from_another_work_directory(work, record, tmp_path, capsys):
    """The causal study and training may have been run in different places; what the file has stays as it is."""
    out, last = [f"--out={tmp_path}", "--name=tiny"], work / "eval/result.json"
    trained = last.read_text()
    last.unlink()
    records.main([str(work), *out])
    (without,) = records.read_records([tmp_path / "tiny.json"])
    assert GAIN in record.numbers and GAIN not in without.numbers and "eval" not in without.stages

    last.write_text(trained)
    write_json(work / "config.json", {"model": str(tmp_path / "tiny.gguf"), "detect": {"threshold": 0.5}})
    knockout = json.loads((work / "knockout/result.json").read_text())
    knockout["numbers"] = dict.fromkeys(knockout["numbers"], {"value": 0.5, "low": None, "high": None, "n": 1})
    write_json(work / "knockout/result.json", knockout)
    records.main([str(work), *out, "--add"])
    assert records.read_records([tmp_path / "tiny.json"]) == [record]

    detect = json.loads((work / "detect/result.json").read_text())
    detect["provenance"]["inputs"]["weights"] = "of others"
    write_json(work / "detect/result.json", detect)
    for of, named in ((out, "another model"), ([f"--out={tmp_path}", "--name=none"], "none.json")):
        with pytest.raises(SystemExit):
            records.main([str(work), *of, "--add"])
        assert named in capsys.readouterr().err
