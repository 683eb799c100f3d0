"""How a task of lm-evaluation-harness wants its answers: its `generation_kwargs`, closed-world."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
