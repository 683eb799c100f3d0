"""Which heads an arm trains: all of the model, the retrieval heads, others, as many others, or those of a file."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from retmask_jax.data.builtin_files import path_of
from retmask_jax.heads.lists.formats import read_heads
from retmask_jax.model.interventions import Head, all_heads, layer_matched
from retmask_jax.runs.context import Context
from retmask_jax.stages.arms import ARMS
from retmask_jax.stages.detect import choose_heads, retrieval_heads
from retmask_jax.utils.fingerprints import fingerprint

_WORDS = ("all", "retrieval", "others", "matched")
_OF_HEADS = ("q", "k", "v", "o")


def trained_heads(context: Context, arm: str, seed: int) -> Sequence[Head] | None:
    """The heads that an arm trains; None: it trains all parameters. seed: of the training, which draws matched heads.

    Raises:
        ValueError: Detection has not run, too few heads are no retrieval heads where others are wanted, or as of
            `check_file`.
    """
    match _choice(context.config, arm):
        case "all":
            return None
        case "retrieval":
            return retrieval_heads(context)
        case "others":
            return _others(context)
        case "matched":
            return layer_matched(context.outline.config, retrieval_heads(context), seed)
        case file:
            return _read(context, file)


def check_choice(config: ConfigDict) -> None:
    """Raises ValueError for settings that leave open what is trained, or ask for what nothing does."""
    section, choices = config.train, {_choice(config, arm) for arm in config.train.arms}
    for choice in sorted(choices - set(_WORDS)):
        if not path_of(choice).is_file():
            raise ValueError(
                f"train.heads is {choice!r}; it must be {', '.join(_WORDS)} or a file of heads, and there is no such file"
            )
    some = choices - {"all"}
    if section.mlp and not some:
        raise ValueError(
            "train.mlp is True, which only goes with some heads: with train.heads=all the MLPs are trained anyway"
        )
    if some and section.lora_rank and not set(section.lora_targets) & set(_OF_HEADS):
        raise ValueError(
            f"an arm trains the heads {min(some)!r}, and train.lora_targets {tuple(section.lora_targets)} has no layer of "
            f"heads: add one of {', '.join(_OF_HEADS)}"
        )


def check_file(context: Context) -> None:
    """Raises ValueError where a file of heads is malformed, names no head, or one that the model does not have."""
    for file in _files(context.config):
        _read(context, file)


def file_prints(context: Context) -> dict[str, Any]:
    """The fingerprint of the file that heads are read from."""
    return {f"heads of {file}": fingerprint(path_of(file)) for file in _files(context.config)}


def _choice(config: ConfigDict, arm: str) -> str:
    return ARMS[arm].heads or config.train.heads


def _files(config: ConfigDict) -> list[str]:
    return sorted({_choice(config, arm) for arm in config.train.arms} - set(_WORDS))


def _others(context: Context) -> list[Head]:
    heads, retrieving = all_heads(context.outline.config), set(retrieval_heads(context))
    others = [head for head in heads if head not in retrieving]
    if not others:
        raise ValueError(
            f"all {len(heads)} heads of the model are retrieval heads, so no others can be trained: raise detect.threshold"
        )
    return others


def _read(context: Context, file: str) -> Sequence[Head]:
    """The heads that a file names, or those of its scores that detection's settings choose."""
    found = read_heads(path_of(file), context.outline.config)
    return found.heads if found.scores is None else choose_heads(context, found.scores)
