"""The stage `detect`: head scores, the head set, its stability, and why cases did not count."""

import dataclasses
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.copy_score import detect
from retmask_jax.heads.detection import Settled, stability
from retmask_jax.heads.lists.formats import read_scores
from retmask_jax.heads.profile import profile
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.interventions import Head, mask_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, task_cost
from retmask_jax.runs.stage import PROMPTS, SHOWN, Stage, Table
from retmask_jax.runs.workdir import Example, Result
from retmask_jax.utils import stats
from retmask_jax.utils.files import digest, write_jsonl
from retmask_jax.utils.numbers import Number

_LISTED = 20  # best heads in the table, with intervals


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadNumber(Number):
    """The score of a head, mean over the counted cases. chosen: whether it is a retrieval head."""

    layer: int
    head: int
    chosen: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectResult(Result):
    """heads: the retrieval heads, best first, with their `scores`. mean: [L][H] scores of all heads. threshold: None where
    heads were chosen by their number. outcomes: cases by outcome, empty where scores were given. profile: as of
    `heads.profile`, None where undefined. n_kv_heads, rope_base (of full layers): None in results of older versions. best:
    the best heads, chosen or not, with intervals, and all retrieval heads; empty in results of older versions."""

    heads: list[Head]
    scores: list[float]
    mean: list[list[float]]
    threshold: float | None
    outcomes: dict[str, int]
    n_kv_heads: int | None = None
    rope_base: float | None = None
    profile: dict[str, float | None]
    stability: list[Settled]
    mask_hash: str
    best: list[HeadNumber] = dataclasses.field(default_factory=list)

    @property
    def reached(self) -> float:
        """The score that every retrieval head reaches."""
        return min(self.scores) if self.threshold is None else self.threshold


def detect_stage(context: Context, folder: Path) -> DetectResult:
    """Head scores, the head set, its stability, and why cases did not count."""
    lm, section = context.lm, context.config.detect
    if section.scores is not None:
        return _detected(context, folder, read_scores(section.scores, context.outline.config), [], [])
    cases = context.cases(section.task)
    found = detect(
        lm,
        cases,
        max_new_tokens=section.max_new_tokens,
        batch_size=context.config.batch_size,
        released=section.released,
    )
    examples = [Example.of(case.needle, {"reply": answer}) for case, answer in zip(cases, found.answers, strict=True)]
    rows = [
        {"length": c.spec.length, "depth": c.spec.depth, "expected": c.needle.answer, "answer": a, "outcome": o}
        for c, a, o in zip(cases, found.answers, found.outcomes, strict=True)
    ]
    write_jsonl(folder / "cases.jsonl", rows)
    return _detected(context, folder, found.scores, found.outcomes, examples[:SHOWN])


def retrieval_heads(context: Context) -> list[Head]:
    """The heads that detection found in this work directory, best first."""
    return DETECT.of(context).heads


def head_scores(context: Context) -> HeadScores:
    """The scores of all heads that detection found in this work directory."""
    return HeadScores.load(context.workdir.folder(DETECT.name) / "scores.json")


def choose_heads(context: Context, scores: HeadScores) -> list[Head]:
    """The heads that detect.threshold or detect.top_k choose, best first; ValueError where there are none."""
    heads = scores.heads(**selection(context))
    if not heads:
        raise ValueError(
            f"no head reaches detect.threshold {context.config.detect.threshold}: the best score is "
            f"{scores.mean.max():.3f}"
        )
    return heads


def best_heads(scores: HeadScores, chosen: Collection[Head], n: int = _LISTED) -> list[HeadNumber]:
    """The n best heads, best first, with the interval of each one's score over cases; which are among those chosen."""
    return [
        HeadNumber.of(
            stats.bootstrap_mean(scores.per_case[layer, head]), layer=layer, head=head, chosen=(layer, head) in chosen
        )
        for layer, head in scores.heads(top_k=min(n, scores.mean.size))
    ]


def selection(context: Context) -> dict[str, Any]:
    """How detect.threshold or detect.top_k choose heads, as of `HeadScores.heads`."""
    section = context.config.detect
    return {"top_k": section.top_k} if section.threshold is None else {"threshold": section.threshold}


def _check(config) -> None:
    if (config.detect.threshold is None) == (config.detect.top_k is None):
        raise ValueError("set one of detect.threshold and detect.top_k, and the other to None")


def _check_model(context: Context) -> None:
    if context.config.detect.scores is not None:
        read_scores(context.config.detect.scores, context.outline.config)


def _detected(
    context: Context, folder: Path, scores: HeadScores, outcomes: list[str], examples: list[Example]
) -> DetectResult:
    """The result of detection from scores, found (with an outcome per case) or given."""
    lm, section = context.lm, context.config.detect
    heads = choose_heads(context, scores)
    scores.save(folder / "scores.json")
    shape = profile(scores, lm.config.n_kv_heads, section.threshold or float(scores.mean[heads[-1]]))
    cases = int(scores.counts.max())
    numbers = {"detect/cases counted": stats.wilson(cases, len(outcomes))} if outcomes else {}
    return DetectResult(
        heads=heads,
        scores=[float(scores.mean[head]) for head in heads],
        mean=scores.mean.tolist(),
        threshold=section.threshold,
        outcomes=dict(Counter(outcomes)),
        n_kv_heads=lm.config.n_kv_heads,
        rope_base=lm.config.rope.theta,
        profile={name: stats.defined(value) for name, value in shape.items()},
        stability=stability(scores, **selection(context)),
        mask_hash=_mask_hash(lm, heads),
        best=best_heads(scores, heads, max(_LISTED, len(heads))),
        examples=examples,
        numbers=numbers
        | {
            "detect/heads": stats.exact(len(heads), cases),
            "detect/top score": stats.bootstrap_mean(scores.per_case[heads[0]]),
            "detect/gini": stats.exact(shape["gini"], cases),
        },
    )


def _mask_hash(lm: LanguageModel, heads: list[Head]) -> str:
    return digest(np.asarray(mask_heads(lm.config, heads).head_mask).tobytes())


def _cost(context: Context) -> Cost:
    return Cost() if context.config.detect.scores else task_cost(context.config, context.config.detect.task)


def _tables(result: DetectResult) -> list[Table]:
    """The best heads, and why cases did not count."""
    rows = [
        (
            str(number.layer),
            str(number.head),
            f"{number.value:.3f}",
            f"[{number.low:.3f}, {number.high:.3f}]",
            "retrieval head" if number.chosen else "",
        )
        for number in result.best[:_LISTED]
        if number.low is not None
    ]
    cases = [(outcome, str(n)) for outcome, n in result.outcomes.items()]
    return [Table(("layer", "head", "score", "95% interval", ""), rows), Table(("cases", "n"), cases)]


DETECT = Stage(
    name="detect",
    work=detect_stage,
    result=DetectResult,
    settings=(*PROMPTS, "detect.*"),
    tasks=lambda config: (config.detect.task,),
    tables=_tables,
    cost=_cost,
    check=_check,
    check_model=_check_model,
)
# Settings of other stages that run detection on the same cases.
DETECTION = ("detect.task", "detect.scores", "detect.max_new_tokens", "detect.released")
