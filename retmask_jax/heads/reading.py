"""Reading given answers after their prompts, in one pass per batch: what the heads look at, without decoding."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from retmask_jax.generation.batching import bucket, full_batches, pad_rows
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.prefill import Shared, prefill, share_prefixes, slots_for, usual_chunk
from retmask_jax.model.attention import Probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import HiddenRows
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.kv_cache import empty_cache
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.sharding import full_share, mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host

# Tokens read per chunk after a shared prefix. Small, so that little is padded when continuations differ in length.
READ_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Forced:
    """One answer of N tokens, read by the model.

    Attributes:
        predicted: The most likely token at the place of each token of the answer.
        argmax: The position of the key that each head weighs most when it predicts that token.
    """

    predicted: Int[np.ndarray, " N"]
    argmax: Int[np.ndarray, "N L H"]


def read_answers(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    interventions: Interventions | None = None,
    what: str = "read answers",
) -> list[Forced]:
    """Reads given answers after their prompts in one pass per batch, without decoding.

    If `predicted` equals the answer, `argmax` is what greedy decoding would give.
    """
    found = measure_answers(
        lm, prompts, answers, own_choices, batch_size=batch_size, interventions=interventions, what=what
    )
    return [Forced(predicted, argmax) for predicted, argmax in found]


def measure_answers(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    measure: Callable[..., Any],
    *,
    spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    values: bool = False,
    batch_size: int = 16,
    interventions: Interventions | None = None,
    what: str = "read answers",
) -> list[Any]:
    """Measures the model at the positions that predict given answers, in one pass per batch.

    A prefix that several prompts share is computed once (`share_prefixes`).

    Args:
        lm: The model.
        prompts: Tokens of each prompt.
        answers: Tokens of the answer after each prompt, at least one.
        measure: measure(config, params, out, target_BN) -> pytree of arrays [B,N,...], where `out` is the `HiddenRows` of
            the positions that predict the answers and target_BN are the answers' tokens. A pure function defined at the
            top of a module, as each function object compiles a program of its own.
        spans: For each prompt as many token spans, which the probe measures as in `Probe`.
        values: Whether the probe also returns the heads' outputs in the spans.
        batch_size: Answers that are read together.
        interventions: The same for all prompts.
        what: The work's name in the progress bar.

    Returns:
        For each prompt what `measure` returns, as NumPy arrays [N,...] of its answer.

    Raises:
        ValueError: A prompt or an answer is empty, or they exceed the model's context.
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
            # After a shared prefix, chunks are computed up to the longest row of a batch. So rows are sorted by length,
            # and batches are small on a CPU, which two rows, or one per device, keep busy. All batches are padded to
            # one width, for one program.
            shared = cache is not None
            size = min(batch_size, full_share(2 if shared and on_cpu else len(group.members)))
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
    config: ModelConfig,
    measure: Callable[..., Any],
    values: bool,
    params: PyTree,
    prefix: PyTree | None,
    tokens_BT: Int[jax.Array, "B T"],
    start_B: Int[jax.Array, " B"],
    end_B: Int[jax.Array, " B"],
    rows_BN: Int[jax.Array, "B N"],
    target_BN: Int[jax.Array, "B N"],
    spans_BN2: Int[jax.Array, "B spans 2"] | None,
    masks: Masks,
    longest: Int[jax.Array, ""],
) -> Any:
    """Measures one batch of texts; the compiled program of `measure_answers`.

    Args:
        measure: Static, as in `measure_answers`.
        values: Static, as in `measure_answers`.
        prefix: The cache of the prefix that the texts continue, or None.
        tokens_BT: The texts after the prefix.
        start_B: The number of the prefix's tokens that each text continues; not read without a prefix.
        end_B: The length of each text, including the prefix.
        rows_BN: The positions in tokens_BT to measure at.
        target_BN: The answers' tokens, which are predicted there.
        spans_BN2: Token spans for the probe, or None.
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


def own_choices(
    config: ModelConfig, params: PyTree, out: HiddenRows, target_BN: Int[jax.Array, "B N"]
) -> tuple[Int[jax.Array, "B N"], Int[jax.Array, "B N L H"]]:
    """Returns the most likely token, and the position of the key that each head weighs most."""
    assert out.probed is not None  # it was asked for
    return jnp.argmax(unembed(config, params, out.x_BPE), axis=-1), out.probed.keys[..., 0]


def _continuations(config, batch, prompts, answers, width: int, group: Shared | None):
    """Returns tokens_BT, start_B, end_B, rows_BN and target_BN of `read_batch`.

    T is the same for all batches of a group that shares a prefix.
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


def _read_prefix(config, params, prefix, masks, longest):
    """Returns the cache of a shared prefix (one row, every position), or None for an empty one."""
    if not prefix:
        return None
    length = bucket(len(prefix))
    tokens_1T = np.pad(np.array([prefix], np.int32), ((0, 0), (0, length - len(prefix))))
    return _prefix_cache(config, params, tokens_1T, np.array([len(prefix)], np.int32), masks, longest)


@functools.partial(jax.jit, static_argnums=0)
def _prefix_cache(config, params, tokens_1T, end_1, masks, longest):
    dtype = jax.tree.leaves(params)[0].dtype
    cache = empty_cache(config, 1, slots_for(tokens_1T.shape[1]), dtype, rings=False)
    return prefill(config, params, tokens_1T, end_1, masks, cache, jnp.zeros((1, 1), jnp.int32), longest=longest).cache


def _corner(new, old):
    """Returns the index at which a cache [R,1,K,...] of fewer slots is copied into [R,B,K,...]: the first slots of every
    row."""
    return (slice(None), slice(None), *(slice(size) for size in old.shape[2:]))
