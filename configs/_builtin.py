"""What recipes for any model with the package's English texts share. It is not a recipe."""

from ml_collections import ConfigDict
from retmask_jax.configs import default


def any_model(config: ConfigDict) -> None:
    """Sets how a model is asked, whatever it is, and the texts."""
    config.prompt.chat = None
    config.prompt.template_kwargs.enable_thinking = False
    config.batch_size = 8
    config.pairs.prompts = "builtin:prompts"
    config.text.file = "builtin:essays"


def needles(lengths: tuple[int, ...], per_length: int | None = None, seed: int = 1) -> ConfigDict:
    """Cases with statements of 15 to 40 words, on which heads are detected."""
    return default.task("builtin:needles", "builtin:essays", lengths, per_length=per_length, seed=seed, prefix=True)


def codes(lengths: tuple[int, ...], per_length: int, seed: int) -> ConfigDict:
    """Cases that ask for a code of four digits, by which masks are tested: nobody guesses it."""
    files = ("builtin:codes", "builtin:essays")
    return default.task(*files, lengths, per_length=per_length, seed=seed, prefix=True, max_new_tokens=8)


def facts(lengths: tuple[int, ...], per_length: int, seed: int) -> ConfigDict:
    """Cases whose text says something else than what every model has learnt."""
    files = ("builtin:facts", "builtin:essays")
    return default.task(*files, lengths, per_length=per_length, seed=seed, prefix=True, max_new_tokens=8)


def indirect(lengths: tuple[int, ...], per_length: int, seed: int) -> ConfigDict:
    """Cases whose question shares no word with the statement that answers it."""
    files = ("builtin:indirect", "builtin:essays")
    return default.task(*files, lengths, per_length=per_length, seed=seed, prefix=True, max_new_tokens=8)


def closed_book() -> ConfigDict:
    """The same facts, asked without a text."""
    return default.task("builtin:closed_book", prefix=True, max_new_tokens=8)


def headlines(config: ConfigDict) -> tuple[str, ...]:
    """The numbers at the end of `run`."""
    task, measured = config.knockout.tasks[0], (*config.eval.tasks, "text loss")
    kinds = ("none", "retrieval", "layer-matched", "any layer", "activity-matched")
    return (
        "detect/cases counted",
        "detect/heads",
        "detect/gini",
        *(f"knockout/{task}/{kind}" for kind in kinds),
        f"rope/{task}/highest minus lowest quarter",
        *(f"eval/{name}/{of}" for name in measured for of in ("start", "retmask minus start")),
    )
