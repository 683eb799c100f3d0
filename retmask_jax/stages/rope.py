"""The stage `rope`: recall with rotary pairs taken out of the retrieval heads."""

from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.evals.perplexity import text_loss
from retmask_jax.heads import conditions as causal
from retmask_jax.heads import rotary
from retmask_jax.heads.conditions import Condition, mean_over_draws
from retmask_jax.heads.head_outputs import HeadStatistics, head_statistics
from retmask_jax.heads.query_norms import query_norms
from retmask_jax.model.interventions import SITES, Interventions
from retmask_jax.model.rope import inverse_frequencies
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.stages.detect import DETECT, retrieval_heads
from retmask_jax.stages.outcomes import check_choices, task_outcomes
from retmask_jax.utils import stats


def _check(config) -> None:
    """Raise ValueError for settings of rope that could only fail later."""
    check_choices("rope.sites", config.rope.sites, SITES)
    for name in ("matched", "text"):
        if config.rope[name] and not config.text.file:
            raise ValueError(f"rope.{name} is measured on plain text: set text.file")


def _check_model(context: Context) -> None:
    """Raise ValueError where the settings of rope ask for more than the model has."""
    config, section = context.outline.config, context.config.rope
    for name, wanted in (
        ("windows", section.windows),
        ("pairs", max(section.pairs, default=0)),
        ("patch_pairs", section.patch_pairs or 0),
    ):
        if not 0 <= wanted <= config.n_pairs:
            raise ValueError(f"rope.{name} has {wanted}, the model has {config.n_pairs} rotary pairs: lower it")


def rope_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Recall with rotary pairs taken out of the retrieval heads: how many, which part of the spectrum, of which heads, at
    which site; beside each condition the share of the variance of q.k that goes with the pairs."""
    lm, section, heads = context.lm, context.config.rope, retrieval_heads(context)
    ks = section.pairs or tuple(
        k for k in (lm.config.n_pairs // 8, lm.config.n_pairs // 4, lm.config.n_pairs // 2) if k
    )
    text = context.config.text.file
    statistics = head_statistics(lm, context.windows()[: context.config.knockout.activity_windows]) if text else None
    conditions = [Condition("none", 0, Interventions()), *_rope_conditions(context, heads, ks, statistics)]
    outcomes, _ = task_outcomes(context, section.tasks, conditions)
    variances = [statistics and rotary.condition_variance(condition, statistics) for condition in conditions]
    rows = causal.summarise(conditions, outcomes)
    contrasts = _low_against_high(conditions, outcomes, ks)
    numbers = _dose_numbers(conditions, outcomes, ks) | _quarter_numbers(lm.config, contrasts)
    for task, outcome_CN in outcomes.items():
        numbers |= _window_numbers(task, conditions, outcome_CN)
    costs = _costs(context, conditions, outcomes, ks) if section.text else []
    numbers |= {
        f"rope/{row['task']}/{row['kind']} {row['k']} pairs, perplexity increase over recall drop": row["ratio"]
        for row in costs
        if row["ratio"] is not None
    }
    return {
        "rows": [row | {"variance": variance} for row, variance in zip(rows, variances * len(outcomes), strict=True)],
        "contrasts": contrasts,
        "pairs": list(ks),
        "n_pairs": lm.config.n_pairs,
        "patch_pairs": _patch_pairs(context),
        "costs": costs,
        "wavelengths": (2 * np.pi / inverse_frequencies(lm.config)).tolist(),
        "context": lm.config.max_length,
        "numbers": numbers,
    }


def _rope_conditions(context: Context, heads, ks, statistics: HeadStatistics | None):
    config, section = context.lm.config, context.config.rope
    norms = query_norms(config, context.lm.params) if section.utility else None
    for site in section.sites:
        yield from rotary.dose_conditions(
            config, heads, ks, draws=section.draws, seed=section.seed, site=site, norms=norms
        )
    if section.windows:
        yield from rotary.window_conditions(config, heads, section.windows, seed=section.seed)
    yield from rotary.coverage_conditions(config, heads, section.coverage, _patch_pairs(context))
    if section.patches:
        yield from rotary.patch_conditions(config, heads, _patch_pairs(context))
    if section.matched:
        yield from rotary.matched_conditions(config, heads, ks, statistics, draws=section.matched, seed=section.seed)


def _patch_pairs(context: Context) -> int:
    """Pairs that are taken out where their number is not what varies."""
    return context.config.rope.patch_pairs or max(1, context.lm.config.n_pairs // 8)


def _dose_numbers(conditions, outcomes, ks) -> dict[str, Any]:
    numbers = {}
    for task, outcome_CN in outcomes.items():
        numbers[f"rope/{task}/none"] = mean_over_draws(conditions, outcome_CN, "none")
        found = dict.fromkeys((c.experiment, c.kind, c.site) for c in conditions if c.experiment in ("dose", "matched"))
        for experiment, kind, site in found:
            for k in ks:
                if any(c.kind == kind and c.site == site and c.n_pairs == k for c in conditions):
                    where = "" if site == "rotary" else f", {site} site"
                    numbers[f"rope/{task}/{kind} {k} pairs{where}"] = mean_over_draws(
                        conditions, outcome_CN, kind, k, experiment=experiment, site=site
                    )
    return numbers


def _quarter_numbers(config, contrasts) -> dict[str, Any]:
    wanted = config.n_pairs // 4, "highest", "rotary"
    return {
        f"rope/{row['task']}/highest minus lowest quarter": row["change"]
        for row in contrasts
        if (row["k"], row["kind"], row["site"]) == wanted
    }


def _low_against_high(conditions, outcomes, ks) -> list[dict[str, Any]]:
    """What taking the highest, or random, pairs out leaves more than taking the lowest out does, at each site."""
    rows = []
    for task, outcome_CN in outcomes.items():
        for site in dict.fromkeys(c.site for c in conditions if c.experiment == "dose"):
            for k, kind in ((k, kind) for k in ks for kind in ("highest", "random")):
                dose = {"experiment": "dose", "site": site, "n_pairs": k}
                if any(c.kind == kind for c in conditions):
                    found = causal.contrast(conditions, outcome_CN, dose | {"kind": "lowest"}, dose | {"kind": kind})
                    rows.append({"task": task, "site": site, "k": k, "kind": kind, **found})
    return rows


def _window_numbers(task: str, conditions, outcome_CN) -> dict[str, Any]:
    """Recall without each window, and where in the spectrum the harm lies."""
    numbers = {}
    chosen = [i for i, c in enumerate(conditions) if c.experiment == "windows" and c.kind == "window"]
    for i in chosen:
        numbers[f"rope/{task}/window {conditions[i].draw + 1} of {len(chosen)}"] = stats.proportion(outcome_CN[i])
    if chosen:
        drops_VN = outcome_CN[:1].astype(float) - outcome_CN[chosen]
        for place, name in enumerate(("centre of mass", "width")):
            found = stats.bootstrap_of_means(drops_VN, lambda means: rotary.spectrum_centre(means)[place])  # noqa: B023
            if found["value"] is not None:
                numbers[f"rope/{task}/{name} of the windows"] = found
    return numbers


def _costs(context: Context, conditions, outcomes, ks) -> list[dict[str, Any]]:
    """What the lowest and the highest pairs cost plain text, against what they cost recall."""
    windows, size = context.windows(), context.config.batch_size
    untouched = text_loss(context.lm, windows, batch_size=size)
    rows = []
    for kind, k in ((kind, k) for k in ks for kind in ("lowest", "highest")):
        i = next(i for i, c in enumerate(conditions) if _is_dose(c, kind, k))
        change = text_loss(context.lm, windows, conditions[i].interventions, batch_size=size) - untouched
        for task, outcome_CN in outcomes.items():
            found = rotary.cost_intervals(change, outcome_CN[0], outcome_CN[i])
            rows.append({"task": task, "kind": kind, "k": k, **found})
    return rows


def _is_dose(condition: Condition, kind: str, k: int) -> bool:
    return (condition.experiment, condition.kind, condition.site, condition.n_pairs) == ("dose", kind, "rotary", k)


ROPE = Stage(
    name="rope",
    work=rope_stage,
    result=dict,
    upstream=(DETECT,),
    settings=(*PROMPTS, "rope.*", "text.*", "knockout.activity_windows"),
    tasks=lambda config: config.rope.tasks,
    check=_check,
    check_model=_check_model,
)
