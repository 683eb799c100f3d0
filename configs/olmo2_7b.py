"""The study of rotary dimensions in retrieval heads (arXiv 2606.21249) on OLMo-2-7B.

    for stage in detect knockout rope; do retmask $stage --config=olmo2_7b; done

The heads here come from the copy score, the study's from the strongest key of the prompt's last position, so the sets
differ. The study masks pairs in its 30 best heads: `--config.detect.threshold=None --config.detect.top_k=30`, with
another work directory, does the same. Where the study counts dimensions we count pairs, half as many.

Data: `data/codes.jsonl` and `data/haystack.txt`, described in configs/_papers.py.

Hardware: 13.6 GiB for the weights in bfloat16, besides the caches: one GPU of 80 GB. Not run by us yet, so no time is
given.

Published: with all 87 heads masked recall falls from 1.00 to 0.00, with as many random ones it stays at 1.00; in the
follow-up 95 heads, 0.00 and 0.95. With rotary dimensions (pairs) masked, recall is

                          8 (4)    16 (8)    32 (16)    48 (24)    64 (32)
    lowest frequencies    0.985    0.885     0.175      0.115      0.07
    random                1.0      1.0       0.98       0.87       0.375
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _papers


def get_config() -> ConfigDict:
    return _papers.rope_study("allenai/OLMo-2-1124-7B", context=4096, pairs=(4, 8, 16, 24, 32))
