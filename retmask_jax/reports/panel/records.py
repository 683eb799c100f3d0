"""The numbers of a work directory in one file, which is kept where its model and answers are not.

    python -m retmask_jax.reports.panel.records WORKDIR --name=MODEL --out=colab/real

writes colab/real/MODEL.json, of all stages that have finished. With `--add` the file keeps what it has, and gets the stages
that it lacks from a further work directory of the same model and heads. `retmask_jax.reports.panel.tables` makes the tables of
pages from such files, and `retmask panel` puts them beside work directories.
"""

import argparse
import dataclasses
import difflib
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from retmask_jax.evals.compare import RETMASK, ArmContrast
from retmask_jax.heads.conditions import Contrast
from retmask_jax.heads.detectors import Agreement
from retmask_jax.reports.panel.gains import GainRun
from retmask_jax.runs.workdir import Result, Workdir, settings_of
from retmask_jax.stages.detect import DETECT
from retmask_jax.stages.eval import EVAL
from retmask_jax.stages.knockout import KNOCKOUT
from retmask_jax.stages.rope import ROPE
from retmask_jax.stages.study.detectors import DETECTORS_STAGE
from retmask_jax.stages.study.theta import THETA
from retmask_jax.utils.files import read_json, read_object, sha256, write_json
from retmask_jax.utils.numbers import Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a run found.

    Attributes:
        model: Its name in tables.
        weights: Hash of the model's files, as of `utils.fingerprints`.
        total_heads: Of the model.
        file: Name of the model's file or folder; sha256: of the file, None where it is a folder.
        settings: What decides the results, by key of the config; of stages that were added, as it was for them.
        stages: Of each stage the versions of packages, the day and the seconds it took.
        numbers: Of all stages, by name; those of `eval` also by seed, where there are several, and of retmask against every
            other arm. With the paired changes that `p_values` tests ("retrieval minus none" is that of "retrieval").
        p_values: McNemar's exact test, by name: of a mask against the untouched model, of other masks against that of the
            retrieval heads ("A minus retrieval"), of rotary pairs ("highest minus lowest"), of a trained model against
            the start, and of retmask against every other arm.
        theta: RoPE base; None where `detect` is of an older version and the stage theta has not run.
        agreement: Of each two detectors.
    """

    model: str
    weights: str
    total_heads: int
    file: str = ""
    sha256: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    stages: dict[str, dict[str, Any]]
    numbers: dict[str, Number]
    p_values: dict[str, float] = dataclasses.field(default_factory=dict)
    theta: float | None = None
    agreement: list[Agreement] = dataclasses.field(default_factory=list)


def record_of(name: str, root: Path) -> Record:
    """The record of a work directory, with the hash of the model's file; ValueError as of `read_workdir`, or where that is
    gone."""
    source = Path(read_object(root / "config.json")["model"])
    return dataclasses.replace(read_workdir(name, root), sha256=_sha256(source))


def read_workdir(name: str, root: Path) -> Record:
    """What a work directory holds; ValueError where `detect` has not finished there."""
    work = Workdir(root, {})
    detect, config = work.result(DETECT.name, DETECT.result), read_object(root / "config.json")
    source = Path(config["model"])
    empty = Record(
        model=name,
        weights=detect.provenance.inputs["weights"],
        total_heads=np.size(detect.mean),
        file=source.name,
        settings=settings_of(config) | {"model": source.name},
        stages={},
        numbers={},
        theta=detect.rope_base,
    )
    return _filled(empty, work, dict(_results(work)))


def added(record: Record, root: Path) -> Record:
    """The record with the stages that it lacks, from a work directory.

    Raises:
        ValueError: `detect` has not finished there, or it has another model, or found other heads.
    """
    work = Workdir(root, {})
    detect = work.result(DETECT.name, DETECT.result)
    same = detect.provenance.inputs["weights"] == record.weights and detect.numbers.items() <= record.numbers.items()
    if not same:
        raise ValueError(f"{root} is of another model than the record of {record.model}, or found other heads in it")
    results = {stage: result for stage, result in _results(work) if stage not in record.stages}
    settings = {key: value for result in results.values() for key, value in (result.provenance.settings or {}).items()}
    return _filled(dataclasses.replace(record, settings=record.settings | settings), work, results)


def _filled(record: Record, work: Workdir, results: Mapping[str, Result]) -> Record:
    """The record with the numbers and tests of these stages of a work directory."""
    numbers = {key: number for result in results.values() for key, number in result.numbers.items()}
    tests = dict(_tests(work, results))
    changes = {_as_change(key): test.change for key, test in tests.items()}
    p_values = {key: test.p_value for key, test in tests.items()} | dict(_of_training(work, results))
    found = dataclasses.replace(
        record,
        stages=record.stages | {stage: _made(result) for stage, result in results.items()},
        numbers=record.numbers | numbers | changes | dict(_of_arms(work, results)),
        p_values=record.p_values | p_values,
    )
    if THETA.name in results:
        found = dataclasses.replace(found, theta=work.result(THETA.name, THETA.result).theta)
    if DETECTORS_STAGE.name in results:
        agreement = work.result(DETECTORS_STAGE.name, DETECTORS_STAGE.result).agreement
        found = dataclasses.replace(found, agreement=agreement)
    return found


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Records of files, and of all files of folders that hold one; ValueError for a file that holds none."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    records = []
    for file in files:
        found = read_json(file)
        if isinstance(found, Mapping) and {"model", "numbers"} <= found.keys():
            records.append(msgspec.convert(found, Record))
        elif file in paths:
            raise ValueError(f"{file} is no record of a run: `python -m retmask_jax.reports.panel.records` writes one")
    return records


def gain_run(record: Record, number: str) -> GainRun:
    """A record's gain, a number of this name, beside how concentrated its head scores are; ValueError where it has none."""
    if number not in record.numbers:
        nearest = ", ".join(difflib.get_close_matches(number, record.numbers, cutoff=0))
        raise ValueError(f"{record.model} has no number {number!r}; the most similar names are {nearest}")
    return GainRun(
        name=record.model,
        weights=record.weights,
        gini=record.numbers["detect/gini"].estimate,
        share=record.numbers["detect/heads"].estimate / record.total_heads,
        gain=record.numbers[number],
    )


def _results(work: Workdir) -> Iterator[tuple[str, Result]]:
    """Each stage with numbers, in the order in which they were made."""
    names = [path.parent.name for path in work.root.glob("*/result.json")]
    found = [(name, work.result(name, Result)) for name in names]
    yield from sorted(((name, one) for name, one in found if one.numbers), key=lambda pair: pair[1].provenance.created)


def _made(result: Result) -> dict[str, Any]:
    made = result.provenance
    return made.versions | {"created": made.created[:10], "seconds": result.seconds}


def _of_arms(work: Workdir, stages: Container[str]) -> Iterator[tuple[str, Number]]:
    if EVAL.name in stages:
        result = work.result(EVAL.name, EVAL.result)
        yield from ((_against(row), row.change) for row in result.contrasts)
        rows = result.rows
        seeds = Counter(row.arm for row in rows if row.task == rows[0].task)
        yield from ((_change(row), row.change) for row in rows if seeds[row.arm] > 1)


def _tests(work: Workdir, stages: Container[str]) -> Iterator[tuple[str, Contrast]]:
    """Each tested difference between masks, by the name that its p-value has."""
    if KNOCKOUT.name in stages:
        knockout = work.result(KNOCKOUT.name, KNOCKOUT.result)
        for row in knockout.rows:
            if (row.kind, row.experiment) == ("retrieval", "zero"):
                yield f"knockout/{row.task}/retrieval", Contrast(change=row.change, p_value=row.mcnemar.p_value)
        for row in knockout.contrasts:
            if row.experiment == "zero" and row.kind != "none":
                yield f"knockout/{row.task}/{row.kind} minus retrieval", row
    if ROPE.name in stages:
        rope = work.result(ROPE.name, ROPE.result)
        for row in rope.contrasts:
            if row.site == "rotary":
                yield f"rope/{row.task}/{row.kind} minus lowest {row.k} pairs", row
                if row.k == rope.n_pairs // 4:
                    yield f"rope/{row.task}/{row.kind} minus lowest quarter", row


def _as_change(test: str) -> str:
    """The name of the difference that is tested."""
    return test if " minus " in test.rpartition("/")[2] else f"{test} minus none"


def _of_training(work: Workdir, stages: Container[str]) -> Iterator[tuple[str, float]]:
    if EVAL.name in stages:
        result = work.result(EVAL.name, EVAL.result)
        yield from ((_change(row), row.mcnemar.p_value) for row in result.rows if row.mcnemar is not None)
        yield from ((_against(row), row.mcnemar.p_value) for row in result.contrasts if row.mcnemar is not None)


def _change(row: Any) -> str:
    return f"eval/{row.task}/{row.model} minus start"


def _against(row: ArmContrast) -> str:
    return f"eval/{row.task}/{RETMASK} minus {row.other}"


def _sha256(source: Path) -> str | None:
    if source.suffix != ".gguf":
        return None
    if not source.is_file():
        raise ValueError(f"{source} is not there, so its sha256 is not known: run the command where the model lies")
    return sha256(source)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the record of a work directory, or adds to it."""
    parser = argparse.ArgumentParser(prog="python -m retmask_jax.reports.panel.records", allow_abbrev=False)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--name", help="of the model in tables (default: that of the work directory)")
    parser.add_argument("--out", type=Path, default=Path("colab/real"), help="folder (default: colab/real)")
    parser.add_argument("--add", action="store_true", help="keep what the file has, and add the stages that it lacks")
    asked = parser.parse_args(argv)
    name = asked.name or asked.workdir.resolve().name
    file = asked.out / f"{name}.json"
    try:
        made = added(read_records([file])[0], asked.workdir) if asked.add else record_of(name, asked.workdir)
    except ValueError as error:
        parser.error(str(error))
    write_json(file, made)
    print(file)


if __name__ == "__main__":
    main()
