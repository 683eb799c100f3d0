"""The causal study on SmolLM2-135M-Instruct, in which few heads retrieve.

    make models
    retmask study --config=smollm2_study

runs detection, eight detectors, knock-out with all controls, rotary pairs and RoPE bases, and writes study.html. Each is a
stage of its own: `retmask detect`, `detectors`, `knockout`, `rope`, `utility` and `theta` with the same --config, in this
order. The settings, with their reasons, are in configs/_real.py.

Hardware: two CPU cores, about two hours.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _real


def get_config() -> ConfigDict:
    return _real.study("models/SmolLM2-135M-Instruct.Q4_1.gguf")
