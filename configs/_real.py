"""What the study of real models has in common. It is not a recipe.

All three models get the same cases with the same seeds, made of the texts of the package, and at least 96 of each task (60
without a text, since there are 60 facts). Prompts have 256 tokens: long enough that nobody guesses a code, and short enough
that all stages take about two hours for a model of 135M parameters on two slow CPU cores (0.27 GFLOP a token, 1.6 million
tokens). A model of 0.5B takes four times as long. Each stage is a command of its own (`retmask knockout --config=NAME`), and
an interrupted stage goes on where it stopped.

The tasks are called as those of the small models in configs/_panel.py, so that `retmask panel` takes both.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _builtin, default


def study(model: str) -> ConfigDict:
    """The causal study: detection, eight detectors, knock-out with all controls, rotary pairs, RoPE bases."""
    config = default.get_config()
    _builtin.any_model(config)
    config.model = model
    config.tasks = ConfigDict(
        {
            "detect": _builtin.needles((256, 512, 1024), per_length=16, seed=1),
            "needle short": _builtin.codes((256,), per_length=96, seed=2),
            "context short": _builtin.facts((256,), per_length=96, seed=4),
            "closed-book": _builtin.closed_book(),
        }
    )
    config.detect.max_new_tokens = 30  # the longest needle's answer has 26 words at most
    config.text.length, config.text.windows = 128, 32

    config.knockout.tasks = ("needle short", "context short", "closed-book")
    config.knockout.modes = ("zero", "mean")  # the mean: is it the missing heads that harm, or what zero does to a text?
    config.knockout.draws, config.knockout.mode_draws = 3, 1
    config.knockout.activity_windows = 2  # a pass for each head and window

    config.rope.tasks = ("needle short",)
    config.rope.draws, config.rope.matched = 2, 2
    config.rope.windows = 8
    config.rope.text = True

    config.detectors.cases = 16  # of 48, evenly spread
    config.detectors.seeds, config.detectors.seed_names = (11,), ("copy_position",)
    config.theta.factors = (0.25, 0.5, 1.0, 2.0, 4.0)
    config.theta.cases = 16
    config.theta.detector = "copy_position"  # reads each case once
    config.headlines = (
        "detect/cases counted",
        "detect/heads",
        "detect/gini",
        *(f"detectors/needle short/{name} masked" for name in config.detectors.names),
        *(f"knockout/needle short/{kind}" for kind in ("none", "retrieval", "layer-matched", "activity-matched")),
        "knockout/context short/retrieval",
        "knockout/context short: from memory/retrieval",
        "knockout/closed-book/retrieval",
        "rope/needle short/highest minus lowest quarter",
        "rope/needle short/centre of mass of the windows",
        *(f"theta/needle short/factor {factor:g}" for factor in config.theta.factors),
    )
    return config
