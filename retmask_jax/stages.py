"""The stages of the pipeline: each reads a config and earlier results and returns its own result as JSON values."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from retmask_jax import memory, stats
from retmask_jax.arms import ARMS, pairs_stage
from retmask_jax.causal_stages import (
    check_experiments,
    check_experiments_model,
    knockout_stage,
    rope_stage,
)
from retmask_jax.context import Context
from retmask_jax.data.preferences import PairRows, encode_pairs, kept_rows
from retmask_jax.data.released import read_pairs
from retmask_jax.detect import detect, stability
from retmask_jax.eval_stages import check_eval, check_eval_model, compare_stage, eval_stage, suite_prints
from retmask_jax.evals.recall import check_fits
from retmask_jax.files import digest, read_jsonl, write_jsonl
from retmask_jax.haystack import check_template
from retmask_jax.head_profile import profile
from retmask_jax.head_scores import HeadScores
from retmask_jax.hosts import primary, wait_for_all
from retmask_jax.limits import check_limits
from retmask_jax.lm import save
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import mask_heads
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
from retmask_jax.workdir import fingerprint


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage: the stages it reads, the function, and fingerprints of what it alone reads beside them."""

    upstream: tuple[str, ...]
    function: Callable[[Context, Path], dict[str, Any]]
    inputs: Callable[[Context], dict[str, Any]] = lambda context: {}


def run_stage(context: Context, name: str) -> tuple[dict[str, Any], bool]:
    """(result, skipped) of one stage."""
    stage = STAGES[name]
    for needed in stage.upstream:
        context.workdir.result(needed)
    run = functools.partial(stage.function, context)
    try:
        return context.workdir.run(name, stage.upstream, context.inputs() | stage.inputs(context), run)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        setting = {"train": "train.microbatch_size", "pairs": "pairs.batch_size"}.get(name, "batch_size")
        raise memory.explain(error, name, f"lower {setting}, shorten the texts, or use more devices") from error


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
        check_fits(name, task, context.lm.config.max_length)
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
    model, heads = context.lm.replace(params=None), context.heads()
    start = {"model": context.model_fingerprint(), "dtype": config.train.compute_dtype}
    runs = {}
    for name, (arm, seed) in names.items():
        target = folder / name
        rows, identity = _rows(context, model.config, name, target)
        if not (target / "model").exists():
            settings = train_settings(config, arm, seed)
            params = train(
                model.config, context.release_params, rows, settings, target, context.mesh,
                fingerprint=digest(identity | start), what=f"train {name}",
                ablated=mask_heads(model.config, heads).fill(model.config) if arm == "contrast" else None,
            )  # fmt: skip
            save(model.replace(params=params), target / "model.part")
            if primary():
                (target / "model.part").rename(target / "model")
            wait_for_all("the model is written")
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
    identity = {"data": fingerprint(file), "tokenizer": context.pairs_prompter.identity(), **limits}

    def encode() -> PairRows:
        records = read_pairs(file)
        if len(records) < section.batch_size:
            raise ValueError(
                f"{name} kept {len(records)} pairs, fewer than a batch of {section.batch_size}: "
                "add prompts or lower train.batch_size"
            )
        return encode_pairs(context.pairs_prompter, records, eos_id=model.eos_ids[0], **limits)

    return kept_rows(target / "rows", identity, encode), identity


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


STAGES = {
    "detect": Stage((), detect_stage),
    "knockout": Stage(("detect",), knockout_stage),
    "rope": Stage(("detect",), rope_stage),
    "pairs": Stage(("detect", "knockout"), pairs_stage),
    "train": Stage(("pairs",), train_stage),
    "eval": Stage(("train",), eval_stage, suite_prints),
    "report": Stage(("detect", "knockout", "rope", "pairs", "train", "eval"), report_stage),
    "detectors": Stage(("detect",), detectors_stage),
    "utility": Stage(("detect",), utility_stage),
    "theta": Stage(("detect",), theta_stage),
    "dynamics": Stage((), dynamics_stage, checkpoint_prints),
    "compare": Stage((), compare_stage, suite_prints),
    "comparison": Stage(("compare",), comparison_stage),
    "study": Stage(("detect", "detectors", "knockout", "rope", "utility", "theta", "dynamics"), study_stage),
}
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
    scores, config = HeadScores.load(context.config.detect.scores), context.lm.config
    if scores.mean.shape != (config.n_layers, config.n_heads):
        raise ValueError(
            f"{context.config.detect.scores} scores {scores.mean.shape[0]} layers of {scores.mean.shape[1]} heads, "
            f"the model has {config.n_layers} of {config.n_heads}"
        )
    return scores


def _mask_hash(lm, heads) -> str:
    return digest(np.asarray(mask_heads(lm.config, heads).head_mask).tobytes())
