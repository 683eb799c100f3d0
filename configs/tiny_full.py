"""RetMask and every control on the bundled tiny model, three training seeds each.

    retmask run --config=tiny_full

About 20 minutes on two CPU cores. All arms start from the same model and use the same prompts, learning rate and number
of updates; they differ in where the rejected (or, for sft, the chosen) answers come from. Intervals pool the seeds and
are over evaluation cases; the table is in colab/README.md.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import tiny

ARMS = (
    *("retmask", "any_layer", "layer_matched", "activity_matched"),
    *("no_fact", "contrast", "sft_filtered", "sft_unfiltered"),
)


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.train.arms = ARMS
    config.train.seeds = (0, 1, 2)
    config.eval.grids = ()
    config.headlines = tuple(
        f"eval/{task}/{arm} minus start"
        for task in ("context long", "context short", "needle long", "closed-book", "text loss")
        for arm in ARMS
    )
    return config
