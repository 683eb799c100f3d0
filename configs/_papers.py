"""What recipes for the same paper share. It is not a recipe.

Data files are not shipped; recipes expect them under `data/`, relative to where the command is run:

    data/needles.jsonl       {"needle", "question", "real_needle"} a line: the published needles, or others. Heads are
                             found with them.
    data/test_needles.jsonl  {"needle", "question", "answer"} a line, other needles with short answers: masks are tested
                             with them, and a reply counts if it has the answer's words.
    data/haystack.txt        plain English text (the published haystack is essays), at least as long as the longest
                             case; the loss on plain text is measured on it, too.
    data/prompts.jsonl       {"id", "messages": [{"role": "user", "content": "..."}]} a line: prompts without labels;
                             the paper takes the first user turns of LMSYS-Chat-1M-Synth (English).
    data/codes.jsonl         {"needle", "question", "answer", "key"} a line: "The code of the blue door is k3x9a.", "The
                             code of the blue door is", "k3x9a", "blue door"; a key phrase and five random characters.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import default


def retmask_method(model: str, threshold: float) -> ConfigDict:
    """arXiv 2601.11020 on a chat model: its detection grid, its head threshold, its sampling, its DPO."""
    config = default.get_config()
    config.model = model
    config.dtype = "bfloat16"  # as published; training keeps its weights in float32
    # Weights and Adam's moments are split over all devices. Work without gradients places the weights otherwise, so
    # that no token waits for them: whole on each device, or heads and MLPs split over a few (sharding.decoding_mesh).
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.batch_size = 8  # keys and values of 8K tokens take 1 GiB a row in Llama-3.1, 4 GiB without shared KV heads
    # 20 lengths from 0 to 5000 x 10 depths x 3 needles. No text of 0 tokens holds a needle: the first length is 128.
    lengths = (128, *(round(i * 5000 / 19) for i in range(1, 20)))
    depths = tuple(round(i / 9, 3) for i in range(10))
    test = {"needles": "data/test_needles.jsonl", "haystack": "data/haystack.txt"}
    config.tasks = ConfigDict(
        {
            "detect": default.task("data/needles.jsonl", "data/haystack.txt", lengths, depths, shuffle=False),
            "needle short": default.task(**test, lengths=(1024,), per_length=100, seed=1),
            "needle long": default.task(**test, lengths=(8192,), per_length=100, seed=2),
        }
    )
    config.detect.threshold = threshold
    config.knockout.tasks = ("needle short",)
    config.rope.tasks = ("needle short",)
    config.pairs.prompts = "data/prompts.jsonl"
    config.text.file = "data/haystack.txt"
    config.eval.tasks = ("needle short", "needle long")
    config.headlines = (
        "detect/cases counted",
        "detect/heads",
        "detect/gini",
        "knockout/needle short/none",
        *(f"knockout/needle short/{kind}" for kind in ("retrieval", "any layer", "layer-matched", "activity-matched")),
        "rope/needle short/highest minus lowest quarter",
        *(f"eval/{task}/retmask minus start" for task in ("needle short", "needle long", "text loss")),
    )
    return config


def on_one_gpu(config: ConfigDict) -> ConfigDict:
    """The method cut to one small GPU: 90 shorter cases, 1024 prompts, 64 updates of 32 pairs."""
    config.tasks.detect.lengths, config.tasks.detect.per_length = (512, 1024, 2048), 30
    config.tasks["needle long"].lengths = (4096,)
    config.pairs.n_prompts = 1024
    config.pairs.max_new_tokens = 256
    config.train.steps = 64
    config.train.batch_size = 32
    config.train.microbatch_size = 2
    config.train.max_tokens, config.train.max_prompt_tokens = 512, 256
    # Ten times the paper's rate, for an eighteenth of its steps; not tuned.
    config.train.learning_rate, config.train.final_learning_rate = 5e-6, 5e-7
    return config


def rope_study(model: str, context: int, pairs: tuple[int, ...] = (8,)) -> ConfigDict:
    """arXiv 2606.21249 on a base model: heads masked, and rotary pairs masked, lowest, highest or random ones first.

    context: tokens that the model takes; the study's lengths stay within it, answer included. pairs: rotary pairs, half
    of the paper's dimensions.
    """
    config = default.get_config()
    config.model = model
    config.dtype = "bfloat16"
    config.batch_size = 8
    config.prompt.template = "{context}\n{question}"
    config.prompt.chat = False
    lengths = tuple(min(length, context - 20) for length in (1024, 2048, 4096, 8192) if length <= context)
    case = {
        "needles": "data/codes.jsonl",
        "haystack": "data/haystack.txt",
        "lengths": lengths,
        "depths": (0.1, 0.25, 0.5, 0.75, 0.9),
        "per_length": 50,
        "max_new_tokens": 20,
    }
    config.tasks = ConfigDict({"detect": default.task(**case, seed=1), "needle": default.task(**case, seed=2)})
    config.detect.max_new_tokens = 20
    config.detect.threshold = 0.1
    config.knockout.tasks = ("needle",)
    config.rope.tasks = ("needle",)
    config.rope.pairs = pairs
    config.text.file = "data/haystack.txt"
    config.headlines = (
        "detect/cases counted",
        "detect/heads",
        "detect/gini",
        "knockout/needle/none",
        *(f"knockout/needle/{kind}" for kind in ("retrieval", "any layer", "layer-matched", "activity-matched")),
        *(f"rope/needle/{kind} {k} pairs" for k in pairs for kind in ("lowest", "highest", "random")),
    )
    return config
