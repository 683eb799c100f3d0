"""qwen3"""

from ml_collections import ConfigDict
from retmask_jax.configs import _panel


def get_config() -> ConfigDict:
    return _panel.member("panel_qwen3", qk_norm="head", head_dim=32, rope_theta=1e5, norm_eps=1e-6, tied_embeddings=False)
