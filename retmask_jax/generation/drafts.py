"""Greedy answers from drafts: what the model is expected to say is read with the prompt in one pass, kept as far as the
model says the same, and decoded from there on.

The answers are those of plain greedy decoding, whatever the drafts.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from retmask_jax.generation.batching import pad_rows
from retmask_jax.generation.continuations import read_on, shared_batches
from retmask_jax.generation.decode import DECODING, Generated, one_row
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import NO_STOP, Draws, check_options
from retmask_jax.model.attention import Probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import next_hidden
from retmask_jax.model.kv_cache import Cache
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.sharding import ROWS, STACKED_ROWS, mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host


class Ends(NamedTuple):
    """What ends an answer: a stop id; or a line end once the answer has a word.

    Attributes:
        stop_ids: i32, padded.
        line_end_V: Whether a token has a line end in it.
        word_V: Whether a token has text other than blanks.
    """

    stop_ids: Any
    line_end_V: Any
    word_V: Any

    @classmethod
    def of(cls, config: ModelConfig, line_end_V: Bool[np.ndarray, " V"], word_V: Bool[np.ndarray, " V"]) -> "Ends":
        """With the model's stop ids. Ids that the tokenizer does not have are taken for words."""
        rest = config.vocab_size - len(word_V)
        line_end_V, word_V = line_end_V[: config.vocab_size], word_V[: config.vocab_size]
        stop_ids = Draws.of(config, None, 0.0, 1.0).stop_ids
        return cls(
            stop_ids, np.pad(line_end_V, (0, max(0, rest))), np.pad(word_V, (0, max(0, rest)), constant_values=True)
        )


def answer_drafts(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    drafts: Sequence[Sequence[int]],
    ends: Ends,
    *,
    max_new_tokens: int,
    width: int,
    batch_size: int = 16,
    least: int = 0,
    what: str = "answer",
    note: Callable[[int, Generated], str] | None = None,
) -> list[Generated]:
    """Greedy answers to prompts, with what every head looked at.

    Args:
        drafts: What each answer is expected to begin with; may be empty.
        max_new_tokens: The longest answer.
        width: The tokens of a draft that are read; calls of one width share their programs.
        batch_size: Prompts that are answered together.
        least: As of `shared_batches`.
        what: Names the work in the progress bar.
        note: Called for each answer with the index of its prompt; what it returns is shown after the bar.

    Returns:
        For each prompt, as of `generate_many` with a probe; `stops` may be a line end.

    Raises:
        ValueError: A prompt is empty, or does not fit into the model's context with its answer.
    """
    check_options(max_new_tokens, 0.0, 1.0)
    if not all(prompts) or len(prompts) != len(drafts):
        raise ValueError(f"{len(prompts)} prompts need as many drafts, and no prompt may be empty")
    config, width = lm.config, min(width, max_new_tokens)
    longest = max(map(len, prompts), default=0)
    check_tokens(config, np.zeros((1, longest), np.int32), new_tokens=max_new_tokens)
    drafts = [tuple(draft)[:width] for draft in drafts]
    masks, longest = normalise(config), np.int32(longest + max_new_tokens)

    def work(todo: list[int], batch_size: int):
        waiting: list[_Begun] = []  # small batches with an answer that goes on after its draft
        common = {"batch_size": batch_size, "masks": masks, "longest": longest, "more": max_new_tokens, "least": least}

        def go_on() -> Iterator[tuple[list[int], list[Generated]]]:
            parts = tuple(begun.state for begun in waiting)
            parts += parts[-1:] * (batch_size // len(waiting[0].rows) - len(parts))  # for one program
            found = to_host(decode_together(config, lm.params, parts, ends, masks, longest))
            for begun, out in zip(waiting, found, strict=False):
                yield begun.rows, _each_row(out)
            waiting.clear()

        for batch in shared_batches(config, lm.params, prompts, drafts, todo, **common):
            draft_BN, said_B = pad_rows([drafts[i] for i in batch.rows], config.pad_id, least=width)
            drafted = Drafted(batch.tokens_BT, batch.start_B, batch.end_B, batch.prompt_B, draft_BN, said_B)
            arguments = config, lm.params, batch.prefix, drafted, ends, masks, longest
            if batch.prefix is None or 2 * len(batch.rows) > batch_size:
                yield batch.rows, _each_row(to_host(answer_batch(*arguments, max_new_tokens=max_new_tokens)))
                continue
            begun = _Begun(batch.rows, read_drafts(*arguments, max_new_tokens=max_new_tokens))
            known = to_host(begun.state.rows)
            if known.done_B.all():
                yield batch.rows, _each_row(_result(config, known))
                continue
            if waiting and begun.shape != waiting[0].shape:
                yield from go_on()
            waiting.append(begun)
            if (len(waiting) + 1) * len(batch.rows) > batch_size:
                yield from go_on()
        if waiting:
            yield from go_on()

    with mesh_of(lm.params):
        return memory.in_batches(len(prompts), batch_size, what, "answer", work, note)


class Drafted(NamedTuple):
    """Texts that end with a draft of their answer; the first four as of `Batch`.

    Attributes:
        draft_BN: The drafts, right-padded.
        said_B: The tokens of each.
    """

    tokens_BT: Any
    start_B: Any
    end_B: Any
    prompt_B: Any
    draft_BN: Any
    said_B: Any


class _Rows(NamedTuple):
    """The answers in progress.

    Attributes:
        tokens_BM: The tokens so far; count_B of them are known, and the last of these is in no cache yet.
        argmax_BMLH: The keys that heads looked at most when the tokens were predicted.
        stop_B: The token that ended the answer, which is not counted, or NO_STOP.
    """

    tokens_BM: Any
    argmax_BMLH: Any
    count_B: Any
    done_B: Any
    stop_B: Any


class _State(NamedTuple):
    """Answers in progress (`_Rows`), and what decoding goes on from: the length of each prompt and the cache."""

    rows: Any
    prompt_B: Any
    cache: Any


class _Begun(NamedTuple):
    """A batch whose drafts are read. rows: the index of each prompt."""

    rows: list[int]
    state: _State

    @property
    def shape(self) -> tuple[int, ...]:
        return self.state.cache["blocks"]["0"].v.shape


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new_tokens", compiler_options=DECODING)
@row_parallel("drafted")
def answer_batch(
    config: ModelConfig,
    params: PyTree,
    prefix: PyTree | None,
    drafted: Drafted,
    ends: Ends,
    masks: Masks,
    longest: jax.Array,
    *,
    max_new_tokens: int,
) -> Generated:
    """The compiled program of `answer_drafts` for a full batch. prefix: as of `Batch`."""
    state = _read(config, params, prefix, drafted, ends, masks, longest, max_new_tokens)
    return _result(config, _decode(config, params, state, ends, masks, longest))


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new_tokens")
@row_parallel("drafted", results=_State(ROWS, ROWS, STACKED_ROWS))
def read_drafts(
    config: ModelConfig,
    params: PyTree,
    prefix: PyTree | None,
    drafted: Drafted,
    ends: Ends,
    masks: Masks,
    longest: jax.Array,
    *,
    max_new_tokens: int,
) -> _State:
    """The first half of `answer_batch`, for a small batch: what the model says as far as it agrees with the drafts."""
    return _read(config, params, prefix, drafted, ends, masks, longest, max_new_tokens)


@functools.partial(jax.jit, static_argnums=0, compiler_options=DECODING)
def decode_together(
    config: ModelConfig, params: PyTree, parts: tuple[_State, ...], ends: Ends, masks: Masks, longest: jax.Array
) -> list[Generated]:
    """The second half of `answer_batch`, for several small batches at once, whose caches have as many slots."""
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), *(part.rows for part in parts))
    cache = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *(part.cache for part in parts))
    prompt_B = jnp.concatenate([part.prompt_B for part in parts])
    out = _result(config, _decode_rows(config, params, prompt_B, rows, cache, ends, masks, longest))
    bounds = np.cumsum([len(part.prompt_B) for part in parts])[:-1].tolist()
    split = [jnp.split(x, bounds) for x in jax.tree.leaves(out)]
    return [jax.tree.unflatten(jax.tree.structure(out), leaves) for leaves in zip(*split, strict=True)]


def _read(
    config: ModelConfig,
    params: PyTree,
    prefix: PyTree | None,
    drafted: Drafted,
    ends: Ends,
    masks: Masks,
    longest: jax.Array,
    max_new_tokens: int,
) -> _State:
    """The prompts and their drafts in one pass."""
    tokens_BT, start_B, end_B, prompt_B, draft_BN, said_B = drafted
    width = draft_BN.shape[1]
    rows_BP = (prompt_B - start_B)[:, None] - 1 + jnp.arange(width + 1)
    texts = prefix, tokens_BT, start_B, end_B
    out = read_on(config, params, *texts, masks, rows_BP, more=max_new_tokens, probe=Probe(rows_BP), longest=longest)
    assert out.probed is not None and out.cache is not None  # both were asked for
    chosen_BP = jnp.argmax(unembed(config, params, out.x_BPE), axis=-1).astype(jnp.int32)
    agrees_BN = (chosen_BP[:, :width] == draft_BN) & (jnp.arange(width) < said_B[:, None])
    known_B = jnp.cumprod(agrees_BN, axis=1).sum(axis=1) + 1
    rows = _begin(config, ends, chosen_BP, out.probed.keys[..., 0], known_B, max_new_tokens)
    return _State(rows, prompt_B, out.cache)


@row_parallel("prompt_B", "rows", stacked=("cache",))
def _decode_rows(
    config: ModelConfig,
    params: PyTree,
    prompt_B: jax.Array,
    rows: _Rows,
    cache: Cache,
    ends: Ends,
    masks: Masks,
    longest: jax.Array,
) -> _Rows:
    return _decode(config, params, _State(rows, prompt_B, cache), ends, masks, longest)


def _decode(config: ModelConfig, params: PyTree, state: _State, ends: Ends, masks: Masks, longest: jax.Array) -> _Rows:
    """The answers, token by token until all rows are done."""
    probe = Probe(jnp.zeros((len(state.prompt_B), 1), jnp.int32))

    def unfinished(carry):
        return ~carry[0].done_B.all()

    def step(carry):
        rows, cache = carry
        last_B = rows.count_B - 1
        token_B = jnp.take_along_axis(rows.tokens_BM, last_B[:, None], axis=1)[:, 0]
        at_B = state.prompt_B + last_B
        new = next_hidden(config, params, token_B, masks, cache=cache, start_B=at_B, probe=probe, longest=longest)
        assert new.probed is not None  # it was asked for
        next_B = jnp.argmax(unembed(config, params, new.x_BTE)[:, 0], axis=-1).astype(jnp.int32)
        return _add(ends, rows, next_B, new.probed.keys[:, 0, :, :, 0]), new.cache

    return jax.lax.while_loop(unfinished, step, (state.rows, state.cache))[0]


def _result(config: ModelConfig, rows: _Rows) -> Generated:
    """The answers, padded; of NumPy arrays as of JAX's."""
    ours_BM = np.arange(rows.tokens_BM.shape[1]) < rows.count_B[:, None]
    xp = np if isinstance(rows.tokens_BM, np.ndarray) else jnp
    tokens_BM = xp.where(ours_BM, rows.tokens_BM, config.pad_id)
    return Generated(tokens_BM, rows.count_B, rows.stop_B, rows.argmax_BMLH)


def _each_row(out: Generated) -> list[Generated]:
    return [one_row(out, row) for row in range(len(out.lengths))]


def _begin(config, ends: Ends, chosen_BP, argmax_BPLH, known_B, max_new_tokens: int) -> _Rows:
    """The answers after the drafts: the model's first `known_B` choices, cut where one of them ends the answer."""
    n = min(chosen_BP.shape[1], max_new_tokens)
    chosen_BP, argmax_BPLH = chosen_BP[:, :n], argmax_BPLH[:, :n]
    known_B = jnp.minimum(known_B, n)
    before_BP = jnp.cumsum(ends.word_V[chosen_BP], axis=1) - ends.word_V[chosen_BP] > 0
    ends_BP = _ends(ends, chosen_BP, before_BP) & (jnp.arange(n) < known_B[:, None])
    ended_B, first_B = ends_BP.any(axis=1), jnp.argmax(ends_BP, axis=1)
    stop_B = jnp.where(ended_B, jnp.take_along_axis(chosen_BP, first_B[:, None], axis=1)[:, 0], NO_STOP)
    more = (0, 0), (0, max_new_tokens - n)
    return _Rows(
        jnp.pad(chosen_BP, more, constant_values=config.pad_id),
        jnp.pad(argmax_BPLH, (*more, (0, 0), (0, 0))),
        jnp.where(ended_B, first_B, known_B),
        ended_B | (known_B == max_new_tokens),
        stop_B,
    )


def _add(ends: Ends, rows: _Rows, token_B, argmax_BLH) -> _Rows:
    """The answers with the next token of each that is not done."""
    at_B, all_B = rows.count_B, jnp.arange(len(token_B))
    known_BM = jnp.arange(rows.tokens_BM.shape[1]) < at_B[:, None]
    ends_B = _ends(ends, token_B, (ends.word_V[rows.tokens_BM] & known_BM).any(axis=1))
    at_B = jnp.where(rows.done_B | ends_B, rows.tokens_BM.shape[1], at_B)  # which is dropped
    count_B = rows.count_B + (~rows.done_B & ~ends_B)
    return _Rows(
        rows.tokens_BM.at[all_B, at_B].set(token_B, mode="drop"),
        rows.argmax_BMLH.at[all_B, at_B].set(argmax_BLH, mode="drop"),
        count_B,
        rows.done_B | ends_B | (count_B == rows.tokens_BM.shape[1]),
        jnp.where(ends_B & ~rows.done_B, token_B, rows.stop_B),
    )


def _ends(ends: Ends, token, has_words):
    """Whether a token ends an answer that has words before it, or none."""
    return jnp.isin(token, ends.stop_ids) | (ends.line_end_V[token] & has_words)
