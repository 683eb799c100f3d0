"""A tiny model shaped as Llama: norms before each layer, two query heads to a key/value head, tied embeddings.

    retmask pretrain --config=panel_llama --workdir=runs/panel_llama-0
    retmask run --config=panel_llama --workdir=runs/panel_llama-0/run

The first command trains the model, the second runs the whole method on it. For another seed, add
`--config.pretrain.seed=1` to the first, `--config.model=runs/panel_llama-1/tiny` to the second, and give both another
--workdir. What the recipes of the panel share is in configs/_panel.py.

Hardware: two CPU cores. 10 minutes of processor time, so about 7 minutes on an idle machine (panel_qwen3: 7.5).

Expected of the model, seeds 0 and 1 (n = 96 each; closed-book 64, copy scores 120):
    needle 128, 256, 320        1.00 .92 .78 | .99 .86 .77
    context 128, 256            .99 .81 | .99 .83
    closed-book                 1.00 | 1.00
    heads of copy score >= 0.1  4 | 4, all of layer 1; Gini .86 | .87
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _panel


def get_config() -> ConfigDict:
    return _panel.member("panel_llama", contradictions=0.2)
