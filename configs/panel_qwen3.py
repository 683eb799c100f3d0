"""A tiny model shaped as Qwen3: as Llama, with norms of each query and key head, another rotary base, and embeddings
of its own for the output.

    retmask pretrain --config=panel_qwen3 --workdir=runs/panel_qwen3-0
    retmask run --config=panel_qwen3 --workdir=runs/panel_qwen3-0/run

The first trains the model, the second puts it through the whole method; `--config.pretrain.seed=1` with another
--workdir, and `--config.model=runs/panel_qwen3-1/tiny`, for a second one. See configs/_panel.py.

Hardware and time: two CPU cores, TIME. Expected:
EXPECT
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _panel


def get_config() -> ConfigDict:
    return _panel.member("panel_qwen3", qk_norm="head", rope_theta=1e5, norm_eps=1e-6, tied_embeddings=False)
