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

from retmask_jax.generation.batching import pad_rows
from retmask_jax.generation.continuations import read_on, shared_batches
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.attention import Probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import HiddenRows
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.sharding import mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host


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
    relative: bool = False,
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
        relative: Whether spans count from the position that is measured, as in `Probe`.
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
    read = [answer[:-1] for answer in answers]

    def work(todo: list[int], batch_size: int):
        common = {"batch_size": batch_size, "masks": masks, "longest": longest}
        for batch in shared_batches(config, lm.params, prompts, read, todo, **common):
            rows_BN = (batch.prompt_B - batch.start_B)[:, None] - 1 + np.arange(width, dtype=np.int32)
            target_BN, _ = pad_rows([answers[i] for i in batch.rows], config.pad_id, least=width)
            spans_BN2 = None if spans is None else np.array([spans[i] for i in batch.rows], np.int32)
            inputs = batch.prefix, batch.tokens_BT, batch.start_B, batch.end_B, rows_BN, target_BN, spans_BN2
            out = to_host(read_batch(config, measure, values, lm.params, *inputs, masks, longest, relative=relative))
            cut = [operator.itemgetter((row, slice(len(answers[i])))) for row, i in enumerate(batch.rows)]
            yield batch.rows, [jax.tree.map(take, out) for take in cut]

    with mesh_of(lm.params):
        return memory.in_batches(len(prompts), batch_size, what, "answer", work)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="relative")
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
    *,
    relative: bool = False,
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
        relative: Static, as in `measure_answers`.
    """
    probe = Probe(rows_BN, spans_BN2, relative, values=values)
    texts = prefix, tokens_BT, start_B, end_B
    out = read_on(config, params, *texts, masks, rows_BN, probe=probe, longest=longest)
    return measure(config, params, out, target_BN)


def own_choices(
    config: ModelConfig, params: PyTree, out: HiddenRows, target_BN: Int[jax.Array, "B N"]
) -> tuple[Int[jax.Array, "B N"], Int[jax.Array, "B N L H"]]:
    """Returns the most likely token, and the position of the key that each head weighs most."""
    assert out.probed is not None  # it was asked for
    return jnp.argmax(unembed(config, params, out.x_BPE), axis=-1), out.probed.keys[..., 0]
