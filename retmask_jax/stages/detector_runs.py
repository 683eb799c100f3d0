"""One detector on the cases of a study: run and kept on disk, so that what is cut off goes on, or taken from `detect`."""

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.needles import Case
from retmask_jax.heads import conditions as causal
from retmask_jax.heads.detection import COUNTED, NoCaseCounts
from retmask_jax.heads.detectors import DETECTORS, over_seeds
from retmask_jax.heads.profile import profile
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.interventions import Interventions
from retmask_jax.runs.context import Context
from retmask_jax.stages.detect import DETECT
from retmask_jax.utils import stats
from retmask_jax.utils.files import read_json, read_jsonl, write_json

OF_ALL_HEADS = ("gini", "zero_fraction", "top5_share")


@dataclasses.dataclass(frozen=True)
class DetectorRun:
    """scores: of the counted cases, None where none counts. outcomes: per case. seconds: of all `timed` cases, compiling
    included. reused: taken from the stage `detect`, whose seconds are the whole stage's."""

    scores: HeadScores | None
    outcomes: list[str]
    seconds: float
    timed: int
    reused: bool = False


def spread(total: int, n: int | None) -> list[int]:
    """n of `total` places, as even as can be and in order; all where n is None or not smaller."""
    if n is None or n >= total:
        return list(range(total))
    return [int(i) for i in np.linspace(0, total - 1, n).round()]


def run_detector(context: Context, name: str, cases: Sequence[Case], target: Path) -> DetectorRun:
    """Run a detector of DETECTORS; the scores go to `target` (RetMask's JSON), the rest beside them.

    Where both are there already, they are read back.
    """
    beside = target.with_suffix(".run.json")
    if beside.exists():
        return DetectorRun(HeadScores.load(target) if target.exists() else None, **read_json(beside))
    begin = time.time()
    try:
        found = DETECTORS[name](context.lm, cases, batch_size=context.config.batch_size, **_options(context, name))
        scores, outcomes = found.scores, found.outcomes
        scores.save(target)
    except NoCaseCounts as error:
        scores, outcomes = None, error.outcomes
    run = DetectorRun(scores, outcomes, round(time.time() - begin, 2), len(cases))
    write_json(beside, {"outcomes": run.outcomes, "seconds": run.seconds, "timed": run.timed})
    return run


def reused_copy(context: Context, places: Sequence[int]) -> DetectorRun | None:
    """What the stage `detect` found on the cases at these places of its task; None where its settings are others."""
    section, folder = context.config.detect, context.workdir.folder("detect")
    if section.scores is not None or section.released:
        return None
    outcomes = [row["outcome"] for row in read_jsonl(folder / "cases.jsonl")]
    counted = [i for i, outcome in enumerate(outcomes) if outcome == COUNTED]
    kept = [n for n, i in enumerate(counted) if i in set(places)]
    scores = HeadScores(HeadScores.load(folder / "scores.json").per_case[..., kept]) if kept else None
    seconds = DETECT.of(context).seconds
    return DetectorRun(scores, [outcomes[i] for i in places], seconds, len(outcomes), reused=True)


def shape_of(scores: HeadScores, n_kv_heads: int) -> dict[str, float | None]:
    """Gini, share of exact zeros and share of the best five over all heads; None where scores are signed."""
    if scores.mean.min() < 0:
        return dict.fromkeys(OF_ALL_HEADS)
    found = profile(scores, n_kv_heads)
    return {name: stats.defined(found[name]) for name in OF_ALL_HEADS}


def repeated(context: Context, name: str, own: DetectorRun, folder: Path, top_k: int) -> dict[str, Any] | None:
    """`over_seeds` of a detector on the cases of the config's seeds, the task's own first; None for less than two runs."""
    section, task, runs = context.config.detectors, context.config.detect.task, [own]
    for seed in section.seeds:
        cases = context.cases(task, seed=seed)
        chosen = [cases[i] for i in spread(len(cases), section.cases)]
        runs.append(run_detector(context, name, chosen, folder / f"{name}-{seed}.json"))
    scores = [run.scores for run in runs if run.scores is not None]
    return over_seeds(scores, top_k) if len(scores) > 1 else None


def _options(context: Context, name: str) -> dict[str, Any]:
    if name in ("copy", "copy_forced"):
        return {"max_new_tokens": context.config.detect.max_new_tokens}
    return {"null_query": context.config.detectors.null_query} if name == "query_focused" else {}


UNTOUCHED = causal.Condition("none", 0, Interventions())


def check_detector_names(key: str, names: Sequence[str]) -> None:
    """Raise ValueError for a name of a detector that there is not."""
    for name in names:
        if name not in DETECTORS:
            raise ValueError(f"{key} has {name!r}; known detectors are {', '.join(DETECTORS)}")


def scored(context: Context, detector: str, n: int | None, target: Path) -> DetectorRun:
    """A detector on so many of the detection task's cases."""
    cases = context.cases(context.config.detect.task)
    return run_detector(context, detector, [cases[i] for i in spread(len(cases), n)], target)


def heads_found(run: DetectorRun, threshold: float) -> dict[str, Any]:
    """Heads at the threshold, the best score, and how many cases counted."""
    counts = {"cases": len(run.outcomes), "outcomes": dict(Counter(run.outcomes))}
    if run.scores is None:
        return counts | {"heads": [], "top": None, "counted": 0}
    heads = run.scores.heads(threshold=threshold)
    return counts | {"heads": heads, "top": float(run.scores.mean.max()), "counted": int(run.scores.counts.max())}


def number_of(row: Mapping) -> dict[str, Any]:
    return {name: row[name] for name in ("value", "low", "high", "n")}
