"""Variants of a model: the same weights with another RoPE base, and the checkpoints of a training run."""

import dataclasses
import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from retmask_jax.generation.language_model import LanguageModel

_COMMIT = re.compile("[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model at some step of its training.

    Attributes:
        source: A folder, or a hub id.
        revision: Of the hub id; None for a folder.
        step: By which checkpoints are ordered.
    """

    source: str
    revision: str | None
    step: int

    @property
    def name(self) -> str:
        return self.source if self.revision is None else f"{self.source}@{self.revision}"


def with_base(lm: LanguageModel, factor: float) -> LanguageModel:
    """Returns the model with every RoPE base (theta) multiplied by a factor; 1 gives an equal config.

    The config is static, so each base compiles its own programs. Scalings (llama3, yarn, ...) stay and apply to the new
    base.

    Raises:
        ValueError: The factor is not positive.
    """
    if not factor > 0:
        raise ValueError(f"the RoPE base is multiplied by {factor}: factors must be positive")

    def scaled(rope):
        return rope and dataclasses.replace(rope, theta=rope.theta * factor)

    config = lm.config
    return lm.replace(
        config=dataclasses.replace(config, rope=scaled(config.rope), sliding_rope=scaled(config.sliding_rope))
    )


def find_checkpoints(names: Sequence[str]) -> list[Checkpoint]:
    """Lists checkpoints in the order of their steps; fetches and reads nothing.

    The step is the number after "step" in the folder's name or the revision, else the last number in it. If any of them
    has no number, all are numbered in the order given.

    Args:
        names: Folders, patterns of folders (runs/x/step_*), and hub ids with a revision (owner/name@step1000).

    Raises:
        ValueError: A name is none of these, or two checkpoints have the same step.
    """
    found = [pair for name in names for pair in _matching(name)]
    numbers = [_step(Path(source).name if revision is None else revision) for source, revision in found]
    steps = list(range(len(found))) if None in numbers else [number for number in numbers if number is not None]
    checkpoints = [Checkpoint(*pair, step) for pair, step in zip(found, steps, strict=True)]
    for step, n in Counter(steps).items():
        if n > 1:
            same = [checkpoint.name for checkpoint in checkpoints if checkpoint.step == step]
            raise ValueError(f"{same[0]} and {same[1]} are both of step {step}: name checkpoints of one training run")
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def _matching(name: str) -> list[tuple[str, str | None]]:
    """Returns the (source, revision) of each checkpoint that a name stands for."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return [(path, None)]
    if glob.has_magic(path):
        folders = sorted(folder for folder in glob.glob(path) if os.path.isdir(folder))
        if not folders:
            raise ValueError(f"no folder matches the checkpoints {name}: check the pattern")
        return [(folder, None) for folder in folders]
    source, at, revision = name.partition("@")
    if at and revision and source.count("/") == 1:
        return [(source, revision)]
    raise ValueError(
        f"checkpoint {name} is not there: name a folder, a pattern of folders, or a hub id with its revision "
        "(owner/name@revision)"
    )


def _step(name: str) -> int | None:
    """Returns 200 for "step_200", 1000 for "stage1-step1000-tokens5B", 500 for "checkpoint-500", None for a commit."""
    numbers = [] if _COMMIT.fullmatch(name) else re.findall(r"step\D?(\d+)", name) or re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None
