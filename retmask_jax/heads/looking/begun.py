"""A prompt that is read once under a mask; answers are then decoded from its cache, and read after it."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int, PyTree

from retmask_jax.generation.batching import bucket
from retmask_jax.generation.decode import DECODING, decode_on
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.prefill import ALIGNED, prefill, slots_for
from retmask_jax.generation.sampling import Draws
from retmask_jax.model.attention import Probe
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.inference import hidden_rows
from retmask_jax.model.interventions import Head, Interventions
from retmask_jax.model.kernels.blocked import HIDDEN, Scores, dot
from retmask_jax.model.kv_cache import Cache, empty_cache
from retmask_jax.model.layers import unembed
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.sharding import mesh_of
from retmask_jax.utils.hosts import to_host

TOP = 64  # keys that are reported for each token and head
_WIDTH_STEP = 16  # an answer that is read is padded to a multiple of so many tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What a model makes of an answer of N tokens, and what its heads look at while it predicts each of them.

    Attributes:
        logprobs: Of the answer's tokens.
        keys: The positions in prompt and answer that a head weighs most, the largest weight first; -1: there are no more.
        weights: Of these keys; 0 where there is none.
        rows: All weights of the heads asked for; S counts the tokens of prompt and answer.
    """

    logprobs: Float32[np.ndarray, " N"]
    keys: Int[np.ndarray, "N L H K"]
    weights: Float32[np.ndarray, "N L H K"]
    rows: Float32[np.ndarray, "N S heads"]


@dataclasses.dataclass(frozen=True, eq=False)
class Begun:
    """A prompt of which all but the last token are in a cache, with room for answers of `room` tokens."""

    lm: LanguageModel
    prompt: tuple[int, ...]
    masks: Masks
    cache: Cache
    room: int

    @classmethod
    def of_prompt(
        cls, lm: LanguageModel, prompt: Sequence[int], interventions: Interventions | None, room: int
    ) -> "Begun":
        """Reads a prompt of at least two tokens, which are checked by the caller."""
        masks = normalise(lm.config, interventions)
        *tokens, _ = prompt
        tokens_1T = np.full((1, bucket(len(tokens))), lm.config.pad_id, np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        end_1, longest = np.array([len(tokens)], np.int32), np.int32(len(prompt) + room)
        with mesh_of(lm.params):
            cache = _begin(lm.config, lm.params, tokens_1T, end_1, masks, longest, room=_width(room))
        return cls(lm, tuple(prompt), masks, cache, room)

    def answer(self) -> list[int]:
        """The greedy answer, with the stop id that ends it, if one does within the room."""
        draws = Draws.of(self.lm.config, None, 0.0, 1.0).greedy._replace(most=np.int32(self.room))
        last_11, start_1 = np.array([self.prompt[-1:]], np.int32), np.array([len(self.prompt) - 1], np.int32)
        shared = self.masks, draws, np.int32(len(self.prompt) + self.room)
        with mesh_of(self.lm.params):
            arguments = self.lm.config, self.lm.params, self.cache, last_11, start_1, *shared
            out = to_host(_decode(*arguments, max_new_tokens=_width(self.room)))
        n, stop = int(out.lengths[0]), int(out.stops[0])
        return [*map(int, out.tokens[0, :n]), *([stop] if stop >= 0 else [])]

    def see(self, answer: Sequence[int], heads: Sequence[Head] = ()) -> Seen:
        """Reads an answer of at least one token, and of at most `room`; heads: those of which all weights are reported."""
        config, n, first = self.lm.config, len(answer), len(self.prompt) - 1
        tokens_1N, target_1N = np.full((2, 1, _width(self.room)), config.pad_id, np.int32)
        tokens_1N[0, :n], target_1N[0, :n] = [self.prompt[-1], *answer[:-1]], answer
        start_1 = np.array([first], np.int32)
        shared = self.masks, np.int32(len(self.prompt) + self.room)
        with mesh_of(self.lm.params):
            arguments = config, self.lm.params, self.cache, tokens_1N, start_1, start_1 + n, target_1N, *shared
            logprobs_1N, probed, cache = _read(*arguments)
            rows = to_host([_weights_of(config, cache, probed.queries, head, start_1) for head in heads])
        none = np.zeros((n, first + 1 + n, 0), np.float32)
        rows = np.stack([row_NS[:n, : first + 1 + n] for row_NS in rows], axis=-1) if rows else none
        logprobs_1N, keys_1NLHK, weights_1NLHK = to_host((logprobs_1N, probed.keys, probed.weights))
        return Seen(logprobs_1N[0, :n], keys_1NLHK[0, :n], weights_1NLHK[0, :n], rows)


@functools.partial(jax.jit, static_argnums=0, static_argnames="room")
def _begin(
    config: ModelConfig,
    params: PyTree,
    tokens_1T: jax.Array,
    end_1: jax.Array,
    masks: Masks,
    longest: jax.Array,
    *,
    room: int,
) -> Cache:
    """The cache of a prompt, with room for more tokens."""
    slots = slots_for(tokens_1T.shape[1]) + room + 1
    cache = empty_cache(config, 1, -(-slots // ALIGNED) * ALIGNED, _dtype(params), rings=False)
    out = prefill(config, params, tokens_1T, end_1, masks, cache, jnp.zeros((1, 1), jnp.int32), longest=longest)
    assert out.cache is not None  # one was given
    return out.cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new_tokens", compiler_options=DECODING)
def _decode(config, params, cache, last_11, start_1, masks, draws, longest, *, max_new_tokens):
    """The answer that begins after the token `last`, which is at position `start`."""
    end_1, row_11 = start_1 + 1, jnp.zeros((1, 1), jnp.int32)
    first = hidden_rows(
        config, params, last_11, masks, row_11, cache=cache, start_B=start_1, end_B=end_1, longest=longest
    )
    return decode_on(config, params, first, end_1, masks, draws, None, longest, max_new_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _read(config, params, cache, tokens_1N, start_1, end_1, target_1N, masks, longest):
    """(log-probabilities of the targets f32[1,N], what was probed, the cache with the tokens)."""
    rows_1N = jnp.arange(tokens_1N.shape[1])[None]
    probe = Probe(rows_1N, top=TOP, weights=True, queries=True)
    place = {"cache": cache, "start_B": start_1, "end_B": end_1}
    out = hidden_rows(config, params, tokens_1N, masks, rows_1N, **place, probe=probe, longest=longest)
    logprobs_1NV = jax.nn.log_softmax(unembed(config, params, out.x_BPE), axis=-1)
    return jnp.take_along_axis(logprobs_1NV, target_1N[..., None], axis=-1)[..., 0], out.probed, out.cache


def _weights_of(
    config: ModelConfig, cache: Cache, queries_1NLHD: jax.Array, head: Head, start_1: np.ndarray
) -> jax.Array:
    """f32[N,S]: all weights of one head, of queries at positions start, start + 1, ..."""
    repeat, place = divmod(head[0], len(config.layer_pattern))
    group, repeat = ("tail", 0) if repeat == config.repeats else ("blocks", repeat)
    layers = cache[group]
    assert layers is not None  # it is a cache of all layers
    at = np.array([*head, repeat, head[1] // (config.n_heads // config.n_kv_heads)], np.int32)
    return _softmax(Scores.for_layer(config, place), queries_1NLHD, layers[str(place)].k, at, start_1)


@functools.partial(jax.jit, static_argnums=0)
def _softmax(scores: Scores, queries_1NLHD, k_R1KDS, at: jax.Array, start_1: jax.Array) -> jax.Array:
    """at: layer, head, repeat of the pattern, KV head; arrays, so that one program serves all heads of a kind of layer."""
    q_ND, k_DS = queries_1NLHD[0, :, at[0], at[1]], k_R1KDS[at[2], 0, at[3]]
    seen_NS = scores.seen(start_1 + jnp.arange(len(q_ND))[:, None], jnp.arange(k_DS.shape[1]))
    return jax.nn.softmax(jnp.where(seen_NS, scores.of(dot(q_ND, k_DS, (1, 0))), HIDDEN), axis=-1)


def _width(room: int) -> int:
    return -(-room // _WIDTH_STEP) * _WIDTH_STEP


def _dtype(params: PyTree):
    return jax.tree.leaves(params)[0].dtype
