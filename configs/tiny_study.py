"""The causal study on the bundled tiny model: detectors, knock-out, rotary pairs, query norms, RoPE base.

    retmask study --config=tiny_study

Compares eight detectors of retrieval heads and two of other fields, masks the heads of each, masks heads and rotary pairs in
many ways, compares query norms, changes the RoPE base, follows heads from token to token of an answer, and writes study.html.
About three minutes on two idle CPU cores.

Training dynamics need checkpoints, and the package has none. Training the model makes some:

    retmask pretrain --config=tiny --workdir=runs/pretrain
    retmask study --config=tiny_study --config.dynamics.checkpoints='("runs/pretrain/checkpoints/step_*",)'

They add a minute or two (the first checkpoints have two layers, the others four).
"""

from ml_collections import ConfigDict
from retmask_jax.configs import tiny


def get_config() -> ConfigDict:
    return study(tiny.get_config())


def study(config: ConfigDict) -> ConfigDict:
    """Put the settings of the study over those of a tiny model."""
    config.knockout.modes = ("zero", "mean", "query")
    config.knockout.curve = (1, 2, 4, 8, 16, 0.25, 0.5, 0.75, 1.0)
    config.knockout.minimal = 0.1
    config.rope.sites = ("rotary", "projection")
    config.rope.utility = True
    config.rope.windows = 8
    config.rope.coverage = (0.25, 0.5, 0.75, 1.0)
    config.rope.patches = True
    config.rope.matched = 3
    config.rope.text = True
    # `detect` has 120 cases; the other stages that read them take about a fifth.
    config.detectors.names = (*config.detectors.names, "induction", "previous_token")
    config.detectors.cases = 24
    config.detectors.seeds = (11,)
    config.detectors.seed_names = ("copy_position",)
    # Twice or half the base changes nothing here.
    config.theta.factors = (0.1, 1.0, 10.0)
    config.theta.cases = 24
    config.theta.detector = "copy_position"  # one program for each base: nothing is decoded
    config.per_step.cases = 24
    config.dynamics.cases = 40
    config.headlines = (
        "detect/heads",
        "detect/gini",
        *(f"detectors/needle short/{name} masked" for name in config.detectors.names),
        "knockout/needle short/none",
        "knockout/needle short/retrieval",
        "knockout/needle short/layer-matched",
        "knockout/needle short/activity-matched",
        "knockout/closed-book/retrieval",
        "knockout/needle short/smallest set",
        "rope/needle short/lowest 4 pairs",
        "rope/needle short/highest 4 pairs",
        "rope/needle short/matched 4 pairs",
        "rope/needle short/centre of mass of the windows",
        "utility/Cohen's d",
        "utility/permutation p",
        *(f"theta/needle short/factor {factor:g}" for factor in config.theta.factors),
    )
    return config
