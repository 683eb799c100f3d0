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
from retmask_jax.heads.builtin_cases import builtin_cases
from retmask_jax.heads.copy_score import RIGHT_RECALL, Answer, detect, greedy_answers, newline_ids, score_answers
from retmask_jax.heads.detection import Detection
from retmask_jax.heads.reading import read_answers
from retmask_jax.runs import recipes

_NEEDLE = 16  # tokens of a needle, and of a question, of the random model
_BATCH = 16
_SHARES = (4, 2, 1)  # of a named model's longest prompt: its cases have a quarter of it, a half, and all


def run(
    size: str,
    length: int | None,
    layers: int | None,
    repeats: int,
    depths: int,
    needles: int,
    max_new_tokens: int,
    model: str | None = None,
) -> Report:
    """Cases a second: depths x needles cases of one length, for a named model of three lengths each.

    The bundled model and one that is named answer real cases; random models read given answers in random tokens.
    """
    require("torch")
    length = length or (512 if size == "bundled" and not model else 2048)
    with models.subject(size, model, n_layers=layers) as subject:
        lm = load(subject.folder, subject.dtype, models.mesh())
        peer = load_peer(subject.folder, subject.dtype, "eager")
        if model:
            lengths = [min(length, lm.config.max_length - max_new_tokens) // share for share in _SHARES]
            n = len(lengths) * depths * needles
            cases = builtin_cases(lm, "detect", n, lengths, seed=0, shuffle=False)  # as the published detector's
            rows = [_own(lm, peer, cases, max_new_tokens, repeats, subject)]
        elif size == "bundled":
            cases = bundled_cases(length, depths, needles)
            rows = [_real(lm, peer, cases, max_new_tokens, repeats, released) for released in (True, False)]
        else:
            rows = [_fixed(lm, peer, *fixed_cases(lm.config.vocab_size, length, depths, needles), repeats, subject)]
    setting = subject.setting(length, lm.config)
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
    stop_ids = None if released else {*lm.config.eos_ids, *newline_ids(lm.tokenizer).tolist()}  # none before its words
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


def _own(
    lm: LanguageModel, peer: Any, cases: Sequence[Case], max_new_tokens: int, repeats: int, subject: models.Subject
) -> Row:
    """Both sides decode answers of their own to a stop id or a line end; keys are compared as far as they say the same."""
    newline = newline_ids(lm.tokenizer).tolist()
    options = {"max_new_tokens": max_new_tokens, "stop_ids": lm.config.eos_ids, "line_ends": newline}

    def ours() -> tuple[Sequence[Answer], Detection]:
        found = greedy_answers(lm, cases, max_new_tokens, min(_BATCH, len(cases)), released=False, read=True)
        return found, score_answers(lm, cases, found, max_new_tokens=max_new_tokens)

    def detected(case: Case, **more: Any) -> Detected:
        return published_detection(peer, case.tokens, case.span, **options, **more)

    timed = alternate({"ours": ours, "peer": lambda: [detected(case) for case in cases]}, repeats)
    (found, detection), theirs = timed["ours"].result, timed["peer"].result
    same = [_agree(tokens_N, other.tokens) for (tokens_N, _), other in zip(found, theirs, strict=True)]
    share, gap = agreement(
        [key_NLH[:n] for (_, key_NLH), n in zip(found, same, strict=True)],
        [other.argmax[:n] for other, n in zip(theirs, same, strict=True)],
        lambda i: detected(cases[i], keep_weights=True).weights,
    )
    bounds = [Bound("cases counted", detection.reasons.get("counted", 0), ">=", 1)]
    bounds += _equal_keys(share, gap) if subject.dtype == "float32" else []
    lengths = sorted({case.spec.length for case in cases})
    name = (
        f"{subject.name}, {len(cases)} cases of {lengths[0]} to {lengths[-1]} tokens, answers end at EOS or a line end"
    )
    facts = {"outcomes": detection.reasons, "equal keys": share, "weight between keys": gap}
    facts |= {"tokens of peer": sum(len(other.tokens) for other in theirs), "equal tokens": sum(same)}
    shared = {"work": len(cases), "what": "cases"}
    return speed_row(name, timed["ours"], timed["peer"], **shared, target=3, bounds=bounds, facts=facts)


def _agree(ours: Int[np.ndarray, " N"], theirs: Int[np.ndarray, " M"]) -> int:
    """The number of tokens with which both answers begin."""
    n = min(len(ours), len(theirs))
    return int(np.argmin([*(ours[:n] == theirs[:n]), False]))


def _equal_keys(share: float, gap: float) -> list[Bound]:
    return [Bound("equal keys", share, ">=", 0.999), Bound("weight between keys", gap, "<=", 1e-5)]


def _fixed(
    lm: LanguageModel,
    peer: Any,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    spans: Sequence[tuple[int, int]],
    repeats: int,
    subject: models.Subject,
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
    bounds = _equal_keys(share, gap) if subject.dtype == "float32" else []
    name = f"{subject.name}, {len(prompts)} cases of {len(prompts[0])} tokens, {_NEEDLE} fixed"
    target = {"30m": 1.5, "8b": 5}[subject.size]
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
