"""The causal study on Gemma-3-270M, a base model most of whose layers see a window of 512 tokens.

    make models
    retmask study --config=gemma3_study

runs detection, eight detectors, knock-out with all controls, rotary pairs and RoPE bases, and writes study.html. Each is a
stage of its own: `retmask detect`, `detectors`, `knockout`, `rope`, `utility` and `theta` with the same --config, in this
order. The settings, with their reasons, are in configs/_real.py.

Hardware: two CPU cores, about three hours.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _real


def get_config() -> ConfigDict:
    return _real.study("models/gemma-3-270m-q4_k_m.gguf")
