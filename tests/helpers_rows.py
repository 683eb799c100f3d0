"""Records of preference pairs and how they are encoded."""

import numpy as np
from helpers_tiny import copying_lm

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.pair_rows import PairRows, encode_blocks
from retmask_jax.data.prompter import Prompter
from retmask_jax.hf.end_tokens import Ends

PROMPTER = Prompter(copying_lm().tokenizer)


def record_of(prompt, chosen, rejected, finished=(True, True)):
    return {
        "id": prompt,
        "messages": [{"role": "user", "content": prompt}],
        "chosen": chosen,
        "rejected": rejected,
        "chosen_finished": finished[0],
        "rejected_finished": finished[1],
    }


OPTIONS = {"ends": Ends(tl.EOS), "max_tokens": 40, "max_prompt_tokens": 20}


def many_records(n):
    rng = np.random.default_rng(0)
    words = tl.VOCABULARY[10:60]
    return [
        record_of(f"{'é' * (i % 3)}{i}", " ".join(rng.choice(words, i % 7)), "oslo", (i % 2 == 0, True))
        for i in range(n)
    ]


def encode_pairs(prompter, records, **options):
    """The blocks of `encode_blocks` as one, in memory."""
    blocks, offset, bounds = list(encode_blocks(prompter, records, **options)), 0, [np.zeros((0, 4), np.int64)]
    for block in blocks:
        bounds.append(block.bounds + offset)
        offset += len(block.flat)
    flat = np.concatenate([np.zeros(0, np.int32), *(block.flat for block in blocks)])
    cuts = (sum(block.cut for block in blocks), sum(block.prompts_cut for block in blocks))
    return PairRows([i for block in blocks for i in block.ids], flat, np.concatenate(bounds), *cuts)
