"""What each number of a config may be: one table, checked before anything is computed."""

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Limit:
    """words: what the value must be; holds(value): whether it is, for a value of one of the kinds."""

    words: str
    kinds: tuple[type, ...]
    holds: Callable[[Any], bool] = lambda value: True


def _whole(least: int) -> Limit:
    return Limit(f"a whole number of at least {least}", (int,), lambda value: value >= least)


def _number(words: str, holds: Callable[[float], bool]) -> Limit:
    return Limit(f"a number {words}", (int, float), holds)


_POSITIVE = _number("above 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("of at least 0", lambda value: value >= 0)
_BELOW_1 = _number("of at least 0 and below 1", lambda value: 0 <= value < 1)
_BETWEEN = _number("above 0 and below 1", lambda value: 0 < value < 1)
_SHARE = _number("above 0 and at most 1", lambda value: 0 < value <= 1)
_FROM_0_TO_1 = _number("from 0 to 1", lambda value: 0 <= value <= 1)
_SIZE = Limit(
    "a number of heads, of at least 1, or a share, above 0 and at most 1",
    (int, float),
    lambda value: value >= 1 if isinstance(value, int) else 0 < value <= 1,
)
_KEPT = Limit(
    "a number of KV heads, of at least 0, or a share, from 0.0 to 1.0",
    (int, float),
    lambda value: value >= 0 if isinstance(value, int) else 0 <= value <= 1,
)
_TEXT = Limit("text", (str,))
_CONTRAST = Limit(
    'a number above 0, or "entropy"',
    (int, float, str),
    lambda value: value == "entropy" if isinstance(value, str) else 0 < value < float("inf"),
)

# Keys, or patterns of keys, by what they must be. Of a tuple every element must.
_LIMITS = {
    _whole(1): """batch_size cpu_devices detect.max_new_tokens detect.top_k knockout.activity_windows pairs.n_prompts
        pairs.batch_size pairs.max_new_tokens pairs.concurrency
        train.steps train.batch_size train.microbatch_size train.max_tokens
        train.max_prompt_tokens train.widths train.reference_batch_size train.checkpoint_every train.keep detectors.cases
        detectors.top_k arena.cases arena.heads arena.windows budget.cases budget.window budget.windows
        theta.cases per_step.cases dynamics.cases text.windows tasks.*.lengths tasks.*.per_length tasks.*.max_new_tokens
        suites.*.lengths suites.*.n suites.niah.shortest suites.niah.longest
        suites.niah.n_lengths suites.niah.n_depths suites.niah.per_cell suites.*.max_new_tokens suites.rerank.length
        suites.perplexity.windows suites.perplexity.stride suites.*.limit rope.pairs rope.patch_pairs
        utility.permutations utility.resamples""",
    _whole(2): "text.length budget.length",
    _whole(3): "suites.perplexity.length",
    _whole(0): """seed knockout.draws knockout.seed knockout.mode_draws rope.draws rope.seed rope.windows rope.matched
        arena.draws arena.seed budget.draws budget.seed budget.sink
        pairs.retries train.seeds train.examples train.lora_rank train.profile detectors.seeds utility.seed per_step.seed
        tasks.*.seed tasks.*.distractors suites.*.seed suites.niah.distractors suites.lm_eval.fewshot""",
    _POSITIVE: """programs.gib programs.days
        pairs.timeout train.beta train.contrast_strength train.learning_rate train.lora_alpha train.eps train.clip
        rates.learning_rates theta.factors""",
    _NOT_NEGATIVE: "rates.most_loss pairs.temperature train.final_learning_rate train.weight_decay train.nll_weight train.gamma",
    _BELOW_1: "train.b1 train.b2 train.warmup",
    _BETWEEN: "knockout.minimal",
    _SHARE: "pairs.top_p rope.coverage",
    _FROM_0_TO_1: "tasks.*.depths eval.contrast_threshold",
    _CONTRAST: "eval.contrast",
    _SIZE: "knockout.curve",
    _KEPT: "budget.kept",
    Limit("a number", (int, float), lambda value: value == value): "detect.threshold dynamics.threshold",
    _TEXT: """ignore detect.scores pairs.prompts_field pairs.prompts_having rates.tasks
        train.arms train.heads train.lora_targets train.checkpoint_folder
        dynamics.checkpoints dynamics.task knockout.tasks rope.tasks theta.tasks eval.tasks eval.grids detectors.names
        detectors.seed_names arena.files arena.detectors arena.detect arena.task arena.modes budget.files
        budget.detectors budget.detect budget.tasks""",
}
# What may be None: "as needed", "all" or "not".
_OR_NONE = """detect.threshold detect.top_k detect.scores knockout.minimal rope.patch_pairs pairs.prompts_field pairs.batch_size
    detectors.cases detectors.top_k arena.cases arena.detect arena.task arena.windows budget.cases budget.detect
    budget.length budget.windows theta.cases per_step.cases dynamics.threshold dynamics.cases dynamics.task tasks.*.per_length
    eval.contrast suites.rerank.length suites.perplexity.stride suites.*.limit suites.lm_eval.fewshot suites.helmet.chat
    distributed prompt.chat""".split()


def check_limits(values: dict[str, Any]) -> None:
    """Raise ValueError for the first of the values, by key of the config, that is not what it must be."""
    for limit, patterns in _LIMITS.items():
        for pattern in patterns.split():
            for key in fnmatch.filter(values, pattern):
                _check(key, values[key], limit)
    for key, value in values.items():
        if value is None and not _may_be_none(key):
            raise ValueError(f"{key} is None; it must be set")


def _check(key: str, value, limit: Limit) -> None:
    or_none = _may_be_none(key)
    if value is None and or_none:
        return
    several = isinstance(value, (tuple, list)) and not or_none
    for one in value if several else (value,):
        good = isinstance(one, limit.kinds) and not isinstance(one, bool) and limit.holds(one)
        if not good:
            must = f"it must be {limit.words}{', or None' if or_none else ''}"
            raise ValueError(f"{key} has {one!r}; {must}" if several else f"{key} is {one!r}; {must}")


def _may_be_none(key: str) -> bool:
    return any(fnmatch.fnmatch(key, pattern) for pattern in _OR_NONE)
