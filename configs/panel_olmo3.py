"""A tiny model shaped as OLMo-3: norms behind each layer, norms over all queries and keys, every other layer with a window.

    retmask pretrain --config=panel_olmo3 --workdir=runs/panel_olmo3-0
    retmask run --config=panel_olmo3 --workdir=runs/panel_olmo3-0/run

The first trains the model, the second puts it through the whole method; `--config.pretrain.seed=1` with another
--workdir, and `--config.model=runs/panel_olmo3-1/tiny`, for a second one. See configs/_panel.py.

The published model has three layers with a window of 4096 to one without. With four layers that would leave one place
for heads that look far back, so they alternate here; the window is 32 tokens, four sentences.

Hardware and time: two CPU cores, TIME. Expected:
EXPECT
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _panel


def get_config() -> ConfigDict:
    return _panel.member(
        "panel_olmo3", norm_placement="post", qk_norm="projection", n_kv_heads=8, head_dim=16,
        layer_pattern=("sliding", "full"), window=32,
    )  # fmt: skip
