"""Both studies of Qwen2.5-Coder-0.5B-Instruct, in which many heads retrieve.

    make models
    retmask study --config=qwen2_5_coder_study                # or one stage after the other: detect, detectors, knockout, ...
    retmask rates --config=qwen2_5_coder_study                # after `retmask pairs`: which learning rate?
    retmask run --config=qwen2_5_coder_study                  # RetMask: with the flags that `rates` prints

The settings, with their reasons, are in configs/_real.py; `--plan` says how long each stage takes here.

Hardware: two CPU cores of 64 GFLOP/s each: about six hours for the study, fourteen more for RetMask with adapters. We have run
`detect`, `knockout` and `rope` with fewer draws (colab/README.md), not RetMask: untouched, the model already follows a text.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _real


def get_config() -> ConfigDict:
    return _real.real("models/qwen2.5-coder-0.5b-instruct-q4.gguf")
