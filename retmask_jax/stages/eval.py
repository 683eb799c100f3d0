"""The stages that measure models: the start model against trained ones, or any models, on the recipe's tasks and suites."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from retmask_jax.data.tasks import by_cell
from retmask_jax.evals.compare import START, arm_numbers, run_rows
from retmask_jax.evals.external.helmet import run_helmet
from retmask_jax.evals.external.helmet_means import helmet_means
from retmask_jax.evals.external.lm_eval import run_lm_eval
from retmask_jax.evals.measured import Measured, as_json, from_json, paired
from retmask_jax.evals.perplexity import POSITIONS, text_loss
from retmask_jax.evals.scoring import mask_hash, shared_mask
from retmask_jax.evals.suites.niah import heat_map
from retmask_jax.evals.suites.registry import check_context, check_suites, run_suites, suite_files, suites_on
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.conditions import Condition
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.runs.context import Context, checkpoint_fingerprint
from retmask_jax.runs.recipes import as_json as config_json
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.runs.workdir import changed_versions, versions
from retmask_jax.stages.detect import retrieval_heads
from retmask_jax.stages.outcomes import task_outcomes
from retmask_jax.stages.train import TRAIN
from retmask_jax.utils.files import digest, read_json, write_json
from retmask_jax.utils.hosts import wait_for_all
from retmask_jax.utils.store import Store

log = logging.getLogger(__name__)

MASKED = "masked"  # the start model with its retrieval heads masked


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model that is measured: where it comes from, and what is masked in it."""

    arm: str
    seed: int
    load: Callable[[], LanguageModel]
    interventions: Interventions = Interventions()


def _check(config) -> None:
    """Raise ValueError for settings of suites, or models to compare, that could only fail later."""
    check_suites(config.suites)
    for name, source in config.eval.models.items():
        if name in (START, MASKED) or not source or not isinstance(source, str):
            raise ValueError(
                f"eval.models has {name!r}: {source!r}; give each folder or hub id a name of its own, not "
                f"{START} or {MASKED}"
            )


def _check_model(context: Context) -> None:
    """Raise ValueError where a suite is longer than the model's context, or its files are not there."""
    for name in suite_files(context.config.suites):
        context.data_file(name)
    check_context(context.config.suites, context.outline.config.max_length)


def suite_prints(context: Context) -> dict[str, Any]:
    """What decides the result of the suites: their settings and files."""
    suites = context.config.suites
    files = {f"file {name}": of_it for name, of_it in context.fingerprints(suite_files(suites)).items()}
    return {"suites": digest(config_json(suites))} | files


def compare_prints(context: Context) -> dict[str, Any]:
    """Those of `suite_prints`, and the weights of the models that are compared."""
    models = context.config.eval.models.items()
    return suite_prints(context) | {f"weights of {name}": checkpoint_fingerprint(source) for name, source in models}


def eval_stage(context: Context, folder: Path) -> dict[str, Any]:
    """The start model and every trained one on all tasks and suites, paired by sample, pooled over seeds."""
    train, trained = context.config.train, context.workdir.folder("train")
    contenders = {START: Contender(START, 0, lambda: context.lm)}
    if context.config.eval.masked:
        heads = mask_heads(context.lm.config, retrieval_heads(context))
        contenders[MASKED] = Contender(MASKED, 0, lambda: context.lm, heads)
    for arm in train.arms:
        for seed in train.seeds:
            path = trained / f"{arm}-{seed}" / "model"
            contenders[f"{arm}-{seed}"] = Contender(arm, seed, lambda path=path: context.load(path))
    return compared(context, contenders)


def compare_stage(context: Context, folder: Path) -> dict[str, Any]:
    """The config's model, and others by name, on all tasks and suites: no training of ours is needed."""
    contenders = {START: Contender(START, 0, lambda: context.lm)}
    for name, source in context.config.eval.models.items():
        contenders[name] = Contender(name, 0, lambda source=source: context.load(source))
    if len(contenders) < 2:
        raise ValueError("nothing is compared with the model: give others as --compare NAME=FOLDER_OR_HUB_ID")
    return compared(context, contenders)


def compared(context: Context, contenders: Mapping[str, Contender]) -> dict[str, Any]:
    """Every contender measured, the first one the start: rows per model, grids, suites, and numbers per arm."""
    found = {name: _measured(context, name, contender) for name, contender in contenders.items()}
    samples = _common(found)
    others = {name: (c.arm, c.seed) for name, c in contenders.items() if name != START}
    arms: dict[str, list[str]] = {}
    for name, (arm, _) in others.items():
        arms.setdefault(arm, []).append(name)
    grids = [
        {"model": name, "arm": contenders[name].arm, "seed": contenders[name].seed, **cell}
        for name, values in found.items()
        for cell in [*values["grid"], *_heat_map(values["suites"])]
    ]
    return {
        "rows": run_rows(samples, others),
        "grids": grids,
        "numbers": arm_numbers(samples, arms),
        "metrics": {one.name: one.metric for values in found.values() for one in values["suites"]},
        "series": {one.name: place for values in found.values() for one in values["suites"] if (place := _place(one))},
        "missing": {
            name: {one.name: dict(one.missing) for one in values["suites"] if one.missing}
            for name, values in found.items()
        },
        "helmet": {name: helmet_means(values["suites"]) for name, values in found.items()},
    }


def _place(one: Measured) -> dict[str, Any] | None:
    """Where a task of a suite stands among those like it: {"of": series, "at": place on the "axis"}."""
    if one.suite == "perplexity" and one.task.startswith(POSITIONS):
        first = int(one.task.removeprefix(POSITIONS).split("-")[0])
        return {"of": f"perplexity by position, {one.length} tokens", "at": first, "axis": "position in the text, from"}
    return {"of": f"{one.suite}/{one.task}", "at": one.length, "axis": "length (tokens)"} if one.length else None


def _heat_map(suites: Sequence[Measured]) -> list[dict[str, Any]]:
    """Cells of the needle suite, as those of the recipe's own grids: shares from 0 to 1."""
    needles = [one for one in suites if one.suite == "niah"]
    return [cell | {"task": "niah, ROUGE-1 recall"} for cell in heat_map(needles)]


def _measured(context: Context, name: str, contender: Contender) -> dict[str, Any]:
    """{"samples": task -> values of the recipe's own cases, "grid": cells, "suites": Measured of each task}."""
    config, there = context.config, context.of(contender.load())
    conditions = [Condition(name, 0, contender.interventions)]
    outcomes, _ = task_outcomes(there, config.eval.tasks, conditions)
    samples = {task: outcome_CN[0] for task, outcome_CN in outcomes.items()}
    if config.text.file:
        samples["text loss"] = text_loss(
            there.lm, there.windows(), contender.interventions, batch_size=config.batch_size
        )
    grid = []
    for task in config.eval.grids:
        outcomes, cases = task_outcomes(there, [task], conditions)
        samples[task] = outcomes[task][0]
        grid += [{"task": task, **cell} for cell in by_cell(cases[task], outcomes[task][0])]
    return {"samples": samples, "grid": grid, "suites": _suites(there, contender)}


def _common(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Values of the samples that every model has, {model: {task: values}}; a task that one lacks is left out."""
    samples = {name: dict(values["samples"]) for name, values in found.items()}
    suites = [{one.name: one for one in values["suites"]} for values in found.values()]
    for task in suites[0]:
        if all(task in of_model for of_model in suites):
            of_task = [of_model[task] for of_model in suites]
            ids, values_MN = paired(of_task)
            for (_, kept), one, values_N in zip(samples.items(), of_task, values_MN, strict=True) if ids else ():
                kept[task] = values_N.astype(bool) if one.binary else values_N
    return samples


# --- suites ---


def _suites(there: Context, contender: Contender) -> list[Measured]:
    """Every suite that is on, task by task and length by length, each kept in a file of its own when it has run, whatever
    else is asked for later."""
    return [one for name, suites in suite_parts(there.config.suites) for one in _kept(there, contender, name, suites)]


def suite_parts(suites) -> Iterator[tuple[str, ConfigDict]]:
    """(name of a suite, all settings with but one of its tasks and lengths) for each part that is run by itself."""
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
        there.resolve,
        only=name,
        batch_size=there.config.batch_size,
        interventions=contender.interventions,
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
        limit=section.limit,
        chat=section.chat,
        stop_new_line=section.stop_new_line,
        citations=section.citations,
    ).measured


def _kept(there: Context, contender: Contender, name: str, suites) -> list[Measured]:
    """What a part of a suite gave this model before, or its run, written down; one that is cut off goes on, sample by
    sample."""
    files = list(there.fingerprints(suite_files(suites)).values())
    mask = mask_hash(there.lm.config, shared_mask(there.lm.config, contender.interventions))
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


def _tasks(config) -> tuple[str, ...]:
    return (*config.eval.tasks, *config.eval.grids)


_SETTINGS = (*PROMPTS, "eval.tasks", "eval.grids", "text.*")
EVAL = Stage(
    name="eval",
    work=eval_stage,
    result=dict,
    upstream=(TRAIN,),
    settings=(*_SETTINGS, "eval.masked", "train.arms", "train.seeds"),
    tasks=_tasks,
    inputs=suite_prints,
    check=_check,
    check_model=_check_model,
)
COMPARE = Stage(
    name="compare", work=compare_stage, result=dict, settings=_SETTINGS, tasks=_tasks, inputs=compare_prints
)
