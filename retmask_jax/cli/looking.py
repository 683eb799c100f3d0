"""What `retmask look` does: a prompt and heads from its flags, the page, and a few lines on the terminal."""

import argparse
import re
from collections.abc import Sequence

from retmask_jax.cli.printing import show_log
from retmask_jax.generation.language_model import LanguageModel, load, outline
from retmask_jax.heads.builtin_cases import builtin_cases, find_heads
from retmask_jax.heads.lists.formats import read_heads
from retmask_jax.heads.looking.asked import Prompt
from retmask_jax.heads.looking.looks import look_at, question_of
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head
from retmask_jax.reports.looking.view import Look
from retmask_jax.utils.files import read_text
from retmask_jax.utils.hosts import primary

_CASES = {"n": 24, "lengths": (512,)}  # to find heads with
_REACHED = 0.1  # the score of a head that a file of scores names


def look(arguments: argparse.Namespace) -> None:
    """Write the page of one prompt and print the answers; what can be wrong with a call is said before weights are read.

    arguments: of `tool_flags`.
    """
    show_log()
    if arguments.out.is_dir():
        raise ValueError(
            f"--out is the folder {arguments.out}: name a file in it, such as {arguments.out / 'look.html'}"
        )
    outlined = outline(arguments.model, ignore=arguments.ignore)
    question = question_of(
        outlined,
        _prompt(outlined, arguments),
        arguments.answer,
        _heads(outlined.config, arguments.heads),
        scores=arguments.scores,
        begin=arguments.begin,
        chat=False if arguments.plain else None,
        max_new_tokens=arguments.new_tokens,
    )
    lm = load(arguments.model, arguments.dtype, ignore=arguments.ignore)
    if arguments.find:
        question = question._replace(scores=find_heads(lm, **_CASES))
    found = Look(look_at(lm, question))
    if not primary():
        return
    for reply in found.replies:
        print(f"{reply.name}: {''.join(reply.texts)}")
    named = ", ".join(f"{layer}-{head} {found.scores.mean[layer, head]:.2f}" for layer, head in found.heads)
    print(f"masked heads, by {found.looks.scored}: {named}")
    found.save(arguments.out)
    print(f"wrote {arguments.out}")


def _prompt(lm: LanguageModel, arguments: argparse.Namespace) -> Prompt:
    if arguments.file is not None:
        return read_text(arguments.file, "prompt file")
    if arguments.prompt is not None or arguments.length is None:
        return arguments.prompt
    (case,) = builtin_cases(lm, "test", 1, (arguments.length,), seed=1)
    return case


def _heads(config: ModelConfig, text: str | None) -> int | Sequence[Head] | None:
    """The heads that --heads names: a number of them, LAYER-HEAD with commas between, or a file."""
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    if re.fullmatch(r"\d+-\d+(,\d+-\d+)*", text):
        pairs = (name.split("-") for name in text.split(","))
        return [(int(layer), int(head)) for layer, head in pairs]
    found = read_heads(text, config)
    return found.heads if found.scores is None else found.scores.heads(threshold=_REACHED)
