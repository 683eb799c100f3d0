"""HELMET's categories and the means it reports (arXiv 2410.02694). A mean with a missing part has no value."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retmask_jax.evals.measured import Measured

SUITE = "helmet"
JUDGE = "needs a judge: run HELMET's scripts/eval_gpt4_{}.py on the answers, then this again"
CITATIONS = "needs an 11B entailment model: ask for citations"


@dataclasses.dataclass(frozen=True)
class Part:
    """A number that is part of a category's mean.

    Attributes:
        dataset: Part of HELMET's name of the data set.
        needs: What the number needs besides the answers; empty for nothing.
    """

    dataset: str
    metric: str
    task: str
    needs: str = ""


def _parts(metric: str, *datasets: str, needs: str = "") -> tuple[Part, ...]:
    return tuple(Part(dataset, metric, dataset, needs) for dataset in datasets)


def _cited(dataset: str, *metrics: str) -> tuple[Part, ...]:
    return tuple(
        Part(dataset, metric, f"{dataset} {metric}", CITATIONS if metric.startswith("citation") else "")
        for metric in metrics
    )


# Names are those of HELMET's config files.
CATEGORIES: dict[str, tuple[Part, ...]] = {
    "recall": _parts("ruler_recall", "ruler_niah_mk_2", "ruler_niah_mk_3", "ruler_niah_mv")
    + _parts("substring_exact_match", "json_kv"),
    "rag": _parts("substring_exact_match", "nq", "triviaqa", "hotpotqa", "popqa"),
    "rerank": _parts("NDCG@10", "msmarco_rerank_psg"),
    "cite": _cited("alce_asqa", "str_em", "citation_rec", "citation_prec")
    + _cited("alce_qampari", "qampari_rec_top5", "citation_rec", "citation_prec"),
    "longqa": _parts("gpt-4-score", "narrativeqa", needs=JUDGE.format("longqa"))
    + _parts("rougeL_f1", "infbench_qa")
    + _parts("exact_match", "infbench_choice"),
    "summ": _parts("gpt-4-f1", "infbench_sum", "multi_lexsum", needs=JUDGE.format("summ")),
    "icl": _parts("exact_match", "trec_coarse", "trec_fine", "banking77", "clinic150", "nlu"),
}
# The categories of each mean. RetMask's paper gives the first two; the last needs no other model than the one measured.
MEANS = {
    "all seven": tuple(CATEGORIES),
    "judge-free": ("recall", "rag", "cite", "rerank", "icl"),
    "no other model": ("recall", "rag", "rerank", "icl"),
}


def helmet_means(measured: Sequence[Measured]) -> dict[int, dict[str, Any]]:
    """Computes the means of categories, over tasks of equal weight, and the means over categories, in per cent.

    Returns:
        {length: {"categories": {name: mean}, "means": {name: mean}}}. A mean is {"value", "n", "parts": {task or
        category: value}, "missing": [line, ...], "left out": [line, ...]}. If a part is missing, the value is None, and
        "missing" says which part and why. "left out" says which samples some part was computed without.
    """
    by_length: dict[int, list[Measured]] = {}
    for part in measured:
        if part.suite == SUITE and part.length is not None:
            by_length.setdefault(part.length, []).append(part)
    return {length: _at_length(parts) for length, parts in sorted(by_length.items())}


def _at_length(measured: Sequence[Measured]) -> dict[str, Any]:
    tasks = {part.task: part for part in measured}
    categories = {name: _category(tasks, parts) for name, parts in CATEGORIES.items()}
    return {"categories": categories, "means": {name: _mean(categories, names) for name, names in MEANS.items()}}


def _category(tasks: Mapping[str, Measured], parts: Sequence[Part]) -> dict[str, Any]:
    done = {part.task: tasks[part.task] for part in parts if part.task in tasks and len(tasks[part.task].values)}
    missing = [
        f"{part.task}: {'; '.join(tasks[part.task].missing) if part.task in tasks else 'not run'}"
        for part in parts
        if part.task not in done
    ]
    left_out = [f"{name}: {n} samples, {why}" for name, part in done.items() for why, n in part.missing.items()]
    values = {name: 100 * float(np.mean(part.values)) for name, part in done.items()}
    return _entry(values, sum(len(part.values) for part in done.values()), missing, left_out)


def _mean(categories: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    values = {name: categories[name]["value"] for name in names if categories[name]["value"] is not None}
    missing = [f"{name}: {line}" for name in names for line in categories[name]["missing"]]
    left_out = [f"{name}: {line}" for name in names for line in categories[name]["left out"]]
    return _entry(values, sum(categories[name]["n"] for name in values), missing, left_out)


def _entry(values: Mapping[str, float], n: int, missing: list[str], left_out: list[str]) -> dict[str, Any]:
    value = None if missing else float(np.mean(list(values.values())))
    return {"value": value, "n": n, "parts": dict(values), "missing": missing, "left out": left_out}
