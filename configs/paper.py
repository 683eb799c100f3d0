"""The published settings on any model, as far as the texts of the package go: for GPUs and TPUs.

    retmask run MODEL --scale=paper

is this recipe with `config.model` set to MODEL. As in arXiv 2601.11020: the detection grid of 20 lengths to 5000 tokens and
10 depths with 3 needles a cell (600 cases), the threshold 0.1, sampling at temperature 0.6, DPO with beta 0.1, all weights
trained in float32 with bfloat16 arithmetic. Not as there: the needles and the haystack are ours; there are 1,200 prompts
instead of 294,000, so 75 updates of 32 pairs are two epochs, at ten times the learning rate; answers end at 512 tokens. With
prompts of yours (`--config.pairs.prompts=chats.jsonl.gz`) set `train.steps`, `train.batch_size` and the learning rates to the
published ones, which are the defaults of configs/default.py.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _builtin, default


def get_config() -> ConfigDict:
    config = default.get_config()
    _builtin.any_model(config)
    config.dtype = "bfloat16"
    config.mesh.data, config.mesh.fsdp = 1, -1
    lengths = (128, *(round(i * 5000 / 19) for i in range(1, 20)))
    depths = tuple(round(i / 9, 3) for i in range(10))
    detect = _builtin.needles(lengths, per_length=30, seed=1)
    detect.depths, detect.shuffle, detect.prefix = depths, False, False
    config.tasks = ConfigDict(
        {
            "detect": detect,
            "needle 1024": _builtin.codes((1024,), per_length=200, seed=2),
            "needle 4096": _builtin.codes((4096,), per_length=100, seed=3),
            "facts 1024": _builtin.facts((1024,), per_length=180, seed=4),
            "closed-book": _builtin.closed_book(),
        }
    )
    config.knockout.tasks = ("needle 1024", "facts 1024")
    config.rope.tasks = ("needle 1024",)
    config.pairs.n_prompts = 1200
    config.pairs.max_new_tokens = 512
    config.train.steps, config.train.batch_size, config.train.microbatch_size = 75, 32, 4
    config.train.learning_rate, config.train.final_learning_rate = 5e-6, 5e-7
    config.train.max_tokens, config.train.max_prompt_tokens = 1024, 512
    config.train.examples = 3
    config.eval.tasks = ("needle 1024", "needle 4096", "facts 1024", "closed-book")
    config.headlines = _builtin.headlines(config)
    return config
