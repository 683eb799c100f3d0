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
from retmask_jax.generation.continuous_programs import laid_out, replace_rows
from retmask_jax.generation.decode import DECODING, Generated, one_row
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import NO_STOP, Draws, check_options
from retmask_jax.model.attention import Probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import next_hidden
from retmask_jax.model.kv_cache import Cache, empty_cache
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.sharding import ROWS, STACKED_ROWS, full_share, mesh_of, row_parallel, row_shares
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host

_FREE = -1  # the owner of a row without an answer in progress


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

    def work(todo: list[int], batch_size: int) -> Iterator[tuple[list[int], list[Generated]]]:
        going_on = _GoingOn(config, lm.params, ends, masks, longest, max_new_tokens, full_share(batch_size))
        common = {"batch_size": batch_size, "masks": masks, "longest": longest, "more": max_new_tokens, "least": least}
        for batch in shared_batches(config, lm.params, prompts, drafts, todo, **common):
            draft_BN, said_B = pad_rows([drafts[i] for i in batch.rows], config.pad_id, least=width)
            drafted = Drafted(batch.tokens_BT, batch.start_B, batch.end_B, batch.prompt_B, draft_BN, said_B)
            arguments = config, lm.params, batch.prefix, drafted, ends, masks, longest
            if batch.prefix is None or 2 * len(batch.rows) > batch_size:
                yield batch.rows, _each_row(to_host(answer_batch(*arguments, max_new_tokens=max_new_tokens)))
            else:
                yield from going_on.take_on(batch.rows, read_drafts(*arguments, max_new_tokens=max_new_tokens))
        yield from going_on.decode_rest()

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
        prompt_B: The length of each prompt.
        tokens_BM: The tokens so far; count_B of them are known, and the last of these is in no cache yet.
        argmax_BMLH: The keys that heads looked at most when the tokens were predicted.
        stop_B: The token that ended the answer, which is not counted, or NO_STOP.
    """

    prompt_B: Any
    tokens_BM: Any
    argmax_BMLH: Any
    count_B: Any
    done_B: Any
    stop_B: Any


_State = tuple[_Rows, Any]  # answers in progress, and the cache that decoding goes on from
_STATE = ROWS, STACKED_ROWS


class _GoingOn:
    """The answers that go on after their drafts: rows of one batch, which are refilled as answers end."""

    def __init__(self, config: ModelConfig, params, ends: Ends, masks: Masks, longest, max_new_tokens: int, batch: int):
        self._shared = config, params, ends, masks, longest
        self._new_tokens = max_new_tokens
        self._owner_B = np.full(batch, _FREE)
        self._state: _State | None = None

    def take_on(self, owners: Sequence[int], state: _State) -> Iterator[tuple[list[int], list[Generated]]]:
        """Takes answers in progress, of which owners are the prompts; yields those that have ended, also to make room."""
        rows = to_host(state[0])
        yield from self._ended(rows, np.asarray(owners))
        goes_on_F = ~rows.done_B & np.isin(np.arange(len(owners)), np.unique(owners, return_index=True)[1])
        if not goes_on_F.any():
            return
        if self._state is None or not _slots(self._state) / 2 < _slots(state) <= _slots(self._state):
            yield from self.decode_rest()  # a row in a cache far longer than it needs would be slow
            config, params, blank_B = *self._shared[:2], np.zeros(len(self._owner_B), np.int32)
            self._state = _blank(config, params, blank_B, slots=_slots(state), max_new_tokens=self._new_tokens)
        shares = row_shares(len(owners))
        owner_DB, goes_on_DF = self._owner_B.reshape(shares, -1), goes_on_F.reshape(shares, -1)
        needed = goes_on_DF.sum(axis=1)
        if ((owner_DB == _FREE).sum(axis=1) < needed).any():
            yield from self._decode_until(needed.max())
        row_DF = np.full(goes_on_DF.shape, owner_DB.shape[1], np.int32)  # beyond the last one: left out
        for own_B, row_F, mine_F, stay_F in zip(
            owner_DB, row_DF, np.reshape(owners, row_DF.shape), goes_on_DF, strict=True
        ):
            free = np.flatnonzero(own_B == _FREE)[: stay_F.sum()]
            row_F[stay_F], own_B[free] = free, mine_F[stay_F]
        self._state = replace_rows(row_DF.ravel(), *self._state, *state)

    def decode_rest(self) -> Iterator[tuple[list[int], list[Generated]]]:
        """Decodes and yields all that is left."""
        if (self._owner_B != _FREE).any():
            yield from self._decode_until(len(self._owner_B))

    def _decode_until(self, enough: int) -> Iterator[tuple[list[int], list[Generated]]]:
        """Decodes until each device has so many rows that are free or done, or no others; yields those that are done."""
        assert self._state is not None
        self._state = _decode_rows(*self._shared, np.int32(enough), *self._state)
        rows = to_host(self._state[0])
        yield from self._ended(rows, self._owner_B)
        self._owner_B[rows.done_B] = _FREE

    def _ended(self, rows: _Rows, owner_B: np.ndarray) -> Iterator[tuple[list[int], list[Generated]]]:
        """Yields the answers that are done, where there are any."""
        at = np.flatnonzero(rows.done_B & (owner_B != _FREE))
        if len(at):
            found = _result(self._shared[0], rows)
            yield owner_B[at].tolist(), [one_row(found, row) for row in at.tolist()]


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
    return _result(config, _decode(config, params, ends, masks, longest, len(drafted.end_B), state)[0])


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new_tokens")
@row_parallel("drafted", results=_STATE)
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
    return laid_out(*_read(config, params, prefix, drafted, ends, masks, longest, max_new_tokens))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("slots", "max_new_tokens"))
@row_parallel("blank_B", results=_STATE)
def _blank(config: ModelConfig, params: PyTree, blank_B: jax.Array, *, slots: int, max_new_tokens: int) -> _State:
    """A batch of free rows. blank_B: zeros i32[B], as many as there are rows."""
    batch = len(blank_B)
    tokens_BM = jnp.zeros((batch, max_new_tokens), jnp.int32)
    argmax_BMLH = jnp.zeros((*tokens_BM.shape, config.n_layers, config.n_heads), jnp.int32)
    rows = _Rows(blank_B, tokens_BM, argmax_BMLH, blank_B + 1, jnp.full(batch, True), blank_B)
    return laid_out(rows, empty_cache(config, batch, slots, jax.tree.leaves(params)[0].dtype, rings=False))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache", compiler_options=DECODING)
@row_parallel("rows", stacked=("cache",), results=_STATE)
def _decode_rows(
    config: ModelConfig,
    params: PyTree,
    ends: Ends,
    masks: Masks,
    longest: jax.Array,
    enough: jax.Array,
    rows: _Rows,
    cache: Cache,
) -> _State:
    """The second half of `answer_batch`, until each device has so many rows that are done, or no others."""
    enough = jnp.minimum(enough, len(rows.done_B))
    return laid_out(*_decode(config, params, ends, masks, longest, enough, (rows, cache)))


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
    rows = _begin(config, ends, prompt_B, chosen_BP, out.probed.keys[..., 0], known_B, max_new_tokens)
    return rows, out.cache


def _decode(
    config: ModelConfig,
    params: PyTree,
    ends: Ends,
    masks: Masks,
    longest: jax.Array,
    enough: jax.Array | int,
    state: _State,
) -> _State:
    """The state with the answers decoded, token by token, until `enough` rows are done."""
    probe = Probe(jnp.zeros((len(state[0].done_B), 1), jnp.int32))

    def unfinished(state):
        return jnp.sum(state[0].done_B) < enough

    def step(state):
        rows, cache = state
        last_B = rows.count_B - 1
        token_B = jnp.take_along_axis(rows.tokens_BM, last_B[:, None], axis=1)[:, 0]
        at_B = rows.prompt_B + last_B
        new = next_hidden(config, params, token_B, masks, cache=cache, start_B=at_B, probe=probe, longest=longest)
        assert new.probed is not None  # it was asked for
        next_B = jnp.argmax(unembed(config, params, new.x_BTE)[:, 0], axis=-1).astype(jnp.int32)
        return _add(ends, rows, next_B, new.probed.keys[:, 0, :, :, 0]), new.cache

    return jax.lax.while_loop(unfinished, step, state)


def _result(config: ModelConfig, rows: _Rows) -> Generated:
    """The answers, padded; of NumPy arrays as of JAX's."""
    ours_BM = np.arange(rows.tokens_BM.shape[1]) < rows.count_B[:, None]
    xp = np if isinstance(rows.tokens_BM, np.ndarray) else jnp
    tokens_BM = xp.where(ours_BM, rows.tokens_BM, config.pad_id)
    return Generated(tokens_BM, rows.count_B, rows.stop_B, rows.argmax_BMLH)


def _slots(state: _State) -> int:
    return state[1]["blocks"]["0"].slots


def _each_row(out: Generated) -> list[Generated]:
    return [one_row(out, row) for row in range(len(out.lengths))]


def _begin(config, ends: Ends, prompt_B, chosen_BP, argmax_BPLH, known_B, max_new_tokens: int) -> _Rows:
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
        prompt_B,
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
        rows.prompt_B,
        rows.tokens_BM.at[all_B, at_B].set(token_B, mode="drop"),
        rows.argmax_BMLH.at[all_B, at_B].set(argmax_BLH, mode="drop"),
        count_B,
        rows.done_B | ends_B | (count_B == rows.tokens_BM.shape[1]),
        jnp.where(ends_B & ~rows.done_B, token_B, rows.stop_B),
    )


def _ends(ends: Ends, token, has_words):
    """Whether a token ends an answer that has words before it, or none."""
    return jnp.isin(token, ends.stop_ids) | (ends.line_end_V[token] & has_words)
