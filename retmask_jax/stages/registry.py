"""All stages: what each reads, its function, the checks before its work, and what `run` and `study` do in order."""

import dataclasses
import functools
import glob
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from retmask_jax.data.prompter import check_template
from retmask_jax.data.tasks import check_fits
from retmask_jax.model.sharding import make_mesh
from retmask_jax.runs.context import Context, named_files
from retmask_jax.runs.limits import check_limits
from retmask_jax.runs.recipes import flat
from retmask_jax.runs.workdir import Basis, settings_of
from retmask_jax.stages.detect import detect_stage, given_scores
from retmask_jax.stages.detectors import check_detectors, check_detectors_model, detectors_stage
from retmask_jax.stages.dynamics import check_dynamics, check_dynamics_model, checkpoint_prints, dynamics_stage
from retmask_jax.stages.eval import (
    check_eval,
    check_eval_model,
    compare_prints,
    compare_stage,
    eval_stage,
    suite_prints,
)
from retmask_jax.stages.knockout import check_knockout, check_knockout_model, knockout_stage
from retmask_jax.stages.pages import COMPARED, REPORTED, STUDIED, comparison_stage, report_stage, study_stage
from retmask_jax.stages.pairs import ARMS, pairs_stage, prompt_prints
from retmask_jax.stages.rope import check_rope, check_rope_model, rope_stage
from retmask_jax.stages.theta import check_theta, theta_stage
from retmask_jax.stages.train import train_settings, train_stage
from retmask_jax.stages.utility import utility_stage
from retmask_jax.training.loop import check_mesh
from retmask_jax.utils import memory


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    upstream: the stages whose results it reads. reads: patterns of the config's keys that decide its result; tasks: names
    of the tasks it answers, whose sections do, too. inputs: fingerprints of what it alone reads. model: whether it needs
    the model, or works on results alone.
    """

    upstream: tuple[str, ...]
    function: Callable[[Context, Path], dict[str, Any]]
    reads: tuple[str, ...] = ()
    tasks: Callable[[Any], Iterable[str]] = lambda config: ()
    inputs: Callable[[Context], dict[str, Any]] = lambda context: {}
    model: bool = True


def run_stage(context: Context, name: str) -> tuple[dict[str, Any], bool]:
    """(result, skipped) of one stage; ValueError where a result that it reads is missing or out of date."""
    check_upstream(context, name)
    config = context.config
    about = {"model": str(config.model), "revision": config.revision, "seed": config.seed}
    run = functools.partial(STAGES[name].function, context)
    try:
        return context.workdir.run(name, basis(context, name), run, about)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        setting = {"train": "train.microbatch_size", "pairs": "pairs.batch_size"}.get(name, "batch_size")
        raise memory.explain(error, name, f"lower {setting}, shorten the texts, or use more devices") from error


def basis(context: Context, name: str) -> Basis:
    """What the result of a stage rests on, as the config and the files are now."""
    stage = STAGES[name]
    settings = _settings(context, name)
    inputs = {"weights": context.model_fingerprint} if stage.model else {}
    inputs |= {f"file {file}": of_it for file, of_it in context.fingerprints(named_files(settings)).items()}
    upstream = {needed: context.workdir.run_id(needed) for needed in stage.upstream}
    return Basis(settings, inputs | stage.inputs(context), upstream)


def check_upstream(context: Context, name: str) -> None:
    """Raise ValueError where a stage reads a result that is missing, or out of date: made with other settings, or from
    results that have been made again since."""
    for needed in STAGES[name].upstream:
        context.workdir.result(needed)
        _check_up_to_date(context, name, needed)


def _check_up_to_date(context: Context, reader: str, name: str) -> None:
    work = context.workdir
    there = [above for above in STAGES[name].upstream if work.is_finished(above)]
    for above in there:
        _check_up_to_date(context, reader, above)
    made = work.result(name)["provenance"]
    if "settings" in made:
        wanted = Basis(_settings(context, name), upstream={above: work.run_id(above) for above in there})
        stored = Basis(made["settings"], upstream={above: made["upstream"].get(above) for above in there})
        changes = stored.changes(wanted)
    else:
        changes = ["it is of an older version"]
    if changes:
        raise ValueError(
            f"{reader} reads the result of {name}, which is out of date ({changes[0]}): run `retmask {name}` first, or "
            "`retmask run` for all"
        )


def _settings(context: Context, name: str) -> dict[str, Any]:
    stage = STAGES[name]
    of_tasks = [f"tasks.{glob.escape(task)}.*" for task in stage.tasks(context.config)]
    return settings_of(context.workdir.config, (*stage.reads, *of_tasks))


def check_config(config, devices=None) -> None:
    """Raise ValueError for settings that could only fail later, after expensive work. devices: of the mesh (None: all)."""
    check_limits(flat(config))
    unknown = [arm for arm in config.train.arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"train.arms has {', '.join(unknown)}; known arms are {', '.join(ARMS)}")
    if (config.detect.threshold is None) == (config.detect.top_k is None):
        raise ValueError("set one of detect.threshold and detect.top_k, and the other to None")
    check_template(config.prompt.template)
    check_knockout(config)
    check_rope(config)
    _check_tasks(config)
    if config.train.max_prompt_tokens >= config.train.max_tokens:
        raise ValueError(
            f"train.max_prompt_tokens {config.train.max_prompt_tokens} must be less than train.max_tokens "
            f"{config.train.max_tokens}, which also holds the answer"
        )
    check_detectors(config)
    check_theta(config)
    check_dynamics(config)
    check_eval(config)
    make_mesh(config.mesh, devices)
    train_settings(config, "retmask", 0)


def _check_tasks(config) -> None:
    """Raise ValueError for a task that is named and not there, and for one that lacks what its cases are made of."""
    named = [
        config.detect.task,
        *config.knockout.tasks,
        *config.rope.tasks,
        *config.eval.tasks,
        *config.eval.grids,
        *config.theta.tasks,
        *([config.dynamics.task] if config.dynamics.task else []),
    ]
    missing = [task for task in named if task not in config.tasks]
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


def check_batch(config, devices=None) -> None:
    """Raise ValueError where a part of a training batch does not divide over the mesh; other stages need no such mesh."""
    check_mesh(train_settings(config, "retmask", 0), make_mesh(config.mesh, devices))


def check_model(context: Context) -> None:
    """Raise ValueError where the model's context is too short for a task, or a file of scores is not this model's."""
    for name, task in context.config.tasks.items():
        check_fits(name, task, context.outline.config.max_length)
    context.check_files()
    if context.config.detect.scores is not None:
        given_scores(context)
    check_knockout_model(context)
    check_rope_model(context)
    check_detectors_model(context)
    check_dynamics_model(context)
    check_eval_model(context)


def _of_detection(config) -> set[str]:
    return {config.detect.task}


def _first_of_knockout(config) -> set[str]:
    return set(config.knockout.tasks[:1])


def _measured(config) -> set[str]:
    return {*config.eval.tasks, *config.eval.grids}


_PROMPTS = ("dtype", "prompt.*")
_DETECTION = ("detect.task", "detect.scores", "detect.max_new_tokens", "detect.released")
_EVALUATION = (*_PROMPTS, "eval.tasks", "eval.grids", "text.*")
STAGES = {
    "detect": Stage((), detect_stage, (*_PROMPTS, "detect.*"), _of_detection),
    "knockout": Stage(
        ("detect",), knockout_stage, (*_PROMPTS, "knockout.*", "text.*"), lambda config: config.knockout.tasks
    ),
    "rope": Stage(
        ("detect",),
        rope_stage,
        (*_PROMPTS, "rope.*", "text.*", "knockout.activity_windows"),
        lambda config: config.rope.tasks,
    ),
    "pairs": Stage(
        ("detect", "knockout"), pairs_stage, (*_PROMPTS, "pairs.*", "train.arms", "train.seeds"), inputs=prompt_prints
    ),
    "train": Stage(("pairs",), train_stage, ("dtype", "prompt.*", "pairs.template_kwargs", "train.*")),
    "eval": Stage(
        ("train",), eval_stage, (*_EVALUATION, "eval.masked", "train.arms", "train.seeds"), _measured, suite_prints
    ),
    "report": Stage(REPORTED, report_stage, model=False),
    "detectors": Stage(
        ("detect",),
        detectors_stage,
        (*_PROMPTS, "detectors.*", "knockout.tasks", *_DETECTION),
        lambda config: _of_detection(config) | _first_of_knockout(config),
    ),
    "utility": Stage(("detect",), utility_stage, ("dtype", "utility.*")),
    "theta": Stage(
        ("detect",),
        theta_stage,
        (*_PROMPTS, "theta.*", "knockout.tasks", *_DETECTION),
        lambda config: {*_of_detection(config), *(config.theta.tasks or _first_of_knockout(config))},
    ),
    "dynamics": Stage(
        (),
        dynamics_stage,
        (*_PROMPTS, "dynamics.*", "knockout.tasks", *_DETECTION, "detect.threshold", "text.*"),
        lambda config: (
            _of_detection(config) | ({config.dynamics.task} if config.dynamics.task else _first_of_knockout(config))
        ),
        checkpoint_prints,
    ),
    "compare": Stage((), compare_stage, _EVALUATION, _measured, compare_prints),
    "comparison": Stage(COMPARED, comparison_stage, model=False),
    "study": Stage(STUDIED, study_stage, model=False),
}
# What `retmask run` and `retmask study` do, in order.
RUN = (*STAGES["report"].upstream, "report")
STUDY = (*STAGES["study"].upstream, "study")
