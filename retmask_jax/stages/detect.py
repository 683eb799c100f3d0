"""The stage `detect`: head scores, the head set, its stability, and why cases did not count."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.heads.copy_score import detect
from retmask_jax.heads.detection import stability
from retmask_jax.heads.profile import profile
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.interventions import mask_heads
from retmask_jax.runs.context import Context
from retmask_jax.utils import stats
from retmask_jax.utils.files import digest, write_jsonl


def detect_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Head scores, the head set, its stability, and why cases did not count."""
    lm, section = context.lm, context.config.detect
    if section.scores is not None:
        return _detected(context, folder, given_scores(context), [])
    cases = context.cases(section.task)
    found = detect(
        lm,
        cases,
        max_new_tokens=section.max_new_tokens,
        batch_size=context.config.batch_size,
        released=section.released,
    )
    rows = [
        {"length": c.spec.length, "depth": c.spec.depth, "expected": c.needle.answer, "answer": a, "outcome": o}
        for c, a, o in zip(cases, found.answers, found.outcomes, strict=True)
    ]
    write_jsonl(folder / "cases.jsonl", rows)
    return _detected(context, folder, found.scores, found.outcomes)


def _detected(context: Context, folder: Path, scores: HeadScores, outcomes: list[str]) -> dict[str, Any]:
    """The result of detection from scores, found (with an outcome per case) or given."""
    lm, section = context.lm, context.config.detect
    selection = {"top_k": section.top_k} if section.threshold is None else {"threshold": section.threshold}
    heads = scores.heads(**selection)
    if not heads:
        raise ValueError(
            f"no head reaches detect.threshold {section.threshold}: the best score is {scores.mean.max():.3f}"
        )
    scores.save(folder / "scores.json")
    shape = profile(scores, lm.config.n_kv_heads, section.threshold or float(scores.mean[heads[-1]]))
    cases = int(scores.counts.max())
    numbers = {"detect/cases counted": stats.wilson(cases, len(outcomes))} if outcomes else {}
    return {
        "heads": heads,
        "scores": [float(scores.mean[head]) for head in heads],
        "mean": scores.mean.tolist(),
        "threshold": section.threshold,
        "outcomes": dict(Counter(outcomes)),
        "n_kv_heads": lm.config.n_kv_heads,
        "profile": {name: stats.defined(value) for name, value in shape.items()},
        "stability": stability(scores, **selection),
        "mask_hash": _mask_hash(lm, heads),
        "numbers": numbers
        | {
            "detect/heads": stats.exact(len(heads), cases),
            "detect/top score": stats.bootstrap_mean(scores.per_case[heads[0]]),
            "detect/gini": stats.exact(shape["gini"], cases),
        },
    }


def given_scores(context: Context) -> HeadScores:
    scores, config = HeadScores.load(context.config.detect.scores), context.outline.config
    if scores.mean.shape != (config.n_layers, config.n_heads):
        raise ValueError(
            f"{context.config.detect.scores} scores {scores.mean.shape[0]} layers of {scores.mean.shape[1]} heads, "
            f"the model has {config.n_layers} of {config.n_heads}"
        )
    return scores


def _mask_hash(lm, heads) -> str:
    return digest(np.asarray(mask_heads(lm.config, heads).head_mask).tobytes())
