"""Greedy generation for prompts of different lengths against transformers' generate, and what masks cost."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from retmask_jax.benchmarks import models
from retmask_jax.benchmarks.chip import generation_rows
from retmask_jax.benchmarks.harness import Bound, Report, Row, Timed, alternate, speed_row
from retmask_jax.benchmarks.peers import generate as peer_generate
from retmask_jax.benchmarks.peers import load_peer, next_logits, require
from retmask_jax.generation.batching import pad_rows
from retmask_jax.generation.continuous import Request, generate_stream
from retmask_jax.generation.language_model import LanguageModel, load
from retmask_jax.model.interventions import Interventions, mask_heads, random_heads, stack

_TARGETS = {"bundled": 15, "30m": 2, "8b": None, models.OWN: 1.5}
_MASK_COST = 0.05


def run(
    size: str,
    length: int | None,
    layers: int | None,
    repeats: int,
    batch: int,
    new_tokens: int,
    model: str | None = None,
    rows: int | None = None,
    alone: bool = False,
) -> Report:
    """Seconds of a batch, and the shares of the machine's peaks.

    Prompts have from a quarter of `length` tokens to all of it; for the shares all have `length`. No token ends a row.

    Args:
        rows: also sample for so many rows at once, as the stage `pairs` does, with a look at what memory allows.
        alone: without a peer, where torch is not installed.
    """
    if not alone:
        require("torch")
    length = length or 512
    with models.subject(size, model, n_layers=layers) as subject:
        mesh = models.mesh()
        lm = load(subject.folder, subject.dtype, mesh)
        peer = None if alone else load_peer(subject.folder, subject.dtype)
        texts = models.text_or_random(subject, batch, length).tolist()
    lengths = np.linspace(length // 4, length, batch).astype(int)
    prompts = [text[:n] for text, n in zip(texts, lengths, strict=True)]
    masks = stack([mask_heads(lm.config, random_heads(lm.config, n=4, seed=seed)) for seed in range(batch)])
    contenders: dict[str, Callable[[], np.ndarray]] = {
        "ours": lambda: _ours(lm, prompts, new_tokens),
        "masked": lambda: _ours(lm, prompts, new_tokens, masks),
    }
    if peer is not None:
        contenders["peer"] = lambda: peer_generate(peer, prompts, new_tokens, lm.config.pad_id)
    timed = alternate(contenders, repeats)
    name = f"{subject.name}, {batch} prompts of {lengths[0]} to {lengths[-1]}, {new_tokens} new"
    bounds, facts = [], {}
    if peer is not None:
        ours, theirs = timed["ours"].result, timed["peer"].result
        compared = compare(ours, theirs, prompts, lambda tokens: next_logits(peer, tokens))
        bounds = [Bound("logit gap where tokens part", compared.gap, "<=", subject.tolerance)]
        facts = dataclasses.asdict(compared)
    shared = {"work": batch * new_tokens, "what": "tokens", "target": _TARGETS[subject.size]}
    speed = speed_row(name, timed["ours"], timed.get("peer"), **shared, bounds=bounds, facts=facts)
    shares = generation_rows(lm, mesh, batch, length, new_tokens, repeats, lambda rows, n: _ours(lm, list(rows), n))
    if rows:
        sampled = functools.partial(_sampled, lm)
        shares += generation_rows(
            lm, mesh, rows, length, new_tokens, repeats, sampled, how="sampled in a refilled batch"
        )
    setting = subject.setting(length, lm.config) | {"batch": batch, "new_tokens": new_tokens, "rows": rows}
    return Report("generate", setting, [speed, _cost(name, timed["masked"], timed["ours"]), *shares])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How two sets of continuations compare.

    share: of equal tokens. first: the earliest step at which a row differs. gap: the largest distance between the
    logits of the two tokens at the first difference of a row, as a share of the largest logit there; after it the two
    sides continue different texts. parted: (row, step, logit gap) of the first difference in each row that has one.
    """

    share: float
    first: int | None
    gap: float
    parted: list[tuple[int, int, float]]


def compare(
    ours: Int[np.ndarray, "B N"],
    theirs: Int[np.ndarray, "B N"],
    prompts: Sequence[Sequence[int]],
    logits_after: Callable[[list[int]], Float[np.ndarray, " V"]],
) -> Comparison:
    """Compare the tokens of two sides. logits_after: the logits that follow given tokens."""
    parted = []
    for row in np.flatnonzero((ours != theirs).any(axis=1)).tolist():
        step = int(np.argmax(ours[row] != theirs[row]))
        logits_V = logits_after([*prompts[row], *theirs[row, :step].tolist()])
        gap = abs(logits_V[ours[row, step]] - logits_V[theirs[row, step]]) / np.abs(logits_V).max()
        parted.append((row, step, float(gap)))
    first = min((step for _, step, _ in parted), default=None)
    return Comparison(float((ours == theirs).mean()), first, max((gap for *_, gap in parted), default=0.0), parted)


def _cost(name: str, masked: Timed, ours: Timed) -> Row:
    """What a mask for every row costs, against the same batch without masks."""
    ratio = masked.median / ours.median
    target = Bound("time with masks", ratio, "<=", 1 + _MASK_COST)
    facts = {"first run s": masked.first, "runs s": masked.runs}
    name = f"{name}; a head mask per row, peer: ours without"
    return Row(name, "s", masked.median, ours.median, ratio, target, facts=facts)


def _sampled(lm: LanguageModel, tokens: Int[np.ndarray, "rows T"], new_tokens: int) -> list:
    """Answers to all rows, which decode at once, at RetMask's temperature."""
    requests = [Request(row, seed=i) for i, row in enumerate(tokens.tolist())]
    options = {"max_new_tokens": new_tokens, "temperature": 0.6, "stop_ids": ()}
    return list(generate_stream(lm.config, lm.params, requests, batch_size=len(requests), **options))


def _ours(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int, interventions: Interventions | None = None
) -> np.ndarray:
    tokens, lengths = pad_rows(prompts, lm.config.pad_id)
    out = lm.generate(tokens, lengths, max_new_tokens=new_tokens, interventions=interventions, stop_ids=())
    return np.asarray(out.tokens)
