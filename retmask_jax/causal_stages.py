"""The causal stages of the pipeline: the model's answers with heads or rotary pairs taken out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax import causal, knockout, rotary, stats
from retmask_jax.causal import Condition, mean_over_draws
from retmask_jax.context import Context
from retmask_jax.evals.perplexity import text_loss
from retmask_jax.head_scores import HeadScores
from retmask_jax.head_statistics import HeadStatistics, head_statistics
from retmask_jax.model.interventions import SITES, Interventions
from retmask_jax.model.rope import inverse_frequencies
from retmask_jax.norm_utility import query_norms
from retmask_jax.wording import mask_name


def check_experiments(config) -> None:
    """Raise ValueError for settings of knock-out and rope that could only fail later."""
    choices = ("knockout.modes", config.knockout.modes, knockout.MODES), ("rope.sites", config.rope.sites, SITES)
    for name, chosen, known in choices:
        if not chosen or chosen[0] != known[0] or not set(chosen) <= set(known):
            raise ValueError(f"{name} is {tuple(chosen)}; it must begin with {known[0]}, and may have {', '.join(known[1:])}")
    for name in ("matched", "text"):
        if config.rope[name] and not config.text.file:
            raise ValueError(f"rope.{name} is measured on plain text: set text.file")


def check_experiments_model(context: Context) -> None:
    """Raise ValueError where these settings ask for more than the model has."""
    config, section = context.outline.config, context.config
    total = config.n_layers * config.n_heads
    numbers = [size for size in section.knockout.curve if not isinstance(size, float)]
    knockout.head_numbers(numbers, n_retrieval=0, n_all=total)
    for name, wanted in (("windows", section.rope.windows), ("pairs", max(section.rope.pairs, default=0)),
                         ("patch_pairs", section.rope.patch_pairs or 0)):  # fmt: skip
        if not 0 <= wanted <= config.n_pairs:
            raise ValueError(f"rope.{name} has {wanted}, the model has {config.n_pairs} rotary pairs: lower it")
    for mode in section.knockout.modes:
        knockout.take_out(config, [], mode)


def knockout_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Every task, and the loss on plain text, with the retrieval heads or others taken out; where the config asks for
    them, other ways to take a head out, curves over the number of heads, and the smallest set that matters."""
    lm, section, heads = context.lm, context.config.knockout, context.heads()
    scores = HeadScores.load(context.workdir.folder("detect") / "scores.json")
    windows = context.windows()
    activity_LH = knockout.activity(lm, windows[: section.activity_windows].tolist(),
                                     batch_size=context.config.batch_size)  # fmt: skip
    conditions = _knockout_conditions(context, heads, scores, activity_LH, windows)
    outcomes, _ = task_outcomes(context, section.tasks, conditions)
    told = [c for c in conditions if c.experiment == "zero" or c.kind == "retrieval"]
    losses = [text_loss(lm, windows, c.interventions, batch_size=context.config.batch_size) for c in told]
    numbers = {
        f"knockout/{task}/{_named(c)}": mean_over_draws(conditions, outcome_CN, c.kind, experiment=c.experiment)
        for task, outcome_CN in outcomes.items()
        for c in _first_draws(conditions)
    } | _loss_numbers(told, losses)
    idle = int((activity_LH < knockout.IDLE * activity_LH.max()).sum())
    numbers["knockout/idle heads"] = stats.exact(idle, activity_LH.size)
    curve = _curve(context, scores, heads)
    minimal = None if section.minimal is None else _minimal(context, heads)
    return {
        "rows": causal.summarise(conditions, outcomes), "activity": activity_LH.tolist(), "idle": idle,
        "idle_below": knockout.IDLE, "curve": curve, "minimal": minimal,
        "contrasts": _against_controls(conditions, outcomes),
        "numbers": numbers | _minimal_numbers(minimal),
        "text_loss": [{"kind": c.kind, "draw": c.draw, "experiment": c.experiment, **stats.bootstrap_mean(loss)}
                      for c, loss in zip(told, losses, strict=True)],
    }  # fmt: skip


def rope_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Recall with rotary pairs taken out of the retrieval heads: how many, which part of the spectrum, of which heads, at
    which site; beside each condition the share of the variance of q.k that goes with the pairs."""
    lm, section, heads = context.lm, context.config.rope, context.heads()
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
    numbers |= {f"rope/{row['task']}/{row['kind']} {row['k']} pairs, perplexity increase over recall drop": row["ratio"]
                for row in costs if row["ratio"] is not None}  # fmt: skip
    return {
        "rows": [row | {"variance": variance} for row, variance in zip(rows, variances * len(outcomes), strict=True)],
        "contrasts": contrasts,
        "pairs": list(ks), "n_pairs": lm.config.n_pairs, "patch_pairs": _patch_pairs(context), "costs": costs,
        "wavelengths": (2 * np.pi / inverse_frequencies(lm.config)).tolist(), "context": lm.config.max_length,
        "numbers": numbers,
    }  # fmt: skip


def task_outcomes(context: Context, tasks: Sequence[str], conditions: Sequence[Condition]):
    """({task: bool[conditions, cases]}, {task: cases}); tasks with a known memory also count answers from it."""
    outcomes, all_cases = {}, {}
    for task in tasks:
        cases = all_cases[task] = context.cases(task)
        texts = _answers(context, task, cases, conditions)
        outcomes[task] = np.stack([causal.hits(text, cases) for text in texts])
        if all(case.needle.memory for case in cases):
            outcomes[f"{task}: from memory"] = np.stack([causal.hits(text, cases, "memory") for text in texts])
    return outcomes, all_cases


def _answers(context: Context, task: str, cases, conditions: Sequence[Condition]) -> list[list[str]]:
    return causal.answers(
        context.lm, cases, [c.interventions for c in conditions],
        max_new_tokens=context.config.tasks[task].max_new_tokens, batch_size=context.config.batch_size, what=task,
    )  # fmt: skip


# --- heads ---


def _knockout_conditions(context: Context, heads, scores: HeadScores, activity_LH, windows) -> list[Condition]:
    """Those of every mode, the untouched model once."""
    section, conditions = context.config.knockout, []
    mean_LHD = head_statistics(context.lm, windows).mean_LHD if "mean" in section.modes else None
    for mode in section.modes:
        draws = section.draws if mode == "zero" else section.mode_draws
        found = knockout.knockout_conditions(context.lm.config, heads, activity_LH, draws=draws, seed=section.seed,
                                             scores_LH=scores.mean, mode=mode, mean_LHD=mean_LHD)  # fmt: skip
        conditions += found if not conditions else found[1:]
    return conditions


def _against_controls(conditions, outcomes) -> list[dict[str, Any]]:
    """What masking other heads leaves more than masking the retrieval heads does."""
    rows = []
    for task, outcome_CN in outcomes.items():
        for control in _first_draws(conditions):
            if control.kind != "retrieval":
                mode = control.experiment
                ours = {"kind": "retrieval", "experiment": mode}
                others = {"kind": control.kind, "experiment": mode}
                rows.append({"task": task, "kind": control.kind, "experiment": mode,
                             **causal.contrast(conditions, outcome_CN, ours, others)})  # fmt: skip
    return rows


def _curve(context: Context, scores: HeadScores, heads) -> list[dict]:
    """Rows of the first task with more and more heads masked."""
    section = context.config.knockout
    if not section.curve:
        return []
    some = knockout.curve_conditions(context.lm.config, scores, heads, section.curve, draws=section.mode_draws,
                                     seed=section.seed)  # fmt: skip
    conditions = [Condition("none", 0, Interventions(), experiment="curve"), *some]
    return causal.summarise(conditions, task_outcomes(context, section.tasks[:1], conditions)[0])


def _minimal(context: Context, heads) -> dict[str, Any]:
    """The smallest set of heads found without which recall of the first task is down to a share of the untouched model's;
    searched on every other case and told of the rest."""
    section, task = context.config.knockout, context.config.knockout.tasks[0]
    cases, config = context.cases(task), context.lm.config

    def outcomes(sets, cases):
        conditions = [Condition("set", 0, knockout.mask_heads(config, some)) for some in sets]
        return np.stack([causal.hits(texts, cases) for texts in _answers(context, task, cases, conditions)])

    searched, rest = cases[::2], cases[1::2]
    start, everything = outcomes([[], heads], searched).mean(axis=1)
    limit = max(section.minimal * start, everything)
    kept, steps = knockout.minimal_set(heads, lambda sets: outcomes(sets, searched).mean(axis=1), limit)
    told = dict(zip(("none", "all retrieval heads", "smallest set"), outcomes([[], heads, kept], rest), strict=True))
    return {"task": task, "heads": [list(head) for head in kept], "steps": steps, "limit": float(limit),
            "searched": len(searched), "recall": {name: stats.proportion(hits) for name, hits in told.items()}}  # fmt: skip


def _minimal_numbers(minimal) -> dict[str, Any]:
    if minimal is None:
        return {}
    numbers = {f"knockout/{minimal['task']}/smallest set": minimal["recall"]["smallest set"]}
    return numbers | {"knockout/heads of the smallest set": stats.exact(len(minimal["heads"]), minimal["searched"])}


def _loss_numbers(conditions, losses) -> dict[str, Any]:
    numbers = {}
    for first in _first_draws(conditions):
        chosen = [loss for c, loss in zip(conditions, losses, strict=True) if _named(c) == _named(first)]
        numbers[f"knockout/text loss/{_named(first)}"] = stats.bootstrap_mean(np.stack(chosen))
    return numbers


def _named(condition: Condition) -> str:
    return mask_name(condition.kind, condition.experiment)


def _first_draws(conditions: Sequence[Condition]) -> list[Condition]:
    return list({_named(c): c for c in reversed(conditions)}.values())[::-1]


# --- rotary pairs ---


def _rope_conditions(context: Context, heads, ks, statistics: HeadStatistics | None):
    config, section = context.lm.config, context.config.rope
    norms = query_norms(config, context.lm.params) if section.utility else None
    for site in section.sites:
        yield from rotary.dose_conditions(config, heads, ks, draws=section.draws, seed=section.seed, site=site, norms=norms)
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
    return {f"rope/{row['task']}/highest minus lowest quarter": row["change"] for row in contrasts
            if (row["k"], row["kind"], row["site"]) == wanted}  # fmt: skip


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
