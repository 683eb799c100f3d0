"""The stage `train`: every arm and seed trained from the same start, exported as an HF checkpoint."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec
from ml_collections import ConfigDict

from retmask_jax.data.pair_formats import iter_pairs
from retmask_jax.data.pair_rows import PairRows, encode_blocks, kept_rows
from retmask_jax.generation.language_model import LanguageModel, save
from retmask_jax.heads.conditions import answers
from retmask_jax.hf.end_tokens import Ends
from retmask_jax.model.interventions import Head, Interventions, mask_heads
from retmask_jax.model.sharding import make_mesh
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.runs.workdir import Example, Result, differing, settings_of
from retmask_jax.stages.arms import ARMS
from retmask_jax.stages.detect import retrieval_heads
from retmask_jax.stages.pairs import PAIRS
from retmask_jax.stages.trained_heads import check_choice, check_file, file_prints, trained_heads
from retmask_jax.training.loop import check_mesh, train
from retmask_jax.training.optimizer import count_trained
from retmask_jax.training.settings import Settings
from retmask_jax.utils import stats
from retmask_jax.utils.files import is_whole, mark_whole, read_json, read_jsonl, write_json
from retmask_jax.utils.fingerprints import fingerprint
from retmask_jax.utils.progress import track

_MADE = "made.json"  # in the folder of a run: what it is made from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The numbers of one step, a line of metrics.jsonl.

    The rewards (nats), their margin and the accuracy are None for objectives other than preference; what a device does
    not say (share of its peak, largest GiB in use) is None, too.
    """

    step: int
    loss: float
    gradient_norm: float
    parameter_norm: float
    learning_rate: float
    reward_chosen: float | None = None
    reward_rejected: float | None = None
    margin: float | None = None
    accuracy: float | None = None
    tokens_per_second: float | None = None
    flops_utilisation: float | None = None
    memory_gib: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """An arm trained with one seed: its pairs, how many of their answers and prompts were cut, and its steps.

    trained_parameters: how many parameters, or entries of adapters, were trained; None in results of older versions.
    """

    arm: str
    seed: int
    examples: int
    answers_cut: int
    prompts_cut: int
    trained_parameters: int | None = None
    steps: list[Step]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult(Result):
    """The runs by name, "ARM-SEED"."""

    runs: dict[str, Run]


def train_stage(context: Context, folder: Path) -> TrainResult:
    """Train every arm and seed from the same start and export each as an HF checkpoint."""
    section, model = context.config.train, context.outline.replace(params=None, source=context.source())
    runs, settings = {}, _runs(context)
    for arm in section.arms:
        for seed in section.seeds:
            name = f"{arm}-{seed}"
            runs[name] = trained_run(context, model, arm, settings[name], folder)
    shown = list(runs)[:1] if section.examples else []
    examples = [example for name in shown for example in _examples(context, folder / name)]
    numbers = {f"train/{name}/final loss": stats.exact(run.steps[-1].loss, run.examples) for name, run in runs.items()}
    return TrainResult(runs=runs, numbers=numbers, examples=examples)


def train_settings(config: ConfigDict, arm: str, seed: int, heads: Sequence[Head] | None = None) -> Settings:
    """How one arm is trained, and which heads of it; None: all parameters."""
    section = config.train
    fields = {field.name for field in dataclasses.fields(Settings)} - {"objective", "seed", "heads"}
    chosen = None if heads is None else tuple(heads)
    return Settings(objective=ARMS[arm].objective, seed=seed, heads=chosen, **{name: section[name] for name in fields})


def trained_run(context: Context, model: LanguageModel, arm: str, settings: Settings, folder: Path) -> Run:
    """Train one arm with one seed into folder/ARM-SEED, unless its exported model is there and whole.

    The model has no parameters yet. What the run is made from is noted there, for `unchanged`.
    """
    target = folder / f"{arm}-{settings.seed}"
    identity = _rows_from(context, target.name)
    write_json(target / _MADE, _made_from(context, identity, settings))
    rows = _rows(context, target, identity)
    if not is_whole(target / "model"):
        identity |= {"model": context.model_fingerprint, "dtype": settings.compute_dtype}
        contrast = settings.objective == "contrast"
        params = train(
            model.config,
            functools.partial(context.start_params, settings.start_dtype),
            rows,
            settings,
            target,
            context.mesh,
            identity=identity,
            what=f"train {target.name}",
            ablated=mask_heads(model.config, retrieval_heads(context)) if contrast else None,
            reference=_reference(context, target, identity),
        )
        trained = dataclasses.replace(model.config, lora=settings.lora)
        save(model.replace(config=trained, params=params), target / "model")
        mark_whole(target / "model")
    steps = msgspec.convert(read_jsonl(target / "metrics.jsonl"), list[Step])
    cut = {"answers_cut": rows.cut, "prompts_cut": rows.prompts_cut}
    trained = count_trained(model.config, settings)
    return Run(arm=arm, seed=settings.seed, examples=len(rows), trained_parameters=trained, steps=steps, **cut)


def unchanged(context: Context, folder: Path, runs: Mapping[str, Settings]) -> list[str]:
    """Those of some runs, {path in the folder: settings}, that were made from what they would be made from now, whether
    they have ended or not."""

    def made(name: str) -> bool:
        note = folder / name / _MADE
        if not note.exists():
            return False
        wanted = _made_from(context, _rows_from(context, note.parent.name), runs[name])
        return not differing(read_json(note), wanted)

    return [name for name in runs if made(name)]


def left_to_train(context: Context, stage: str, runs: Callable[[Context], Mapping[str, Settings]], n: int) -> int:
    """How many of the n runs of a stage have no model that `unchanged` would keep."""
    if not context.workdir.is_finished(PAIRS.name):
        return n
    folder = context.workdir.folder(stage)
    return n - sum(is_whole(folder / name / "model") for name in unchanged(context, folder, runs(context)))


def _made_from(context: Context, rows_from: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """All that decides a run, {name: JSON value}: its rows, model, settings, and the heads that an objective masks."""
    masked = sorted(retrieval_heads(context)) if settings.objective == "contrast" else []
    of_settings = msgspec.json.decode(msgspec.json.encode(settings))  # with lists for tuples, as a file has them
    made = {"model": context.model_fingerprint, "masked": [list(head) for head in masked], "train": of_settings}
    return rows_from | settings_of(made)


def _runs(context: Context) -> dict[str, Settings]:
    """{name of a run, ARM-SEED: how it is trained}."""
    arms, seeds = context.config.train.arms, context.config.train.seeds
    return {
        f"{arm}-{seed}": train_settings(context.config, arm, seed, trained_heads(context, arm, seed))
        for arm in arms
        for seed in seeds
    }


def _reference(context: Context, target: Path, identity: dict[str, Any]) -> Path:
    """Where runs on the same pairs find the start model's log-probabilities of them, whatever they train and how fast."""
    begun = target / "reference"  # by a version in which each run had its own
    return begun if begun.exists() else context.measured("reference", identity)


def check_batch(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Raises ValueError where a part of a batch does not divide over the mesh of these devices (None: all)."""
    check_mesh(train_settings(config, "retmask", 0), make_mesh(config.mesh, devices))


def _rows_from(context: Context, name: str) -> dict[str, Any]:
    """What the token rows of a run are made from, {name: JSON value}: its pairs, the tokenizer and the limits."""
    data, tokenizer = fingerprint(_pairs_file(context, name)), context.pairs_prompter.identity()
    return {"data": data, "tokenizer": tokenizer, "end": _ends(context).usual, **_limits(context)}


def _rows(context: Context, target: Path, identity: dict[str, Any]) -> PairRows:
    """The token rows of a run's pairs, encoded once and kept in target/rows; identity: as of `_rows_from`."""
    section, name, file = context.config.train, target.name, _pairs_file(context, target.name)

    def blocks() -> Iterator[PairRows]:
        n = sum(1 for _ in iter_pairs(file))
        if n < section.batch_size:
            raise ValueError(
                f"{name} kept {n} pairs, fewer than a batch of {section.batch_size}: "
                "add prompts or lower train.batch_size"
            )
        records = track(iter_pairs(file), n, f"tokenize {name}", "pair")
        return encode_blocks(context.pairs_prompter, records, ends=_ends(context), **_limits(context))

    return kept_rows(target / "rows", identity, blocks)


def _pairs_file(context: Context, name: str) -> Path:
    folder = context.workdir.folder(PAIRS.name)
    if not (file := folder / f"{name}.jsonl.gz").exists():
        raise ValueError(
            f"{file} is gone, which `retmask pairs` has written: move {folder} away and run it again; answers that were "
            "sampled are found in `measured`"
        )
    return file


def _limits(context: Context) -> dict[str, int]:
    section = context.config.train
    return {"max_tokens": section.max_tokens, "max_prompt_tokens": section.max_prompt_tokens}


def _ends(context: Context) -> Ends:
    prompter, eos_ids = context.pairs_prompter, context.outline.config.eos_ids
    return Ends.of(prompter.tokenizer, eos_ids, chat=prompter.chat, template_kwargs=prompter.template_kwargs)


def _examples(context: Context, run: Path) -> list[Example]:
    """The first cases of the first task with a context, as answered before and after a run."""
    config, task = context.config, _shown_task(context.config)
    if task is None:
        return []
    cases = context.cases(task)[: config.train.examples]
    options = {"max_new_tokens": config.tasks[task].max_new_tokens, "batch_size": config.batch_size, "what": "examples"}
    (before,) = answers(context.lm, cases, [Interventions()], **options)
    context.release()
    (after,) = answers(context.load(run / "model"), cases, [Interventions()], **options)
    replies = zip(cases, before, after, strict=True)
    return [Example.of(case.needle, {"before": first, "after": then}) for case, first, then in replies]


def _shown_task(config) -> str | None:
    return next((task for task in config.eval.tasks if config.tasks[task].lengths), None)


def _check(config) -> None:
    if config.train.max_prompt_tokens >= config.train.max_tokens:
        raise ValueError(
            f"train.max_prompt_tokens {config.train.max_prompt_tokens} must be less than train.max_tokens "
            f"{config.train.max_tokens}, which also holds the answer"
        )
    train_settings(config, "retmask", 0)
    check_choice(config)


def training_tokens(config: ConfigDict) -> int:
    """About how many tokens one run is trained on."""
    section = config.train
    answer = section.max_tokens - section.max_prompt_tokens
    # on average they are half full
    return section.steps * section.batch_size * (section.max_prompt_tokens + 2 * answer) // 2


def _cost(context: Context) -> Cost:
    section = context.config.train
    task = _shown_task(context.config)
    read = 2 * section.examples * max(context.config.tasks[task].lengths) if task else 0
    runs = left_to_train(context, TRAIN.name, _runs, len(section.arms) * len(section.seeds))
    return Cost(read=read, trained=runs * training_tokens(context.config))


TRAIN = Stage(
    name="train",
    work=train_stage,
    result=TrainResult,
    upstream=(PAIRS,),
    settings=(*PROMPTS, "pairs.template_kwargs", "train.*"),
    inputs=file_prints,
    stays=lambda context, folder: unchanged(context, folder, _runs(context)),
    batch_key="train.microbatch_size",
    check=_check,
    check_run=check_batch,
    check_model=check_file,
    cost=_cost,
)
