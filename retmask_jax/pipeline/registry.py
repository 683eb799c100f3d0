"""All stages in one table, what `run` and `study` do in order, and what must hold before and while a stage runs."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from retmask_jax.data.prompter import check_template
from retmask_jax.data.tasks import check_fits, check_writable
from retmask_jax.model.sharding import make_mesh
from retmask_jax.reports.comparison import COMPARISON
from retmask_jax.reports.report import REPORT
from retmask_jax.reports.study.arena import ARENA_PAGE
from retmask_jax.reports.study.budget import BUDGET_PAGE
from retmask_jax.reports.study.page import STUDY
from retmask_jax.runs.context import Context
from retmask_jax.runs.limits import check_limits
from retmask_jax.runs.recipes import flat
from retmask_jax.runs.stage import Stage, inputs_read, settings_read
from retmask_jax.runs.workdir import Basis, R, Result
from retmask_jax.stages.compare import COMPARE
from retmask_jax.stages.detect import DETECT
from retmask_jax.stages.eval import EVAL
from retmask_jax.stages.knockout import KNOCKOUT
from retmask_jax.stages.pairs import PAIRS
from retmask_jax.stages.rates import RATES
from retmask_jax.stages.rope import ROPE
from retmask_jax.stages.study.arena import ARENA
from retmask_jax.stages.study.budget import BUDGET
from retmask_jax.stages.study.detectors import DETECTORS_STAGE
from retmask_jax.stages.study.dynamics import DYNAMICS
from retmask_jax.stages.study.per_step import PER_STEP
from retmask_jax.stages.study.theta import THETA
from retmask_jax.stages.study.utility import UTILITY
from retmask_jax.stages.train import TRAIN
from retmask_jax.utils import memory

_ALL = (
    DETECT,
    KNOCKOUT,
    ROPE,
    PAIRS,
    RATES,
    TRAIN,
    EVAL,
    REPORT,
    DETECTORS_STAGE,
    UTILITY,
    THETA,
    PER_STEP,
    DYNAMICS,
    STUDY,
    ARENA,
    ARENA_PAGE,
    BUDGET,
    BUDGET_PAGE,
    COMPARE,
    COMPARISON,
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}
# The page that follows a stage which is a command of its own.
PAGES = {COMPARE.name: COMPARISON, ARENA.name: ARENA_PAGE, BUDGET.name: BUDGET_PAGE}
# What `retmask run` and `retmask study` do, in order.
RUN = (*REPORT.upstream, REPORT)
STUDIED = (*STUDY.upstream, STUDY)


def run_stage(context: Context, stage: Stage, begins: Callable[[], None] = lambda: None) -> tuple[Result, bool]:
    """(result, whether it ran now) of one stage; ValueError where a result that it reads is missing or out of date.

    begins: Called before the work of the stage, on all hosts; not where its result is up to date.
    """
    check_upstream(context, stage)

    def work(folder: Path) -> Result:
        begins()
        return stage.work(context, folder)

    config = context.config
    about = {"model": str(config.model), "revision": config.revision, "seed": config.seed}
    try:
        ran = context.workdir.run(
            stage.name, basis(context, stage), work, about, stage.result, lambda folder: stage.stays(context, folder)
        )
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        raise memory.explain(
            error, stage.name, f"lower {stage.batch_key}, shorten the texts, or use more devices"
        ) from error
    return stage.of(context), ran


def basis(context: Context, stage: Stage) -> Basis:
    """What the result of a stage rests on, as the config and the files are now."""
    upstream = {needed.name: context.workdir.run_id(needed.name) for needed in stage.upstream}
    return Basis(settings_read(context, stage), inputs_read(context, stage), upstream)


def check_upstream(context: Context, stage: Stage) -> None:
    """Raise ValueError where a stage reads a result that is missing, or out of date: made with other settings, or from
    results that have been made again since."""
    for needed in stage.upstream:
        context.workdir.provenance(needed.name)
        _check_up_to_date(context, stage.name, needed)


def up_to_date(context: Context, stage: Stage[R]) -> R | None:
    """The result of a stage; None where it has not run, or is out of date, or of a version whose results differ."""
    try:
        _check_up_to_date(context, stage.name, stage)
        return stage.of(context)
    except ValueError:
        return None


def _check_up_to_date(context: Context, reader: str, stage: Stage) -> None:
    work = context.workdir
    there = [above for above in stage.upstream if work.is_finished(above.name)]
    for above in there:
        _check_up_to_date(context, reader, above)
    made = work.provenance(stage.name)
    upstream = {above.name: work.run_id(above.name) for above in there}
    known = {above.name: made.upstream.get(above.name, "") for above in there}
    wanted = Basis(settings_read(context, stage), made.inputs, upstream)
    if changes := dataclasses.replace(made, upstream=known).changes(wanted):
        raise ValueError(
            f"{reader} reads the result of {stage.name}, which is out of date ({changes[0]}): run `retmask {stage.name}` "
            "first, or `retmask run` for all"
        )


def check_config(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Raise ValueError for settings that could only fail later, after expensive work. devices: of the mesh (None: all)."""
    check_limits(flat(config))
    check_template("prompt.template", config.prompt.template)
    check_template("prompt.plain_template", config.prompt.plain_template)
    _check_tasks(config)
    for stage in STAGES.values():
        stage.check(config)
    make_mesh(config.mesh, devices)


def _check_tasks(config) -> None:
    """Raise ValueError for a task that a stage names and is not there, and for one that lacks what its cases are made of."""
    missing = [task for stage in STAGES.values() for task in stage.tasks(config) if task not in config.tasks]
    if missing:
        raise ValueError(f"there is no task {missing[0]!r} under tasks; there are {', '.join(config.tasks)}")
    bare = {"needles": "a JSONL file of needles or questions"}
    of_lengths = {
        "haystack": "a text file that is cut to tasks of these lengths",
        "depths": "at least one, such as 0.5",
    }
    for name, task in config.tasks.items():
        for key, wanted in (bare | of_lengths if task.lengths else bare).items():
            if not task[key]:
                raise ValueError(f"tasks.{name}.{key} is empty: name {wanted}")


def check_model(context: Context, run: Sequence[Stage] = ()) -> None:
    """Raise ValueError where the model's context is too short for a task, or settings do not suit the model.

    run: Stages that are to run, for which the model must be fit.
    """
    context.check_files()
    for name, task in context.config.tasks.items():
        check_fits(name, task, context.outline.config.max_length)
        check_writable(context.outline.tokenizer, task.needles)
    for stage in STAGES.values():
        stage.check_model(context)
    for stage in run:
        stage.check_fit(context)
