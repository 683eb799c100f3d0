"""One detector on the cases of a study: run, with its results kept on disk to be resumed, or taken from `detect`."""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.needles import Case
from retmask_jax.heads.detection import COUNTED, NoCaseCounts
from retmask_jax.heads.detectors import DETECTORS, Repeats, over_seeds
from retmask_jax.heads.profile import profile
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.interventions import Head
from retmask_jax.runs.context import Context
from retmask_jax.stages.detect import DETECT
from retmask_jax.utils import stats
from retmask_jax.utils.files import read_json, read_jsonl, write_json

PASSES = {"query_focused": 2, "gradient": 3}  # of a detector over the cases; others read them once


@dataclasses.dataclass(frozen=True)
class DetectorRun:
    """A detector's scores on some cases, and what they cost.

    Attributes:
        scores: Of the cases that count; None where none counts.
        outcomes: Of each case.
        seconds: Of all `timed` cases, compiling included.
        reused: The scores are those of the stage `detect`; the seconds are then those of the whole stage.
    """

    scores: HeadScores | None
    outcomes: list[str]
    seconds: float
    timed: int
    reused: bool = False


@dataclasses.dataclass(frozen=True)
class Concentration:
    """How concentrated the scores of all heads are, as in `heads.profile`; None where scores are signed or undefined."""

    gini: float | None
    zero_fraction: float | None
    top5_share: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The retrieval heads that a detector finds at a threshold.

    Attributes:
        cases: How many the detector ran on; counted of them count.
        outcomes: Number of cases by outcome.
        heads: At the threshold, best first.
        top: The best head's score; None where no case counts.
    """

    cases: int
    outcomes: dict[str, int]
    heads: list[Head]
    top: float | None
    counted: int


def check_detector_names(key: str, names: Sequence[str]) -> None:
    """Raises ValueError for a name, under this key of the config, that is not a detector's."""
    for name in names:
        if name not in DETECTORS:
            raise ValueError(f"{key} has {name!r}; known detectors are {', '.join(DETECTORS)}")


def spread(total: int, n: int | None) -> list[int]:
    """Picks n of `total` places, evenly spread and in order; all of them where n is None or not smaller."""
    if n is None or n >= total:
        return list(range(total))
    return [int(i) for i in np.linspace(0, total - 1, n).round()]


def run_detector(context: Context, name: str, cases: Sequence[Case], target: Path) -> DetectorRun:
    """Runs a detector of DETECTORS, or reads back what an earlier call wrote.

    Args:
        target: For the scores, in RetMask's JSON format; outcomes and times go to a second file next to it.
    """
    record = target.with_suffix(".run.json")
    if record.exists():
        return DetectorRun(HeadScores.load(target) if target.exists() else None, **read_json(record))
    begin = time.time()
    try:
        found = DETECTORS[name](context.lm, cases, batch_size=context.config.batch_size, **_options(context, name))
        scores, outcomes = found.scores, found.outcomes
        scores.save(target)
    except NoCaseCounts as error:
        scores, outcomes = None, error.outcomes
    run = DetectorRun(scores, outcomes, round(time.time() - begin, 2), len(cases))
    write_json(record, {"outcomes": run.outcomes, "seconds": run.seconds, "timed": run.timed})
    return run


def scored(context: Context, detector: str, n: int | None, target: Path) -> DetectorRun:
    """Runs a detector on n cases of the detection task, evenly spread."""
    cases = context.cases(context.config.detect.task)
    return run_detector(context, detector, [cases[i] for i in spread(len(cases), n)], target)


def reused_copy(context: Context, places: Sequence[int]) -> DetectorRun | None:
    """Returns what `detect` found on the cases at these places of its task; None if it ran with other settings."""
    section, folder = context.config.detect, context.workdir.folder("detect")
    if section.scores is not None or section.released:
        return None
    outcomes = [row["outcome"] for row in read_jsonl(folder / "cases.jsonl")]
    counted = [i for i, outcome in enumerate(outcomes) if outcome == COUNTED]
    kept = [n for n, i in enumerate(counted) if i in set(places)]
    scores = HeadScores(HeadScores.load(folder / "scores.json").per_case[..., kept]) if kept else None
    seconds = DETECT.of(context).seconds
    return DetectorRun(scores, [outcomes[i] for i in places], seconds, len(outcomes), reused=True)


def repeated(context: Context, name: str, own: DetectorRun, folder: Path, top_k: int) -> Repeats | None:
    """Runs a detector on cases of the config's seeds and compares these runs, and the one with the task's seed.

    Args:
        own: The run with the task's seed.

    Returns:
        None where fewer than two runs have scores.
    """
    section, task, runs = context.config.detectors, context.config.detect.task, [own]
    for seed in section.seeds:
        cases = context.cases(task, seed=seed)
        chosen = [cases[i] for i in spread(len(cases), section.cases)]
        runs.append(run_detector(context, name, chosen, folder / f"{name}-{seed}.json"))
    scores = [run.scores for run in runs if run.scores is not None]
    return over_seeds(scores, top_k) if len(scores) > 1 else None


def concentration(scores: HeadScores, n_kv_heads: int) -> Concentration:
    """Measures how concentrated the scores are over all heads."""
    if scores.mean.min() < 0:
        return Concentration(None, None, None)
    found = profile(scores, n_kv_heads)
    fields = dataclasses.fields(Concentration)
    return Concentration(*(stats.defined(found[field.name]) for field in fields))


def heads_found(run: DetectorRun, threshold: float) -> Found:
    """Returns the heads at the threshold, the best score, and how many cases counted."""
    heads, top, counted = [], None, 0
    if run.scores is not None:
        heads = run.scores.heads(threshold=threshold)
        top, counted = float(run.scores.mean.max()), int(run.scores.counts.max())
    cases, outcomes = len(run.outcomes), dict(Counter(run.outcomes))
    return Found(cases=cases, outcomes=outcomes, heads=heads, top=top, counted=counted)


def _options(context: Context, name: str) -> dict[str, Any]:
    if name in ("copy", "copy_forced"):
        return {"max_new_tokens": context.config.detect.max_new_tokens}
    return {"null_query": context.config.detectors.null_query} if name == "query_focused" else {}
