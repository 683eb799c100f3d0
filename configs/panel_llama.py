"""llama"""

from ml_collections import ConfigDict
from retmask_jax.configs import _panel


def get_config() -> ConfigDict:
    return _panel.member("panel_llama")
