"""The stage `detectors`: all detectors on the same cases, how far they agree, repeat and matter."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from retmask_jax.heads.conditions import UNTOUCHED, Condition, ConditionRow, summarise
from retmask_jax.heads.detection import Settled, stability
from retmask_jax.heads.detectors import DETECTORS, Agreement, Repeats, agreement
from retmask_jax.model.interventions import Head, mask_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, cases_cost, task_cost
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.detect import DETECT, DETECTION, HeadNumber, best_heads, retrieval_heads
from retmask_jax.stages.outcomes import task_outcomes
from retmask_jax.stages.study.detector_runs import (
    PASSES,
    Concentration,
    DetectorRun,
    check_detector_names,
    concentration,
    repeated,
    reused_copy,
    run_detector,
    spread,
)
from retmask_jax.utils import stats
from retmask_jax.utils.files import write_jsonl
from retmask_jax.utils.numbers import Number

_LISTED = 5  # best heads of each detector in the result, with intervals


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorRow:
    """What one detector found, and what it cost.

    Attributes:
        outcomes: Number of cases by outcome; `counted` of them count.
        seconds: Of all `timed` cases, compiling included.
        reused: The scores, and the seconds, are those of the stage `detect`.
        heads: The best heads; empty where no case counts.
        top: The best head's score; None where no case counts.
        profile: None where no case counts.
        shared: Jaccard index of `heads` with the heads of `detect`; None where no case counts.
        best: The first of `heads` with the intervals of their scores, and whether they are heads of `detect`; empty in
            results of older versions.
    """

    name: str
    outcomes: dict[str, int]
    seconds: float
    timed: int
    cases_per_second: float
    reused: bool
    heads: list[Head]
    counted: int = 0
    top: float | None = None
    profile: Concentration | None = None
    shared: float | None = None
    best: list[HeadNumber] = dataclasses.field(default_factory=list)

    @property
    def gini(self) -> float | None:
        """The Gini coefficient of all scores; None where it is undefined."""
        return None if self.profile is None else self.profile.gini


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorsResult(Result):
    """How the detectors compare.

    Attributes:
        top_k: How many of each detector's best heads are compared and masked.
        cases: How many the detectors ran on.
        rows: Of each detector.
        masked: Recall on the first knock-out task, untouched (kind "none") and with each detector's best heads masked
            (the kind is the detector).
        agreement: Of each two detectors for which cases count.
        stability: By detector, how its best heads settle as cases are added.
        over_seeds: By detector, for those that ran on cases of several seeds.
    """

    top_k: int
    cases: int
    rows: list[DetectorRow]
    masked: list[ConditionRow]
    agreement: list[Agreement]
    stability: dict[str, list[Settled]]
    over_seeds: dict[str, Repeats]


def detectors_stage(context: Context, folder: Path) -> DetectorsResult:
    """Runs every detector on the detection cases; measures agreement, cost, and recall with each one's heads masked."""
    section, heads = context.config.detectors, retrieval_heads(context)
    top_k = section.top_k or len(heads)
    runs = _run_detectors(context, folder)
    scores = {name: run.scores for name, run in runs.items() if run.scores is not None}
    best = {name: found.heads(top_k=top_k) for name, found in scores.items()}
    again = [name for name in section.seed_names if name in runs] if section.seeds else []
    repeats = {name: repeated(context, name, runs[name], folder, top_k) for name in again}
    over_seeds = {name: found for name, found in repeats.items() if found is not None}
    rows = [_detector_row(context, name, run, best.get(name, []), heads) for name, run in runs.items()]
    masked = _masked_recall(context, best)
    return DetectorsResult(
        top_k=top_k,
        cases=len(next(iter(runs.values())).outcomes),
        rows=rows,
        masked=masked,
        agreement=agreement(scores, top_k),
        stability={name: stability(found, top_k=top_k) for name, found in scores.items()},
        over_seeds=over_seeds,
        numbers=_recall_numbers(masked) | _detector_numbers(rows, over_seeds),
    )


def _check(config) -> None:
    section = config.detectors
    check_detector_names("detectors.names", section.names)
    check_detector_names("detectors.seed_names", section.seed_names)
    if not section.names:
        raise ValueError(f"detectors.names is empty; known detectors are {', '.join(DETECTORS)}")
    seeds = [config.tasks[config.detect.task].seed, *section.seeds]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"detectors.seeds {section.seeds} repeat a seed or {seeds[0]}, the task's seed: name others")


def _check_model(context: Context) -> None:
    section, config = context.config.detectors, context.outline.config
    total = config.n_layers * config.n_heads
    if section.top_k is not None and section.top_k > total:
        raise ValueError(f"detectors.top_k is {section.top_k}, the model has {total} heads: lower it")
    query, tokenizer = section.null_query, context.outline.tokenizer
    if tokenizer is not None and not tokenizer.encode(query, add_special_tokens=False):
        raise ValueError(f"detectors.null_query {query!r} has no tokens: give it words the tokenizer knows")


def _run_detectors(context: Context, folder: Path) -> dict[str, DetectorRun]:
    """Runs every detector, with its scores in folder/NAME.json; folder/cases.jsonl says which case each score is of."""
    cases = context.cases(context.config.detect.task)
    places = spread(len(cases), context.config.detectors.cases)
    chosen, runs = [cases[i] for i in places], {}
    for name in context.config.detectors.names:
        target = folder / f"{name}.json"
        reused = reused_copy(context, places) if name == "copy" else None
        if reused and reused.scores is not None:
            reused.scores.save(target)
        runs[name] = reused or run_detector(context, name, chosen, target)
    write_jsonl(
        folder / "cases.jsonl",
        [
            {
                "length": case.spec.length,
                "depth": case.spec.depth,
                "outcomes": {name: run.outcomes[i] for name, run in runs.items()},
            }
            for i, case in enumerate(chosen)
        ],
    )
    return runs


def _detector_row(
    context: Context, name: str, run: DetectorRun, best: Sequence[Head], heads: Sequence[Head]
) -> DetectorRow:
    """Summarises a run. best: the detector's top heads; heads: those of `detect`."""
    row = DetectorRow(
        name=name,
        outcomes=dict(Counter(run.outcomes)),
        seconds=run.seconds,
        timed=run.timed,
        cases_per_second=run.timed / max(run.seconds, 0.01),
        reused=run.reused,
        heads=list(best),
    )
    if run.scores is None:
        return row
    return dataclasses.replace(
        row,
        counted=int(run.scores.counts.max()),
        top=float(run.scores.mean[best[0]]),
        profile=concentration(run.scores, context.lm.config.n_kv_heads),
        shared=stats.jaccard(best, heads),
        best=best_heads(run.scores, heads, min(_LISTED, len(best))),
    )


def _masked_recall(context: Context, best: Mapping[str, Sequence[Head]]) -> list[ConditionRow]:
    """Measures recall on the first knock-out task, untouched and with each detector's best heads masked."""
    masks = [Condition(name, 0, mask_heads(context.lm.config, heads), tuple(heads)) for name, heads in best.items()]
    conditions = [UNTOUCHED, *masks]
    outcomes = task_outcomes(context, context.config.knockout.tasks[:1], conditions).outcomes
    return summarise(conditions, outcomes)


def _recall_numbers(masked: Sequence[ConditionRow]) -> dict[str, Number]:
    return {
        f"detectors/{row.task}/{row.kind}{'' if row.kind == UNTOUCHED.kind else ' masked'}": row.number
        for row in masked
    }


def _detector_numbers(rows: Sequence[DetectorRow], over_seeds: Mapping[str, Repeats]) -> dict[str, Number]:
    numbers = {}
    for row in rows:
        numbers[f"detectors/cases counted/{row.name}"] = stats.wilson(row.counted, sum(row.outcomes.values()))
        numbers[f"detectors/cases per second/{row.name}"] = stats.exact(row.cases_per_second, row.timed)
        if row.shared is not None:
            numbers[f"detectors/heads shared with detect/{row.name}"] = stats.exact(row.shared, row.counted)
        if row.gini is not None:
            numbers[f"detectors/gini/{row.name}"] = stats.exact(row.gini, row.counted)
    for name, repeats in over_seeds.items():
        numbers[f"detectors/heads shared over seeds/{name}"] = stats.exact(repeats.jaccard, repeats.n)
    return numbers


def _cost(context: Context) -> Cost:
    config, section = context.config, context.config.detectors
    detection = cases_cost(config, config.detect.task, section.cases)
    names = [name for name in section.names if name != "copy" or config.detect.scores or config.detect.released]
    runs = sum(PASSES.get(name, 1) for name in names) + len(section.seeds) * len(section.seed_names)
    masked = (1 + len(section.names)) * task_cost(config, config.knockout.tasks[0]) if config.knockout.tasks else Cost()
    return runs * Cost(detection.read) + masked


DETECTORS_STAGE = Stage(
    name="detectors",
    work=detectors_stage,
    result=DetectorsResult,
    upstream=(DETECT,),
    settings=(*PROMPTS, "detectors.*", "knockout.tasks", *DETECTION),
    tasks=lambda config: (config.detect.task, *config.knockout.tasks[:1]),
    check=_check,
    check_model=_check_model,
    cost=_cost,
)
