"""Tables of pages in Markdown, from the records of runs, and the picture of gain against sparsity.

    python -m retmask_jax.reports.panel.tables colab/panel --figure=colab/gain.png

prints them; a test compares the pages with them, line by line.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from retmask_jax.evals.compare import START
from retmask_jax.reports import plotting
from retmask_jax.reports.panel.gains import Gains, gain_against_sparsity, sparsity
from retmask_jax.reports.panel.profiles import write_both
from retmask_jax.reports.panel.records import Record, gain_run, read_records
from retmask_jax.utils.numbers import Number

GAIN = "eval/context long/retmask minus start"
TASK = "needle short"
_KINDS = ("layer-matched", "any layer", "activity-matched", "lowest-scoring")
_CHANGE = re.compile(r"eval/(.+)/(.+) minus (.+)")

Rows = list[list[str]]


def masks(records: Iterable[Record], task: str = TASK) -> Rows:
    """What masking does in each model that has a knock-out of the task: recall with p against the untouched model, and of the
    controls against the retrieval heads."""
    header = [
        "model",
        "heads, Gini",
        "n",
        "untouched",
        "retrieval heads masked",
        *_KINDS,
        "text loss, untouched and masked",
    ]
    rows = [header]
    for record in records:
        numbers = record.numbers
        if f"knockout/{task}/none" not in numbers:
            continue
        of, loss = f"knockout/{task}/", "knockout/text loss/"
        recalls = [_with_p(numbers.get(of + "retrieval"), record.p_values.get(of + "retrieval"))]
        recalls += [
            _with_p(numbers.get(of + kind), record.p_values.get(f"{of}{kind} minus retrieval")) for kind in _KINDS
        ]
        losses = " and ".join(_cell(numbers.get(loss + kind)) for kind in ("none", "retrieval"))
        untouched = numbers[of + "none"]
        rows.append([record.model, _heads(record), str(untouched.n), _cell(untouched), *recalls, losses])
    return rows


def rotary(records: Iterable[Record], task: str = TASK) -> Rows:
    """Where in the spectrum recall lives, in each model whose rotary pairs were ablated on the task."""
    names = {
        "recall without the highest quarter of the pairs, minus without the lowest": "highest minus lowest quarter",
        "centre of the harm in the spectrum (0: lowest)": "centre of mass of the windows",
    }
    rows = [["model", "n", *names]]
    for record in records:
        found = [record.numbers.get(f"rope/{task}/{name}") for name in names.values()]
        if found[0] is not None:
            rows.append([record.model, str(found[0].n), _cell(found[0], signed=True), _cell(found[1])])
    return rows


def training(record: Record) -> Rows:
    """What each arm changes on each task, and retmask against the others, with p where a single model was trained, and n."""
    changes = [match for name in record.numbers if (match := _CHANGE.fullmatch(name))]
    tasks = list(dict.fromkeys(match[1] for match in changes))
    arms = {
        (match[2], match[3]): match[2] if match[3] == START else f"{match[2]} minus {match[3]}" for match in changes
    }
    if not changes:
        return []
    starts = {task: record.numbers[f"eval/{task}/start"] for task in tasks}
    rows = [["task", "n", f"{record.model}, start", *arms.values()]]
    for task, start in starts.items():
        names = [f"eval/{task}/{arm} minus {other}" for arm, other in arms]
        cells = [_with_p(record.numbers.get(name), _p_of(record, name), signed=True) for name in names]
        rows.append([task, str(start.n), _cell(start), *cells])
    return rows


def gains(records: Iterable[Record], number: str = GAIN) -> tuple[Rows, Gains]:
    """(a row per model that has the number, the same for the picture)."""
    having = [record for record in records if number in record.numbers]
    found = gain_against_sparsity([gain_run(record, number) for record in having])
    rows = [["model", "Gini of the head scores", "share of heads above the threshold", "gain", "n"]]
    rows += [
        [run.name, f"{run.gini:.3f}", f"{run.share:.3f}", _cell(run.gain, signed=True), str(run.gain.n)]
        for run in found.rows
    ]
    return rows, found


def markdown(rows: Rows) -> str:
    """A table; nothing for one without rows."""
    if len(rows) < 2:
        return ""
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def every_table(records: Sequence[Record], number: str = GAIN) -> list[str]:
    """All tables of these records, in Markdown."""
    made = [masks(records), rotary(records), gains(records, number)[0], *map(training, records)]
    return [text for text in map(markdown, made) if text]


def _p_of(record: Record, change: str) -> float | None:
    """The p-value of a change, where it is that of one model: tests are of "retmask-0", pooled changes of "retmask"."""
    arm = re.compile(re.escape(change).replace(r"\ minus", r"(?:-\d+)?\ minus"))
    tests = [p for name, p in record.p_values.items() if arm.fullmatch(name)]
    return record.p_values.get(change, tests[0] if len(tests) == 1 else None)


def _heads(record: Record) -> str:
    n, gini = (record.numbers[f"detect/{name}"].estimate for name in ("heads", "gini"))
    return f"{n:.0f} of {record.total_heads} heads, {gini:.2f}"


def _cell(number: Number | None, *, signed: bool = False) -> str:
    if number is None or number.value is None:
        return "–"
    form = "+.3f" if signed else ".3f"
    bounds = "" if number.low is None else f" [{number.low:{form}}, {number.high:{form}}]"
    return f"{number.value:{form}}{bounds}"


def _with_p(number: Number | None, p: float | None, *, signed: bool = False) -> str:
    return _cell(number, signed=signed) + ("" if number is None or p is None else f", p {p:.2g}")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables; writes the picture, if wanted."""
    parser = argparse.ArgumentParser(prog="python -m retmask_jax.reports.panel.tables", allow_abbrev=False)
    parser.add_argument("records", nargs="+", type=Path, help="files of records, or folders of them")
    parser.add_argument("--gain", default=GAIN, metavar="NUMBER", help=f"change by training (default: {GAIN})")
    parser.add_argument("--figure", type=Path, help="PNG of the gain against sparsity; an SVG is written beside it")
    asked = parser.parse_args(argv)
    try:
        records = read_records(asked.records)
    except ValueError as error:
        parser.error(str(error))
    print("\n\n".join(every_table(records, asked.gain)))
    found = gains(records, asked.gain)[1]
    print(f"\n{found.finding}")
    if asked.figure:
        with plotting.style():
            write_both(sparsity(found, asked.gain), asked.figure.with_suffix(""))


if __name__ == "__main__":
    main()
