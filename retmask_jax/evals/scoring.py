"""What suites ask of a model: log-probabilities of continuations, and answers up to a stop, as a task wants them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from retmask_jax.generation.batching import batches_by_length, pad_rows, pad_to_bucket
from retmask_jax.generation.continuous import Request, generate_stream
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.logprobs import next_logprobs
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions, stack
from retmask_jax.utils import memory
from retmask_jax.utils.files import digest
from retmask_jax.utils.hosts import to_host
from retmask_jax.utils.store import Store, request_key

# Names for the same thing, the first that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LENGTH = 256  # the harness's own
# A draw from fewer tokens; means nothing where nothing is drawn.
_OF_DRAWS = ("top_k", "min_p", "typical_p")


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """until: texts that end an answer. temperature 0 is greedy."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], max_length: int) -> "GenerationOptions":
        """From a task's generation_kwargs. Raises ValueError for one that is not known, for drawing at temperature 0,
        and for more new tokens than the model's context has."""
        given = dict(kwargs)
        until = given.pop("until", None) or ()
        lengths = [length for name in _LENGTHS if (length := given.pop(name, None)) is not None]
        new = int(lengths[0]) if lengths else _DEFAULT_LENGTH
        temperature, top_p = _draw(given)
        if given:
            raise ValueError(
                f"generation_kwargs of the task has {', '.join(sorted(given))}, which cannot be followed here: take it out"
            )
        if new >= max_length:
            raise ValueError(
                f"the task wants {new} new tokens; the model's context of {max_length} leaves no room for a prompt: "
                "lower max_gen_toks"
            )
        return cls((until,) if isinstance(until, str) else tuple(until), new, temperature, top_p)

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of `scoring.answers`."""
        return dataclasses.asdict(self)


def _draw(given: dict[str, Any]) -> tuple[float, float]:
    """(temperature, top_p), taken out of what is given with all that says nothing of greedy answers."""
    temperature, top_p = float(given.pop("temperature", None) or 0), given.pop("top_p", None)
    wanted = given.pop("do_sample", None)
    if wanted and temperature == 0:
        raise ValueError("the task wants do_sample at temperature 0: give it a temperature, or set do_sample to false")
    if wanted is False or temperature == 0:
        for name in _OF_DRAWS:
            given.pop(name, None)
        return 0.0, 1.0
    return temperature, 1.0 if top_p is None else float(top_p)


Pair = tuple[Sequence[int], Sequence[int]]


def continuation_logprobs(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    interventions: Interventions | None = None,
    *,
    batch_size: int,
    kept: Store | None = None,
    what: str = "log-likelihood",
) -> list[tuple[float, bool]]:
    """(log-probability in nats of a continuation, whether each of its tokens is the most likely one) of each pair.

    pairs: token ids of context and continuation, both at least one; of a pair longer than the model's context by more
    than the last token, which is not read, the beginning is left out. kept: of this model under these interventions;
    only what it lacks is computed. Where memory runs out the batch is halved. Raises ValueError for an empty side, and
    for a continuation longer than the context.
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
    """Whether `continuation_logprobs` leaves out the beginning of a pair."""
    return len(pair[0]) + len(pair[1]) > max_length + 1


def answers(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], interventions: Interventions | None = None, **options
) -> list[str]:
    """What the model says behind each prompt; arguments as of `answered`."""
    return [text for text, _ in answered(lm, prompts, interventions, **options)]


def answered(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    interventions: Interventions | None = None,
    *,
    max_new_tokens: int,
    batch_size: int,
    until: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    kept: Store | None = None,
    what: str = "generate",
) -> list[tuple[str, int]]:
    """(answer, without special tokens, up to the first of the `until` texts; number of tokens made) of each prompt.

    Draws at a temperature depend on a prompt's place in the list, not on its batch. kept: of this model under these
    interventions; only what it lacks is generated. Prompts must leave room for the new tokens, see `last_tokens`.
    """
    mask, kept = shared_mask(lm.config, interventions), Store() if kept is None else kept
    stops = stop_ids(lm, until)
    same = {"max_new_tokens": max_new_tokens, "until": list(until), "stop_ids": stops}
    drawn = {"temperature": temperature, "top_p": top_p} if temperature else {}
    keys = [
        request_key("answer", prompt, **same, **drawn, **({"seed": i} if drawn else {}))
        for i, prompt in enumerate(prompts)
    ]
    missing = kept.missing(keys)
    if missing:
        requests = [Request(np.asarray(prompts[i]).tolist(), seed=i) for i in missing]
        made = generate_stream(
            lm.config,
            lm.params,
            requests,
            batch_size=min(batch_size, len(missing)),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop_ids=stops,
            masks=stack([mask]),
            what=what,
        )
        for place, one in made:
            text = cut(lm.tokenizer.decode(one.tokens, skip_special_tokens=True), until)
            kept.add(keys[missing[place]], [text, int(one.lengths)])
    return [tuple(kept[key]) for key in keys]


def last_tokens(prompt: Sequence[int], room: int) -> list[int]:
    """The end of a prompt that is longer than its room."""
    return list(prompt[-room:])


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first occurrence of any of the `until` texts; an empty one ends nothing."""
    for stop in until:
        text = text.split(stop, 1)[0] if stop else text
    return text


def stop_ids(lm: LanguageModel, until: Iterable[str]) -> list[int]:
    """The ids that end an answer: the model's own, EOS of its tokenizer, and the special tokens among the `until` texts.

    Special tokens are not in the text that `cut` sees, so they must end an answer as it is made. What is left of an
    answer when others are cut from its text may depend on the stop itself, such as the space before it: those are cut.
    """
    tokenizer = lm.tokenizer
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [*lm.config.eos_ids, tokenizer.eos_token_id, *(special.get(stop) for stop in until)]
    return list(dict.fromkeys(i for i in ids if i is not None))


def shared_mask(config: ModelConfig, interventions: Interventions | None) -> Interventions:
    """The filled interventions; ValueError for masks with a row axis, since the rows of a suite come in any order."""
    iv = (interventions or Interventions()).fill(config)
    if iv.of_rows():
        raise ValueError(
            "a suite runs under one mask: interventions with a row axis do not apply; run it once for each"
        )
    return iv


def mask_hash(mask: Interventions) -> str:
    """What tells filled interventions apart."""
    arrays = [np.asarray(part) for part in mask.given().values()]
    return digest([mask.rope_site, *([str(x.dtype), digest(x.tobytes())] for x in arrays)])


def _fitted(pair: Pair, max_length: int) -> list[int]:
    context, continuation = pair
    if not len(context) or not len(continuation):
        raise ValueError(f"a context of {len(context)} and a continuation of {len(continuation)} tokens: both need one")
    if len(continuation) > max_length:
        raise ValueError(
            f"a continuation of {len(continuation)} tokens exceeds the model's context of {max_length}: shorten it"
        )
    return [*context, *continuation][-(max_length + 1) :]


def _scores(lm: LanguageModel, rows, continuation_lengths, iv: Interventions) -> list[tuple[float, bool]]:
    """Of rows of context and continuation; the last token of a row is only predicted."""
    tokens, lengths = pad_rows([row[:-1] for row in rows], lm.config.pad_id)
    targets, _ = pad_rows([row[1:] for row in rows], lm.config.pad_id)
    tokens, targets = (pad_to_bucket(lm.config, x, 0) for x in (tokens, targets))
    place = np.arange(tokens.shape[1])
    first = lengths - np.array(continuation_lengths)
    counted = (place >= first[:, None]) & (place < lengths[:, None])
    logps, greedy = to_host(next_logprobs(lm.config, lm.params, tokens, targets, counted, lengths, iv))
    sums = logps.astype(np.float64).sum(axis=1)
    return [(float(total), bool(row.all())) for total, row in zip(sums, greedy | ~counted, strict=True)]
