"""The stage `dynamics`: detection over the checkpoints of a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.tasks import check_fits
from retmask_jax.evals.perplexity import text_loss
from retmask_jax.heads import conditions as causal
from retmask_jax.heads.variants import Checkpoint, find_checkpoints
from retmask_jax.hf.checkpoint_files import read_config
from retmask_jax.hf.families import from_hf
from retmask_jax.hf.hub import config_folder
from retmask_jax.hf.tokenizer import load_tokenizer
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import mask_heads
from retmask_jax.runs.context import Context, checkpoint_fingerprint
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.stages.detect import DETECTION
from retmask_jax.stages.detector_runs import UNTOUCHED, check_detector_names, heads_found, scored, shape_of
from retmask_jax.stages.outcomes import task_outcomes
from retmask_jax.utils import stats

PUBLISHED_THRESHOLD = 0.1


def _check(config) -> None:
    """Raise ValueError for settings of this stage that could only fail later."""
    check_detector_names("dynamics.detector", [config.dynamics.detector])
    find_checkpoints(config.dynamics.checkpoints)


def _check_model(context: Context) -> None:
    """Raise ValueError where a local checkpoint cannot be measured."""
    for checkpoint in find_checkpoints(context.config.dynamics.checkpoints):
        if checkpoint.revision is None:
            _check_checkpoint(context, checkpoint)


def checkpoint_prints(context: Context) -> dict[str, Any]:
    """Fingerprints of the checkpoints that `dynamics` reads; of one on the hub its revision is all that is known."""
    checkpoints = find_checkpoints(context.config.dynamics.checkpoints)
    return {
        f"checkpoint {c.name}": checkpoint_fingerprint(c.source) if c.revision is None else c.revision
        for c in checkpoints
    }


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
        "detector": section.detector,
        "threshold": threshold,
        "task": task,
        "final": final,
        "rows": rows,
        "numbers": _dynamics_numbers(rows),
    }


def _checkpoint_row(
    context: Context, checkpoint: Checkpoint, final, threshold: float, task: str | None, target: Path
) -> dict[str, Any]:
    """One checkpoint, loaded here and let go; final: heads of the last one, None for the last itself.

    emergence: mean score of the final heads, 0 for one in a layer that is not there yet.
    """
    there = context.of(context.load(checkpoint.source, revision=checkpoint.revision))
    section, config = context.config.dynamics, there.lm.config
    run = scored(there, section.detector, section.cases, target)
    found = heads_found(run, threshold)
    final = found["heads"] if final is None else final
    mean = {} if run.scores is None else dict(np.ndenumerate(run.scores.mean))
    row = {
        "name": checkpoint.name,
        "step": checkpoint.step,
        "layers": config.n_layers,
        "heads_per_layer": config.n_heads,
        **found,
        "jaccard": stats.jaccard(found["heads"], final),
        "emergence": float(np.mean([mean.get(tuple(head), 0.0) for head in final])) if final else None,
        "gini": None if run.scores is None else shape_of(run.scores, config.n_kv_heads)["gini"],
    }
    best = [] if run.scores is None else run.scores.heads(top_k=min(len(final), config.n_layers * config.n_heads))
    row["recall"] = _with_and_without(there, task, best) if task else None
    row["text_loss"] = None
    if there.config.text.file:
        loss = text_loss(there.lm, there.windows(), batch_size=there.config.batch_size)
        row["text_loss"] = stats.bootstrap_mean(loss)
    return row


def _with_and_without(there: Context, task: str, heads) -> dict[str, Any]:
    """Recall untouched, and with the checkpoint's own best heads masked."""
    conditions = [UNTOUCHED, causal.Condition("masked", 0, mask_heads(there.lm.config, heads), tuple(heads))]
    outcomes, _ = task_outcomes(there, [task], conditions)
    untouched, masked = outcomes[task]
    return {
        "none": stats.proportion(untouched),
        "masked": stats.proportion(masked),
        "n_masked": len(heads),
        "mcnemar": stats.mcnemar(untouched, masked),
    }


def _dynamics_numbers(rows: Sequence[Mapping]) -> dict[str, dict]:
    numbers = {}
    for row in rows:
        at = f"dynamics/step {row['step']}"
        for name, value in (
            ("heads", len(row["heads"])),
            ("top score", row["top"]),
            ("gini", row["gini"]),
            ("mean score of the final heads", row["emergence"]),
            ("heads shared", row["jaccard"]),
        ):
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


def _tasks(config) -> tuple[str, ...]:
    return (config.detect.task, *([config.dynamics.task] if config.dynamics.task else config.knockout.tasks[:1]))


DYNAMICS = Stage(
    name="dynamics",
    work=dynamics_stage,
    result=dict,
    settings=(*PROMPTS, "dynamics.*", "knockout.tasks", *DETECTION, "detect.threshold", "text.*"),
    tasks=_tasks,
    inputs=checkpoint_prints,
    check=_check,
    check_model=_check_model,
)
