"""A stage of the pipeline as one object: what it reads, its checks, its work and the type of its result."""

import dataclasses
import glob
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple

from retmask_jax.runs.context import Context, named_files
from retmask_jax.runs.costs import Cost
from retmask_jax.runs.workdir import R, settings_of

SHOWN = 3  # examples of answers in a result


class Table(NamedTuple):
    """A table to print."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Generic[R]):
    """A stage: its name is the command, the section of the config and the folder in the work directory.

    Attributes:
        work: Computes the result; its second argument is the folder for the files of the stage.
        result: The type of what `work` returns, which `of` reads back.
        upstream: The stages whose results it reads.
        settings: Patterns of the config's keys that decide its result.
        tasks: Names of the tasks it answers, whose sections decide its result, too.
        inputs: Fingerprints of files that it alone reads.
        stays: Names of folders within its own that are as they would be made again, and stay where the stage is.
        needs_model: Whether it needs the model, or works on results alone.
        batch_key: The config's key that lowers the memory it takes.
        check: Raises ValueError for a config that could only fail later, before anything runs.
        check_run: Raises ValueError where other stages can run with the config and this one cannot.
        check_model: Raises ValueError where the settings do not suit the model or its files.
        check_fit: Raises ValueError where other stages can run on the model and this one cannot.
        tables: What is printed at its end besides its numbers and examples.
        cost: About how many tokens it reads and writes, for the time that is said beforehand.
    """

    name: str
    work: Callable[[Context, Path], R]
    result: type[R]
    upstream: "tuple[Stage, ...]" = ()
    settings: tuple[str, ...] = ()
    tasks: Callable[[Any], Iterable[str]] = lambda config: ()
    inputs: Callable[[Context], dict[str, Any]] = lambda context: {}
    stays: Callable[[Context, Path], Iterable[str]] = lambda context, folder: ()
    needs_model: bool = True
    batch_key: str = "batch_size"
    check: Callable[[Any], None] = lambda config: None
    check_run: Callable[[Any], None] = lambda config: None
    check_model: Callable[[Context], None] = lambda context: None
    check_fit: Callable[[Context], None] = lambda context: None
    tables: Callable[[R], list[Table]] = lambda result: []
    cost: Callable[[Context], Cost] = lambda context: Cost()

    def of(self, context: Context) -> R:
        """The result of this stage in the work directory; ValueError if it has not run."""
        return context.workdir.result(self.name, self.result)


def settings_read(context: Context, stage: Stage) -> dict[str, Any]:
    """{key: value} of the config that decide a stage's result."""
    of_tasks = [f"tasks.{glob.escape(task)}.*" for task in stage.tasks(context.config)]
    of_model = ["ignore"] if stage.needs_model else []
    return settings_of(context.workdir.config, (*stage.settings, *of_tasks, *of_model))


def inputs_read(context: Context, stage: Stage) -> dict[str, Any]:
    """Fingerprints of the files that decide a stage's result: the model's, those that its settings name, its own."""
    weights = {"weights": context.model_fingerprint} if stage.needs_model else {}
    named = context.fingerprints(named_files(settings_read(context, stage)))
    return weights | {f"file {file}": of_it for file, of_it in named.items()} | stage.inputs(context)


PROMPTS = ("dtype", "prompt.*")  # settings of every stage that asks a model
