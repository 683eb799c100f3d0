"""RetMask (arXiv 2601.11020) on Llama-3.1-8B-Instruct: find the heads, mask them, sample pairs, train, evaluate.

    retmask run --config=llama3_1_8b

The paper's controls, random heads and random non-retrieval heads, are other arms:
`--config.train.arms="('retmask','random','any_layer')"`. `--config.detect.scores=FILE` uses
published head scores instead of detection.

Data: the four files that configs/_papers.py describes under `data/` (needles, test_needles, haystack, prompts).

Hardware: the stages without gradients need 15.0 GiB for the weights in bfloat16, besides the caches: one GPU of 80 GB.
Full fine-tuning holds weights, gradients and Adam's two moments in float32, 120 GiB over all devices, and activations:
eight GPUs of 80 GB, or a TPU slice of as much memory. Not run by us yet, so no time is given.

Published: 342 of 600 detection cases count, 33 of 1024 heads reach 0.1, the best is 15-30 at 0.923, Gini 0.935.
HELMET's mean at 128K tokens rises from 46.40 to 48.68, against 47.04 with random heads masked and 47.19 with random
non-retrieval heads; general tasks stay as they were. Here the needle stands at its depth, a copied token counts once
and an answer ends at EOS or a newline, so what detection finds will differ; `--config.detect.released=True` and
`--config.tasks.detect.at_start=True` do as the released code did.

HELMET in your checkout of it, on the start model and the trained model:

    retmask eval --config=llama3_1_8b --helmet=../HELMET
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _papers


def get_config() -> ConfigDict:
    return _papers.retmask_method("meta-llama/Llama-3.1-8B-Instruct", threshold=0.1)
