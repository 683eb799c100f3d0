"""The stages of the pipeline: each reads a config and earlier results and returns its own result as JSON values."""

import dataclasses
import functools
import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from retmask_jax import memory, stats
from retmask_jax.arms import ARMS, pairs_stage, prompt_prints
from retmask_jax.causal_stages import (
    check_experiments,
    check_experiments_model,
    knockout_stage,
    rope_stage,
)
from retmask_jax.context import Context, named_files
from retmask_jax.data.preferences import PairRows, encode_blocks, kept_rows
from retmask_jax.data.released import iter_pairs
from retmask_jax.detect import detect, stability
from retmask_jax.end_tokens import Ends
from retmask_jax.eval_stages import (
    check_eval,
    check_eval_model,
    compare_prints,
    compare_stage,
    eval_stage,
    suite_prints,
)
from retmask_jax.evals.recall import check_fits
from retmask_jax.files import digest, is_whole, mark_whole, read_jsonl, write_jsonl
from retmask_jax.fingerprints import fingerprint
from retmask_jax.haystack import check_template
from retmask_jax.head_profile import profile
from retmask_jax.head_scores import HeadScores
from retmask_jax.limits import check_limits
from retmask_jax.lm import save
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import mask_heads
from retmask_jax.progress import track
from retmask_jax.recipes import flat
from retmask_jax.sharding import make_mesh
from retmask_jax.study_stages import (
    check_study,
    check_study_model,
    checkpoint_prints,
    detectors_stage,
    dynamics_stage,
    theta_stage,
    utility_stage,
)
from retmask_jax.train import check_mesh, train
from retmask_jax.training_settings import Settings
from retmask_jax.workdir import Basis, settings_of


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
    check_experiments(config)
    _check_tasks(config)
    if config.train.max_prompt_tokens >= config.train.max_tokens:
        raise ValueError(
            f"train.max_prompt_tokens {config.train.max_prompt_tokens} must be less than train.max_tokens "
            f"{config.train.max_tokens}, which also holds the answer"
        )
    check_study(config)
    check_eval(config)
    make_mesh(config.mesh, devices)
    train_settings(config, "retmask", 0)


def _check_tasks(config) -> None:
    """Raise ValueError for a task that is named and not there, and for one that lacks what its cases are made of."""
    named = [config.detect.task, *config.knockout.tasks, *config.rope.tasks, *config.eval.tasks, *config.eval.grids,
             *config.theta.tasks, *([config.dynamics.task] if config.dynamics.task else [])]  # fmt: skip
    missing = [task for task in named if task not in config.tasks]
    if missing:
        raise ValueError(f"there is no task {missing[0]!r} under tasks; there are {', '.join(config.tasks)}")
    bare = {"needles": "a JSONL file of needles or questions"}
    of_lengths = {"haystack": "a text file that is cut to tasks of these lengths", "depths": "at least one, such as 0.5"}
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
        _given_scores(context)
    check_experiments_model(context)
    check_study_model(context)
    check_eval_model(context)


def detect_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Head scores, the head set, its stability, and why cases did not count."""
    lm, section = context.lm, context.config.detect
    if section.scores is not None:
        return _detected(context, folder, _given_scores(context), [])
    cases = context.cases(section.task)
    found = detect(lm, cases, max_new_tokens=section.max_new_tokens, batch_size=context.config.batch_size,
                   released=section.released)  # fmt: skip
    rows = [
        {"length": c.spec.length, "depth": c.spec.depth, "expected": c.needle.answer, "answer": a, "outcome": o}
        for c, a, o in zip(cases, found.answers, found.outcomes, strict=True)
    ]
    write_jsonl(folder / "cases.jsonl", rows)
    return _detected(context, folder, found.scores, found.outcomes)


def train_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Every arm and seed trained from the same start, exported as an HF checkpoint."""
    config = context.config
    names = {f"{arm}-{seed}": (arm, seed) for arm in config.train.arms for seed in config.train.seeds}
    model, heads = context.outline.replace(params=None, source=context.source()), context.heads()
    start = {"model": context.model_fingerprint, "dtype": config.train.compute_dtype}
    runs = {}
    for name, (arm, seed) in names.items():
        target = folder / name
        rows, identity = _rows(context, model.config, name, target)
        if not is_whole(target / "model"):
            settings = train_settings(config, arm, seed)
            load_start = functools.partial(context.start_params, settings.start_dtype)
            params = train(
                model.config, load_start, rows, settings, target, context.mesh,
                fingerprint=digest(identity | start), what=f"train {name}",
                ablated=mask_heads(model.config, heads).fill(model.config) if arm == "contrast" else None,
            )  # fmt: skip
            trained = dataclasses.replace(model.config, lora=settings.lora)
            save(model.replace(config=trained, params=params), target / "model")
            mark_whole(target / "model")
        runs[name] = {
            "arm": arm, "seed": seed, "examples": len(rows), "answers_cut": rows.cut,
            "prompts_cut": rows.prompts_cut, "steps": read_jsonl(target / "metrics.jsonl"),
        }  # fmt: skip
    numbers = {
        f"train/{name}/final loss": stats.exact(run["steps"][-1]["loss"], run["examples"]) for name, run in runs.items()
    }
    return {"runs": runs, "numbers": numbers}


def _rows(context: Context, model: ModelConfig, name: str, target: Path) -> tuple[PairRows, dict[str, Any]]:
    """(token rows of an arm's pairs, what they were made from), encoded once and kept in target/rows."""
    section = context.config.train
    file = context.workdir.folder("pairs") / f"{name}.jsonl.gz"
    limits = {"max_tokens": section.max_tokens, "max_prompt_tokens": section.max_prompt_tokens}
    prompter = context.pairs_prompter
    ends = Ends.of(prompter.tokenizer, model.eos_ids, chat=prompter.chat, template_kwargs=prompter.template_kwargs)
    identity = {"data": fingerprint(file), "tokenizer": prompter.identity(), "end": ends.usual, **limits}

    def blocks() -> Iterator[PairRows]:
        n = sum(1 for _ in iter_pairs(file))
        if n < section.batch_size:
            raise ValueError(
                f"{name} kept {n} pairs, fewer than a batch of {section.batch_size}: "
                "add prompts or lower train.batch_size"
            )
        records = track(iter_pairs(file), n, f"tokenize {name}", "pair")
        return encode_blocks(prompter, records, ends=ends, **limits)

    return kept_rows(target / "rows", identity, blocks), identity


def report_stage(context: Context, folder: Path) -> dict[str, Any]:
    """One self-contained HTML page from the results of all stages."""
    from retmask_jax.report import write_report

    return _page(context, "report", write_report)


def study_stage(context: Context, folder: Path) -> dict[str, Any]:
    """One self-contained HTML page from the results of the causal study's stages."""
    from retmask_jax.study_report import write_study

    return _page(context, "study", write_study)


def comparison_stage(context: Context, folder: Path) -> dict[str, Any]:
    """One self-contained HTML page from the result of `compare`."""
    from retmask_jax.report import write_comparison

    return _page(context, "comparison", write_comparison)


def _page(context: Context, name: str, write: Callable[..., None]) -> dict[str, Any]:
    """NAME.html in the work directory, from the results of the stages before."""
    path = context.workdir.root / f"{name}.html"
    write(path, {stage: context.workdir.result(stage) for stage in STAGES[name].upstream}, str(context.config.model))
    return {"path": path.name, "numbers": {}}


def train_settings(config, arm: str, seed: int) -> Settings:
    """How one arm is trained."""
    section = config.train
    fields = {field.name for field in dataclasses.fields(Settings)} - {"objective", "seed"}
    objective = {"sft_filtered": "sft", "sft_unfiltered": "sft", "contrast": "contrast"}.get(arm, "dpo")
    return Settings(objective=objective, seed=seed, **{name: section[name] for name in fields})


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
    "knockout": Stage(("detect",), knockout_stage, (*_PROMPTS, "knockout.*", "text.*"), lambda config: config.knockout.tasks),
    "rope": Stage(("detect",), rope_stage, (*_PROMPTS, "rope.*", "text.*", "knockout.activity_windows"),
                  lambda config: config.rope.tasks),
    "pairs": Stage(("detect", "knockout"), pairs_stage, (*_PROMPTS, "pairs.*", "train.arms", "train.seeds"),
                   inputs=prompt_prints),
    "train": Stage(("pairs",), train_stage, ("dtype", "prompt.*", "pairs.template_kwargs", "train.*")),
    "eval": Stage(("train",), eval_stage, (*_EVALUATION, "eval.masked", "train.arms", "train.seeds"), _measured, suite_prints),
    "report": Stage(("detect", "knockout", "rope", "pairs", "train", "eval"), report_stage, model=False),
    "detectors": Stage(("detect",), detectors_stage, (*_PROMPTS, "detectors.*", "knockout.tasks", *_DETECTION),
                       lambda config: _of_detection(config) | _first_of_knockout(config)),
    "utility": Stage(("detect",), utility_stage, ("dtype", "utility.*")),
    "theta": Stage(("detect",), theta_stage, (*_PROMPTS, "theta.*", "knockout.tasks", *_DETECTION), lambda config: {
        *_of_detection(config), *(config.theta.tasks or _first_of_knockout(config))}),
    "dynamics": Stage((), dynamics_stage, (*_PROMPTS, "dynamics.*", "knockout.tasks", *_DETECTION, "detect.threshold", "text.*"),
                      lambda config: _of_detection(config) | ({config.dynamics.task} if config.dynamics.task else
                                                              _first_of_knockout(config)), checkpoint_prints),
    "compare": Stage((), compare_stage, _EVALUATION, _measured, compare_prints),
    "comparison": Stage(("compare",), comparison_stage, model=False),
    "study": Stage(("detect", "detectors", "knockout", "rope", "utility", "theta", "dynamics"), study_stage, model=False),
}  # fmt: skip
# What `retmask run` and `retmask study` do, in order.
RUN = (*STAGES["report"].upstream, "report")
STUDY = (*STAGES["study"].upstream, "study")


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
        "heads": heads, "scores": [float(scores.mean[head]) for head in heads],
        "mean": scores.mean.tolist(), "threshold": section.threshold, "outcomes": dict(Counter(outcomes)),
        "n_kv_heads": lm.config.n_kv_heads,
        "profile": {name: stats.defined(value) for name, value in shape.items()},
        "stability": stability(scores, **selection), "mask_hash": _mask_hash(lm, heads),
        "numbers": numbers | {
            "detect/heads": stats.exact(len(heads), cases),
            "detect/top score": stats.bootstrap_mean(scores.per_case[heads[0]]),
            "detect/gini": stats.exact(shape["gini"], cases),
        },
    }  # fmt: skip


def _given_scores(context: Context) -> HeadScores:
    scores, config = HeadScores.load(context.config.detect.scores), context.outline.config
    if scores.mean.shape != (config.n_layers, config.n_heads):
        raise ValueError(
            f"{context.config.detect.scores} scores {scores.mean.shape[0]} layers of {scores.mean.shape[1]} heads, "
            f"the model has {config.n_layers} of {config.n_heads}"
        )
    return scores


def _mask_hash(lm, heads) -> str:
    return digest(np.asarray(mask_heads(lm.config, heads).head_mask).tobytes())
