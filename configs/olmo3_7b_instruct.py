"""RetMask (arXiv 2601.11020) on Olmo-3-7B-Instruct: find the heads, mask them, sample pairs, train, evaluate.

    retmask run --config=olmo3_7b_instruct

Data: the four files that configs/_papers.py describes under `data/` (needles, test_needles, haystack, prompts).

Hardware: the stages without gradients need 13.6 GiB for the weights in bfloat16, besides the caches: one GPU of 80 GB.
Full fine-tuning holds weights, gradients and Adam's two moments in float32, 109 GiB over all devices, and activations:
eight GPUs of 80 GB, or a TPU slice of as much memory. Not run by us yet, so no time is given.

Published: HELMET's mean at 64K tokens rises by 0.59. How many cases counted is not known to us. Here the needle stands
at its depth, a copied token counts once and an answer ends at EOS or a newline, so what detection finds will differ;
`--config.detect.released=True` and `--config.tasks.detect.at_start=True` do as the released code did.

HELMET in your checkout of it, on the start model and the trained model:

    retmask eval --config=olmo3_7b_instruct --helmet=../HELMET
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _papers


def get_config() -> ConfigDict:
    return _papers.retmask_method("allenai/Olmo-3-7B-Instruct", threshold=0.05)
