"""The causal stages of the pipeline: the model's answers with heads or rotary pairs taken out."""

from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax import causal, stats
from retmask_jax.context import Context
from retmask_jax.evals.perplexity import text_loss
from retmask_jax.model.rope import inverse_frequencies


def knockout_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Every task, and the loss on plain text, with the retrieval heads or random others masked."""
    lm, section, heads = context.lm, context.config.knockout, context.heads()
    windows = context.windows()
    activity_LH = causal.activity(lm, windows[: section.activity_windows].tolist(), batch_size=section.activity_windows)
    conditions = causal.knockout_conditions(lm.config, heads, activity_LH, draws=section.draws, seed=section.seed)
    outcomes, _ = task_outcomes(context, section.tasks, conditions)
    losses = np.stack([
        text_loss(lm, windows, c.interventions, batch_size=context.config.batch_size) for c in conditions
    ])  # fmt: skip
    numbers = {
        f"knockout/{task}/{kind}": causal.mean_over_draws(conditions, outcome_CN, kind)
        for task, outcome_CN in outcomes.items()
        for kind in _kinds(conditions)
    }
    for kind in _kinds(conditions):
        chosen = [i for i, c in enumerate(conditions) if c.kind == kind]
        numbers[f"knockout/text loss/{kind}"] = stats.bootstrap_mean(losses[chosen].mean(axis=0))
    idle = int((activity_LH < causal.IDLE * activity_LH.max()).sum())
    numbers["knockout/idle heads"] = stats.exact(idle, activity_LH.size)
    return {
        "rows": causal.summarise(conditions, outcomes), "activity": activity_LH.tolist(), "idle": idle,
        "idle_below": causal.IDLE, "numbers": numbers,
        "text_loss": [{"kind": c.kind, "draw": c.draw, **stats.bootstrap_mean(loss)}
                      for c, loss in zip(conditions, losses, strict=True)],
    }  # fmt: skip


def rope_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Recall against the number of rotary pairs taken out of the retrieval heads, lowest, highest or random first."""
    lm, section = context.lm, context.config.rope
    ks = section.pairs or tuple(
        k for k in (lm.config.n_pairs // 8, lm.config.n_pairs // 4, lm.config.n_pairs // 2) if k
    )
    conditions = causal.rope_conditions(lm.config, context.heads(), ks, draws=section.draws, seed=section.seed)
    outcomes, _ = task_outcomes(context, section.tasks, conditions)
    numbers = {
        f"rope/{task}/{kind} {k} pairs": causal.mean_over_draws(conditions, outcome_CN, kind, k)
        for task, outcome_CN in outcomes.items()
        for kind in _kinds(conditions) if kind != "none"
        for k in ks
    }  # fmt: skip
    quarter = lm.config.n_pairs // 4
    for task, outcome_CN in outcomes.items():
        numbers[f"rope/{task}/none"] = causal.mean_over_draws(conditions, outcome_CN, "none")
        if quarter in ks:
            low, high = (_only(conditions, outcome_CN, kind, quarter) for kind in ("lowest", "highest"))
            numbers[f"rope/{task}/highest minus lowest quarter"] = stats.paired_bootstrap(high, low)
    return {
        "rows": causal.summarise(conditions, outcomes), "pairs": list(ks), "n_pairs": lm.config.n_pairs,
        "wavelengths": (2 * np.pi / inverse_frequencies(lm.config)).tolist(), "numbers": numbers,
    }  # fmt: skip


def task_outcomes(context: Context, tasks, conditions):
    """({task: bool[conditions, cases]}, {task: cases}); tasks with a known memory also count answers from it."""
    outcomes, all_cases = {}, {}
    for task in tasks:
        cases = all_cases[task] = context.cases(task)
        texts = causal.answers(
            context.lm, cases, [c.interventions for c in conditions],
            max_new_tokens=context.config.tasks[task].max_new_tokens, batch_size=context.config.batch_size, what=task,
        )  # fmt: skip
        outcomes[task] = np.stack([causal.hits(text, cases) for text in texts])
        if all(case.needle.memory for case in cases):
            outcomes[f"{task}: from memory"] = np.stack([causal.hits(text, cases, "memory") for text in texts])
    return outcomes, all_cases


def _kinds(conditions) -> list[str]:
    return list(dict.fromkeys(condition.kind for condition in conditions))


def _only(conditions, outcome_CN, kind, k):
    return outcome_CN[next(i for i, c in enumerate(conditions) if c.kind == kind and len(c.pairs) == k)]
