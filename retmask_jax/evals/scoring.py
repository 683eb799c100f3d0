"""What suites need from a model: log-probabilities of continuations, and answers that end where a task says."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from retmask_jax.generation.batching import batches_by_length, pad_rows, pad_to_bucket
from retmask_jax.generation.continuous import Request, generate_stream
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.logprobs import next_logprobs
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.masking import normalise
from retmask_jax.utils import memory
from retmask_jax.utils.files import digest
from retmask_jax.utils.hosts import to_host
from retmask_jax.utils.store import Store, request_key

# Names of the same option; the first that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LENGTH = 256  # as in lm-evaluation-harness
# Options that restrict sampling; they have no effect on greedy answers.
_SAMPLING = ("top_k", "min_p", "typical_p")


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How a task wants its answers generated. Each of the texts `until` ends an answer; temperature 0 is greedy."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any], max_length: int) -> "GenerationOptions":
        """Reads a task's generation_kwargs.

        Raises:
            ValueError: An option is not known, the task samples at temperature 0, or the model's context of max_length
                has no room for the new tokens.
        """
        given = dict(kwargs)
        until = given.pop("until", None) or ()
        lengths = [length for name in _LENGTHS if (length := given.pop(name, None)) is not None]
        new = int(lengths[0]) if lengths else _DEFAULT_LENGTH
        temperature, top_p = _draw(given)
        if given:
            raise ValueError(
                f"generation_kwargs of the task has {', '.join(sorted(given))}, which is not supported here: remove it"
            )
        if new >= max_length:
            raise ValueError(
                f"the task wants {new} new tokens; the model's context of {max_length} leaves no room for a prompt: "
                "lower max_gen_toks"
            )
        return cls((until,) if isinstance(until, str) else tuple(until), new, temperature, top_p)

    def arguments(self) -> dict[str, Any]:
        """Returns the options as keyword arguments of `answers`."""
        return dataclasses.asdict(self)


def _draw(given: dict[str, Any]) -> tuple[float, float]:
    """Returns (temperature, top_p), and removes from `given` the options of sampling that have been dealt with."""
    temperature, top_p = float(given.pop("temperature", None) or 0), given.pop("top_p", None)
    wanted = given.pop("do_sample", None)
    if wanted and temperature == 0:
        raise ValueError("the task wants do_sample at temperature 0: give it a temperature, or set do_sample to false")
    if wanted is False or temperature == 0:
        for name in _SAMPLING:
            given.pop(name, None)
        return 0.0, 1.0
    return temperature, 1.0 if top_p is None else float(top_p)


Prompt = Sequence[int] | Int[np.ndarray, " T"]
Pair = tuple[Prompt, Prompt]  # token ids of a context and of its continuation


def continuation_logprobs(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    interventions: Interventions | None = None,
    *,
    batch_size: int,
    kept: Store | None = None,
    what: str = "log-likelihood",
) -> list[tuple[float, bool]]:
    """Computes the log-probability of each continuation in nats, and whether each of its tokens is the most likely one.

    If memory runs out, the batch is halved.

    Args:
        pairs: Token ids of context and continuation. The last token of a pair is only predicted, not read; a pair that
            exceeds the model's context without it loses its beginning.
        kept: Results of this model under these interventions; only missing ones are computed, and added.
        what: The work's name in the progress bar.

    Raises:
        ValueError: A context or continuation is empty, or a continuation exceeds the model's context.
    """
    iv, kept = shared_mask(lm.config, interventions), Store() if kept is None else kept
    rows = [_fitted(pair, lm.config.max_length) for pair in pairs]
    keys = [request_key("log-likelihood", row, n=len(pair[1])) for row, pair in zip(rows, pairs, strict=True)]
    missing = kept.missing(keys)

    def work(todo: list[int], batch_size: int):
        for places in batches_by_length([rows[missing[i]] for i in todo], batch_size):
            batch = [missing[todo[place]] for place in places]
            found = _scores(lm, [rows[i] for i in batch], [len(pairs[i][1]) for i in batch], iv)
            for i, value in zip(batch, found, strict=True):
                kept.add(keys[i], value)
            yield [todo[place] for place in places], found

    if missing:
        memory.in_batches(len(missing), min(batch_size, len(missing)), what, "request", work)
    return [tuple(kept[key]) for key in keys]


def is_too_long(pair: Pair, max_length: int) -> bool:
    """Says whether `continuation_logprobs` drops the beginning of a pair."""
    return len(pair[0]) + len(pair[1]) > max_length + 1


def answers(
    lm: LanguageModel, prompts: Sequence[Prompt], interventions: Interventions | None = None, **options: Any
) -> list[str]:
    """Returns the model's answer to each prompt; options as of `answered`."""
    return [text for text, _ in answered(lm, prompts, interventions, **options)]


def answered(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    interventions: Interventions | None = None,
    *,
    max_new_tokens: int,
    batch_size: int,
    until: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    contrast: ContrastDecoding | None = None,
    kept: Store | None = None,
    what: str = "generate",
) -> list[tuple[str, int]]:
    """Generates an answer to each prompt; returns (text, number of generated tokens) for each.

    Prompts must leave room for the new tokens, see `last_tokens`. A sampled answer depends on the prompt's place in the
    list, not on its batch.

    Args:
        until: The text ends before the first of these. Special tokens are not in it.
        contrast: Decoding by contrast, with one mask for all prompts.
        kept: Answers of this model under these interventions and this contrast; only missing ones are generated, and added.
        what: The work's name in the progress bar.
    """
    rows = [np.asarray(prompt).tolist() for prompt in prompts]
    mask, kept = shared_mask(lm.config, interventions), Store() if kept is None else kept
    stops = stop_ids(lm, until)
    shared = {"max_new_tokens": max_new_tokens, "until": list(until), "stop_ids": stops}
    shared |= {"temperature": temperature, "top_p": top_p} if temperature else {}
    keys = [request_key("answer", row, **shared, **({"seed": i} if temperature else {})) for i, row in enumerate(rows)]
    missing = kept.missing(keys)
    if missing:
        requests = [Request(rows[i], seed=i) for i in missing]
        made = generate_stream(
            lm.config,
            lm.params,
            requests,
            batch_size=min(batch_size, len(missing)),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop_ids=stops,
            masks=[mask],
            contrast=contrast,
            what=what,
        )
        for place, generated in made:
            text = cut(lm.tokenizer.decode(generated.tokens, skip_special_tokens=True), until)
            kept.add(keys[missing[place]], [text, int(np.asarray(generated.lengths))])
    return [tuple(kept[key]) for key in keys]


def last_tokens(prompt: Sequence[int], room: int) -> list[int]:
    """Returns the last `room` tokens of a prompt."""
    return list(prompt[-room:])


def cut(text: str, until: Iterable[str]) -> str:
    """Returns the text before the first occurrence of any of the `until` texts; empty ones are ignored."""
    for stop in until:
        text = text.split(stop, 1)[0] if stop else text
    return text


def stop_ids(lm: LanguageModel, until: Iterable[str]) -> list[int]:
    """Returns the ids that end an answer: the model's stop ids, EOS of its tokenizer, and the special tokens in `until`.

    Special tokens are not in the text that `cut` gets, so they must end an answer while it is generated. Other texts
    are left to `cut`, because the token that would end the answer may include more than the text, such as a space.
    """
    tokenizer = lm.tokenizer
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [*lm.config.eos_ids, tokenizer.eos_token_id, *(special.get(stop) for stop in until)]
    return list(dict.fromkeys(i for i in ids if i is not None))


def shared_mask(config: ModelConfig, interventions: Interventions | None) -> Interventions:
    """Checks interventions; raises ValueError for masks with a row axis, as samples are batched in any order."""
    iv = interventions or Interventions()
    normalise(config, iv)
    if iv.has_rows:
        raise ValueError(
            "a suite runs under one mask: interventions with a row axis do not apply; run it once for each"
        )
    return iv


def mask_hash(config: ModelConfig, mask: Interventions, contrast: ContrastDecoding | None = None) -> str:
    """Returns a hash of interventions that all rows share, and of a contrast."""
    if contrast is not None:
        return digest([mask_hash(config, mask), mask_hash(config, contrast.interventions), *contrast.identity])
    masks = normalise(config, mask)
    parts = [masks.head_BLH, masks.rope_BLHR]
    # Masks without these parts keep the hashes that they had before there were any.
    parts += [] if mask.head_mean is None else [masks.mean_BLHD]
    parts += [] if mask.query_mask is None else [masks.query_BLH, masks.query_mean_BLHD]
    ways = [] if masks.streams is None else [f"streams {masks.streams.sink} {masks.streams.window}"]
    parts += [] if masks.streams is None else [masks.streams.gate]
    arrays = [np.asarray(part[0]) for part in parts]
    return digest([mask.rope_site, *ways, *([str(x.dtype), digest(x.tobytes())] for x in arrays)])


def _fitted(pair: Pair, max_length: int) -> list[int]:
    """Returns context and continuation as one row, without the beginning that exceeds the model's context."""
    context, continuation = pair
    if not len(context) or not len(continuation):
        raise ValueError(f"a context of {len(context)} and a continuation of {len(continuation)} tokens: both need one")
    if len(continuation) > max_length:
        raise ValueError(
            f"a continuation of {len(continuation)} tokens exceeds the model's context of {max_length}: shorten it"
        )
    return [*context, *continuation][-(max_length + 1) :]


def _scores(
    lm: LanguageModel, rows: Sequence[Sequence[int]], continuation_lengths: Sequence[int], iv: Interventions
) -> list[tuple[float, bool]]:
    """Returns the results of `continuation_logprobs` for one batch; rows are contexts with their continuations."""
    tokens, lengths = pad_rows([row[:-1] for row in rows], lm.config.pad_id)
    targets, _ = pad_rows([row[1:] for row in rows], lm.config.pad_id)
    tokens, targets = (pad_to_bucket(lm.config, x, 0) for x in (tokens, targets))
    place = np.arange(tokens.shape[1])
    first = lengths - np.array(continuation_lengths)
    counted = (place >= first[:, None]) & (place < lengths[:, None])
    logps, greedy = to_host(next_logprobs(lm.config, lm.params, tokens, targets, counted, lengths, iv))
    sums = logps.astype(np.float64).sum(axis=1)
    return [(float(total), bool(row.all())) for total, row in zip(sums, greedy | ~counted, strict=True)]
