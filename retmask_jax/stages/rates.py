"""The stage `rates`: the arm retmask at several learning rates, measured on cases that `eval` does not report."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from retmask_jax.data.builtin_files import path_of
from retmask_jax.data.needles import read_sentences
from retmask_jax.evals.compare import RETMASK, START, ArmRow, arm_rows
from retmask_jax.evals.perplexity import text_windows
from retmask_jax.heads.conditions import UNTOUCHED
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, task_cost
from retmask_jax.runs.stage import PROMPTS, Stage, Table
from retmask_jax.runs.workdir import Result
from retmask_jax.stages.outcomes import FROM_MEMORY, task_outcomes, text_losses
from retmask_jax.stages.pairs import PAIRS
from retmask_jax.stages.train import left_to_train, train_settings, trained_run, training_tokens, unchanged
from retmask_jax.stages.trained_heads import file_prints, trained_heads
from retmask_jax.training.settings import Settings

_LOSS = "text loss"
_SET_HERE = ("objective", "seed", "learning_rate", "final_learning_rate", "heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatesResult(Result):
    """What each learning rate does to the development tasks.

    Attributes:
        rows: Of the start model and of each rate, which is the name of the arm.
        chosen: The rate whose mean gain over the tasks is highest, of those at which the loss on text rises by at most
            `most_loss` (nats); of equal ones the lowest. Where it rises more at every rate, the lowest rate.
        last: Where the cosine ends at that rate.
        most_loss: As in the config.
    """

    rows: list[ArmRow]
    chosen: float
    last: float
    most_loss: float


def rates_stage(context: Context, folder: Path) -> RatesResult:
    """Trains at every rate from the same start on the same pairs; models stay in the folder."""
    section = context.config.rates
    model = context.outline.replace(params=None, source=context.source())
    samples = {START: _samples(context)}
    for name, settings in _runs(context).items():
        rate = f"{settings.learning_rate:g}"
        trained_run(context, model, RETMASK, settings, folder / rate)
        samples[rate] = _samples(context.of(context.load(folder / name / "model")))
    rows = arm_rows(samples, {name: [name] for name in samples if name != START})
    chosen = choose(rows, section.learning_rates, section.most_loss)
    return RatesResult(
        rows=rows,
        chosen=chosen,
        last=_last_share(context.config) * chosen,
        most_loss=section.most_loss,
        numbers={f"rates/{row.task}/{row.arm} minus {START}": row.change for row in rows if row.change is not None},
    )


def _runs(context: Context) -> dict[str, Settings]:
    """{folder of a run, RATE/ARM-SEED: how it is trained}, the arm retmask with the first seed."""
    seed = context.config.train.seeds[0]
    usual = train_settings(context.config, RETMASK, seed, trained_heads(context, RETMASK, seed))
    share = _last_share(context.config)
    return {
        f"{rate:g}/{RETMASK}-{seed}": dataclasses.replace(usual, learning_rate=rate, final_learning_rate=share * rate)
        for rate in context.config.rates.learning_rates
    }


def _last_share(config: ConfigDict) -> float:
    return config.train.final_learning_rate / config.train.learning_rate


def choose(rows: Sequence[ArmRow], rates: Sequence[float], most_loss: float) -> float:
    """The rate of `RatesResult.chosen`."""
    changes: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.change is not None and not row.task.endswith(FROM_MEMORY):
            changes.setdefault(row.arm, {})[row.task] = row.change.estimate
    good = [rate for rate in sorted(rates) if changes[f"{rate:g}"].get(_LOSS, 0.0) <= most_loss]
    return max(good, key=lambda rate: _gain(changes[f"{rate:g}"]), default=min(rates))


def _gain(changes: Mapping[str, float]) -> float:
    return float(np.mean([change for task, change in changes.items() if task != _LOSS]))


def _samples(there: Context) -> dict[str, np.ndarray]:
    """Values by task, and of the text after the windows that other stages read."""
    config = there.config
    answered = task_outcomes(there, config.rates.tasks, [UNTOUCHED])
    samples = {task: outcome_CN[0] for task, outcome_CN in answered.outcomes.items()}
    if (text := config.text).file:
        sentences = read_sentences(path_of(text.file))
        windows = text_windows(there.outline.tokenizer, sentences, text.length, 2 * text.windows)[text.windows :]
        samples[_LOSS] = text_losses(there, windows, [UNTOUCHED])[0]
    return samples


def _check(config) -> None:
    if reported := [task for task in config.rates.tasks if task in (*config.eval.tasks, *config.eval.grids)]:
        raise ValueError(f"rates.tasks has {reported[0]!r}, which eval reports: a rate is chosen on other cases")
    if len(set(config.rates.learning_rates)) < len(config.rates.learning_rates):
        raise ValueError(f"rates.learning_rates {tuple(config.rates.learning_rates)} repeat a rate: name each once")


def _check_run(config) -> None:
    for name, words in (("learning_rates", "several rates"), ("tasks", "tasks that eval does not report")):
        if not config.rates[name]:
            raise ValueError(f"rates.{name} is empty: name {words}")
    if RETMASK not in config.train.arms:
        raise ValueError(f"train.arms lacks {RETMASK}, whose pairs the rates are tried on: add it")


def _tables(result: RatesResult) -> list[Table]:
    rates = {"train.learning_rate": result.chosen, "train.final_learning_rate": result.last}
    flags = " ".join(f"--config.{key}={rate:g}" for key, rate in rates.items())
    return [Table(("chosen learning rate", "for the stages after it"), [(f"{result.chosen:g}", flags)])]


def _cost(context: Context) -> Cost:
    config, rates = context.config, len(context.config.rates.learning_rates)
    left = left_to_train(context, RATES.name, _runs, rates)
    measured = sum((task_cost(config, task) for task in config.rates.tasks), Cost())
    text = Cost(config.text.windows * config.text.length if config.text.file else 0)
    return (1 + rates) * (measured + text) + Cost(trained=left * training_tokens(config))


RATES = Stage(
    name="rates",
    work=rates_stage,
    result=RatesResult,
    upstream=(PAIRS,),
    settings=(
        *PROMPTS,
        "pairs.template_kwargs",
        "rates.*",
        "text.*",
        "train.heads",
        "train.seeds",
        *(f"train.{field.name}" for field in dataclasses.fields(Settings) if field.name not in _SET_HERE),
    ),
    tasks=lambda config: config.rates.tasks,
    inputs=file_prints,
    stays=lambda context, folder: unchanged(context, folder, _runs(context)),
    batch_key="train.microbatch_size",
    check=_check,
    check_run=_check_run,
    tables=_tables,
    cost=_cost,
)
