"""Detection against the published algorithm, which takes one case at a time and loops over heads."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from retmask_jax.benchmarks import models
from retmask_jax.benchmarks.harness import Bound, Report, Row, alternate, speed_row
from retmask_jax.benchmarks.peers import Detected, load_peer, published_detection, require
from retmask_jax.data.answers import rouge1_recall
from retmask_jax.data.needles import Case
from retmask_jax.data.tasks import task_cases
from retmask_jax.generation.language_model import LanguageModel, load
from retmask_jax.heads.copy_score import RIGHT_RECALL, detect, newline_ids
from retmask_jax.heads.reading import read_answers
from retmask_jax.runs import recipes

_NEEDLE = 16  # tokens of a needle, and of a question, of the random model
_BATCH = 16


def run(
    size: str, length: int | None, layers: int | None, repeats: int, depths: int, needles: int, max_new_tokens: int
) -> Report:
    """Cases a second, depths x needles cases of one length.

    The bundled model answers real cases; random models read given answers in random tokens.
    """
    require("torch")
    length = length or (512 if size == "bundled" else 2048)
    with models.checkpoint(size, n_layers=layers) as folder:
        lm = load(folder, models.DTYPES[size], models.mesh())
        peer = load_peer(folder, models.DTYPES[size], "eager")
        if size == "bundled":
            cases = bundled_cases(length, depths, needles)
            rows = [_real(lm, peer, cases, max_new_tokens, repeats, released) for released in (True, False)]
        else:
            rows = [_fixed(lm, peer, *fixed_cases(lm.config.vocab_size, length, depths, needles), repeats, size)]
    setting = models.setting(size, length, lm.config)
    return Report("detect", setting | {"depths": depths, "needles": needles, "max_new_tokens": max_new_tokens}, rows)


def bundled_cases(length: int, depths: int, needles: int) -> list[Case]:
    """The needle cases of the tiny recipe, on the bundled data."""
    grid = tuple(np.linspace(0, 1, depths).tolist())
    overrides = {"lengths": (length,), "depths": grid, "per_length": depths * needles}
    config = recipes.load_recipe("tiny", [(f"tasks.detect.{name}", repr(value)) for name, value in overrides.items()])
    return task_cases(models.bundled_prompter(), config.tasks.detect)


def fixed_cases(
    vocab_size: int, length: int, depths: int, needles: int
) -> tuple[list[list[int]], list[list[int]], list[tuple[int, int]]]:
    """Prompts, answers and spans of random tokens on the published grid: one haystack, every needle at every depth."""
    hay = models.random_tokens(vocab_size, length - 2 * _NEEDLE, seed=1).tolist()
    prompts, answers, spans = [], [], []
    for seed in range(needles):
        needle, question = models.random_tokens(vocab_size, 2, _NEEDLE, seed=2 + seed).tolist()
        for depth in np.linspace(0, 1, depths):
            at = round(depth * len(hay))
            prompts.append(hay[:at] + needle + hay[at:] + question)
            answers.append(needle)
            spans.append((at, at + _NEEDLE))
    return prompts, answers, spans


def peer_scores(
    peer: Any, tokenizer: Any, cases: Sequence[Case], max_new_tokens: int, stop_ids: Collection[int] | None
) -> Float64[np.ndarray, "L H"]:
    """The published detector's mean score over the cases that count.

    Args:
        stop_ids: None: as released, decoding never stops and repeated tokens count. Else a head's score is the share of
            the needle's tokens that it copied, as defined in arXiv 2404.15574.
    """
    counted, options = [], {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids or ()}
    for case in cases:
        detected = published_detection(peer, case.tokens, case.span, **options)
        answer = tokenizer.decode(detected.tokens, skip_special_tokens=True)
        if rouge1_recall(answer, case.needle.answer) > RIGHT_RECALL:
            tokens_of = list if stop_ids is None else set
            needle = len(tokens_of(case.tokens[slice(*case.span)]))
            counted.append([[len(tokens_of(copied)) / needle for copied in heads] for heads in detected.copied])
    return np.mean(counted, axis=0)


def _real(
    lm: LanguageModel, peer: Any, cases: Sequence[Case], max_new_tokens: int, repeats: int, released: bool
) -> Row:
    batch_size = min(_BATCH, len(cases))
    stop_ids = None if released else {*lm.config.eos_ids, *newline_ids(lm.tokenizer).tolist()}
    timed = alternate(
        {
            "ours": lambda: detect(lm, cases, max_new_tokens=max_new_tokens, batch_size=batch_size, released=released),
            "peer": lambda: peer_scores(peer, lm.tokenizer, cases, max_new_tokens, stop_ids),
        },
        repeats,
    )
    ours = timed["ours"].result
    bounds = [
        Bound("score difference", float(np.abs(ours.scores.mean - timed["peer"].result).max()), "<=", 1e-6),
        Bound("cases counted", ours.reasons.get("counted", 0), ">=", 1),
    ]
    how = f"{max_new_tokens} tokens decoded, as released" if released else "answers end at EOS or newline"
    name = f"bundled, {len(cases)} cases of {cases[0].spec.length}; {how}"
    facts, shared = {"outcomes": ours.reasons}, {"work": len(cases), "what": "cases"}
    return speed_row(name, timed["ours"], timed["peer"], **shared, target=25, bounds=bounds, facts=facts)


def _fixed(
    lm: LanguageModel,
    peer: Any,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    spans: Sequence[tuple[int, int]],
    repeats: int,
    size: str,
) -> Row:
    def peer_case(i: int, **options: Any) -> Detected:
        return published_detection(peer, prompts[i], spans[i], max_new_tokens=_NEEDLE, fixed=answers[i], **options)

    batch_size = min(_BATCH, len(prompts))
    contenders = {
        "ours": lambda: [case.argmax for case in read_answers(lm, prompts, answers, batch_size=batch_size)],
        "peer": lambda: [peer_case(i).argmax for i in range(len(prompts))],
    }
    timed = alternate(contenders, repeats)
    share, gap = agreement(
        timed["ours"].result, timed["peer"].result, lambda i: peer_case(i, keep_weights=True).weights
    )
    # In 16 bits both sides round at every layer, and either may look at another key because of that.
    exact = models.DTYPES[size] == "float32"
    bounds = [Bound("equal keys", share, ">=", 0.999), Bound("weight between keys", gap, "<=", 1e-5)] if exact else []
    name = f"{size}, {len(prompts)} cases of {len(prompts[0])} tokens, {_NEEDLE} fixed"
    target = {"30m": 1.5, "8b": 5}[size]
    compared = int(sum(keys.size for keys in timed["peer"].result))
    facts = {"keys compared": compared, "equal keys": share, "weight between keys": gap}
    shared = {"work": len(prompts), "what": "cases"}
    return speed_row(name, timed["ours"], timed["peer"], **shared, target=target, bounds=bounds, facts=facts)


def agreement(
    ours: Sequence[Int[np.ndarray, "N L H"]],
    theirs: Sequence[Int[np.ndarray, "N L H"]],
    weights_of: Callable[[int], list[list[np.ndarray]]],
) -> tuple[float, float]:
    """Returns the share of equal keys, and the largest difference in attention weight between two keys that differ.

    Args:
        ours, theirs: keys of each case.
        weights_of: the peer's weights [N][L][H,S] of a case; called only where keys differ.
    """
    equal, total, gap = 0, 0, 0.0
    for case, (a_NLH, b_NLH) in enumerate(zip(ours, theirs, strict=True)):
        a_NLH = np.asarray(a_NLH)
        differ = np.argwhere(a_NLH != b_NLH)
        equal, total = equal + a_NLH.size - len(differ), total + a_NLH.size
        if not len(differ):
            continue
        weights = weights_of(case)
        for n, layer, head in differ:
            weight_S = weights[n][layer][head]
            gap = max(gap, abs(float(weight_S[b_NLH[n, layer, head]] - weight_S[a_NLH[n, layer, head]])))
    return equal / total, gap
