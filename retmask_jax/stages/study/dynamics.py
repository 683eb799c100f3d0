"""The stage `dynamics`: detection over the checkpoints of a training run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.tasks import check_fits
from retmask_jax.heads.conditions import UNTOUCHED, Condition
from retmask_jax.hf.checkpoint_files import read_config
from retmask_jax.hf.families import from_hf, ignorable
from retmask_jax.hf.hub import config_folder
from retmask_jax.hf.tokenizer import load_tokenizer
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head, mask_heads
from retmask_jax.runs.context import Context, checkpoint_fingerprint
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.detect import DETECTION
from retmask_jax.stages.outcomes import task_outcomes, text_losses
from retmask_jax.stages.study.detector_runs import (
    DetectorRun,
    Found,
    check_detector_names,
    concentration,
    heads_found,
    scored,
)
from retmask_jax.stages.study.variants import Checkpoint, find_checkpoints
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import McNemar, Number

PUBLISHED_THRESHOLD = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointRecall:
    """Recall of a checkpoint, untouched (none) and with its n_masked best heads masked; mcnemar: test of the two."""

    none: Number
    masked: Number
    n_masked: int
    mcnemar: McNemar


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointRow(Found):
    """What is found at one checkpoint.

    Attributes:
        jaccard: Of its heads with those of the last checkpoint.
        emergence: Mean score of the last checkpoint's heads, with 0 for those in layers that this one lacks; None where
            the last one has no heads.
        gini: None where it is undefined.
        recall: None where the config names no task.
        text_loss: Nats per token; None where the config names no text.
    """

    name: str
    step: int
    layers: int
    heads_per_layer: int
    jaccard: float
    emergence: float | None
    gini: float | None
    recall: CheckpointRecall | None
    text_loss: Number | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicsResult(Result):
    """Detection over the checkpoints of a training run; no rows, and nothing else, where the config names none.

    Attributes:
        rows: In the order of training.
        detector: Which finds the heads, those with a score of at least `threshold`.
        task: On which recall is measured.
        final: The heads of the last checkpoint.
    """

    rows: list[CheckpointRow]
    detector: str | None = None
    threshold: float | None = None
    task: str | None = None
    final: list[Head] = dataclasses.field(default_factory=list)


def dynamics_stage(context: Context, folder: Path) -> DynamicsResult:
    """Runs the same detection on every checkpoint of a training run."""
    section = context.config.dynamics
    checkpoints = find_checkpoints(section.checkpoints)
    if not checkpoints:
        return DynamicsResult(rows=[], numbers={})
    for checkpoint in checkpoints:
        _check_checkpoint(context, checkpoint)
    context.release()  # one model at a time
    threshold = context.config.detect.threshold if section.threshold is None else section.threshold
    threshold = PUBLISHED_THRESHOLD if threshold is None else threshold
    final, rows = None, []
    for checkpoint in reversed(checkpoints):  # the others are compared with the last one's heads
        row = _checkpoint_row(context, checkpoint, final, threshold, folder / f"step_{checkpoint.step}.json")
        final = row.heads if final is None else final
        rows.insert(0, row)
    return DynamicsResult(
        rows=rows,
        detector=section.detector,
        threshold=threshold,
        task=_recall_task(context.config),
        final=final or [],
        numbers=_numbers(rows),
    )


def checkpoint_prints(context: Context) -> dict[str, Any]:
    """Returns the fingerprints of the checkpoints; those on the hub are known by their revisions."""
    checkpoints, ignore = find_checkpoints(context.config.dynamics.checkpoints), context.config.ignore
    return {
        f"checkpoint {c.name}": checkpoint_fingerprint(c.source, ignore) if c.revision is None else c.revision
        for c in checkpoints
    }


def _check(config) -> None:
    check_detector_names("dynamics.detector", [config.dynamics.detector])
    find_checkpoints(config.dynamics.checkpoints)


def _check_model(context: Context) -> None:
    """Raises ValueError where a local checkpoint cannot be measured; those on the hub are checked when the stage runs."""
    for checkpoint in find_checkpoints(context.config.dynamics.checkpoints):
        if checkpoint.revision is None:
            _check_checkpoint(context, checkpoint)


def _checkpoint_row(
    context: Context, checkpoint: Checkpoint, final: list[Head] | None, threshold: float, target: Path
) -> CheckpointRow:
    """Loads a checkpoint and measures it. final: heads of the last checkpoint; None for that one."""
    there = context.of(context.load(checkpoint.source, revision=checkpoint.revision))
    section, config = context.config.dynamics, there.lm.config
    run = scored(there, section.detector, section.cases, target)
    found = heads_found(run, threshold)
    final = found.heads if final is None else final
    n_masked = min(len(final), config.n_layers * config.n_heads)
    best = [] if run.scores is None else run.scores.heads(top_k=n_masked)
    return CheckpointRow(
        name=checkpoint.name,
        step=checkpoint.step,
        layers=config.n_layers,
        heads_per_layer=config.n_heads,
        jaccard=stats.jaccard(found.heads, final),
        emergence=_mean_score(run, final),
        gini=None if run.scores is None else concentration(run.scores, config.n_kv_heads).gini,
        recall=_recall(there, best),
        text_loss=_text_loss(there),
        **vars(found),
    )


def _mean_score(run: DetectorRun, heads: Sequence[Head]) -> float | None:
    """Averages the scores of heads, with 0 for those that the checkpoint has not scored."""
    scores = {} if run.scores is None else dict(np.ndenumerate(run.scores.mean))
    return float(np.mean([scores.get(head, 0.0) for head in heads])) if heads else None


def _recall(there: Context, best: Sequence[Head]) -> CheckpointRecall | None:
    """Measures a checkpoint's recall, untouched and with its best heads masked."""
    task = _recall_task(there.config)
    if task is None:
        return None
    conditions = [UNTOUCHED, Condition("masked", 0, mask_heads(there.lm.config, best), tuple(best))]
    outcomes = task_outcomes(there, [task], conditions).outcomes
    untouched, masked = outcomes[task]
    return CheckpointRecall(
        none=stats.proportion(untouched),
        masked=stats.proportion(masked),
        n_masked=len(best),
        mcnemar=stats.mcnemar(untouched, masked),
    )


def _text_loss(there: Context) -> Number | None:
    if not there.config.text.file:
        return None
    return stats.bootstrap_mean(text_losses(there, there.windows(), [UNTOUCHED])[0])


def _numbers(rows: Sequence[CheckpointRow]) -> dict[str, Number]:
    numbers = {}
    for row in rows:
        at = f"dynamics/step {row.step}"
        counted = {
            "heads": len(row.heads),
            "top score": row.top,
            "gini": row.gini,
            "mean score of the final heads": row.emergence,
            "heads shared": row.jaccard,
        }
        numbers |= {f"{at}/{name}": stats.exact(v, row.counted) for name, v in counted.items() if v is not None}
        if row.recall is not None:
            numbers |= {f"{at}/recall": row.recall.none, f"{at}/recall, masked": row.recall.masked}
        if row.text_loss is not None:
            numbers[f"{at}/text loss"] = row.text_loss
    return numbers


def _recall_task(config) -> str | None:
    return config.dynamics.task or next(iter(config.knockout.tasks), None)


def _check_checkpoint(context: Context, checkpoint: Checkpoint) -> None:
    """Raises ValueError where a checkpoint cannot be measured. From the hub this fetches all files but the weights."""
    ignore = context.config.ignore
    folder = config_folder(checkpoint.source, revision=checkpoint.revision, ignore=ignore)
    hf_config = read_config(folder)
    config: ModelConfig = from_hf(hf_config, ignorable(hf_config, ignore))
    if load_tokenizer(folder) is None:
        raise ValueError(f"checkpoint {checkpoint.name} has no tokenizer: copy the model's tokenizer files into it")
    for name in filter(None, {context.config.detect.task, _recall_task(context.config)}):
        check_fits(name, context.config.tasks[name], config.max_length, f"the context of checkpoint {checkpoint.name}")


def _tasks(config) -> tuple[str, ...]:
    return (config.detect.task, *([config.dynamics.task] if config.dynamics.task else config.knockout.tasks[:1]))


DYNAMICS = Stage(
    name="dynamics",
    work=dynamics_stage,
    result=DynamicsResult,
    settings=(*PROMPTS, "dynamics.*", "knockout.tasks", *DETECTION, "detect.threshold", "text.*"),
    tasks=_tasks,
    inputs=checkpoint_prints,
    check=_check,
    check_model=_check_model,
)
