"""The causal study on Qwen2.5-Coder-0.5B-Instruct, in which many heads retrieve.

    make models
    retmask study --config=qwen2_5_coder_study

runs detection, eight detectors, knock-out with all controls, rotary pairs and RoPE bases, and writes study.html. Each is a
stage of its own: `retmask detect`, `detectors`, `knockout`, `rope`, `utility` and `theta` with the same --config, in this
order. The settings, with their reasons, are in configs/_real.py.

Hardware: two CPU cores, about eight hours.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _real


def get_config() -> ConfigDict:
    return _real.study("models/qwen2.5-coder-0.5b-instruct-q4.gguf")
