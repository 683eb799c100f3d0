"""The stage `compare`: the config's model against any others, on the recipe's tasks and suites; nothing is trained."""

from pathlib import Path
from typing import Any

from retmask_jax.evals.compare import START
from retmask_jax.runs.context import Context, checkpoint_fingerprint
from retmask_jax.runs.stage import Stage
from retmask_jax.stages.eval import CONTRAST, MASKED, SETTINGS, Contender, EvalResult, compared, suite_prints, tasks_of


def compare_stage(context: Context, folder: Path) -> EvalResult:
    """Measure the config's model and those of `eval.models` on all tasks and suites, paired by sample."""
    contenders = {START: Contender(START, 0, lambda: context.lm)}
    for name, source in context.config.eval.models.items():
        contenders[name] = Contender(name, 0, lambda source=source: context.load(source))
    return compared(context, contenders)


def _inputs(context: Context) -> dict[str, Any]:
    models, ignore = context.config.eval.models.items(), context.config.ignore
    prints = {f"weights of {name}": checkpoint_fingerprint(source, ignore) for name, source in models}
    return suite_prints(context) | prints


def _check(config) -> None:
    for name, source in config.eval.models.items():
        if name in (START, MASKED, CONTRAST) or not source or not isinstance(source, str):
            raise ValueError(
                f"eval.models has {name!r}: {source!r}; give each folder or hub id a name, not {START}, {MASKED} or {CONTRAST}"
            )


def _check_run(config) -> None:
    if not config.eval.models:
        raise ValueError("nothing is compared with the model: give others as --compare NAME=FOLDER_OR_HUB_ID")


COMPARE = Stage(
    name="compare",
    work=compare_stage,
    result=EvalResult,
    settings=SETTINGS,
    tasks=tasks_of,
    inputs=_inputs,
    check=_check,
    check_run=_check_run,
)
