"""The method on any model with the texts of the package, in minutes on a laptop's CPU for a model of 135M parameters.

    retmask run MODEL

is this recipe with `config.model` set to MODEL, a hub id, a folder or a .gguf file. Chat models are asked in their chat
template, with thinking off; others in plain text. Replies are begun for the model ("The code of the blue door is"), which
makes small models answer. Everything is smaller than in the papers: 42 detection cases instead of 600, 24 cases of a task, 6
updates of 8 pairs with adapters. So a change by training is hardly to be expected here; `--scale=paper` has the published
settings.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _builtin, default


def get_config() -> ConfigDict:
    config = default.get_config()
    _builtin.any_model(config)
    config.tasks = ConfigDict(
        {
            "detect": _builtin.needles((512, 1024, 2000), per_length=14, seed=1),
            "needle 512": _builtin.codes((512,), per_length=24, seed=2),
            "needle 1536": _builtin.codes((1536,), per_length=12, seed=3),
            "detect 256": _builtin.needles((256,), per_length=16, seed=6),
            "needle 256": _builtin.codes((256,), per_length=24, seed=5),
            "facts 256": _builtin.facts((256,), per_length=60, seed=4),
            "closed-book": _builtin.closed_book(),
        }
    )
    config.detect.max_new_tokens = 30
    config.knockout.tasks = ("needle 512",)
    config.knockout.draws = 2
    config.knockout.activity_windows = 1
    config.rope.tasks = ("needle 512",)
    config.rope.draws = 1
    config.text.length, config.text.windows = 128, 16

    config.pairs.n_prompts = 48
    config.pairs.max_new_tokens = 64
    config.train.steps, config.train.batch_size, config.train.microbatch_size = 6, 8, 4
    config.train.learning_rate, config.train.final_learning_rate = 5e-5, 5e-6
    config.train.max_tokens, config.train.max_prompt_tokens = 224, 160
    config.train.compute_dtype = "float32"
    config.train.lora_rank = 16
    config.train.widths = 1
    config.train.checkpoint_every = 4
    config.train.examples = 3
    config.eval.tasks = ("needle 512", "needle 1536", "facts 256", "closed-book")
    config.detectors.cases = 16
    config.arena.detect, config.arena.task, config.arena.windows = "detect 256", "needle 256", 8  # there are many masks
    config.budget.detect, config.budget.length, config.budget.window = "detect 256", 512, 64
    config.theta.factors, config.theta.cases = (0.5, 1.0, 2.0), 12
    config.headlines = _builtin.headlines(config)
    return config
