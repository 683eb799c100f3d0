"""The stage `knockout`: answers and losses with the retrieval heads, or others, taken out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.evals.perplexity import text_loss
from retmask_jax.heads import conditions as causal
from retmask_jax.heads import knockout
from retmask_jax.heads.conditions import Condition, mean_over_draws
from retmask_jax.heads.head_outputs import head_statistics
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.interventions import Interventions
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.stages.detect import DETECT, head_scores, retrieval_heads
from retmask_jax.stages.outcomes import check_choices, mask_name, task_answers, task_outcomes
from retmask_jax.utils import stats


def _check(config) -> None:
    """Raise ValueError for settings of knock-out that could only fail later."""
    check_choices("knockout.modes", config.knockout.modes, knockout.MODES)


def _check_model(context: Context) -> None:
    """Raise ValueError where the settings of knock-out ask for more than the model has."""
    config, section = context.outline.config, context.config.knockout
    numbers = [size for size in section.curve if not isinstance(size, float)]
    knockout.head_numbers(numbers, n_retrieval=0, n_all=config.n_layers * config.n_heads)
    for mode in section.modes:
        knockout.take_out(config, [], mode)


def knockout_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Every task, and the loss on plain text, with the retrieval heads or others taken out; where the config asks for
    them, other ways to take a head out, curves over the number of heads, and the smallest set that matters."""
    lm, section, heads = context.lm, context.config.knockout, retrieval_heads(context)
    scores = head_scores(context)
    windows = context.windows()
    activity_LH = knockout.activity(
        lm, windows[: section.activity_windows].tolist(), batch_size=context.config.batch_size
    )
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
        "rows": causal.summarise(conditions, outcomes),
        "activity": activity_LH.tolist(),
        "idle": idle,
        "idle_below": knockout.IDLE,
        "curve": curve,
        "minimal": minimal,
        "contrasts": _against_controls(conditions, outcomes),
        "numbers": numbers | _minimal_numbers(minimal),
        "text_loss": [
            {"kind": c.kind, "draw": c.draw, "experiment": c.experiment, **stats.bootstrap_mean(loss)}
            for c, loss in zip(told, losses, strict=True)
        ],
    }


def _knockout_conditions(context: Context, heads, scores: HeadScores, activity_LH, windows) -> list[Condition]:
    """Those of every mode, the untouched model once."""
    section, conditions = context.config.knockout, []
    mean_LHD = head_statistics(context.lm, windows).mean_LHD if "mean" in section.modes else None
    for mode in section.modes:
        draws = section.draws if mode == "zero" else section.mode_draws
        found = knockout.knockout_conditions(
            context.lm.config,
            heads,
            activity_LH,
            draws=draws,
            seed=section.seed,
            scores_LH=scores.mean,
            mode=mode,
            mean_LHD=mean_LHD,
        )
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
                rows.append(
                    {
                        "task": task,
                        "kind": control.kind,
                        "experiment": mode,
                        **causal.contrast(conditions, outcome_CN, ours, others),
                    }
                )
    return rows


def _curve(context: Context, scores: HeadScores, heads) -> list[dict]:
    """Rows of the first task with more and more heads masked."""
    section = context.config.knockout
    if not section.curve:
        return []
    some = knockout.curve_conditions(
        context.lm.config, scores, heads, section.curve, draws=section.mode_draws, seed=section.seed
    )
    conditions = [Condition("none", 0, Interventions(), experiment="curve"), *some]
    return causal.summarise(conditions, task_outcomes(context, section.tasks[:1], conditions)[0])


def _minimal(context: Context, heads) -> dict[str, Any]:
    """The smallest set of heads found without which recall of the first task is down to a share of the untouched model's;
    searched on every other case and told of the rest."""
    section, task = context.config.knockout, context.config.knockout.tasks[0]
    cases, config = context.cases(task), context.lm.config

    def outcomes(sets, cases):
        conditions = [Condition("set", 0, knockout.mask_heads(config, some)) for some in sets]
        return np.stack([causal.hits(texts, cases) for texts in task_answers(context, task, cases, conditions)])

    searched, rest = cases[::2], cases[1::2]
    start, everything = outcomes([[], heads], searched).mean(axis=1)
    limit = max(section.minimal * start, everything)
    kept, steps = knockout.minimal_set(heads, lambda sets: outcomes(sets, searched).mean(axis=1), limit)
    told = dict(zip(("none", "all retrieval heads", "smallest set"), outcomes([[], heads, kept], rest), strict=True))
    return {
        "task": task,
        "heads": [list(head) for head in kept],
        "steps": steps,
        "limit": float(limit),
        "searched": len(searched),
        "recall": {name: stats.proportion(hits) for name, hits in told.items()},
    }


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


KNOCKOUT = Stage(
    name="knockout",
    work=knockout_stage,
    result=dict,
    upstream=(DETECT,),
    settings=(*PROMPTS, "knockout.*", "text.*"),
    tasks=lambda config: config.knockout.tasks,
    check=_check,
    check_model=_check_model,
)
