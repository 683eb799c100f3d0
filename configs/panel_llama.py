"""A tiny model shaped as Llama: norms before each layer, two query heads to a key/value head, tied embeddings.

    retmask pretrain --config=panel_llama --workdir=runs/panel_llama-0
    retmask run --config=panel_llama --workdir=runs/panel_llama-0/run

The first trains the model, the second puts it through the whole method; `--config.pretrain.seed=1` with another
--workdir, and `--config.model=runs/panel_llama-1/tiny`, for a second one. The other two of the panel are panel_qwen3 and
panel_olmo3; what they have in common is in configs/_panel.py.

Hardware and time: two CPU cores, TIME. Expected:
EXPECT
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _panel


def get_config() -> ConfigDict:
    return _panel.member("panel_llama")
