"""Both studies of Gemma-3-270M, a base model most of whose layers see a window of 512 tokens.

    make models
    retmask study --config=gemma3_study                # or one stage after the other: detect, detectors, knockout, ...
    retmask rates --config=gemma3_study                # after `retmask pairs`: which learning rate?
    retmask run --config=gemma3_study                  # RetMask: with the flags that `rates` prints

The settings, with their reasons, are in configs/_real.py; `--plan` says how long each stage takes here.

Hardware: two CPU cores of 64 GFLOP/s each: about two hours for the study, four more for RetMask with adapters.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _real


def get_config() -> ConfigDict:
    return _real.real("models/gemma-3-270m-q4_k_m.gguf")
