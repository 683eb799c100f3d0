"""olmo3"""

from ml_collections import ConfigDict
from retmask_jax.configs import _panel


def get_config() -> ConfigDict:
    return _panel.member(
        "panel_olmo3", norm_placement="post", qk_norm="projection", n_kv_heads=8, head_dim=16,
        layer_pattern=("sliding", "full"), window=32,
    )  # fmt: skip
