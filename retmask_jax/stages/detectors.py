"""The stage `detectors`: all detectors on the same cases, how far they agree, repeat and matter."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.heads import conditions as causal
from retmask_jax.heads.detection import stability
from retmask_jax.heads.detectors import DETECTORS, agreement
from retmask_jax.model.interventions import mask_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.stages.detect import DETECT, DETECTION, retrieval_heads
from retmask_jax.stages.detector_runs import (
    UNTOUCHED,
    DetectorRun,
    check_detector_names,
    number_of,
    repeated,
    reused_copy,
    run_detector,
    shape_of,
    spread,
)
from retmask_jax.stages.outcomes import task_outcomes
from retmask_jax.utils import stats
from retmask_jax.utils.files import write_jsonl


def _check(config) -> None:
    """Raise ValueError for settings of this stage that could only fail later."""
    section = config.detectors
    check_detector_names("detectors.names", section.names)
    check_detector_names("detectors.seed_names", section.seed_names)
    if not section.names:
        raise ValueError(f"detectors.names is empty; known detectors are {', '.join(DETECTORS)}")
    seeds = [config.tasks[config.detect.task].seed, *section.seeds]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"detectors.seeds {section.seeds} repeat a seed or {seeds[0]}, the task's own: name others")


def _check_model(context: Context) -> None:
    """Raise ValueError where these settings do not suit the model."""
    section, config = context.config.detectors, context.outline.config
    total = config.n_layers * config.n_heads
    if section.top_k is not None and section.top_k > total:
        raise ValueError(f"detectors.top_k is {section.top_k}, the model has {total} heads: lower it")
    query, tokenizer = section.null_query, context.outline.tokenizer
    if tokenizer is not None and not tokenizer.encode(query, add_special_tokens=False):
        raise ValueError(f"detectors.null_query {query!r} has no tokens: give it words the tokenizer knows")


def detectors_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Every detector on the detection cases: how far they agree, settle and repeat, what they cost, and how much recall
    falls when the best heads of each are masked."""
    section, heads = context.config.detectors, retrieval_heads(context)
    top_k = section.top_k or len(heads)
    runs = _run_detectors(context, folder)
    scores = {name: run.scores for name, run in runs.items() if run.scores is not None}
    best = {name: found.heads(top_k=top_k) for name, found in scores.items()}
    again = [name for name in section.seed_names if name in runs] if section.seeds else []
    seeds = {name: repeated(context, name, runs[name], folder, top_k) for name in again}
    rows = [_detector_row(context, name, run, best.get(name, []), heads) for name, run in runs.items()]
    masked, numbers = _masked_recall(context, best)
    return {
        "top_k": top_k,
        "cases": len(next(iter(runs.values())).outcomes),
        "rows": rows,
        "masked": masked,
        "agreement": [
            {"a": a, "b": b, "jaccard": both["jaccard"], "spearman": stats.defined(both["spearman"])}
            for (a, b), both in agreement(scores, top_k).items()
        ],
        "stability": {name: stability(found, top_k=top_k) for name, found in scores.items()},
        "over_seeds": {name: repeats for name, repeats in seeds.items() if repeats},
        "numbers": numbers | _detector_numbers(rows, seeds),
    }


def _run_detectors(context: Context, folder: Path) -> dict[str, DetectorRun]:
    """Every detector's run, its scores in folder/NAME.json; folder/cases.jsonl tells which case a score is of."""
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


def _detector_row(context: Context, name: str, run: DetectorRun, best, heads) -> dict[str, Any]:
    """What one detector found and cost; best: its top heads."""
    row = {
        "name": name,
        "outcomes": dict(Counter(run.outcomes)),
        "seconds": run.seconds,
        "timed": run.timed,
        "cases_per_second": run.timed / max(run.seconds, 0.01),
        "reused": run.reused,
        "heads": best,
    }
    if run.scores is None:
        return row | {"counted": 0, "top": None, "profile": None, "shared": None}
    return row | {
        "counted": int(run.scores.counts.max()),
        "top": float(run.scores.mean[best[0]]),
        "profile": shape_of(run.scores, context.lm.config.n_kv_heads),
        "shared": stats.jaccard(best, heads),
    }


def _masked_recall(context: Context, best: Mapping[str, list]) -> tuple[list[dict], dict[str, dict]]:
    """(rows, numbers) of recall on the first knock-out task with each detector's best heads masked."""
    conditions = [UNTOUCHED]
    conditions += [
        causal.Condition(name, 0, mask_heads(context.lm.config, heads), tuple(heads)) for name, heads in best.items()
    ]
    outcomes, _ = task_outcomes(context, context.config.knockout.tasks[:1], conditions)
    rows = causal.summarise(conditions, outcomes)
    numbers = {
        f"detectors/{row['task']}/{row['kind']}{'' if row['kind'] == 'none' else ' masked'}": number_of(row)
        for row in rows
    }
    return rows, numbers


def _detector_numbers(rows: Sequence[Mapping], seeds: Mapping[str, Any]) -> dict[str, dict]:
    numbers = {}
    for row in rows:
        name, total = row["name"], sum(row["outcomes"].values())
        numbers[f"detectors/cases counted/{name}"] = stats.wilson(row["counted"], total)
        numbers[f"detectors/cases per second/{name}"] = stats.exact(row["cases_per_second"], row["timed"])
        if row["shared"] is not None:
            numbers[f"detectors/heads shared with detect/{name}"] = stats.exact(row["shared"], row["counted"])
        if row["profile"] and row["profile"]["gini"] is not None:
            numbers[f"detectors/gini/{name}"] = stats.exact(row["profile"]["gini"], row["counted"])
    for name, repeats in seeds.items():
        if repeats:
            numbers[f"detectors/heads shared over seeds/{name}"] = stats.exact(repeats["jaccard"], repeats["n"])
    return numbers


DETECTORS_STAGE = Stage(
    name="detectors",
    work=detectors_stage,
    result=dict,
    upstream=(DETECT,),
    settings=(*PROMPTS, "detectors.*", "knockout.tasks", *DETECTION),
    tasks=lambda config: (config.detect.task, *config.knockout.tasks[:1]),
    check=_check,
    check_model=_check_model,
)
