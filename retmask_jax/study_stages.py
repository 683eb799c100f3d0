"""Further stages of the causal study: detectors compared, query norms, other RoPE bases, checkpoints of a training."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax import causal, stats
from retmask_jax.causal_stages import task_outcomes
from retmask_jax.checkpoint_files import read_config
from retmask_jax.context import Context, checkpoint_fingerprint
from retmask_jax.detect import stability
from retmask_jax.detector_runs import DetectorRun, repeated, reused_copy, run_detector, shape_of, spread
from retmask_jax.detectors import DETECTORS, agreement
from retmask_jax.evals.perplexity import text_loss
from retmask_jax.evals.recall import check_fits
from retmask_jax.families import from_hf
from retmask_jax.files import write_jsonl
from retmask_jax.head_scores import HeadScores
from retmask_jax.hub import config_folder
from retmask_jax.lm import load_tokenizer
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.model.rope import inverse_frequencies
from retmask_jax.norm_utility import norm_utility, query_norms
from retmask_jax.variants import Checkpoint, find_checkpoints, with_base

PUBLISHED_THRESHOLD = 0.1
_UNTOUCHED = causal.Condition("none", 0, Interventions())


# --- checks, before expensive work ---


def check_study(config) -> None:
    """Raise ValueError for settings of these stages that could only fail later."""
    section, known = config.detectors, ", ".join(DETECTORS)
    for key, names in (("detectors.names", section.names), ("detectors.seed_names", section.seed_names),
                       ("theta.detector", [config.theta.detector]),
                       ("dynamics.detector", [config.dynamics.detector])):  # fmt: skip
        for name in names:
            if name not in DETECTORS:
                raise ValueError(f"{key} has {name!r}; known detectors are {known}")
    if not section.names:
        raise ValueError(f"detectors.names is empty; known detectors are {known}")
    seeds = [config.tasks[config.detect.task].seed, *section.seeds]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"detectors.seeds {section.seeds} repeat a seed or {seeds[0]}, the task's own: name others")
    _check_factors(config.theta.factors)
    find_checkpoints(config.dynamics.checkpoints)


def check_study_model(context: Context) -> None:
    """Raise ValueError where these settings do not suit the model, or a local checkpoint cannot be measured."""
    section, config = context.config.detectors, context.outline.config
    total = config.n_layers * config.n_heads
    if section.top_k is not None and section.top_k > total:
        raise ValueError(f"detectors.top_k is {section.top_k}, the model has {total} heads: lower it")
    query, tokenizer = section.null_query, context.outline.tokenizer
    if tokenizer is not None and not tokenizer.encode(query, add_special_tokens=False):
        raise ValueError(f"detectors.null_query {query!r} has no tokens: give it words the tokenizer knows")
    for checkpoint in find_checkpoints(context.config.dynamics.checkpoints):
        if checkpoint.revision is None:
            _check_checkpoint(context, checkpoint)


def checkpoint_prints(context: Context) -> dict[str, Any]:
    """Fingerprints of the checkpoints that `dynamics` reads; of one on the hub its revision is all that is known."""
    checkpoints = find_checkpoints(context.config.dynamics.checkpoints)
    return {f"checkpoint {c.name}": checkpoint_fingerprint(c.source) if c.revision is None else c.revision for c in checkpoints}


# --- detectors ---


def detectors_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Every detector on the detection cases: how far they agree, settle and repeat, what they cost, and how much recall
    falls when the best heads of each are masked."""
    section, heads = context.config.detectors, context.heads()
    top_k = section.top_k or len(heads)
    runs = _run_detectors(context, folder)
    scores = {name: run.scores for name, run in runs.items() if run.scores is not None}
    best = {name: found.heads(top_k=top_k) for name, found in scores.items()}
    again = [name for name in section.seed_names if name in runs] if section.seeds else []
    seeds = {name: repeated(context, name, runs[name], folder, top_k) for name in again}
    rows = [_detector_row(context, name, run, best.get(name, []), heads) for name, run in runs.items()]
    masked, numbers = _masked_recall(context, best)
    return {
        "top_k": top_k, "cases": len(next(iter(runs.values())).outcomes), "rows": rows, "masked": masked,
        "agreement": [{"a": a, "b": b, "jaccard": both["jaccard"], "spearman": stats.defined(both["spearman"])}
                      for (a, b), both in agreement(scores, top_k).items()],
        "stability": {name: stability(found, top_k=top_k) for name, found in scores.items()},
        "over_seeds": {name: repeats for name, repeats in seeds.items() if repeats},
        "numbers": numbers | _detector_numbers(rows, seeds),
    }  # fmt: skip


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
    write_jsonl(folder / "cases.jsonl", [
        {"length": case.spec.length, "depth": case.spec.depth,
         "outcomes": {name: run.outcomes[i] for name, run in runs.items()}} for i, case in enumerate(chosen)
    ])  # fmt: skip
    return runs


def _detector_row(context: Context, name: str, run: DetectorRun, best, heads) -> dict[str, Any]:
    """What one detector found and cost; best: its top heads."""
    row = {
        "name": name, "outcomes": dict(Counter(run.outcomes)), "seconds": run.seconds, "timed": run.timed,
        "cases_per_second": run.timed / max(run.seconds, 0.01), "reused": run.reused, "heads": best,
    }  # fmt: skip
    if run.scores is None:
        return row | {"counted": 0, "top": None, "profile": None, "shared": None}
    return row | {
        "counted": int(run.scores.counts.max()), "top": float(run.scores.mean[best[0]]),
        "profile": shape_of(run.scores, context.lm.config.n_kv_heads), "shared": stats.jaccard(best, heads),
    }  # fmt: skip


def _masked_recall(context: Context, best: Mapping[str, list]) -> tuple[list[dict], dict[str, dict]]:
    """(rows, numbers) of recall on the first knock-out task with each detector's best heads masked."""
    conditions = [_UNTOUCHED]
    conditions += [
        causal.Condition(name, 0, mask_heads(context.lm.config, heads), tuple(heads)) for name, heads in best.items()
    ]
    outcomes, _ = task_outcomes(context, context.config.knockout.tasks[:1], conditions)
    rows = causal.summarise(conditions, outcomes)
    numbers = {
        f"detectors/{row['task']}/{row['kind']}{'' if row['kind'] == 'none' else ' masked'}": _number(row) for row in rows
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


# --- query norms ---


def utility_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Norms of the query projections of retrieval heads against others, by head and by rotary pair."""
    section, config, heads = context.config.utility, context.lm.config, context.heads()
    norms = query_norms(config, context.lm.params)
    scores = HeadScores.load(context.workdir.folder("detect") / "scores.json")
    result = {
        "heads": heads, "norms": norms.head_LH.tolist(), "max_length": config.max_length,
        "wavelengths": {kind: (2 * np.pi / inverse_frequencies(config, kind)).tolist() for kind in config.ropes},
    }  # fmt: skip
    try:
        found = norm_utility(norms, scores, heads, section.permutations, section.resamples, section.seed)
    except ValueError as error:  # a model with one retrieval head has nothing to compare; the study goes on
        return result | {"comparison": None, "undefined": str(error), "numbers": {}}
    n, test, rho = found["n"], found["permutation"], found["partial_spearman"]
    exact = {
        "utility/Cohen's d": found["cohens_d"], "utility/difference of norms": test["value"],
        "utility/difference expected from layers": test["expected"], "utility/permutation p": test["p_value"],
        "utility/rotary pairs that differ": sum(p < 0.05 for p in found["pair_adjusted_p"]),
    }  # fmt: skip
    numbers = {name: stats.exact(value, n) for name, value in exact.items() if value is not None}
    if rho["value"] is not None:
        numbers["utility/norm against score (partial rank correlation)"] = rho
    return result | {"comparison": found, "undefined": None, "numbers": numbers}


# --- RoPE base ---


def theta_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Recall and the number of retrieval heads with the RoPE base changed at inference, the weights as they are."""
    section, base = context.config.theta, context.lm.config.rope.theta
    tasks = section.tasks or context.config.knockout.tasks[:1]
    threshold = _theta_threshold(context)
    outcomes: dict[str, list] = {}
    counts = []
    for factor in section.factors:
        changed = context.of(with_base(context.lm, factor))
        for task, outcome_CN in task_outcomes(changed, tasks, [_UNTOUCHED])[0].items():
            outcomes.setdefault(task, []).append(outcome_CN[0])
        run = _scored(changed, section.detector, section.cases, folder / f"factor_{factor:g}.json")
        counts.append({"factor": factor, "theta": factor * base} | _heads_found(run, threshold))
    own = section.factors.index(1)
    for count in counts:
        count["jaccard"] = stats.jaccard(count["heads"], counts[own]["heads"])
    rows = [
        {"task": task, "factor": factor, "theta": factor * base, **stats.proportion(outcome),
         "change": stats.paired_bootstrap(outcome, of_task[own]), "mcnemar": stats.mcnemar(of_task[own], outcome)}
        for task, of_task in outcomes.items()
        for factor, outcome in zip(section.factors, of_task, strict=True)
    ]  # fmt: skip
    numbers = {f"theta/{row['task']}/factor {row['factor']:g}": _number(row) for row in rows}
    for count in counts:
        numbers[f"theta/heads/factor {count['factor']:g}"] = stats.exact(len(count["heads"]), count["counted"])
    return {
        "theta": base, "factors": list(section.factors), "detector": section.detector, "threshold": threshold,
        "rows": rows, "heads": counts, "numbers": numbers,
    }  # fmt: skip


def _theta_threshold(context: Context) -> float:
    """Heads that were chosen by their number reach the score of the last of them."""
    result = context.workdir.result("detect")
    return min(result["scores"]) if result["threshold"] is None else result["threshold"]


# --- training dynamics ---


def dynamics_stage(context: Context, folder: Path) -> dict[str, Any]:
    """The same detection on every checkpoint of a training run, in order; nothing where none is named."""
    section = context.config.dynamics
    checkpoints = find_checkpoints(section.checkpoints)
    if not checkpoints:
        return {"rows": [], "numbers": {}}
    for checkpoint in checkpoints:
        _check_checkpoint(context, checkpoint)
    context.release()  # one model at a time
    threshold = context.config.detect.threshold if section.threshold is None else section.threshold
    threshold = PUBLISHED_THRESHOLD if threshold is None else threshold
    task = section.task or next(iter(context.config.knockout.tasks), None)
    final = None
    rows = []
    for checkpoint in reversed(checkpoints):  # the last one's heads are what the others are compared with
        row = _checkpoint_row(context, checkpoint, final, threshold, task, folder / f"step_{checkpoint.step}.json")
        final = row["heads"] if final is None else final
        rows.insert(0, row)
    return {
        "detector": section.detector, "threshold": threshold, "task": task, "final": final, "rows": rows,
        "numbers": _dynamics_numbers(rows),
    }  # fmt: skip


def _checkpoint_row(context: Context, checkpoint: Checkpoint, final, threshold: float, task: str | None,
                    target: Path) -> dict[str, Any]:  # fmt: skip
    """One checkpoint, loaded here and let go; final: heads of the last one, None for the last itself.

    emergence: mean score of the final heads, 0 for one in a layer that is not there yet.
    """
    there = context.of(context.load(checkpoint.source, revision=checkpoint.revision))
    section, config = context.config.dynamics, there.lm.config
    run = _scored(there, section.detector, section.cases, target)
    found = _heads_found(run, threshold)
    final = found["heads"] if final is None else final
    mean = {} if run.scores is None else dict(np.ndenumerate(run.scores.mean))
    row = {
        "name": checkpoint.name, "step": checkpoint.step, "layers": config.n_layers, "heads_per_layer": config.n_heads,
        **found, "jaccard": stats.jaccard(found["heads"], final),
        "emergence": float(np.mean([mean.get(tuple(head), 0.0) for head in final])) if final else None,
        "gini": None if run.scores is None else shape_of(run.scores, config.n_kv_heads)["gini"],
    }  # fmt: skip
    best = [] if run.scores is None else run.scores.heads(top_k=min(len(final), config.n_layers * config.n_heads))
    row["recall"] = _with_and_without(there, task, best) if task else None
    row["text_loss"] = None
    if there.config.text.file:
        loss = text_loss(there.lm, there.windows(), batch_size=there.config.batch_size)
        row["text_loss"] = stats.bootstrap_mean(loss)
    return row


def _with_and_without(there: Context, task: str, heads) -> dict[str, Any]:
    """Recall untouched, and with the checkpoint's own best heads masked."""
    conditions = [_UNTOUCHED, causal.Condition("masked", 0, mask_heads(there.lm.config, heads), tuple(heads))]
    outcomes, _ = task_outcomes(there, [task], conditions)
    untouched, masked = outcomes[task]
    return {"none": stats.proportion(untouched), "masked": stats.proportion(masked), "n_masked": len(heads),
            "mcnemar": stats.mcnemar(untouched, masked)}  # fmt: skip


def _dynamics_numbers(rows: Sequence[Mapping]) -> dict[str, dict]:
    numbers = {}
    for row in rows:
        at = f"dynamics/step {row['step']}"
        for name, value in (("heads", len(row["heads"])), ("top score", row["top"]), ("gini", row["gini"]),
                            ("mean score of the final heads", row["emergence"]), ("heads shared", row["jaccard"])):  # fmt: skip
            if value is not None:
                numbers[f"{at}/{name}"] = stats.exact(value, row["counted"])
        if row["recall"]:
            numbers |= {f"{at}/recall": row["recall"]["none"], f"{at}/recall, masked": row["recall"]["masked"]}
        if row["text_loss"]:
            numbers[f"{at}/text loss"] = row["text_loss"]
    return numbers


def _check_checkpoint(context: Context, checkpoint: Checkpoint) -> None:
    """ValueError where a checkpoint cannot be measured; of one on the hub all but the weights is fetched."""
    folder = config_folder(checkpoint.source, revision=checkpoint.revision)
    config: ModelConfig = from_hf(read_config(folder))
    if load_tokenizer(folder) is None:
        raise ValueError(f"checkpoint {checkpoint.name} has no tokenizer: copy the model's tokenizer files into it")
    section = context.config.dynamics
    for name in {context.config.detect.task, section.task or next(iter(context.config.knockout.tasks), None)} - {None}:
        check_fits(name, context.config.tasks[name], config.max_length, f"the context of checkpoint {checkpoint.name}")


# --- shared ---


def _scored(context: Context, detector: str, n: int | None, target: Path) -> DetectorRun:
    """A detector on so many of the detection task's cases."""
    cases = context.cases(context.config.detect.task)
    return run_detector(context, detector, [cases[i] for i in spread(len(cases), n)], target)


def _heads_found(run: DetectorRun, threshold: float) -> dict[str, Any]:
    """Heads at the threshold, the best score, and how many cases counted."""
    counts = {"cases": len(run.outcomes), "outcomes": dict(Counter(run.outcomes))}
    if run.scores is None:
        return counts | {"heads": [], "top": None, "counted": 0}
    heads = run.scores.heads(threshold=threshold)
    return counts | {"heads": heads, "top": float(run.scores.mean.max()), "counted": int(run.scores.counts.max())}


def _check_factors(factors: Sequence[float]) -> None:
    if 1 not in factors:
        raise ValueError(f"theta.factors {tuple(factors)} lack 1, the model as it is, which the others are compared with")
    if len(set(factors)) < len(factors) or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"theta.factors {tuple(factors)} must be positive and each one there once")


def _number(row: Mapping) -> dict[str, Any]:
    return {name: row[name] for name in ("value", "low", "high", "n")}
