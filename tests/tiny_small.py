"""The tiny recipe with everything small: the whole pipeline in about a minute."""

from pathlib import Path

from retmask_jax.configs import tiny

HERE = Path(__file__).parent


def get_config():
    config = tiny.get_config()
    for task in config.tasks.values():
        if task.lengths:
            task.lengths, task.per_length = (128,), 4
        task.max_new_tokens = 8  # alike: one program for all
    config.tasks["closed-book"].needles = str(HERE / "tiny_closed_book.jsonl")  # the first of the recipe's
    config.batch_size = 8
    config.text.length, config.text.windows = 64, 4
    config.knockout.activity_windows = 4
    config.knockout.draws = 1
    config.knockout.tasks = ("needle short", "context short")
    config.rope.pairs, config.rope.draws = (4,), 1
    config.detectors.names = ("copy", "copy_position")
    config.theta.factors, config.theta.detector = (1.0, 8.0), "copy_position"
    # The shortest of the recipe's prompts, whose rows are all padded to one width.
    config.pairs.prompts = str(HERE / "tiny_prompts.jsonl")
    config.pairs.n_prompts, config.pairs.max_new_tokens = 8, 8
    config.train.arms = ("retmask",)
    config.train.steps, config.train.batch_size, config.train.microbatch_size = 6, 4, 4
    config.train.checkpoint_every = 2
    config.train.max_tokens, config.train.max_prompt_tokens = 64, 48
    config.eval.tasks = ("context short", "closed-book")
    config.eval.contrast = 0.5
    return config
