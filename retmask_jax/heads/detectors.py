"""Detectors of retrieval heads with one interface, and how far they agree.

Each of DETECTORS is called as detector(lm, cases, batch_size=16) and returns a Detection. `copy` and `copy_forced` also
take max_new_tokens, and score the model's answers. The others read the gold answer, the needle's tokens, after the
prompt: they need cases with a needle, but not a model that answers right. `induction` and `previous_token` read random
tokens. Scores of different detectors have different units, so compare the order of heads (`agreement`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from retmask_jax.data.needles import Case
from retmask_jax.generation.batching import batches_by_length, pad_rows, pad_to_bucket
from retmask_jax.generation.decode import generate_many
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.logprobs import sequence_logprobs
from retmask_jax.heads.copy_score import RIGHT_RECALL, detect, score_answers, words_of
from retmask_jax.heads.detection import COUNTED, Detection, collect
from retmask_jax.heads.patterns.repeated import induction, previous_token
from retmask_jax.heads.reading import measure_answers, read_answers
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.attention import EVERYWHERE
from retmask_jax.model.interventions import Head, Interventions
from retmask_jax.model.layers import merge_layers, scaled, unembed, unembedding
from retmask_jax.model.sharding import full_share, mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory, stats
from retmask_jax.utils.hosts import to_host

# For each usable case its scores, or why it does not count.
CaseScores = Sequence[Float[np.ndarray, "L H"] | str]


def copy_forced(
    lm: LanguageModel, cases: Sequence[Case], *, max_new_tokens: int = 50, batch_size: int = 16
) -> Detection:
    """Computes the copy score of `detect`, but looks at heads only afterwards: the model answers without a probe, then
    reads its answer in one pass."""
    prompts = [case.tokens for case in cases]
    decoded = generate_many(
        lm.config, lm.params, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens, what="copy, forced"
    )
    said = [np.asarray(generated.tokens) for generated in decoded]
    keys = [np.zeros((0, lm.config.n_layers, lm.config.n_heads), np.int32)] * len(cases)
    spoken = [i for i, tokens in enumerate(said) if len(tokens)]
    if spoken:
        answers = [said[i].tolist() for i in spoken]
        found = read_answers(lm, [prompts[i] for i in spoken], answers, batch_size=batch_size)
        for i, forced in zip(spoken, found, strict=True):
            keys[i] = forced.argmax
    return score_answers(lm, cases, list(zip(said, keys, strict=True)), max_new_tokens=max_new_tokens)


def copy_position(lm: LanguageModel, cases: Sequence[Case], *, batch_size: int = 16) -> Detection:
    """Computes the share of the gold answer's tokens for which a head's strongest key is that token's place in the needle.

    As in the follow-up of arXiv 2606.21249 tokens of all cases are pooled: a case's score is its hits over the mean
    number of tokens of an answer, so that the mean over cases is all hits over all tokens.
    """

    def score(gold: Sequence[Case]) -> CaseScores:
        found = read_answers(lm, *_texts(gold), batch_size=batch_size, what="copy position")
        sources = [np.arange(*case.span)[:, None, None] for case in gold]
        hits = [(forced.argmax == source).sum(axis=0) for forced, source in zip(found, sources, strict=True)]
        return [hit / np.mean([len(source) for source in sources]) for hit in hits]

    return _gold(cases, score)


def argmax(lm: LanguageModel, cases: Sequence[Case], *, batch_size: int = 16) -> Detection:
    """Scores 1 where the strongest key of the prompt's last position is in the answer's span, else 0 (arXiv 2606.21249)."""

    def score(gold: Sequence[Case]) -> CaseScores:
        prompts, answers = _texts(gold)
        found = read_answers(lm, prompts, [words[:1] for words in answers], batch_size=batch_size, what="argmax")
        return [_inside(forced.argmax[0], case.span) for forced, case in zip(found, gold, strict=True)]

    return _gold(cases, score)


def mass(lm: LanguageModel, cases: Sequence[Case], *, batch_size: int = 16) -> Detection:
    """Measures the attention mass in the answer's span, mean over the positions that predict the gold answer."""

    def score(gold: Sequence[Case]) -> CaseScores:
        spans = [(case.span,) for case in gold]
        found = measure_answers(lm, *_texts(gold), _masses, spans=spans, batch_size=batch_size, what="mass")
        return [mass_NLH.mean(axis=0) for mass_NLH in found]

    return _gold(cases, score)


def query_focused(
    lm: LanguageModel, cases: Sequence[Case], *, batch_size: int = 16, null_query: str = "N/A"
) -> Detection:
    """Computes QRHead's score (arXiv 2506.09944): the attention mass from the question's tokens to the whole needle,
    mean over these tokens, minus the same for a null query in place of the question.

    The released code counts the instruction and the end of the chat template as part of both queries; here they are
    the question and the null query alone.

    Raises:
        ValueError: The null query has no tokens.
    """
    null = tuple(lm.tokenizer.encode(null_query, add_special_tokens=False))
    if not null:
        raise ValueError(f"null_query {null_query!r} has no tokens: give it words the tokenizer knows")

    def score(gold: Sequence[Case]) -> CaseScores:
        befores = [case.tokens[: case.question[0]] for case in gold] * 2
        queries = [case.tokens[slice(*case.question)] for case in gold] + [null] * len(gold)
        # `measure_answers` measures where an answer is predicted. With an answer that begins at the query's second
        # token, and has one more token at its end, these are the positions of the query's tokens.
        prompts = [(*before, query[0]) for before, query in zip(befores, queries, strict=True)]
        answers = [(*query[1:], lm.config.pad_id) for query in queries]
        spans = [(case.statement,) for case in gold] * 2
        found = measure_answers(lm, prompts, answers, _masses, spans=spans, batch_size=batch_size, what="query-focused")
        means = [mass_NLH.mean(axis=0) for mass_NLH in found]
        return [asked - empty for asked, empty in zip(means[: len(gold)], means[len(gold) :], strict=True)]

    return _gold(cases, score, _no_question)


def logit(lm: LanguageModel, cases: Sequence[Case], *, batch_size: int = 16) -> Detection:
    """Computes the score of LOCOS (arXiv 2607.01002): what a head reads in the answer's span adds to the logit of the
    answer's token, minus what it reads elsewhere adds, scaled to as many tokens; mean over the positions that predict
    the gold answer.

    Only the direct path counts: the head's output through o_proj (and the norm after attention, if the model has one)
    to the unembedding, without what later layers make of it. Norms are taken as linear, with the root mean squares that
    they had, and a soft cap on logits is left out. The released code also leaves out the final norm; here its weight
    and divisor count. A case counts where the model predicts more than half of the answer's tokens.
    """

    def score(gold: Sequence[Case]) -> CaseScores:
        prompts, answers = _texts(gold)
        found = measure_answers(
            lm,
            prompts,
            answers,
            _contributions,
            spans=[(case.span, EVERYWHERE) for case in gold],
            values=True,
            batch_size=batch_size,
            what="logit",
        )
        return [
            _contrast(parts, case) if np.mean(predicted == words) > RIGHT_RECALL else "wrong answer"
            for (predicted, parts), words, case in zip(found, answers, gold, strict=True)
        ]

    return _gold(cases, score)


def gradient(lm: LanguageModel, cases: Sequence[Case], *, batch_size: int = 16) -> Detection:
    """Computes how fast the gold answer's log-probability falls as a head is masked: minus its derivative with respect
    to a float head mask, at 0, in nats summed over the answer's tokens. One backward pass gives all heads."""

    def score(gold: Sequence[Case]) -> CaseScores:
        prompts, answers = _texts(gold)
        return _gate_gradients(lm, prompts, answers, batch_size)

    return _gold(cases, score)


DETECTORS: dict[str, Callable[..., Detection]] = {
    "copy": detect,
    "copy_forced": copy_forced,
    "copy_position": copy_position,
    "argmax": argmax,
    "mass": mass,
    "query_focused": query_focused,
    "logit": logit,
    "gradient": gradient,
    # What other fields look for, on random tokens.
    "induction": induction,
    "previous_token": previous_token,
}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far detectors a and b agree: Jaccard index of their best heads, rank correlation of their scores of all heads.

    spearman: None where one of them gives all heads the same score.
    """

    a: str
    b: str
    jaccard: float
    spearman: float | None


@dataclasses.dataclass(frozen=True)
class Repeats:
    """How far n runs of one detector agree: means over pairs of runs, and the heads that are among the best of every run."""

    n: int
    jaccard: float
    spearman: float
    common: list[Head]


def agreement(scores_by_name: Mapping[str, HeadScores], top_k: int) -> list[Agreement]:
    """Compares each two detectors by their top_k heads and by their scores of all heads."""
    return [
        Agreement(a, b, _shared(first, second, top_k), stats.defined(_correlation(first, second)))
        for (a, first), (b, second) in itertools.combinations(scores_by_name.items(), 2)
    ]


def over_seeds(runs: Sequence[HeadScores], top_k: int) -> Repeats:
    """Compares one detector's runs on cases of different seeds by their top_k heads and by their scores of all heads.

    Raises:
        ValueError: There are fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} runs cannot be compared: give one per seed, at least two")
    pairs = list(itertools.combinations(runs, 2))
    common = set.intersection(*(set(run.heads(top_k=top_k)) for run in runs))
    return Repeats(
        n=len(runs),
        jaccard=float(np.mean([_shared(a, b, top_k) for a, b in pairs])),
        spearman=float(np.mean([_correlation(a, b) for a, b in pairs])),
        common=sorted(common),
    )


def _shared(a: HeadScores, b: HeadScores, top_k: int) -> float:
    return stats.jaccard(a.heads(top_k=top_k), b.heads(top_k=top_k))


def _correlation(a: HeadScores, b: HeadScores) -> float:
    return stats.spearman(a.mean, b.mean).value


def _no_needle(case: Case) -> str | None:
    return None if case.span[1] > case.span[0] else "no needle"


def _no_question(case: Case) -> str | None:
    """Returns why a case has no question after a needle, or None."""
    if case.statement[1] <= case.statement[0]:
        return "no needle"
    if case.question[1] <= case.question[0]:
        return "no question"
    return None if case.question[0] >= case.statement[1] else "question before the needle"


def _gold(
    cases: Sequence[Case],
    score: Callable[[Sequence[Case]], CaseScores],
    why_not: Callable[[Case], str | None] = _no_needle,
) -> Detection:
    """Returns the Detection of the cases for which why_not gives None; the others do not count, for the reason given."""
    reasons = [why_not(case) for case in cases]
    usable = [case for case, reason in zip(cases, reasons, strict=True) if reason is None]
    found = iter(score(usable) if usable else ())
    results = [next(found) if reason is None else reason for reason in reasons]
    outcomes = [result if isinstance(result, str) else COUNTED for result in results]
    per_case = [result for result in results if not isinstance(result, str)]
    return collect(per_case, [case.needle.answer for case in cases], outcomes)


def _texts(gold: Sequence[Case]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Returns the prompts and the gold answers, as tokens."""
    return [case.tokens for case in gold], [words_of(case) for case in gold]


def _inside(keys: Int[np.ndarray, "L H"], span: tuple[int, int]) -> Float32[np.ndarray, "L H"]:
    return ((keys >= span[0]) & (keys < span[1])).astype(np.float32)


def _masses(config, params, out, target_BN):
    """Returns the mass in the first span, f32[B,N,L,H]."""
    return out.probed.mass[..., 0]


def _contributions(config, params, out, target_BN):
    """Returns the token that the model predicts, i32[B,N], and what each head adds to the logit of the target by what it
    reads in each of the two spans, f32[B,N,L,H,2]."""
    exact = jax.lax.Precision.HIGHEST
    to_target_BNE = jnp.moveaxis(jnp.take(unembedding(config, params), target_BN, axis=1), 0, -1).astype(jnp.float32)
    to_target_BNE *= (params["norm"]["scale"] + config.norm_offset) / out.rms_BP[..., None]
    to_target_BNE = scaled(scaled(to_target_BNE, config.residual_scale), config.logit_scale)

    def of_layer(args):
        layer, values_BNH2D = args
        o_HDE = layer["o"].astype(jnp.float32).reshape(config.n_heads, config.head_dim, -1)
        direction_BNE = to_target_BNE
        if "norm" in layer:
            written_BNE = jnp.einsum("bnhd,hde->bne", values_BNH2D[..., 1, :], o_HDE, precision=exact)
            square_BN1 = jnp.mean(jnp.square(written_BNE), axis=-1, keepdims=True)
            direction_BNE *= (layer["norm"] + config.norm_offset) * jax.lax.rsqrt(square_BN1 + config.norm_eps)
        direction_BNHD = jnp.einsum("bne,hde->bnhd", direction_BNE, o_HDE, precision=exact)
        return jnp.einsum("bnhd,bnhsd->bnhs", direction_BNHD, values_BNH2D, precision=exact)

    parts_LBNH2 = jax.lax.map(of_layer, (_written_by(config, params), jnp.moveaxis(out.probed.values, 2, 0)))
    return jnp.argmax(unembed(config, params, out.x_BPE), axis=-1), jnp.moveaxis(parts_LBNH2, 0, 2)


def _written_by(config, params) -> dict[str, Any]:
    """Returns o_proj as "o" [L,HD,E] and, if the model has a norm after attention, its weights as "norm" [L,E]."""

    def weights_of(block):
        norm = {} if config.norm_placement == "pre" else {"norm": block["attn_post_norm"]["scale"]}
        return {"o": block["attn"]["o"]["kernel"]} | norm

    groups = {name: {i: weights_of(block) for i, block in params.get(name, {}).items()} for name in ("blocks", "tail")}
    return merge_layers(config, groups)


def _contrast(parts_NLH2: Float[np.ndarray, "N L H 2"], case: Case) -> Float[np.ndarray, "L H"]:
    """Returns the needle's part minus that of as many tokens elsewhere, mean over positions."""
    within = case.span[1] - case.span[0]
    seen_N = len(case.tokens) + np.arange(len(parts_NLH2))
    share_N11 = (within / np.maximum(seen_N - within, 1))[:, None, None]
    needle_NLH, all_NLH = parts_NLH2[..., 0], parts_NLH2[..., 1]
    return (needle_NLH - share_N11 * (all_NLH - needle_NLH)).mean(axis=0)


def _gate_gradients(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int
) -> CaseScores:
    """Returns the scores of `gradient` for each prompt with its answer."""
    rows = [(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]
    longest = np.int32(max(map(len, rows)))
    check_tokens(lm.config, np.zeros((1, longest), np.int32))

    def work(todo: list[int], batch_size: int):
        for batch in batches_by_length([rows[i] for i in todo], min(batch_size, full_share(len(todo)))):
            batch = [todo[i] for i in batch]
            tokens_BT, lengths_B = pad_rows([rows[i] for i in batch], lm.config.pad_id)
            tokens_BT = pad_to_bucket(lm.config, tokens_BT, 0)
            first_B = np.array([len(prompts[i]) for i in batch])
            positions_T = np.arange(tokens_BT.shape[1])
            counted_BT = (positions_T >= first_B[:, None]) & (positions_T < lengths_B[:, None])
            yield batch, to_host(_gradients(lm.config, lm.params, tokens_BT, counted_BT, longest))

    with mesh_of(lm.params):
        return memory.in_batches(len(rows), batch_size, "gradient", "answer", work)


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_BT", "counted_BT")
def _gradients(config, params, tokens_BT, counted_BT, longest):
    """Returns f32[B,L,H]. Each row has gates of its own, so that one gradient of the sum over rows separates them."""
    lengths_B = jnp.full(len(tokens_BT), longest)

    def total(gate_BLH):
        gates = Interventions(head_mask=gate_BLH)
        return jnp.sum(sequence_logprobs(config, params, tokens_BT, counted_BT, lengths_B, gates, remat=True))

    return -jax.grad(total)(jnp.zeros((len(tokens_BT), config.n_layers, config.n_heads)))
