"""RetMask (arXiv 2601.11020) on Qwen3-0.6B, cut to one small GPU.

    retmask run --config=qwen3_0_6b

Thinking is off in all stages, and everything is shorter than in the paper: `on_one_gpu` of configs/_papers.py lists
what is cut.

Data: the four files that configs/_papers.py describes under `data/` (needles, test_needles, haystack, prompts).

Hardware: one GPU of 16 GB, such as Colab offers, by this count: weights in bfloat16 take 1.1 GiB; training holds
weights, gradients and Adam's two moments in float32, 8.9 GiB, and activations. Not run by us yet, so no time is given.

Expected: nothing is published for this model.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _papers


def get_config() -> ConfigDict:
    config = _papers.on_one_gpu(_papers.retmask_method("Qwen/Qwen3-0.6B", threshold=0.05))
    config.prompt.template_kwargs.enable_thinking = False
    return config
