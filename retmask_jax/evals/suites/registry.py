"""The suites of a config (`config.suites`): which are on, the checks of their settings, and their run on a model."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from retmask_jax.data.needles import read_needles, read_sentences
from retmask_jax.data.prompter import Prompter
from retmask_jax.evals.measured import Measured
from retmask_jax.evals.perplexity import run_positions, run_sliding, sliding_windows, text_windows
from retmask_jax.evals.suites.json_kv import run_json_kv
from retmask_jax.evals.suites.niah import even_grid, niah_cases, run_niah
from retmask_jax.evals.suites.questions import read_questions
from retmask_jax.evals.suites.rerank import ndcg, read_queries, run_rerank
from retmask_jax.evals.suites.ruler import TASKS, run_ruler
from retmask_jax.evals.suites.samples import check_lengths
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.store import Store


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite, whose settings are the section of its name under `suites`.

    Attributes:
        run: run(lm, prompter, section, resolve, shared) measures a model. `resolve` turns a file's name in the config
            into its path; `shared` has batch_size, interventions and kept, as of `scoring.answered`.
        on: The key that turns the suite on.
        longest: longest(section) is the number of tokens that the model's context must have.
        check: check(section) raises ValueError for settings that cannot work.
        files: The keys that name files.
        decodes: Whether all it measures are decoded answers, so that `run` takes a contrast, too.
    """

    run: Callable[[LanguageModel, Prompter, ConfigDict, Callable[[str], Path], dict[str, Any]], list[Measured]]
    on: str
    longest: Callable[[ConfigDict], int]
    check: Callable[[ConfigDict], None]
    files: tuple[str, ...] = ()
    decodes: bool = False


def suites_on(suites: ConfigDict) -> list[str]:
    """Returns the names of the suites that are on: those with tasks, lengths or a file."""
    return [name for name, suite in SUITES.items() if suites[name][suite.on]]


def suite_files(suites: ConfigDict) -> list[str]:
    """Returns the names of the files that the suites which are on read."""
    names = {suites[name][key] for name in suites_on(suites) for key in SUITES[name].files}
    return sorted(names - {""})


def check_suites(suites: ConfigDict) -> None:
    """Raises ValueError for a setting that would fail later; what each number may be is checked in `runs.limits`."""
    for name in suites_on(suites):
        SUITES[name].check(suites[name])


def check_context(suites: ConfigDict, max_length: int) -> None:
    """Raises ValueError if a suite's samples exceed a model's context of max_length tokens."""
    for name in suites_on(suites):
        check_lengths(max_length, [SUITES[name].longest(suites[name])], f"suites.{name}")


def run_suites(
    lm: LanguageModel,
    prompter: Prompter,
    suites: ConfigDict,
    resolve: Callable[[str], Path],
    *,
    batch_size: int,
    interventions: Interventions | None = None,
    contrast: ContrastDecoding | None = None,
    kept: Store | None = None,
    only: str | None = None,
) -> list[Measured]:
    """Runs all suites that are on, or one of them.

    Args:
        resolve: Turns a file's name in the config into its path.
        contrast: Answers are decoded by contrast.
        kept: Results of this model under these interventions and this contrast; only missing ones are computed, and added.
        only: The name of the suite to run; None for all.

    Raises:
        ValueError: As of `check_suites`, `check_context` and the suites; also for a contrast where a suite does not decode.
    """
    on = [name for name in suites_on(suites) if only in (None, name)]
    if not on:
        return []
    check_suites(suites)
    check_context(suites, lm.config.max_length)
    shared: dict[str, Any] = {"batch_size": batch_size, "interventions": interventions, "kept": kept}
    if contrast is not None:
        if read := [name for name in on if not SUITES[name].decodes]:
            raise ValueError(f"suite {read[0]} reads given texts, where contrast decoding decides nothing: turn it off")
        shared["contrast"] = contrast
    return [measured for name in on for measured in SUITES[name].run(lm, prompter, suites[name], resolve, shared)]


def _ruler(lm, prompter, section, resolve, shared: dict[str, Any]) -> list[Measured]:
    essay = read_sentences(resolve(section.essay)) if section.essay else None
    questions = {task: read_questions(resolve(section[task])) for task in ("qa_1", "qa_2") if task in section.tasks}
    return run_ruler(
        lm,
        prompter,
        tasks=section.tasks,
        lengths=section.lengths,
        n=section.n,
        seed=section.seed,
        haystack=essay,
        questions=questions,
        **shared,
    )


def _niah(lm, prompter, section, resolve, shared) -> list[Measured]:
    lengths, depths = even_grid(section.shortest, section.longest, section.n_lengths, section.n_depths)
    needles, sentences = read_needles(resolve(section.needles)), read_sentences(resolve(section.haystack))
    cases = niah_cases(
        prompter,
        sentences,
        needles,
        lengths,
        depths,
        per_cell=section.per_cell,
        distractors=section.distractors,
        seed=section.seed,
    )
    return run_niah(lm, cases, max_new_tokens=section.max_new_tokens, **shared)


def _json_kv(lm, prompter, section, resolve, shared) -> list[Measured]:
    return run_json_kv(
        lm,
        prompter,
        lengths=section.lengths,
        n=section.n,
        seed=section.seed,
        max_new_tokens=section.max_new_tokens,
        **shared,
    )


def _rerank(lm, prompter, section, resolve, shared) -> list[Measured]:
    queries = read_queries(resolve(section.file))[: section.n]
    return run_rerank(
        lm, prompter, queries, section.length, seed=section.seed, max_new_tokens=section.max_new_tokens, **shared
    )


def _perplexity(lm, prompter, section, resolve, shared) -> list[Measured]:
    sentences, tokenizer = read_sentences(resolve(section.file)), prompter.tokenizer
    measured = run_positions(lm, text_windows(tokenizer, sentences, section.length, section.windows), **shared)
    if section.stride is not None:
        windows = sliding_windows(tokenizer, sentences, section.length, section.stride, section.windows)
        measured.append(run_sliding(lm, windows, section.stride, **shared))
    return measured


def _check_ruler(section) -> None:
    unknown = [task for task in section.tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"suites.ruler.tasks has {unknown[0]!r}; RULER has {', '.join(TASKS)}")
    for task in section.tasks:
        key = {"essay": "essay", "questions": task, None: None}[TASKS[task].needs]
        if key and not section[key]:
            raise ValueError(f"suites.ruler.tasks has {task!r}, which reads a text: set suites.ruler.{key} to a file")
    _check_lengths("ruler", section.lengths)


def _check_niah(section) -> None:
    if not section.haystack:
        raise ValueError("suites.niah.needles is set and suites.niah.haystack is not: name a text, too")
    even_grid(section.shortest, section.longest, section.n_lengths, section.n_depths)


def _check_json_kv(section) -> None:
    _check_lengths("json_kv", section.lengths)


def _check_rerank(section) -> None:
    ndcg(["a"], {"a": 1})  # raises if the library is not installed


def _check_perplexity(section) -> None:
    if section.stride is not None and section.stride >= section.length - 1:
        raise ValueError(
            f"suites.perplexity.stride is {section.stride}; with windows of {section.length} tokens it must be in "
            f"1..{section.length - 2}, or None"
        )


def _check_lengths(suite: str, lengths: Sequence[int]) -> None:
    if not lengths or len(set(lengths)) < len(lengths):
        raise ValueError(f"suites.{suite}.lengths is {lengths}; it must hold different whole numbers of tokens above 0")


def _lengths(section) -> int:
    return max(section.lengths, default=0)


SUITES = {
    "ruler": Suite(_ruler, "tasks", _lengths, _check_ruler, ("essay", "qa_1", "qa_2"), decodes=True),
    "niah": Suite(
        _niah,
        "needles",
        lambda section: section.longest + section.max_new_tokens,
        _check_niah,
        ("needles", "haystack"),
        decodes=True,
    ),
    "json_kv": Suite(_json_kv, "lengths", _lengths, _check_json_kv, decodes=True),
    "rerank": Suite(_rerank, "file", lambda section: section.length or 0, _check_rerank, ("file",), decodes=True),
    "perplexity": Suite(_perplexity, "file", lambda section: section.length, _check_perplexity, ("file",)),
}
