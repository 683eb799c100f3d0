"""A tiny model shaped as Qwen3: as Llama, with norms of each query and key head, another rotary base, and separate
embeddings for the output.

    retmask pretrain --config=panel_qwen3 --workdir=runs/panel_qwen3-0
    retmask run --config=panel_qwen3 --workdir=runs/panel_qwen3-0/run

The first command trains the model, the second runs the whole method on it. For another seed, add
`--config.pretrain.seed=1` to the first, `--config.model=runs/panel_qwen3-1/tiny` to the second, and give both another
--workdir. What the recipes of the panel share is in configs/_panel.py.

Hardware: two CPU cores. 7.5 minutes on an idle machine.

Expected of the model, seeds 0 and 1 (n = 96 each; closed-book 64, copy scores 120):
    needle 128, 256, 320        1.00 .95 .92 | .99 .93 .89
    context 128, 256            .97 .69 | .91 .36
    closed-book                 1.00 | 1.00
    heads of copy score >= 0.1  4 | 4, all of layer 1; Gini .87 | .87
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _panel


def get_config() -> ConfigDict:
    return _panel.member(
        "panel_qwen3", contradictions=0.12, qk_norm="head", rope_theta=1e5, norm_eps=1e-6, tied_embeddings=False
    )
