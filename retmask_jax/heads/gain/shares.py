"""The share of a gain that each part of a model carries: put into the start model, and taken out of the trained one."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float64, PyTree

from retmask_jax.data.needles import Case
from retmask_jax.generation.batching import full_batches, pad_rows
from retmask_jax.heads.copy_score import words_of
from retmask_jax.heads.gain.grafting import Gates, states, target_logprobs
from retmask_jax.heads.knockout import control_heads
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head, all_heads
from retmask_jax.model.sharding import full_share, mesh_of
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory, stats
from retmask_jax.utils.hosts import to_host
from retmask_jax.utils.numbers import Number

_MULTIPLE = 64  # to which rows are padded
_DRAWS = 3  # of other heads, as controls for the retrieval heads


@dataclasses.dataclass(frozen=True)
class Part:
    """Parts of a model that are grafted together. kind: "group", "head" or "MLP"; layer, head: of the last two."""

    name: str
    kind: str
    gates: Gates
    layer: int | None = None
    head: int | None = None


@dataclasses.dataclass(frozen=True)
class Answered:
    """How models answer the same cases: [models, cases].

    logp_GN: log-probability of the right answer after the prompt, in nats. right_GN: whether each of its tokens is the most
    likely one, so that greedy decoding gives it.
    """

    logp_GN: Float64[np.ndarray, "G N"]
    right_GN: Bool[np.ndarray, "G N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
    """A measure of the two models, and by how much the trained one is above, paired by case."""

    start: Number
    trained: Number
    gain: Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carried:
    """Shares of a gain; undefined where the gain is 0.

    put_in: of the start model with this part of the trained one. taken_out: what the trained model loses with this part of
    the start model. interaction: the share of the part, and that of all others together, put in, minus 1; since the trained
    model without the part is the start model with all others, this is put_in - taken_out. Below 0 the part needs others to
    have its effect; above 0 others can do without it.
    """

    put_in: Number
    taken_out: Number
    interaction: Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartShares:
    """What a part carries of the gain in the log-probability of the answer, and of that in recall. kind, layer, head: as in
    `Part`; heads: how many it has."""

    name: str
    kind: str
    layer: int | None
    head: int | None
    heads: int
    logprob: Carried
    recall: Carried


def parts_of(
    config: ModelConfig, retrieval: Sequence[Head] = (), singly: Sequence[Head] | None = None, seed: int = 0
) -> list[Part]:
    """Named groups, single heads, and the MLP of each layer.

    Args:
        retrieval: The heads of a group, beside one of all other heads, and draws of as many of these where there are enough.
        singly: The heads that are a part each; None: all.
        seed: Of the first draw.
    """
    heads, layers = all_heads(config), range(config.n_layers)
    chosen = {tuple(head) for head in retrieval}
    enough = 0 < len(chosen) <= len(heads) - len(chosen)
    controls = control_heads(config, sorted(chosen), draws=_DRAWS, seed=seed) if enough else []
    named: Mapping[str, Gates] = {
        "retrieval heads": Gates.of(config, chosen),
        "other heads": Gates.of(config, [head for head in heads if head not in chosen]),
        **{f"{kind}, draw {draw + 1}": Gates.of(config, some) for kind, draw, some in controls},
        "all heads": Gates.of(config, heads),
        "all MLPs": Gates.of(config, mlps=layers),
        "norms and embeddings": Gates.of(config, others=True),
    }
    without = () if 0 < len(chosen) < len(heads) else ("retrieval heads", "other heads")
    groups = [Part(name, "group", gates) for name, gates in named.items() if name not in without]
    singly = heads if singly is None else singly
    each_head = [Part(f"head {i}-{j}", "head", Gates.of(config, [(i, j)]), i, j) for i, j in singly]
    each_mlp = [Part(f"MLP {i}", "MLP", Gates.of(config, mlps=[i]), i) for i in layers]
    return [*groups, *each_head, *each_mlp]


def tokens_read(config: ModelConfig, parts: Sequence[Part], cases: Sequence[Case]) -> int:
    """About how many tokens `part_shares` reads in whole passes: what lies before a part is computed once for all."""
    share = [1 - float(part.gates.first_group(config, False)) / config.repeats for part in parts]
    return round(2 * (1 + sum(share)) * sum(len(case.tokens) for case in cases))


def answers_between(
    config: ModelConfig,
    start: PyTree,
    trained: PyTree,
    cases: Sequence[Case],
    gates: Sequence[tuple[bool, Gates]],
    *,
    batch_size: int,
) -> Answered:
    """How the models between two answer cases.

    A pass begins at the first layer in which a model is another one than its base, from the states that the base had there.
    Two programs serve all gates.

    Args:
        start, trained: Parameters.
        gates: With the base of each: whether it is mostly the trained model (True) or mostly the start model.
        batch_size: Cases in a pass; halved where memory runs out.

    Raises:
        ValueError: A prompt with its answer exceeds the model's context.
        OutOfMemory: A single case is too much.
    """
    n, words = len(gates), [words_of(case) for case in cases]
    rows = [(*case.tokens, *answer[:-1]) for case, answer in zip(cases, words, strict=True)]
    longest = max(map(len, rows))
    padded = min(-(-longest // _MULTIPLE) * _MULTIPLE, config.max_length)
    tokens_NT, lengths_N = pad_rows(rows, config.pad_id, least=padded)
    check_tokens(config, tokens_NT)
    targets_NP, answered_N = pad_rows(words, config.pad_id)
    counted_NP = np.arange(targets_NP.shape[1]) < answered_N[:, None]
    first_N1 = (lengths_N - answered_N)[:, None]
    rows_NP = np.minimum(first_N1 + np.arange(targets_NP.shape[1]), lengths_N[:, None] - 1).astype(np.int32)
    params, bases = (start, trained), (Gates.of(config), ~Gates.of(config))
    firsts = [one.first_group(config, base) for base, one in gates]

    def work(todo: list[int], batch_size: int):
        waiting, left = set(todo), sorted({i // n for i in todo})
        size = -(-len(left) // -(-len(left) // batch_size))  # equal batches, so that few cases are computed twice
        for batch in full_batches(left, full_share(size)):
            of_batch = tokens_NT[batch], rows_NP[batch], targets_NP[batch], np.int32(longest)
            wanted = [g for g in range(n) if any(case * n + g in waiting for case in batch)]
            for base in (False, True):
                states_RBTE = states(config, params, bases[base], tokens_NT[batch], np.int32(longest))
                for g in (g for g in wanted if gates[g][0] == base):
                    found = target_logprobs(config, params, gates[g][1], firsts[g], states_RBTE, *of_batch)
                    logp_BP, right_BP = to_host(found)
                    logp_B = np.where(counted_NP[batch], logp_BP, 0).sum(axis=1, dtype=np.float64)
                    right_B = (right_BP | ~counted_NP[batch]).all(axis=1)
                    yield [case * n + g for case in batch], list(zip(logp_B.tolist(), right_B.tolist(), strict=True))

    with mesh_of(params):
        pairs = memory.in_batches(n * len(cases), batch_size, "graft", "answer", work)
    logp_N, right_N = (np.array(values).reshape(len(cases), n).T for values in zip(*pairs, strict=True))
    return Answered(logp_N, right_N)


def part_shares(
    config: ModelConfig,
    start: PyTree,
    trained: PyTree,
    cases: Sequence[Case],
    parts: Sequence[Part],
    *,
    batch_size: int,
) -> tuple[dict[str, Gain], list[PartShares]]:
    """(the gain by measure, "logprob" and "recall"; the shares that parts carry); arguments and errors as of
    `answers_between`."""
    nothing = Gates.of(config)
    gates = [(False, nothing), (True, ~nothing)]
    gates += [(False, part.gates) for part in parts] + [(True, ~part.gates) for part in parts]
    answered = answers_between(config, start, trained, cases, gates, batch_size=batch_size)
    by_measure = {"logprob": answered.logp_GN, "recall": answered.right_GN}
    carried = {name: _carried(values_GN.astype(np.float64), len(parts)) for name, values_GN in by_measure.items()}
    rows = [
        PartShares(
            name=part.name,
            kind=part.kind,
            layer=part.layer,
            head=part.head,
            heads=int(part.gates.heads_LH.sum()),
            logprob=carried["logprob"][i],
            recall=carried["recall"][i],
        )
        for i, part in enumerate(parts)
    ]
    return {name: _gain(*values_GN[:2]) for name, values_GN in by_measure.items()}, rows


def _gain(start_N: np.ndarray, trained_N: np.ndarray) -> Gain:
    mean = stats.proportion if start_N.dtype == bool else stats.bootstrap_mean
    return Gain(start=mean(start_N), trained=mean(trained_N), gain=stats.paired_bootstrap(trained_N, start_N))


def _carried(values_GN: np.ndarray, n_parts: int) -> list[Carried]:
    """The shares of parts, from a measure of the start model, the trained one, those with a part put in and taken out."""
    start_N, trained_N, *changed_N = values_GN
    put_in_PN = np.array(changed_N[:n_parts]) - start_N
    taken_out_PN = trained_N - np.array(changed_N[n_parts:])
    numbers = (
        stats.bootstrap_shares(share_PN, trained_N - start_N)
        for share_PN in (put_in_PN, taken_out_PN, put_in_PN - taken_out_PN)
    )
    return [Carried(put_in=a, taken_out=b, interaction=c) for a, b, c in zip(*numbers, strict=True)]
