"""A tiny model shaped as OLMo-3: norms after each layer, norms over all queries and keys, a window in every
other layer.

    retmask pretrain --config=panel_olmo3 --workdir=runs/panel_olmo3-0
    retmask run --config=panel_olmo3 --workdir=runs/panel_olmo3-0/run

The first command trains the model, the second runs the whole method on it. For another seed, add
`--config.pretrain.seed=1` to the first, `--config.model=runs/panel_olmo3-1/tiny` to the second, and give both another
--workdir. What the recipes of the panel share is in configs/_panel.py.

The published model has three layers with a window of 4096 for each layer without one. With four layers only one would
be left for heads that look far back, so the kinds alternate here; the window is 32 tokens, about four sentences.

Hardware: two CPU cores. 8 minutes of processor time, so about 6 minutes on an idle machine (panel_qwen3: 7.5).

Expected of the model, seeds 0 and 1 (n = 96 each; closed-book 64, copy scores 120):
    needle 128, 256, 320        .99 .80 .70 | 1.00 .82 .70
    context 128, 256            1.00 .81 | .99 .90
    closed-book                 1.00 | 1.00
    heads of copy score >= 0.1  4 | 4, all of layer 1; Gini .85 | .83
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _panel


def get_config() -> ConfigDict:
    return _panel.member(
        "panel_olmo3",
        contradictions=0.3,
        norm_placement="post",
        qk_norm="projection",
        n_kv_heads=8,
        head_dim=16,
        layer_pattern=("sliding", "full"),
        window=32,
    )
