"""What suites ask of a model, as lists on the host: log-probabilities of continuations, and answers up to a stop."""

from collections.abc import Iterable, Sequence

import numpy as np

from retmask_jax import memory
from retmask_jax.files import digest
from retmask_jax.generate import batches_by_length, generate_many, pad_rows, pad_to_bucket
from retmask_jax.hosts import to_host
from retmask_jax.lm import LanguageModel
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.sequence import next_logprobs

Pair = tuple[Sequence[int], Sequence[int]]


def continuation_logprobs(lm: LanguageModel, pairs: Sequence[Pair], interventions: Interventions | None = None, *,
                          batch_size: int, what: str = "log-likelihood") -> list[tuple[float, bool]]:  # fmt: skip
    """(log-probability in nats of a continuation, whether each of its tokens is the most likely one) of each pair.

    pairs: token ids of context and continuation, both at least one; of a pair longer than the model's context by more
    than the last token, which is not read, the beginning is left out. Where memory runs out the batch is halved.
    Raises ValueError for an empty side, and for a continuation longer than the context.
    """
    iv = shared_mask(lm.config, interventions)
    rows = [_fitted(pair, lm.config.max_length) for pair in pairs]

    def work(todo: list[int], batch_size: int):
        for places in batches_by_length([rows[i] for i in todo], batch_size):
            batch = [todo[place] for place in places]
            yield batch, _scores(lm, [rows[i] for i in batch], [len(pairs[i][1]) for i in batch], iv)

    return memory.in_batches(len(pairs), min(batch_size, len(pairs)), what, "request", work)


def is_too_long(pair: Pair, max_length: int) -> bool:
    """Whether `continuation_logprobs` leaves out the beginning of a pair."""
    return len(pair[0]) + len(pair[1]) > max_length + 1


def answers(lm: LanguageModel, prompts: Sequence[Sequence[int]], interventions: Interventions | None = None, *,
            max_new_tokens: int, batch_size: int, until: Sequence[str] = (), temperature: float = 0.0,
            top_p: float = 1.0, what: str = "generate") -> list[str]:  # fmt: skip
    """What the model says behind each prompt, without special tokens, up to the first of the `until` texts.

    Draws at a temperature depend on a prompt's place in the list, not on its batch. Prompts must leave room for the new
    tokens, see `last_tokens`.
    """
    found = generate_many(
        lm.config, lm.params, prompts, batch_size=min(batch_size, len(prompts)), max_new_tokens=max_new_tokens,
        interventions=shared_mask(lm.config, interventions), temperature=temperature, top_p=top_p,
        stop_ids=stop_ids(lm, until), what=what,
    )  # fmt: skip
    return [cut(lm.tokenizer.decode(one.tokens, skip_special_tokens=True), until) for one in found]


def last_tokens(prompt: Sequence[int], room: int) -> list[int]:
    """The end of a prompt that is longer than its room."""
    return list(prompt[-room:])


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first occurrence of any of the `until` texts; an empty one ends nothing."""
    for stop in until:
        text = text.split(stop, 1)[0] if stop else text
    return text


def stop_ids(lm: LanguageModel, until: Iterable[str]) -> list[int]:
    """The ids that end an answer: EOS of model and tokenizer, and the special tokens among the `until` texts.

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
        raise ValueError("a suite runs under one mask: interventions with a row axis do not apply; run it once for each")
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
