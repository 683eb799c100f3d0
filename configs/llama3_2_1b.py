"""RetMask (arXiv 2601.11020) on Llama-3.2-1B-Instruct, cut to one small GPU.

    retmask run --config=llama3_2_1b

Everything is shorter than in the paper: `on_one_gpu` of configs/_papers.py lists what is cut. Adapters (LoRA) are
trained, not all weights as in the paper.

Data: the four files that configs/_papers.py describes under `data/` (needles, test_needles, haystack, prompts).

Hardware: one GPU of 16 GB, such as Colab offers, by this count: weights in bfloat16 take 2.3 GiB, adapters of rank 16
with their gradients and moments 0.2 GiB, and activations. All weights (`--config.train.lora_rank=0`) would take 18.4
GiB with gradients and moments. Not run by us yet, so no time is given.

Expected: nothing is published for this model.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _papers


def get_config() -> ConfigDict:
    config = _papers.on_one_gpu(_papers.retmask_method("meta-llama/Llama-3.2-1B-Instruct", threshold=0.1))
    config.train.lora_rank = 16
    # Ten times the rate for all weights, as is usual for adapters; not tuned.
    config.train.learning_rate, config.train.final_learning_rate = 5e-5, 5e-6
    return config
