"""HELMET (arXiv 2410.02694) on a model of ours, by the user's own unmodified checkout: its data, prompts and scores.

HELMET runs in a process of its own (`helmet_worker`), which hands over the exact token ids of its prompts and scores
our answers; the model stays in this one. A killed run goes on: answers are kept one by one, scores by data set.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.evals import scoring
from retmask_jax.evals.external.helmet_means import CATEGORIES, SUITE, Part
from retmask_jax.evals.external.helmet_process import CODE, HelmetProcess
from retmask_jax.evals.measured import Measured
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.files import digest
from retmask_jax.utils.store import Store

log = logging.getLogger(__name__)

LONGEST = 131072  # HELMET keeps this length in files of its own
TOO_LONG = "prompt and answer longer than the model's context"
_NO_SCORE = "no score from HELMET"
_JUDGED = "-gpt4eval_o.json"  # how the judge's scripts call their files
_BEST_JUDGED = {"gpt-4-score": 3.0, "gpt-4-f1": 1.0}  # fluency (0, 1) x correctness (0 to 3); an F1


@dataclasses.dataclass(frozen=True)
class HelmetRun:
    """measured: per number of a category's mean and length, without values where it could not be had (missing says
    why). notes: what of the run a reader must know, such as keys of HELMET's configs that its code does not read."""

    measured: list[Measured]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Job:
    lm: LanguageModel
    mask: Interventions
    batch_size: int
    answers: Store
    scores: Store


def run_helmet(
    lm: LanguageModel,
    checkout: str | Path,
    lengths: Sequence[int],
    categories: Sequence[str] | None = None,
    *,
    folder: str | Path,
    batch_size: int,
    interventions: Interventions | None = None,
    limit: int | None = None,
    chat: bool | None = None,
    stop_new_line: bool = False,
    citations: bool = False,
) -> HelmetRun:
    """The data sets of some categories (None: all seven) at some lengths in tokens, under interventions.

    checkout: the folder of HELMET with its data. folder: where answers, scores and HELMET's own result files are kept,
    of one model. limit: samples per data set (None: HELMET's). chat: put prompts in the chat template, or not (None: as
    HELMET's config of the category has it); without it the answer's prefix ends the prompt and stands before the answer
    that is scored. stop_new_line: end answers at a new line where a config says so; HELMET's code does not read that
    key, so its published numbers are without. citations: score citations, too, by HELMET's 11B entailment model.
    Raises ValueError in one line for a folder that is no checkout, a length or category it does not have, a length
    beyond the model's context, a missing chat template, and where HELMET cannot be imported. A data set that HELMET
    fails on, such as one whose data are not there, is missing from the result with its reason.
    """
    checkout, folder = _checked_checkout(checkout), Path(folder)
    categories = list(CATEGORIES if categories is None else categories)
    _check(lm, lengths, categories)
    mask = scoring.shared_mask(lm.config, interventions)
    arguments = ["--model_name_or_path", str(lm.source.folder or "model"), "--no_cuda", "--overwrite"]
    arguments += [] if limit is None else ["--max_test_samples", str(limit)]
    arguments += [] if chat is None else ["--use_chat_template", str(chat)]
    mask_hash = scoring.mask_hash(mask)
    request = {"arguments": arguments, "stop_new_line": stop_new_line, "output": str((folder / mask_hash).resolve())}
    measured, notes = [], []
    with contextlib.ExitStack() as opened:
        answers, scores = (opened.enter_context(Store(folder / name / mask_hash)) for name in ("answers", "scores"))
        job = _Job(lm, mask, batch_size, answers, scores)
        process = opened.enter_context(HelmetProcess(checkout, folder, lm.tokenizer, gpu=citations))
        for category, config in _configs(categories, lengths):
            process.use(config, request)
            measured += _run_config(job, process, category, lengths, citations)
            notes += _notes(config, process.settings)
    for note in dict.fromkeys(notes):
        log.warning("HELMET: %s", note)
    return HelmetRun(measured, list(dict.fromkeys(notes)))


def _configs(categories: Sequence[str], lengths: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(category, file) of each config that is needed."""
    for category in categories:
        if any(length < LONGEST for length in lengths):
            yield category, f"configs/{category}_short.yaml"
        if any(length >= LONGEST for length in lengths):
            yield category, f"configs/{category}.yaml"


def _run_config(job: _Job, process: HelmetProcess, category: str, lengths, citations: bool) -> list[Measured]:
    if process.settings["use_chat_template"] and not job.lm.tokenizer.chat_template:
        raise ValueError(
            f"HELMET puts {category} in a chat template, and the tokenizer has none: add one or set chat to False"
        )
    _check_lengths(process, category, lengths)
    measured = []
    for number, entry in enumerate(process.entries):
        parts = [part for part in CATEGORIES[category] if part.dataset in entry["datasets"]]
        if entry["input_max_length"] not in lengths or not parts:
            continue
        found = _scored(job, process, number, citations)
        measured += [_measured(part, entry["input_max_length"], found) for part in parts]
    return measured


def _check_lengths(process: HelmetProcess, category: str, lengths: Sequence[int]) -> None:
    """ValueError for a length that neither this config of the category has nor, by HELMET's naming, its other one."""
    has = {entry["input_max_length"] for entry in process.entries}
    wanted = {length for length in lengths if (length < LONGEST) == (min(has) < LONGEST)}
    if wanted - has:
        raise ValueError(f"HELMET has no {category} at {min(wanted - has)} tokens; this config of it has {sorted(has)}")


def _scored(job: _Job, process: HelmetProcess, number: int, citations: bool) -> dict[str, Any]:
    """HELMET's scores of a data set: {"scored": {metric: values}, "ids", "n", "output"}, or {"failed", "n"}."""
    entry = process.entries[number]
    key = (entry["datasets"], entry["input_max_length"], digest([process.identity, entry, citations]))
    if key in job.scores:
        return job.scores[key]
    reply = process.ask({"entry": number, "citations": citations})
    if "generate" not in reply:
        return reply | {"n": process.settings["max_test_samples"] or 1}
    found = _answers(job, process.prompts, reply["generate"], f"{entry['datasets']} {entry['input_max_length']}")
    n, fitting = len(found), sum(answer is not None for answer in found)
    if not fitting:
        return {"failed": TOO_LONG, "n": n}
    reply = process.ask({"answers": found}) | {"n": n}
    if "scored" in reply:
        job.scores.add(key, reply)
    return reply


def _answers(
    job: _Job, prompts: Sequence[np.ndarray], options: dict[str, Any], what: str
) -> list[dict[str, Any] | None]:
    """{"output", "output_len"} of each prompt, None where it does not fit; only what is not kept yet is generated."""
    room = job.lm.config.max_length - options["max_new_tokens"]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    made = scoring.answered(
        job.lm,
        [prompts[i] for i in fitting],
        job.mask,
        batch_size=job.batch_size,
        kept=job.answers,
        what=f"HELMET {what}",
        **options,
    )
    found: list[dict[str, Any] | None] = [None] * len(prompts)
    for i, (output, n) in zip(fitting, made, strict=True):
        found[i] = {"output": output, "output_len": n}
    return found


def _measured(part: Part, length: int, found: dict[str, Any]) -> Measured:
    """The values of one part; none, and why, where there are none."""
    if "failed" in found:
        return _without(part, length, {found["failed"]: found["n"]})
    values = found["scored"].get(part.metric) or _judged(found["output"], part.metric)
    if values is None:
        return _without(part, length, {part.needs or f"{_NO_SCORE} called {part.metric}": found["n"]})
    scored = [(str(i), value) for i, value in zip(found["ids"], values, strict=True) if value is not None]
    counts = {TOO_LONG: found["n"] - len(values), _NO_SCORE: len(values) - len(scored)}
    numbers = np.array([value for _, value in scored], float)
    return Measured(
        SUITE,
        part.task,
        part.metric,
        tuple(i for i, _ in scored),
        numbers,
        binary=bool(np.isin(numbers, (0, 1)).all()),
        length=length,
        missing={why: n for why, n in counts.items() if n},
    )


def _without(part: Part, length: int, missing: dict[str, int]) -> Measured:
    return Measured(SUITE, part.task, part.metric, (), np.zeros(0), binary=False, length=length, missing=missing)


def _judged(output: str, metric: str) -> list[float | None] | None:
    """A judge's scores as shares, of the same answers, where its script has left a file beside HELMET's."""
    path = Path(output.removesuffix(".json") + _JUDGED)
    if metric not in _BEST_JUDGED or not path.is_file():
        return None
    own, judged = (json.loads(Path(name).read_text())["data"] for name in (output, path))
    if [row["output"] for row in own] != [row["output"] for row in judged]:
        log.warning("HELMET: %s judges other answers than those of now: judge them again", path)
        return None
    scores = [row.get("gpt-4-scores") for row in judged]
    return [one and _judge_score(one, metric) / _BEST_JUDGED[metric] for one in scores]


def _judge_score(scores: dict[str, float], metric: str) -> float:
    return scores["f1"] if metric == "gpt-4-f1" else scores["fluency"] * scores["correctness"]


def _notes(config: str, settings: dict[str, Any]) -> list[str]:
    if not settings.get("stop_new_line"):
        return []
    if settings["stop_newline"]:
        return [f"{config}: answers end at a new line, as its key stop_new_line says; HELMET's own runs do not read it"]
    return [
        f"{config}: its key stop_new_line is not read by HELMET (the option is stop_newline), so answers do not end "
        "at a new line, as in HELMET's published numbers"
    ]


def _checked_checkout(checkout: str | Path) -> Path:
    missing = [name for name in CODE if not (Path(checkout) / name).is_file()]
    if missing:
        raise ValueError(
            f"{checkout} is no checkout of HELMET ({', '.join(missing)} missing): clone princeton-nlp/HELMET and give its folder"
        )
    return Path(checkout).resolve()


def _check(lm: LanguageModel, lengths: Sequence[int], categories: Sequence[str]) -> None:
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown:
        raise ValueError(f"HELMET has no category {', '.join(unknown)}; it has {', '.join(CATEGORIES)}")
    if not lengths or max(lengths) > lm.config.max_length:
        most = max(lengths, default="no")
        raise ValueError(
            f"HELMET at {most} tokens: the model's context is {lm.config.max_length}; give lengths up to that"
        )
    if lm.tokenizer is None:
        raise ValueError("the model folder has no tokenizer, which HELMET's prompts need")
