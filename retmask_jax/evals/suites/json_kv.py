"""Key-value recall (arXiv 2307.03172): a JSON object of random UUIDs, and the question for the value of one key."""

import json
import uuid
from collections.abc import Sequence

import numpy as np

from retmask_jax.data.prompter import Prompter
from retmask_jax.evals.measured import Measured
from retmask_jax.evals.suites.samples import Draft, Sample, check_lengths, contained_share, fill, measure
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.store import Store

_SEED = 0x6A736F6E  # makes other numbers of a seed than other suites do
_PAIR_TOKENS = 16  # two UUIDs have more in any tokenizer


def json_kv_samples(
    prompter: Prompter, length: int, n: int, seed: int = 0, *, max_new_tokens: int = 100
) -> list[Sample]:
    """Makes n samples of at most `length` tokens, the answer's max_new_tokens included, and less than one line shorter.

    The pair that is asked for is at any place with equal probability.

    Raises:
        ValueError: The length has no room.
    """
    drafts = [_draft(np.random.default_rng([seed, _SEED, i]), length, f"{seed}-{i}") for i in range(n)]
    return fill(prompter, drafts, length, max_new_tokens, "json_kv")


def run_json_kv(
    lm: LanguageModel,
    prompter: Prompter,
    *,
    lengths: Sequence[int],
    n: int = 100,
    seed: int = 0,
    max_new_tokens: int = 100,
    batch_size: int = 1,
    interventions: Interventions | None = None,
    contrast: ContrastDecoding | None = None,
    kept: Store | None = None,
) -> list[Measured]:
    """Measures the substring exact match of greedy answers, at each length; options as of `scoring.answered`.

    Raises:
        ValueError: A length has no room, or exceeds the model's context.
    """
    check_lengths(lm.config.max_length, lengths, "json_kv")
    return [
        measure(
            lm,
            json_kv_samples(prompter, length, n, seed, max_new_tokens=max_new_tokens),
            contained_share,
            suite="json_kv",
            task="one key",
            metric="substring exact match",
            binary=True,
            length=length,
            batch_size=batch_size,
            interventions=interventions,
            contrast=contrast,
            kept=kept,
        )
        for length in lengths
    ]


def _draft(rng: np.random.Generator, length: int, name: str) -> Draft:
    place = rng.random()
    key, value = _uuids(rng, 2)
    others = _uuids(rng, 2 * (length // _PAIR_TOKENS))
    lines = [_line(*pair) for pair in zip(others[::2], others[1::2], strict=True)]

    def text(units: int) -> str:
        at = int(place * (units + 1))
        pairs = ",\n ".join([*lines[:at], _line(key, value), *lines[at:units]])
        return (
            "Find the value of one key in the JSON object below.\n\n{" + pairs + "}\n\n"
            f"Which value does the key {json.dumps(key)} have? Answer with the value alone."
        )

    return Draft(name, text, (value,), len(lines), prefix="Value:", needles=(_line(key, value),))


def _line(key: str, value: str) -> str:
    return f"{json.dumps(key)}: {json.dumps(value)}"


def _uuids(rng: np.random.Generator, n: int) -> list[str]:
    numbers = rng.bytes(16 * n)
    return [str(uuid.UUID(bytes=numbers[i : i + 16], version=4)) for i in range(0, len(numbers), 16)]
