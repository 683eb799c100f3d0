"""HELMET (arXiv 2410.02694) on a model of this package, with data, prompts and scores of the user's checkout of HELMET.

HELMET runs unmodified in another process (`helmet_worker`), which sends the exact token ids of its prompts and scores
the answers. The model stays in this process. A killed run is resumed: answers are kept one by one, scores by data set.
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
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.files import digest
from retmask_jax.utils.store import Store

log = logging.getLogger(__name__)

LONGEST = 131072  # HELMET has this length in separate files
TOO_LONG = "prompt and answer longer than the model's context"
_NO_SCORE = "no score from HELMET"
_JUDGED = "-gpt4eval_o.json"  # end of the names of the files that the judge's scripts write
_BEST_JUDGED = {"gpt-4-score": 3.0, "gpt-4-f1": 1.0}  # fluency (0, 1) x correctness (0 to 3); an F1


@dataclasses.dataclass(frozen=True)
class HelmetRun:
    """The result of a run of HELMET.

    Attributes:
        measured: For each part of a category's mean and each length. A part that could not be measured has no values,
            and its `missing` says why.
        notes: What a reader must know of the run, such as keys of HELMET's configs that HELMET's code does not read.
    """

    measured: list[Measured]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same in a run."""

    lm: LanguageModel
    mask: Interventions
    batch_size: int
    answers: Store
    scores: Store
    contrast: ContrastDecoding | None = None


def run_helmet(
    lm: LanguageModel,
    checkout: str | Path,
    lengths: Sequence[int],
    categories: Sequence[str] | None = None,
    *,
    folder: str | Path,
    batch_size: int,
    interventions: Interventions | None = None,
    contrast: ContrastDecoding | None = None,
    limit: int | None = None,
    chat: bool | None = None,
    stop_new_line: bool = False,
    citations: bool = False,
) -> HelmetRun:
    """Runs the data sets of some categories of HELMET.

    A data set on which HELMET fails, for example because its data are missing, has no values in the result, and the
    reason.

    Args:
        checkout: The folder of HELMET with its data.
        lengths: In tokens.
        categories: None for all seven.
        folder: Where answers, scores and HELMET's result files of this model are kept.
        contrast: Answers are decoded by contrast.
        limit: Samples of each data set; None as in HELMET.
        chat: Whether prompts are put in the chat template; None as in HELMET's config of the category. Without the
            template the answer's prefix ends the prompt and precedes the answer that is scored.
        stop_new_line: Whether answers end at a new line if a config says so. HELMET's code does not read that key, so
            its published numbers are without.
        citations: Whether citations are scored, with HELMET's 11B entailment model.

    Raises:
        ValueError: The folder is no checkout or HELMET cannot be imported, HELMET does not have a length or category, a
            length exceeds the model's context, or a chat template is missing. The message has one line.
    """
    checkout, folder = _checked_checkout(checkout), Path(folder)
    categories = list(CATEGORIES if categories is None else categories)
    _check(lm, lengths, categories)
    mask = scoring.shared_mask(lm.config, interventions)
    arguments = ["--model_name_or_path", str(lm.source.folder or "model"), "--no_cuda", "--overwrite"]
    arguments += [] if limit is None else ["--max_test_samples", str(limit)]
    arguments += [] if chat is None else ["--use_chat_template", str(chat)]
    mask_hash = scoring.mask_hash(lm.config, mask, contrast)
    request = {"arguments": arguments, "stop_new_line": stop_new_line, "output": str((folder / mask_hash).resolve())}
    measured, notes = [], []
    with contextlib.ExitStack() as opened:
        answers, scores = (opened.enter_context(Store(folder / name / mask_hash)) for name in ("answers", "scores"))
        job = _Job(lm, mask, batch_size, answers, scores, contrast)
        process = opened.enter_context(HelmetProcess(checkout, folder, lm.tokenizer, gpu=citations))
        for category, config in _configs(categories, lengths):
            process.use(config, request)
            measured += _run_config(job, process, category, lengths, citations)
            notes += _notes(config, process.settings)
    for note in dict.fromkeys(notes):
        log.warning("HELMET: %s", note)
    return HelmetRun(measured, list(dict.fromkeys(notes)))


def _configs(categories: Sequence[str], lengths: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yields (category, file) of each config that is needed."""
    for category in categories:
        if any(length < LONGEST for length in lengths):
            yield category, f"configs/{category}_short.yaml"
        if any(length >= LONGEST for length in lengths):
            yield category, f"configs/{category}.yaml"


def _run_config(
    job: _Job, process: HelmetProcess, category: str, lengths: Sequence[int], citations: bool
) -> list[Measured]:
    """Runs the data sets of the config that the process has been given."""
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
    """Raises ValueError if this config should have a length, by HELMET's naming of files, and does not."""
    has = {entry["input_max_length"] for entry in process.entries}
    wanted = {length for length in lengths if (length < LONGEST) == (min(has) < LONGEST)}
    if wanted - has:
        raise ValueError(f"HELMET has no {category} at {min(wanted - has)} tokens; this config of it has {sorted(has)}")


def _scored(job: _Job, process: HelmetProcess, number: int, citations: bool) -> dict[str, Any]:
    """Returns HELMET's scores of a data set: {"scored": {metric: values}, "ids", "n", "output"}, or {"failed", "n"}."""
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
    """Returns {"output", "output_len"} of each prompt, None if the prompt does not fit in the model's context."""
    room = job.lm.config.max_length - options["max_new_tokens"]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    made = scoring.answered(
        job.lm,
        [prompts[i] for i in fitting],
        job.mask,
        batch_size=job.batch_size,
        contrast=job.contrast,
        kept=job.answers,
        what=f"HELMET {what}",
        **options,
    )
    found: list[dict[str, Any] | None] = [None] * len(prompts)
    for i, (output, n) in zip(fitting, made, strict=True):
        found[i] = {"output": output, "output_len": n}
    return found


def _measured(part: Part, length: int, found: dict[str, Any]) -> Measured:
    """Returns the values of one part, or no values and the reason."""
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
    """Returns a judge's scores of the same answers as shares, if its script has written a file next to HELMET's."""
    path = Path(output.removesuffix(".json") + _JUDGED)
    if metric not in _BEST_JUDGED or not path.is_file():
        return None
    own, judged = (json.loads(Path(name).read_text())["data"] for name in (output, path))
    if [row["output"] for row in own] != [row["output"] for row in judged]:
        log.warning("HELMET: %s judges other answers than those of now: judge them again", path)
        return None
    scores = [row.get("gpt-4-scores") for row in judged]
    return [of_answer and _judge_score(of_answer, metric) / _BEST_JUDGED[metric] for of_answer in scores]


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
