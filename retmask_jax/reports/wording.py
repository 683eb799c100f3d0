"""How changes and tasks are put into words, alike on every page."""

from collections.abc import Mapping

from retmask_jax.reports.html import change, count
from retmask_jax.stages.outcomes import FROM_MEMORY
from retmask_jax.utils.numbers import Number, _typed

TEXT_LOSS = "text loss"


def directions(subject: str, changes: Mapping[str, Number]) -> str:
    """What a treatment does to each task, judged by the interval of the change alone."""
    groups: dict[str, list[str]] = {"raises": [], "lowers": [], "": []}
    for task, number in changes.items():
        groups[direction(number)].append(f"{measure(task)} ({change(number)})")
    clear = [f"{verb} " + ", ".join(groups[verb]) for verb in ("raises", "lowers") if groups[verb]]
    unclear = len(groups[""])
    if not clear:
        return f"{subject} shows no clear change: the 95% interval contains 0 on every measure." if unclear else ""
    rest = f"; the 95% interval contains 0 on {count(unclear, 'other measure')}" if unclear else ""
    return f"{subject} {' and '.join(clear)}{rest}."


def direction(number: Number) -> str:
    """ "raises" or "lowers" where the interval of a change lies on one side of 0, else ""."""
    number = _typed(number)
    if number.low is not None and number.low > 0:
        return "raises"
    return "lowers" if number.high is not None and number.high < 0 else ""


def measure(task: str) -> str:
    """What a task measures, in a sentence."""
    return task if is_loss(task) or FROM_MEMORY in task or "/" in task else f"recall on {task}"


def is_loss(task: str) -> bool:
    """Whether a task is a loss on text, in nats per token, and not a share of answers."""
    return task == TEXT_LOSS or task.startswith("perplexity/")


def axis(task: str) -> str:
    """What a task measures, at an axis."""
    if is_loss(task):
        return "nats per token"
    return "share of answers" if FROM_MEMORY in task else "recall"
