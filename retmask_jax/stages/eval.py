"""The stage `eval`: the start model against trained ones on the recipe's tasks and suites; `compare` shares what it does."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from ml_collections import ConfigDict

from retmask_jax.data.builtin_files import path_of
from retmask_jax.data.tasks import GridCell, by_cell
from retmask_jax.evals import compare
from retmask_jax.evals.compare import START, ArmContrast, ArmRow, ModelRow
from retmask_jax.evals.external.helmet import run_helmet
from retmask_jax.evals.external.helmet_means import helmet_means
from retmask_jax.evals.external.lm_eval import run_lm_eval
from retmask_jax.evals.measured import Measured, as_json, from_json, paired
from retmask_jax.evals.perplexity import POSITIONS
from retmask_jax.evals.scoring import mask_hash, shared_mask
from retmask_jax.evals.suites.niah import heat_map
from retmask_jax.evals.suites.registry import SUITES, check_context, check_suites, run_suites, suite_files, suites_on
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.heads.conditions import Condition
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, suites_cost, task_cost
from retmask_jax.runs.recipes import as_json as config_json
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.runs.workdir import Result, changed_versions, versions
from retmask_jax.stages.detect import retrieval_heads
from retmask_jax.stages.outcomes import task_outcomes, text_losses
from retmask_jax.stages.train import TRAIN
from retmask_jax.utils.files import digest, read_json, write_json
from retmask_jax.utils.hosts import wait_for_all
from retmask_jax.utils.numbers import Number
from retmask_jax.utils.store import Store

log = logging.getLogger(__name__)

# The start model with its retrieval heads masked; and its answers decoded by contrast with that.
MASKED, CONTRAST = "masked", "contrast decoding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(GridCell):
    """A cell of a grid, of one model on one task."""

    model: str
    arm: str
    seed: int
    task: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a task of a suite stands in a series of such tasks: the name of the series, the place on the axis, its name."""

    of: str
    at: int
    axis: str


class HelmetMean(msgspec.Struct, frozen=True):
    """A mean of HELMET in per cent, as of `evals.external.helmet_means`; None where a part is missing."""

    value: float | None
    n: int
    parts: dict[str, float]
    missing: list[str]
    left_out: list[str] = msgspec.field(name="left out")


@dataclasses.dataclass(frozen=True)
class Helmet:
    """HELMET's categories and means at one length."""

    categories: dict[str, HelmetMean]
    means: dict[str, HelmetMean]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalResult(Result):
    """What models do on tasks and suites, against the start model.

    Attributes:
        rows: Every model on every task.
        arms: Every arm on every task, pooled over its models, the start model first.
        contrasts: The arm retmask against every other; empty in results of older versions.
        grids: Cells of the grids over length and depth, of each model.
        metrics: What the values of a suite's task are, such as "exact match".
        series: Tasks of suites that differ only in their place on an axis.
        missing: Samples of suites without a value: model, task, reason, their number.
        helmet: HELMET by model and length (tokens, as text).
    """

    rows: list[ModelRow]
    arms: list[ArmRow]
    grids: list[Cell]
    metrics: dict[str, str]
    series: dict[str, Place]
    missing: dict[str, dict[str, dict[str, int]]]
    helmet: dict[str, dict[str, Helmet]]
    contrasts: list[ArmContrast] = dataclasses.field(default_factory=list)

    @property
    def means(self) -> dict[str, dict[str, Number]]:
        """{task: {arm: mean}}, with the start model."""
        means: dict[str, dict[str, Number]] = {}
        for row in self.arms:
            means.setdefault(row.task, {})[row.arm] = row.mean
        return means

    @property
    def changes(self) -> dict[str, dict[str, Number]]:
        """{arm: {task: change against the start model}}, without the start model."""
        changes: dict[str, dict[str, Number]] = {}
        for row in self.arms:
            if row.change is not None:
                changes.setdefault(row.arm, {})[row.task] = row.change
        return changes


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model that is measured: where it comes from, what is masked in it, and whether its answers are decoded by contrast;
    such a model is not measured where it reads given texts."""

    arm: str
    seed: int
    load: Callable[[], LanguageModel]
    interventions: Interventions = Interventions()
    contrast: ContrastDecoding | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one model did: values of the recipe's own cases by task, cells of grids by task, the tasks of suites, and the
    suites that it cannot run."""

    samples: dict[str, np.ndarray]
    grids: dict[str, list[GridCell]]
    suites: list[Measured]
    apart: tuple[str, ...] = ()


def eval_stage(context: Context, folder: Path) -> EvalResult:
    """Measure the start model and every trained one on all tasks and suites, paired by sample, pooled over seeds."""
    train, trained = context.config.train, context.workdir.folder(TRAIN.name)
    section, contenders = context.config.eval, {START: Contender(START, 0, lambda: context.lm)}
    if section.masked:
        contenders[MASKED] = Contender(MASKED, 0, lambda: context.lm, _retrieval_mask(context))
    for arm in train.arms:
        for seed in train.seeds:
            path = trained / f"{arm}-{seed}" / "model"
            contenders[f"{arm}-{seed}"] = Contender(arm, seed, lambda path=path: context.load(path))
    if section.contrast is not None:
        contrast = ContrastDecoding(_retrieval_mask(context), section.contrast, section.contrast_threshold)
        contenders[CONTRAST] = Contender(CONTRAST, 0, lambda: context.lm, contrast=contrast)
    return compared(context, contenders)


def compared(context: Context, contenders: Mapping[str, Contender]) -> EvalResult:
    """Measure every contender, the start model first, and compare the others with it."""
    measured = {name: _measured(context, name, contender) for name, contender in contenders.items()}
    samples = common_samples(measured)
    others = {name: (contender.arm, contender.seed) for name, contender in contenders.items() if name != START}
    models: dict[str, list[str]] = {}
    for name, (arm, _) in others.items():
        models.setdefault(arm, []).append(name)
    arms = compare.arm_rows(samples, models)
    tasks = [task for model in measured.values() for task in model.suites]
    return EvalResult(
        rows=compare.model_rows(samples, others),
        arms=arms,
        contrasts=compare.arm_contrasts(samples, models),
        grids=[cell for name, model in measured.items() for cell in _cells(name, contenders[name], model)],
        metrics={task.name: task.metric for task in tasks},
        series={task.name: place for task in tasks if (place := _place(task))},
        missing={
            name: {task.name: dict(task.missing) for task in model.suites if task.missing}
            for name, model in measured.items()
        },
        helmet={name: _helmet_means(model.suites) for name, model in measured.items()},
        numbers=compare.headlines(arms),
    )


def common_samples(measured: Mapping[str, Measurement]) -> dict[str, dict[str, np.ndarray]]:
    """Values of the samples that models share, {model: {task: values}}.

    A task of a suite that one of them lacks is left out, unless it is a suite that this one cannot run.
    """
    samples = {name: dict(model.samples) for name, model in measured.items()}
    suites = {name: {task.name: task for task in model.suites} for name, model in measured.items()}
    for task in next(iter(measured.values())).suites:
        having = [name for name, model in measured.items() if task.suite not in model.apart]
        if all(task.name in suites[name] for name in having):
            tasks = [suites[name][task.name] for name in having]
            ids, values_MN = paired(tasks)
            for name, of_model, values_N in zip(having, tasks, values_MN, strict=True) if ids else ():
                samples[name][task.name] = values_N.astype(bool) if of_model.binary else values_N
    return samples


def suite_prints(context: Context) -> dict[str, Any]:
    """What decides the result of the suites: their settings and files."""
    suites = context.config.suites
    files = {f"file {name}": of_it for name, of_it in context.fingerprints(suite_files(suites)).items()}
    return {"suites": digest(config_json(suites))} | files


def tasks_of(config: ConfigDict) -> tuple[str, ...]:
    """The tasks that models are measured on."""
    return (*config.eval.tasks, *config.eval.grids)


def _measured(context: Context, name: str, contender: Contender) -> Measurement:
    config, there = context.config, context.of(contender.load())
    conditions = [Condition(name, 0, contender.interventions)]
    outcomes = task_outcomes(there, config.eval.tasks, conditions, contender.contrast).outcomes
    samples = {task: outcome_CN[0] for task, outcome_CN in outcomes.items()}
    if config.text.file and contender.contrast is None:
        samples["text loss"] = text_losses(there, there.windows(), conditions)[0]
    grids = {}
    for task in config.eval.grids:
        answered = task_outcomes(there, [task], conditions, contender.contrast)
        samples[task] = answered.outcomes[task][0]
        grids[task] = by_cell(answered.cases[task], samples[task])
    apart = () if contender.contrast is None else _READING
    return Measurement(samples, grids, _suites(there, contender, apart), apart)


def _retrieval_mask(context: Context) -> Interventions:
    """What the arm retmask masks."""
    return mask_heads(context.lm.config, retrieval_heads(context))


def _cells(name: str, contender: Contender, measured: Measurement) -> list[Cell]:
    """The cells of the recipe's own grids and, with shares from 0 to 1, too, of the needle suite."""
    needles = [task for task in measured.suites if task.suite == "niah"]
    grids = measured.grids | {"niah, ROUGE-1 recall": heat_map(needles)}
    return [
        Cell(model=name, arm=contender.arm, seed=contender.seed, task=task, **vars(cell))
        for task, cells in grids.items()
        for cell in cells
    ]


def _place(task: Measured) -> Place | None:
    if task.suite == "perplexity" and task.task.startswith(POSITIONS):
        first = int(task.task.removeprefix(POSITIONS).split("-")[0])
        return Place(f"perplexity by position, {task.length} tokens", first, "position in the text, from")
    return Place(f"{task.suite}/{task.task}", task.length, "length (tokens)") if task.length else None


def _helmet_means(suites: Sequence[Measured]) -> dict[str, Helmet]:
    return {str(length): msgspec.convert(means, Helmet) for length, means in helmet_means(suites).items()}


# --- suites ---

# Those that read given texts, at least in some of their tasks: no answer is decoded, by contrast or otherwise.
_READING = (*(name for name, suite in SUITES.items() if not suite.decodes), "lm_eval")


def _suites(there: Context, contender: Contender, apart: Sequence[str]) -> list[Measured]:
    """Every suite that is on, but those apart, task by task and length by length. Each part is kept in its file once it has
    run, so that it need not run again when others are asked for later."""
    parts = [(name, suites) for name, suites in suite_parts(there.config.suites) if name not in apart]
    return [task for name, suites in parts for task in _kept(there, contender, name, suites)]


def suite_parts(suites: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """(name of a suite, all settings with only one of its tasks and lengths) for each part that is run by itself."""
    on = suites_on(suites) + [name for name, key in (("lm_eval", "tasks"), ("helmet", "path")) if suites[name][key]]
    for name in on:
        split = [key for key in ("tasks", "lengths") if key in suites[name] and name != "helmet"]
        for values in itertools.product(*(suites[name][key] for key in split)):
            part = ConfigDict(suites.to_dict())
            part[name].update({key: (value,) for key, value in zip(split, values, strict=True)})
            yield name, part


def _run(there: Context, contender: Contender, name: str, suites, kept: Store) -> list[Measured]:
    match name:
        case "lm_eval":
            return _lm_eval(there, contender, suites.lm_eval, kept)
        case "helmet":
            return _helmet(there, contender, suites.helmet)
    return run_suites(
        there.lm,
        there.prompter,
        suites,
        path_of,
        only=name,
        batch_size=there.config.batch_size,
        interventions=contender.interventions,
        contrast=contender.contrast,
        kept=kept,
    )


def _lm_eval(there: Context, contender: Contender, section, kept: Store) -> list[Measured]:
    return run_lm_eval(
        there.lm,
        section.tasks,
        interventions=contender.interventions,
        limit=section.limit,
        num_fewshot=section.fewshot,
        include_path=section.include_path or None,
        batch_size=there.config.batch_size,
        apply_chat_template=section.chat,
        template_kwargs=there.config.prompt.template_kwargs.to_dict(),
        kept=kept,
    ).measured


def _helmet(there: Context, contender: Contender, section) -> list[Measured]:
    return run_helmet(
        there.lm,
        section.path,
        section.lengths,
        section.categories or None,
        folder=_store(there) / "helmet" / there.model_fingerprint,
        batch_size=there.config.batch_size,
        interventions=contender.interventions,
        contrast=contender.contrast,
        limit=section.limit,
        chat=section.chat,
        stop_new_line=section.stop_new_line,
        citations=section.citations,
    ).measured


def _kept(there: Context, contender: Contender, name: str, suites) -> list[Measured]:
    """What a part of a suite gave this model: read if it was measured before, else measured now and written. An
    interrupted part goes on, sample by sample."""
    files = list(there.fingerprints(suite_files(suites)).values())
    mask = mask_hash(there.lm.config, shared_mask(there.lm.config, contender.interventions), contender.contrast)
    settings = config_json(suites[name]), config_json(there.config.prompt)
    identity = digest([there.model_fingerprint, mask, *settings, files])
    path = _store(there) / f"{name}-{identity}.json"
    if not path.exists():
        with Store(path.with_suffix("")) as kept:
            measured = _run(there, contender, name, suites, kept)
        write_json(path, {"versions": versions(), "measured": [as_json(one) for one in measured]})
        wait_for_all(f"{name} is measured")
    found = read_json(path)
    if changed := changed_versions(found["versions"]):
        log.warning("%s: what is kept was measured with %s", name, changed)
    return [from_json(record) for record in found["measured"]]


def _store(there: Context) -> Path:
    """Next to the stages, whose folders are set aside when their settings change."""
    return there.workdir.folder("measured")


def _check(config) -> None:
    check_suites(config.suites)


def _check_model(context: Context) -> None:
    for name in suite_files(context.config.suites):
        context.data_file(name)
    check_context(context.config.suites, context.outline.config.max_length)


SETTINGS = (*PROMPTS, "eval.tasks", "eval.grids", "text.*")


def _cost(context: Context) -> Cost:
    config = context.config
    passes = 0 if config.eval.contrast is None else 2
    models = 1 + config.eval.masked + passes + len(config.train.arms) * len(config.train.seeds)
    tasks = [task_cost(config, task) for task in tasks_of(config)] + [suites_cost(config)]
    return models * sum(tasks, Cost(config.text.windows * config.text.length if config.text.file else 0))


EVAL = Stage(
    name="eval",
    work=eval_stage,
    result=EvalResult,
    upstream=(TRAIN,),
    settings=(*SETTINGS, "eval.masked", "eval.contrast*", "train.arms", "train.seeds"),
    tasks=tasks_of,
    inputs=suite_prints,
    check=_check,
    check_model=_check_model,
    cost=_cost,
)
