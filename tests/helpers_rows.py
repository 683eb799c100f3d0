"""Records of preference pairs and how they are encoded."""

import numpy as np
from helpers_tiny import copying_lm

from retmask_jax.data import tiny_language as tl
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
