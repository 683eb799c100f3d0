"""RetMask (arXiv 2601.11020) on Llama-3.2-1B-Instruct, cut to one small GPU.

    retmask run --config=llama3_2_1b

Everything is shorter than in the paper: what is cut is listed in configs/_papers.py.

Data: the four files that configs/_papers.py describes under `data/` (needles, test_needles, haystack, prompts).

Hardware: one GPU of 16 GB for all stages before training: weights in bfloat16 take 2.3 GiB. Training holds weights,
gradients and Adam's two moments in float32, 18.4 GiB, and activations: one GPU of 40 GB, or the Qwen3-0.6B recipe. Not
run by us yet, so no time is given.

Expected: nothing is published for this model.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _papers


def get_config() -> ConfigDict:
    return _papers.on_one_gpu(_papers.retmask_method("meta-llama/Llama-3.2-1B-Instruct", threshold=0.1))
