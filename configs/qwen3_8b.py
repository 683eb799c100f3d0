"""RetMask (arXiv 2601.11020) on Qwen3-8B: find the heads, mask them, sample pairs, train, evaluate.

    retmask run --config=qwen3_8b

As in the paper, thinking is off to find heads and on to sample answers, of up to 4096 new tokens. The thoughts
come before the answer, as the model writes them, and count towards the 1024 tokens of a training row: the results of
pairs and train say how many answers were cut.

Data: the four files that configs/_papers.py describes under `data/` (needles, test_needles, haystack, prompts).

Hardware: the stages without gradients need 15.3 GiB for the weights in bfloat16, besides the caches: one GPU of 80 GB.
Full fine-tuning holds weights, gradients and Adam's two moments in float32, 122 GiB over all devices, and activations:
eight GPUs of 80 GB, or a TPU slice of as much memory. Not run by us yet, so no time is given.

Published: all 600 detection cases count, Gini 0.902, and HELMET's mean at 128K tokens rises by 0.89, measured with
YaRN (factor 4, original length 32768), which has to be added to the checkpoint's config.json. Here the needle stands
at its depth, a copied token counts once and an answer ends at EOS or a newline, so what detection finds will differ;
`--config.detect.released=True` and `--config.tasks.detect.at_start=True` do as the released code did.

HELMET in your checkout of it, on the start model and the trained model:

    retmask eval --config=qwen3_8b --helmet=../HELMET
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _papers


def get_config() -> ConfigDict:
    config = _papers.retmask_method("Qwen/Qwen3-8B", threshold=0.05)
    config.prompt.template_kwargs.enable_thinking = False
    config.pairs.template_kwargs.enable_thinking = True
    config.pairs.max_new_tokens = 4096
    return config
