"""Given answers read by the model after their prompts, in one pass a batch: what its heads look at, without decoding."""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax.generation.batching import bucket, full_batches, pad_rows
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.prefill import Shared, prefill, share_prefixes, slots_for, usual_chunk
from retmask_jax.model.attention import Probe
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kv_cache import empty_cache
from retmask_jax.model.layers import unembed
from retmask_jax.model.masks import Masks, normalise
from retmask_jax.model.sharding import full_share, mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host

READ_CHUNK = 256  # tokens at once behind a shared beginning: little is wasted where continuations differ in length


@dataclasses.dataclass(frozen=True)
class Forced:
    """One answer read by the model, as NumPy arrays: predicted i32[n], its own choice at each token of the answer, and
    argmax i32[n,L,H], the position of the key each head looked at most when it predicted that token."""

    predicted: np.ndarray
    argmax: np.ndarray


def read_answers(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    interventions: Interventions | None = None,
    what: str = "read answers",
) -> list[Forced]:
    """Read given answers behind their prompts in one pass per batch, without decoding.

    Where predicted equals the answer, argmax is what greedy decoding would have given.
    """
    found = measure_answers(
        lm, prompts, answers, own_choices, batch_size=batch_size, interventions=interventions, what=what
    )
    return [Forced(*one) for one in found]


def measure_answers(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    measure,
    *,
    spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    values: bool = False,
    batch_size: int = 16,
    interventions: Interventions | None = None,
    what: str = "read answers",
) -> list:
    """measure(config, params, out, target_BN) of the rows that predict given answers, in one pass per batch.

    measure: a pure function, named in a module (each compiles its own program), of the `HiddenRows` at those rows and the
    tokens they should predict; gives arrays [B,N,...]. spans, values: per prompt as many spans, and whether to ask for
    the heads' outputs, as in `Probe`. What prompts have in common at their beginning is computed once
    (`share_prefixes`). Returns per prompt what measure gives, as NumPy arrays [n,...].
    """
    if not all(prompts) or not all(answers) or len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts need as many answers, and none of them may be empty")
    config, width = lm.config, max(map(len, answers))
    check_tokens(config, np.zeros((1, max(map(len, prompts))), np.int32), new_tokens=width)
    masks = normalise(config, interventions)
    longest = np.int32(max(map(len, prompts)) + width)
    on_cpu = jax.default_backend() == "cpu"

    def work(todo: list[int], batch_size: int):
        for group in share_prefixes([prompts[i] for i in todo]):
            group = dataclasses.replace(group, members=tuple(todo[i] for i in group.members))
            cache = _read_prefix(config, lm.params, group.prefix, masks, longest)
            # Behind a beginning chunks are computed as far as the longest row of a batch goes: rows of one length, and
            # one program for all. On a CPU two rows fill a product, or one on each of its devices.
            shared = cache is not None
            size = min(batch_size, full_share(2 if shared and on_cpu else len(group.members)))
            # The longest continuations first.
            members = sorted(zip(group.members, group.starts, strict=True), key=lambda m: m[1] - len(prompts[m[0]]))
            for batch in full_batches(members, size):
                inputs = _continuations(config, batch, prompts, answers, width, group if shared else None)
                spans_BN2 = None if spans is None else np.array([spans[i] for i, _ in batch], np.int32)
                out = to_host(read_batch(config, measure, values, lm.params, cache, *inputs, spans_BN2, masks, longest))
                rows = [i for i, _ in batch]
                cut = [operator.itemgetter((row, slice(len(answers[i])))) for row, i in enumerate(rows)]
                yield rows, [jax.tree.map(take, out) for take in cut]

    with mesh_of(lm.params):
        return memory.in_batches(len(prompts), batch_size, what, "answer", work)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@row_parallel("tokens_BT", "start_B", "end_B", "rows_BN", "target_BN", "spans_BN2", "masks")
def read_batch(
    config, measure, values, params, prefix, tokens_BT, start_B, end_B, rows_BN, target_BN, spans_BN2, masks, longest
):
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
        longest: Tokens of the longest text and its answer.
    """
    batch, length = tokens_BT.shape
    n_prefix, chunk = (0, usual_chunk()) if prefix is None else (prefix["blocks"]["0"].slots, READ_CHUNK)
    cache = None
    if prefix is not None or length > chunk:
        dtype = jax.tree.leaves(params)[0].dtype
        cache = empty_cache(config, batch, n_prefix + slots_for(length, chunk), dtype, rings=False)
    if prefix is not None:
        cache = jax.tree.map(lambda new, old: new.at[_corner(new, old)].set(old), cache, prefix)
    rows_BN = jnp.minimum(rows_BN, (end_B - start_B)[:, None] - 1)
    out = prefill(
        config,
        params,
        tokens_BT,
        end_B,
        masks,
        cache,
        rows_BN,
        start_B=None if prefix is None else start_B,
        probe=Probe(rows_BN, spans_BN2, values=values),
        longest=longest,
        chunk=chunk,
    )
    return measure(config, params, out, target_BN)


def own_choices(config, params, out, target_BN):
    """(the model's own next token i32[B,N], the key each head looks at most i32[B,N,L,H])."""
    return jnp.argmax(unembed(config, params, out.x_BPE), axis=-1), out.probed.keys[..., 0]


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


def _read_prefix(config, params, prefix, masks: Masks, longest):
    """The cache of a shared beginning (one row, every position), or None where there is none."""
    if not prefix:
        return None
    length = bucket(len(prefix))
    tokens_1T = np.pad(np.array([prefix], np.int32), ((0, 0), (0, length - len(prefix))))
    return _prefix_cache(config, params, tokens_1T, np.array([len(prefix)], np.int32), masks, longest)


@functools.partial(jax.jit, static_argnums=0)
def _prefix_cache(config, params, tokens_1T, end_1, masks: Masks, longest):
    dtype = jax.tree.leaves(params)[0].dtype
    cache = empty_cache(config, 1, slots_for(tokens_1T.shape[1]), dtype, rings=False)
    return prefill(config, params, tokens_1T, end_1, masks, cache, jnp.zeros((1, 1), jnp.int32), longest=longest).cache


def _corner(new, old):
    """Where [R,1,K,...] of fewer slots goes into [R,B,K,...]: to every row, from the first slot on."""
    return (slice(None), slice(None), *(slice(size) for size in old.shape[2:]))
