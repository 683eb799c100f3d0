"""The study of rotary dimensions in retrieval heads (arXiv 2606.21249) on Qwen2.5-14B.

    for stage in detect knockout rope; do retmask $stage --config=qwen2_5_14b; done

The heads here come from the copy score, the study's from the strongest key of the prompt's last position, so the sets
differ. The study masks pairs in its 30 best heads: `--config.detect.threshold=None --config.detect.top_k=30`, with
another work directory, does the same. Where the study counts dimensions we count pairs, half as many.

Data: `data/codes.jsonl` and `data/haystack.txt`, described in configs/_papers.py.

Hardware: 27.5 GiB for the weights in bfloat16, besides the caches: one GPU of 80 GB. Not run by us yet, so no time is
given.

Expected: no published number for this model is known to us.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _papers


def get_config() -> ConfigDict:
    return _papers.rope_study("Qwen/Qwen2.5-14B", context=131072)
