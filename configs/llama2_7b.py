"""The study of rotary dimensions in retrieval heads (arXiv 2606.21249) on Llama-2-7B.

    for stage in detect knockout rope; do retmask $stage --config=llama2_7b; done

The heads here come from the copy score, the study's from the strongest key of the prompt's last position, so the sets
differ. The study masks pairs in its 30 best heads: `--config.detect.threshold=None --config.detect.top_k=30`, with
another work directory, does the same. Where the study counts dimensions we count pairs, half as many.

Data: `data/codes.jsonl` and `data/haystack.txt`, described in configs/_papers.py.

Hardware: 12.6 GiB for the weights in bfloat16, besides the caches: one GPU of 80 GB. Not run by us yet, so no time is
given.

Published: 42 heads, in the follow-up 38; it is the model with theta 10,000 in the comparison with Llama-3.1-8B (theta
500,000; 47 and 45 heads). We know of no published recall under a mask for it.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _papers


def get_config() -> ConfigDict:
    return _papers.rope_study("meta-llama/Llama-2-7b-hf", context=4096)
