"""Detection: which heads look at the needle's token while the model copies it (arXiv 2404.15574)."""

import collections
import dataclasses
import functools
import logging
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax import memory, stats
from retmask_jax.generate import bucket, full_batches, generate_many, pad_rows
from retmask_jax.haystack import Case
from retmask_jax.head_scores import HeadScores
from retmask_jax.hosts import to_host
from retmask_jax.lm import LanguageModel
from retmask_jax.matching import rouge1_recall
from retmask_jax.model.attention import Probe
from retmask_jax.model.cache import empty_cache
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.transformer import check_tokens, unembed
from retmask_jax.prefill import Shared, prefill, share_prefixes, slots_for, usual_chunk
from retmask_jax.sharding import by_rows, full_share, mesh_of

log = logging.getLogger(__name__)

RIGHT_RECALL = 0.5
COUNTED = "counted"
READ_CHUNK = 256  # tokens at once behind a shared beginning: little is wasted where continuations differ in length


class NoCaseCounts(ValueError):
    """No detection case counts, so no head has a score. outcomes: why not, per case."""

    def __init__(self, message: str, outcomes: Sequence[str]):
        super().__init__(message)
        self.outcomes = list(outcomes)


@dataclasses.dataclass(frozen=True)
class Detection:
    """scores: of the counted cases. answers and outcomes: per case, the model's answer (where a detector reads the gold
    answer, that one), and "counted" or why it was not."""

    scores: HeadScores
    answers: list[str]
    outcomes: list[str]

    @property
    def reasons(self) -> dict[str, int]:
        """Number of cases per outcome."""
        return dict(collections.Counter(self.outcomes))


def detect(lm: LanguageModel, cases: Sequence[Case], *, max_new_tokens: int = 50, batch_size: int = 16,
           released: bool = False, read: bool = True) -> Detection:  # fmt: skip
    """Copy scores by greedy decoding: METHODS of arXiv 2404.15574, one score per head and counted case.

    A case counts if the ROUGE-1 recall of the answer against the needle's answer part is above 0.5. Decoding ends at
    EOS or a newline. read: where a first batch answers with the needle's words, read the others' in one pass each
    (`read_answers`) and decode only where the model says something else; the result is the same. released=True
    repeats the published detector: it never stops before max_new_tokens and adds up repeated copies, so that scores
    can exceed 1. Raises NoCaseCounts, a ValueError, if no case counts.
    """
    results = _greedy(lm, cases, max_new_tokens, batch_size, released, read)
    return score_answers(lm, cases, results, max_new_tokens=max_new_tokens, released=released)


def score_answers(lm: LanguageModel, cases: Sequence[Case], results: Sequence[tuple[Any, Any]], *, max_new_tokens: int,
                  released: bool = False) -> Detection:  # fmt: skip
    """Copy scores of the model's answers, as in `detect`: results are (tokens i32[n], argmax i32[n,L,H]) per case."""
    newline = newline_ids(lm.tokenizer)
    answers, outcomes, per_case = [], [], []
    for case, (tokens_N, argmax_NLH) in zip(cases, results, strict=True):
        end = len(tokens_N) if released else _first(tokens_N, newline)
        tokens_N, argmax_NLH = tokens_N[:end], argmax_NLH[:end]
        answer = lm.tokenizer.decode(tokens_N, skip_special_tokens=True)
        answers.append(answer)
        outcomes.append(_outcome(answer, case.needle.answer, cut=end == max_new_tokens))
        if outcomes[-1] == COUNTED:
            per_case.append(copy_score(np.asarray(case.tokens), case.span, tokens_N, argmax_NLH, released))
    return collect(per_case, answers, outcomes)


def collect(per_case: Sequence[np.ndarray], answers: list[str], outcomes: list[str]) -> Detection:
    """The Detection of scores f32[L,H], one for each outcome that says counted; NoCaseCounts if none does."""
    reasons = dict(collections.Counter(outcomes))
    if not per_case:
        raise NoCaseCounts(
            f"none of {len(outcomes)} detection cases counts: {reasons}; "
            "check the chat template and the lengths, or give max_new_tokens room",
            outcomes,
        )
    log.info("%d of %d cases counted: %s", len(per_case), len(outcomes), reasons)
    return Detection(HeadScores(np.stack(per_case, axis=-1)), answers, outcomes)


@dataclasses.dataclass(frozen=True)
class Forced:
    """One answer read by the model, as NumPy arrays: predicted i32[n], its own choice at each token of the answer, and
    argmax i32[n,L,H], the position of the key each head looked at most when it predicted that token."""

    predicted: np.ndarray
    argmax: np.ndarray


def read_answers(lm: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *,
                 batch_size: int = 16, interventions: Interventions | None = None,
                 what: str = "read answers") -> list[Forced]:  # fmt: skip
    """Read given answers behind their prompts in one pass per batch, without decoding.

    Where predicted equals the answer, argmax is what greedy decoding would have given.
    """
    found = measure_answers(lm, prompts, answers, own_choices, batch_size=batch_size, interventions=interventions,
                            what=what)  # fmt: skip
    return [Forced(*one) for one in found]


def measure_answers(lm: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], measure, *,
                    spans: Sequence[Sequence[tuple[int, int]]] | None = None, values: bool = False,
                    batch_size: int = 16, interventions: Interventions | None = None,
                    what: str = "read answers") -> list:  # fmt: skip
    """measure(config, params, out, target_BN) of the rows that predict given answers, in one pass per batch.

    measure: a pure function, named in a module (each compiles its own program), of a `Prefilled` at those rows and the
    tokens they should predict; gives arrays [B,N,...]. spans, values: per prompt as many spans, and whether to ask for
    the heads' outputs, as in `Probe`. What prompts have in common at their beginning is computed once
    (`share_prefixes`). Returns per prompt what measure gives, as NumPy arrays [n,...].
    """
    if not all(prompts) or not all(answers) or len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts need as many answers, and none of them may be empty")
    config, width = lm.config, max(map(len, answers))
    check_tokens(config, np.zeros((1, max(map(len, prompts))), np.int32), new_tokens=width)
    iv = (interventions or Interventions()).fill(config)
    longest = np.int32(max(map(len, prompts)) + width)
    on_cpu = jax.default_backend() == "cpu"

    def work(todo: list[int], batch_size: int):
        for group in share_prefixes([prompts[i] for i in todo]):
            group = dataclasses.replace(group, members=tuple(todo[i] for i in group.members))
            cache = _read_prefix(config, lm.params, group.prefix, iv, longest)
            # Behind a beginning chunks are computed as far as the longest row of a batch goes: rows of one length, and
            # one program for all. On a CPU two rows fill a product, or one on each of its devices.
            shared = cache is not None
            size = min(batch_size, full_share(2 if shared and on_cpu else len(group.members)))
            # The longest continuations first.
            members = sorted(zip(group.members, group.starts, strict=True), key=lambda m: m[1] - len(prompts[m[0]]))
            for batch in full_batches(members, size):
                inputs = _continuations(config, batch, prompts, answers, width, group if shared else None)
                spans_BN2 = None if spans is None else np.array([spans[i] for i, _ in batch], np.int32)
                out = to_host(read_batch(config, measure, values, lm.params, cache, *inputs, spans_BN2, iv, longest))
                rows = [i for i, _ in batch]
                cut = [operator.itemgetter((row, slice(len(answers[i])))) for row, i in enumerate(rows)]
                yield rows, [jax.tree.map(take, out) for take in cut]

    with mesh_of(lm.params):
        return memory.in_batches(len(prompts), batch_size, what, "answer", work)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def read_batch(config, measure, values, params, prefix, tokens_BT, start_B, end_B, rows_BN, target_BN, spans_BN2, iv,
               longest):  # fmt: skip
    """The compiled program of `measure_answers`: what is measured, [B,N,...], at rows of a batch of texts.

    Args:
        measure: Static, as in `measure_answers`.
        values: Static; also ask for the heads' outputs in the spans.
        prefix: The cache of the beginning that the texts continue; None where they begin themselves.
        tokens_BT: The texts, behind the prefix.
        start_B: How many tokens of the prefix each text continues; not read without a prefix.
        end_B: The length of each text, the prefix counted.
        rows_BN: The rows of tokens_BT to measure at.
        target_BN: The tokens that those rows should predict.
        spans_BN2: Token spans to measure in, or None.
        iv: Filled interventions.
        longest: Tokens of the longest text and its answer.
    """
    rows = tokens_BT, start_B, end_B, rows_BN, target_BN, spans_BN2, iv.per_row(len(tokens_BT))
    return by_rows(functools.partial(_read_rows, config, measure, values), (params, prefix, longest), rows)


def own_choices(config, params, out, target_BN):
    """(the model's own next token i32[B,N], the key each head looks at most i32[B,N,L,H])."""
    return jnp.argmax(unembed(config, params, out.x_BPE), axis=-1), out.probed.keys[..., 0]


def newline_ids(tokenizer) -> np.ndarray:
    """Ids of the tokens whose text holds a newline."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return np.array([i for i, text in enumerate(texts) if "\n" in text], np.int64)


def copy_score(prompt_S, span: tuple[int, int], tokens_N, argmax_NLH, released: bool = False) -> np.ndarray:
    """f32[L,H]: |tokens a head copied from the needle| / |tokens of the needle|, both as sets.

    A head copies token n if its strongest key lies in the span [start, end) and holds the token that is generated.
    released=True counts every copy, repeats included, and divides by the length of the span.
    """
    start, end = span
    inside_NLH = (argmax_NLH >= start) & (argmax_NLH < end)
    key_NLH = np.minimum(argmax_NLH, len(prompt_S) - 1)  # keys behind the prompt lie in no span
    hit_NLH = inside_NLH & (prompt_S[key_NLH] == np.asarray(tokens_N)[:, None, None])
    if released:
        return hit_NLH.sum(axis=0).astype(np.float32) / (end - start)
    needle_ids = np.unique(prompt_S[start:end])
    copied = [(hit_NLH & (np.asarray(tokens_N) == i)[:, None, None]).any(axis=0) for i in needle_ids]
    return np.sum(copied, axis=0).astype(np.float32) / len(needle_ids)


def words_of(case: Case) -> tuple[int, ...]:
    """The tokens of the needle's answer part, as they stand in the prompt."""
    return tuple(case.tokens[slice(*case.span)])


def stability(scores: HeadScores, steps: int = 10, **selection) -> list[dict]:
    """How the head set settles as cases are added: [{"cases", "heads", "jaccard" (with the final set)}, ...].

    selection: threshold=... or top_k=..., as in `HeadScores.heads`.
    """
    total = int(scores.counts.max())
    final = scores.heads(**selection)
    rows = []
    for n in sorted({max(1, round(total * (i + 1) / steps)) for i in range(steps)}):
        first = HeadScores([[cases[:n] for cases in row] for row in scores.per_case])
        heads = first.heads(**selection)
        rows.append({"cases": n, "heads": len(heads), "jaccard": stats.jaccard(heads, final)})
    return rows


def _outcome(answer: str, reference: str, cut: bool) -> str:
    if not answer.strip():
        return "empty answer"
    if rouge1_recall(answer, reference) > RIGHT_RECALL:
        return COUNTED
    return "wrong answer, cut at the token limit" if cut else "wrong answer"


def _greedy(lm, cases, max_new_tokens: int, batch_size: int, released: bool, read: bool) -> list:
    """(tokens, argmax) of each case's greedy answer."""
    results: list[Any] = [None] * len(cases)

    def decode(chosen) -> None:
        decoded = generate_many(
            lm.config, lm.params, [cases[i].tokens for i in chosen], batch_size=batch_size,
            max_new_tokens=max_new_tokens, stop_ids=() if released else None, probe=True, what="detect",
        )  # fmt: skip
        for i, result in zip(chosen, decoded, strict=True):
            results[i] = result.tokens, result.argmax

    def read_others(closing: tuple[int, ...]) -> None:
        """Results of those that say the needle's words and the closing, and stop."""
        drafts = {
            i: (*words_of(cases[i]), *closing, lm.config.eos_ids[0])
            for i, result in enumerate(results) if result is None
        }  # fmt: skip
        drafts = {i: draft for i, draft in drafts.items() if len(draft) <= max_new_tokens}
        if not drafts:
            return
        found = read_answers(lm, [cases[i].tokens for i in drafts], list(drafts.values()), batch_size=batch_size,
                             what="detect")  # fmt: skip
        for (i, draft), forced in zip(drafts.items(), found, strict=True):
            *said, last = forced.predicted.tolist()
            if tuple(said) == draft[:-1] and last in lm.config.eos_ids:
                results[i] = forced.predicted[:-1], forced.argmax[:-1]

    first = sorted(range(len(cases)), key=lambda i: len(cases[i].tokens))[:batch_size]
    if read and not released and lm.config.eos_ids and len(first) < len(cases):
        decode(first)
        closing = _usual_closing([cases[i] for i in first], [results[i][0] for i in first], max_new_tokens)
        if closing is not None:
            read_others(closing)
    decode([i for i, result in enumerate(results) if result is None])
    return results


def _usual_closing(cases, answers, max_new_tokens: int) -> tuple[int, ...] | None:
    """What most answers say behind the needle's words before they stop; None if most say something else."""
    closings = collections.Counter(
        tuple(map(int, tokens[len(words) :]))
        for tokens, words in zip(answers, map(words_of, cases), strict=True)
        if len(tokens) < max_new_tokens and tuple(tokens[: len(words)]) == words
    )
    (closing, count), *_ = closings.most_common(1) or [(None, 0)]
    return closing if count > len(cases) / 2 else None


def _continuations(config, batch, prompts, answers, width: int, group: Shared | None):
    """(tokens i32[B,T] behind the shared beginning, start_B, end_B, rows i32[B,N] that predict the answer, and the
    answer i32[B,N]).

    T fits all members of a group that shares one.
    """
    rows = [(*prompts[i][start:], *answers[i][:-1]) for i, start in batch]
    tokens_BT, lengths_B = pad_rows(rows, config.pad_id, multiple_of=READ_CHUNK // 4)
    if group is not None:
        members = zip(group.members, group.starts, strict=True)
        longest = max(len(prompts[i]) - start + len(answers[i]) - 1 for i, start in members)
        tokens_BT = np.pad(tokens_BT, ((0, 0), (0, max(0, slots_for(longest, READ_CHUNK) - tokens_BT.shape[1]))))
    start_B = np.array([start for _, start in batch], np.int32)
    asked_B = np.array([len(prompts[i]) - start - 1 for i, start in batch], np.int32)
    target_BN, _ = pad_rows([answers[i] for i, _ in batch], config.pad_id)
    target_BN = np.pad(target_BN, ((0, 0), (0, width - target_BN.shape[1])), constant_values=config.pad_id)
    return tokens_BT, start_B, start_B + lengths_B, asked_B[:, None] + np.arange(width, dtype=np.int32), target_BN


def _read_prefix(config, params, prefix, iv, longest):
    """The cache of a shared beginning (one row, every position), or None where there is none."""
    if not prefix:
        return None
    length = bucket(len(prefix))
    tokens_1T = np.pad(np.array([prefix], np.int32), ((0, 0), (0, length - len(prefix))))
    return _prefix_cache(config, params, tokens_1T, np.array([len(prefix)], np.int32), iv, longest)


@functools.partial(jax.jit, static_argnums=0)
def _prefix_cache(config, params, tokens_1T, end_1, iv, longest):
    dtype = jax.tree.leaves(params)[0].dtype
    cache = empty_cache(config, 1, slots_for(tokens_1T.shape[1]), dtype, rings=False)
    return prefill(config, params, tokens_1T, end_1, iv, cache, jnp.zeros((1, 1), jnp.int32), longest=longest).cache


def _read_rows(config, measure, values, shared, rows):
    params, prefix, longest = shared
    tokens_BT, start_B, end_B, rows_BN, target_BN, spans_BN2, iv = rows
    batch, length = tokens_BT.shape
    n_prefix, chunk = (0, usual_chunk()) if prefix is None else (prefix["blocks"]["0"].slots, READ_CHUNK)
    cache = None
    if prefix is not None or length > chunk:
        dtype = jax.tree.leaves(params)[0].dtype
        cache = empty_cache(config, batch, n_prefix + slots_for(length, chunk), dtype, rings=False)
    if prefix is not None:
        cache = jax.tree.map(lambda new, old: new.at[_corner(new, old)].set(old), cache, prefix)
    rows_BN = jnp.minimum(rows_BN, (end_B - start_B)[:, None] - 1)
    out = prefill(config, params, tokens_BT, end_B, iv, cache, rows_BN, start_B=None if prefix is None else start_B,
                  probe=Probe(rows_BN, spans_BN2, values=values), longest=longest, chunk=chunk)  # fmt: skip
    return measure(config, params, out, target_BN)


def _corner(new, old):
    """Where [R,1,K,...] of fewer slots goes into [R,B,K,...]: to every row, from the first slot on."""
    return (slice(None), slice(None), *(slice(size) for size in old.shape[2:]))


def _first(tokens_N, stop_ids) -> int:
    """Index of the first stop id, or the number of tokens."""
    found = np.flatnonzero(np.isin(tokens_N, stop_ids))
    return int(found[0]) if len(found) else len(tokens_N)
