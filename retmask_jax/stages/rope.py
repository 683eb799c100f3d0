"""The stage `rope`: recall with rotary pairs of the retrieval heads ablated."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from retmask_jax.heads import rotary
from retmask_jax.heads.conditions import (
    UNTOUCHED,
    Condition,
    ConditionRow,
    Contrast,
    contrast,
    mean_over_draws,
    summarise,
)
from retmask_jax.heads.head_outputs import HeadStatistics, head_statistics
from retmask_jax.heads.query_norms import query_norms
from retmask_jax.model.interventions import SITES, Head
from retmask_jax.model.rope import inverse_frequencies, why_no_rotary_masks
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, task_cost
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.detect import DETECT, retrieval_heads
from retmask_jax.stages.outcomes import check_choices, task_outcomes, text_losses
from retmask_jax.utils import stats
from retmask_jax.utils.numbers import Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeRow(ConditionRow):
    """A task under one condition. variance: the share of the variance of q.k that it removes (`condition_variance`)."""

    variance: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoseMean(Number):
    """Recall on a task without k pairs of a kind, mean over the draws; kind "none" is the untouched model."""

    value: float
    task: str
    experiment: str
    kind: str
    k: int
    site: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoseContrast(Contrast):
    """How many more cases are right without k pairs of a kind than without the k lowest pairs."""

    task: str
    site: str
    k: int
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Where in the spectrum the harm to recall lies (`rotary.spectrum_centre`); None where no window lowers recall."""

    task: str
    centre: Number | None
    width: Number | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostRow(rotary.Costs):
    """What ablating k pairs of a kind costs plain text, and what it costs recall on a task."""

    task: str
    kind: str
    k: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeResult(Result):
    """rows: every condition on every task. means: of the doses, over their draws. spectra: of the tasks with windows.
    pairs: the numbers of pairs ablated, of `n_pairs`. patch_pairs: how many for coverage and single heads. wavelengths: of
    each pair, in tokens. context: the model's longest, in tokens."""

    rows: list[RopeRow]
    means: list[DoseMean]
    contrasts: list[DoseContrast]
    spectra: list[Spectrum]
    costs: list[CostRow]
    pairs: list[int]
    n_pairs: int
    patch_pairs: int
    wavelengths: list[float]
    context: int

    def quarter(self, task: str) -> Number | None:
        """Recall on a task without the highest quarter of the pairs minus recall without the lowest; None if not measured."""
        wanted = task, "rotary", self.n_pairs // 4, "highest"
        return next((row.change for row in self.contrasts if (row.task, row.site, row.k, row.kind) == wanted), None)


def rope_stage(context: Context, folder: Path) -> RopeResult:
    """Recall with rotary pairs of the retrieval heads ablated, and the share of the variance of q.k that goes with them.

    It varies how many pairs, which part of the spectrum, of which heads and at which site.
    """
    lm, section, heads = context.lm, context.config.rope, retrieval_heads(context)
    ks = section.pairs or tuple(
        k for k in (lm.config.n_pairs // 8, lm.config.n_pairs // 4, lm.config.n_pairs // 2) if k
    )
    text = context.config.text.file
    statistics = head_statistics(lm, context.windows()[: context.config.knockout.activity_windows]) if text else None
    conditions = [UNTOUCHED]
    if section.tasks:  # a model that takes no rotary masks is asked for none
        conditions += _conditions(context, heads, ks, statistics)
    outcomes = task_outcomes(context, section.tasks, conditions).outcomes
    variances = [
        None if statistics is None else rotary.condition_variance(condition, statistics) for condition in conditions
    ]
    result = RopeResult(
        rows=[
            RopeRow(**vars(row), variance=variance)
            for row, variance in zip(summarise(conditions, outcomes), variances * len(outcomes), strict=True)
        ],
        means=[mean for task, outcome_CN in outcomes.items() for mean in _means(task, conditions, outcome_CN, ks)],
        contrasts=_low_against_high(conditions, outcomes, ks),
        spectra=[found for task, outcome_CN in outcomes.items() for found in _spectrum(task, conditions, outcome_CN)],
        costs=_costs(context, conditions, outcomes, ks) if section.text and section.tasks else [],
        pairs=list(ks),
        n_pairs=lm.config.n_pairs,
        patch_pairs=_patch_pairs(context),
        wavelengths=(2 * np.pi / inverse_frequencies(lm.config)).tolist(),
        context=lm.config.max_length,
        numbers={},
    )
    return dataclasses.replace(result, numbers=_numbers(result))


def _check(config) -> None:
    check_choices("rope.sites", config.rope.sites, SITES)
    for name in ("matched", "text"):
        if config.rope[name] and not config.text.file:
            raise ValueError(f"rope.{name} is measured on plain text: set text.file")


def _check_fit(context: Context) -> None:
    tasks = context.config.rope.tasks
    if tasks and (why := why_no_rotary_masks(context.outline.config)) is not None:
        raise ValueError(f"rope.tasks names {', '.join(tasks)}, but {why}: set rope.tasks to ()")


def _check_model(context: Context) -> None:
    config, section = context.outline.config, context.config.rope
    for name, wanted in (
        ("windows", section.windows),
        ("pairs", max(section.pairs, default=0)),
        ("patch_pairs", section.patch_pairs or 0),
    ):
        if not 0 <= wanted <= config.n_pairs:
            raise ValueError(f"rope.{name} has {wanted}, the model has {config.n_pairs} rotary pairs: lower it")


def _conditions(
    context: Context, heads: Sequence[Head], ks: Sequence[int], statistics: HeadStatistics | None
) -> Iterator[Condition]:
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
    if section.matched and statistics is not None:  # which `_check` makes sure of
        yield from rotary.matched_conditions(config, heads, ks, statistics, draws=section.matched, seed=section.seed)


def _patch_pairs(context: Context) -> int:
    """How many pairs are ablated in the experiments that do not vary their number."""
    return context.config.rope.patch_pairs or max(1, context.lm.config.n_pairs // 8)


def _means(task: str, conditions: Sequence[Condition], outcome_CN, ks: Sequence[int]) -> Iterator[DoseMean]:
    """The untouched model, and each dose."""
    doses = dict.fromkeys((c.experiment, c.kind, c.site) for c in conditions if c.experiment in ("dose", "matched"))
    measured = {(c.experiment, c.kind, c.site, c.n_pairs) for c in conditions}
    chosen = [("", "none", "rotary", 0)]
    chosen += [(*dose, k) for dose in doses for k in ks if (*dose, k) in measured]
    for experiment, kind, site, k in chosen:
        wanted = {"experiment": experiment, "kind": kind, "site": site}
        mean = mean_over_draws(conditions, outcome_CN, n_pairs=k, **wanted)
        yield DoseMean.of(mean, task=task, k=k, **wanted)


def _low_against_high(conditions: Sequence[Condition], outcomes, ks: Sequence[int]) -> list[DoseContrast]:
    """The highest, and random, pairs against the lowest, at each site."""
    rows = []
    for task, outcome_CN in outcomes.items():
        for site in dict.fromkeys(c.site for c in conditions if c.experiment == "dose"):
            for k, kind in ((k, kind) for k in ks for kind in ("highest", "random")):
                dose = {"experiment": "dose", "site": site, "n_pairs": k}
                if any(c.kind == kind for c in conditions):
                    measured = contrast(conditions, outcome_CN, dose | {"kind": "lowest"}, dose | {"kind": kind})
                    rows.append(
                        DoseContrast(
                            task=task, site=site, k=k, kind=kind, change=measured.change, p_value=measured.p_value
                        )
                    )
    return rows


def _spectrum(task: str, conditions: Sequence[Condition], outcome_CN) -> Iterator[Spectrum]:
    """Where in the spectrum the harm lies, if windows of it were ablated."""
    chosen = [i for i, c in enumerate(conditions) if _is_window(c)]
    if chosen:
        drops_VN = outcome_CN[:1].astype(float) - outcome_CN[chosen]
        centre, width = (
            stats.bootstrap_of_means(drops_VN, lambda means, place=place: rotary.spectrum_centre(means)[place])
            for place in range(2)
        )
        yield Spectrum(
            task=task, centre=None if centre.value is None else centre, width=None if width.value is None else width
        )


def _costs(context: Context, conditions: Sequence[Condition], outcomes, ks: Sequence[int]) -> list[CostRow]:
    """The costs of the lowest and of the highest pairs."""
    doses = [("dose", kind, "rotary", k) for k in ks for kind in ("lowest", "highest")]
    known = [(c.experiment, c.kind, c.site, c.n_pairs) for c in conditions]
    chosen = [0, *map(known.index, doses)]
    untouched, *losses = text_losses(context, context.windows(), [conditions[i] for i in chosen])
    return [
        CostRow(
            **vars(rotary.cost_intervals(loss - untouched, outcome_CN[0], outcome_CN[i])), task=task, kind=kind, k=k
        )
        for (_, kind, _, k), i, loss in zip(doses, chosen[1:], losses, strict=True)
        for task, outcome_CN in outcomes.items()
    ]


def _is_window(row: Condition | ConditionRow) -> bool:
    return row.experiment == "windows" and row.kind == "window"


def _numbers(result: RopeResult) -> dict[str, Number]:
    """The headline numbers."""
    numbers = {f"rope/{mean.task}/{_dose_name(mean)}": mean.number for mean in result.means}
    for task in dict.fromkeys(mean.task for mean in result.means):
        if (quarter := result.quarter(task)) is not None:
            numbers[f"rope/{task}/highest minus lowest quarter"] = quarter
    for found in result.spectra:
        windows = [row for row in result.rows if row.task == found.task and _is_window(row)]
        for row in windows:
            numbers[f"rope/{row.task}/window {row.draw + 1} of {len(windows)}"] = row.number
        if found.centre is not None:
            numbers[f"rope/{found.task}/centre of mass of the windows"] = found.centre
        if found.width is not None:
            numbers[f"rope/{found.task}/width of the windows"] = found.width
    for row in result.costs:
        if row.ratio is not None:
            numbers[f"rope/{row.task}/{row.kind} {row.k} pairs, perplexity increase over recall drop"] = row.ratio
    return numbers


def _dose_name(mean: DoseMean) -> str:
    where = "" if mean.site == "rotary" else f", {mean.site} site"
    return "none" if mean.kind == "none" else f"{mean.kind} {mean.k} pairs{where}"


def _cost(context: Context) -> Cost:
    section = context.config.rope
    doses = (len(section.pairs) or 3) * (2 + section.draws + 2 * section.utility + section.matched)
    conditions = 1 + len(section.sites) * doses + section.windows + 2 * len(section.coverage)
    return sum((conditions * task_cost(context.config, task) for task in section.tasks), Cost())


ROPE = Stage(
    name="rope",
    work=rope_stage,
    result=RopeResult,
    upstream=(DETECT,),
    settings=(*PROMPTS, "rope.*", "text.*", "knockout.activity_windows"),
    tasks=lambda config: config.rope.tasks,
    check=_check,
    check_model=_check_model,
    check_fit=_check_fit,
    cost=_cost,
)
