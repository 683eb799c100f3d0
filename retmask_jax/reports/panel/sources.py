"""Results of other runs, to be compared: files of head scores, work directories, and their records."""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retmask_jax.heads.profile import Scored
from retmask_jax.heads.scores import HeadScores
from retmask_jax.reports.panel.gains import GainRun
from retmask_jax.reports.panel.records import Record, read_records, read_workdir
from retmask_jax.runs.stage import Stage
from retmask_jax.runs.workdir import R, Result, Workdir
from retmask_jax.stages.detect import DETECT
from retmask_jax.stages.eval import EVAL

_THRESHOLD = 0.1


def read_models(sources: Sequence[Path], kv_heads: Sequence[int] = (), threshold: float | None = None) -> list[Scored]:
    """Reads the head scores of each source: a file in RetMask's format, or a work directory in which `detect` has run.

    Args:
        sources: Files and work directories.
        kv_heads: Key/value heads of the files' models, one for all or one each; work directories say theirs.
        threshold: None: 0.1 for a file, for a work directory the threshold of its heads.

    Raises:
        ValueError: A source is missing or broken, or the number of kv_heads does not fit.
    """
    files = [source for source in sources if not source.is_dir()]
    if files and len(kv_heads) not in (1, len(files)):
        raise ValueError(
            f"--kv_heads has {len(kv_heads)} numbers for {len(files)} files of scores: give num_key_value_heads of their "
            "models, one for all or one each (8,4)"
        )
    if kv_heads and not files:
        raise ValueError(f"--kv_heads={kv_heads[0]} does not apply: work directories say their key/value heads")
    of_file = dict(zip(files, list(kv_heads) * len(files) if len(kv_heads) == 1 else kv_heads, strict=False))
    models = []
    for name, source in zip(_names(sources), sources, strict=True):
        if source.is_dir():
            models.append(_of_run(name, source, threshold))
        else:
            reached = _THRESHOLD if threshold is None else threshold
            models.append(Scored(name, HeadScores.load(source), of_file[source], reached))
    return models


def read_studies(sources: Sequence[Path]) -> list[Record]:
    """Reads what findings rest on from each source: a work directory, a record, or a folder of records.

    Raises:
        ValueError: A source is none of these, `detect` has not finished in it, or two models have the same name.
    """
    roots = work_directories(sources)
    names, records = dict(zip(roots, _names(roots), strict=True)), []
    for source in sources:
        records += [read_workdir(names[source], source)] if source in names else _read_records(source)
    count = Counter(record.model for record in records)
    if twice := [name for name, n in count.items() if n > 1]:
        raise ValueError(
            f"{count[twice[0]]} of the sources are of a model called {twice[0]}: leave all but one of them out"
        )
    return records


def work_directories(sources: Sequence[Path]) -> list[Path]:
    """Those of the sources that are work directories with results."""
    return [source for source in sources if any(source.glob("*/result.json"))]


def read_gains(roots: Sequence[Path], number: str) -> list[GainRun]:
    """Reads the Gini coefficient of detection and one number of evaluation from each work directory.

    Args:
        roots: Work directories.
        number: Such as "eval/needle long/retmask minus start".

    Raises:
        ValueError: A source has no number of that name.
    """
    return [_of_evaluation(name, root, number) for name, root in zip(_names(roots), roots, strict=True)]


def _of_run(name: str, root: Path, threshold: float | None) -> Scored:
    result = _read(root, DETECT)
    scores = root / DETECT.name / "scores.json"
    if result.n_kv_heads is None:
        raise ValueError(
            f"{root} does not say its key/value heads (it is of an older version): give {scores} and --kv_heads"
        )
    reached = result.reached if threshold is None else threshold
    return Scored(name, HeadScores.load(scores), result.n_kv_heads, reached)


def _read_records(source: Path) -> list[Record]:
    found = read_records([source])
    if not found:
        raise ValueError(
            f"{source} is neither a work directory with results nor a folder of records: run `retmask study "
            f"--workdir={source}` first"
        )
    return found


def _of_evaluation(name: str, root: Path, number: str) -> GainRun:
    if not root.is_dir():
        raise ValueError(f"{root} is no work directory: only those have an evaluation")
    detect, numbers = _read(root, DETECT), Workdir(root, {}).result(EVAL.name, Result).numbers
    if number not in numbers:
        nearest = ", ".join(difflib.get_close_matches(number, numbers, cutoff=0))
        raise ValueError(f"eval in {root} has no number {number!r}; the most similar names are {nearest}")
    weights, gini = detect.provenance.inputs["weights"], detect.numbers["detect/gini"].estimate
    share = len(detect.heads) / np.size(detect.mean)
    return GainRun(name=name, weights=weights, gini=gini, share=share, gain=numbers[number])


def _read(root: Path, stage: Stage[R]) -> R:
    return Workdir(root, {}).result(stage.name, stage.result)


def _names(sources: Sequence[Path]) -> list[str]:
    """Names paths by their last part that is not the same in all, or in full where two would have the same name."""
    parts = [(source.resolve() if source.is_dir() else source.with_suffix("")).parts for source in sources]
    while len(parts) > 1 and len({path[-1] for path in parts}) == 1 and all(len(path) > 1 for path in parts):
        parts = [path[:-1] for path in parts]
    count = Counter(path[-1] for path in parts)
    return [path[-1] if count[path[-1]] == 1 else str(source) for path, source in zip(parts, sources, strict=True)]
