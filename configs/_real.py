"""What the recipes of real models have in common: the causal study, and RetMask with its controls. It is not a recipe.

All models get the same cases with the same seeds, made of the texts of the package. `retmask study --config=NAME --plan` and
`retmask run --config=NAME --plan` print about how long each stage takes on the machine at hand. Each stage is a command of its
own, and an interrupted stage goes on where it stopped, so any of it can be run in pieces.

The tasks are called as those of the small models in configs/_panel.py, so that `retmask panel` takes both.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _builtin, default

ARMS = (
    *("retmask", "any_layer", "layer_matched"),  # the paper's
    *("activity_matched", "no_fact", "contrast", "sft_filtered"),  # other controls
    *("retmask_retrieval", "retmask_matched", "retmask_others"),  # which heads must change
)


def real(model: str) -> ConfigDict:
    """Both studies of a model."""
    config = default.get_config()
    _builtin.any_model(config)
    config.model = model
    # Of the study there are at least 96 cases of a task, 60 without a text since there are 60 facts. 256 tokens are enough
    # that nobody guesses a code, and few enough for two hours with a model of 135M on two slow cores.
    config.tasks = ConfigDict(
        {
            "detect": _builtin.needles((256, 512, 1024), per_length=16, seed=1),
            "needle short": _builtin.codes((256,), per_length=96, seed=2),
            "context short": _builtin.facts((256,), per_length=96, seed=4),
            "closed-book": _builtin.closed_book(),
        }
    )
    config.detect.max_new_tokens = 30  # the longest needle's answer has 26 words at most
    config.text.length, config.text.windows = 128, 32
    _study(config)
    _retmask(config)
    config.headlines = _headlines(config)
    return config


def _study(config: ConfigDict) -> None:
    config.knockout.tasks = ("needle short", "context short", "closed-book")
    # The mean: is it the missing heads that harm, or what zero does to a text?
    config.knockout.modes = ("zero", "mean")
    config.knockout.draws, config.knockout.mode_draws = 3, 1
    config.knockout.activity_windows = 2  # a pass for each head and window
    config.rope.tasks = ("needle short",)
    config.rope.draws, config.rope.matched = 2, 2
    config.rope.windows = 8
    config.rope.text = True
    config.detectors.cases = 16  # of 48, evenly spread
    config.detectors.seeds, config.detectors.seed_names = (11,), ("copy_position",)
    config.theta.factors = (0.25, 0.5, 1.0, 2.0, 4.0)
    config.theta.cases = 16
    config.theta.detector = "copy_position"  # reads each case once
    config.per_step.cases = 24


def _retmask(config: ConfigDict) -> None:
    """Adapters, three arms and one seed, unless a recipe says otherwise."""
    # Prompts with a short text to answer from, so that every arm, no_fact too, is trained on the same ones. No code, fact or
    # question of a task is in them.
    config.pairs.prompts_having = ("messages_without",)
    config.pairs.n_prompts = 240
    config.pairs.max_new_tokens = 64
    config.train.arms = ARMS[:3]
    config.train.steps, config.train.batch_size = 30, 16  # two epochs
    config.train.microbatch_size, config.train.reference_batch_size = 4, 8
    config.train.max_tokens, config.train.max_prompt_tokens = 288, 224  # the longest prompt has 170, its template 40
    config.train.compute_dtype = "float32"  # bfloat16 is slower on a CPU
    config.train.widths = 1
    config.train.checkpoint_every = 10
    config.train.lora_rank = 16
    # Before `retmask rates` has chosen one.
    config.train.learning_rate, config.train.final_learning_rate = 1e-4, 1e-5
    config.rates.learning_rates = (3e-5, 1e-4, 3e-4)
    config.rates.tasks = ("dev needle",)
    # What training never sees. The rate is chosen on other statements, and on other text, than `eval` reports.
    config.tasks.update(
        {
            "dev needle": _builtin.needles((1536,), per_length=32, seed=21),
            "needle 1K": _builtin.codes((1024,), per_length=96, seed=5),
            "needle 2K": _builtin.codes((2048,), per_length=64, seed=6),
            "needle 4K": _builtin.codes((4096,), per_length=32, seed=7),
            "indirect": _builtin.indirect((512,), per_length=96, seed=8),
            "context long": _builtin.facts((1024,), per_length=96, seed=9),
        }
    )
    needles = ("needle 1K", "needle 2K", "needle 4K", "indirect")
    config.eval.tasks = (*needles, "context short", "context long", "closed-book")
    config.eval.contrast = 0.5  # decode it or train it?
    config.suites.ruler.tasks = ("niah_single_1", "niah_single_2", "niah_multikey_1")
    config.suites.ruler.lengths, config.suites.ruler.n = (1024,), 48
    config.suites.ruler.essay = "builtin:essays"
    config.suites.lm_eval.tasks = ("common_knowledge",)  # the package's 120 questions; needs retmask_jax[eval]


def _headlines(config: ConfigDict) -> tuple[str, ...]:
    controls = ("none", "retrieval", "layer-matched", "any layer", "activity-matched")
    return (
        "detect/cases counted",
        "detect/heads",
        "detect/gini",
        *(f"detectors/needle short/{name} masked" for name in config.detectors.names),
        *(f"knockout/needle short/{kind}" for kind in controls),
        "knockout/context short/retrieval",
        "knockout/context short: from memory/retrieval",
        "knockout/closed-book/retrieval",
        "rope/needle short/highest minus lowest quarter",
        "rope/needle short/centre of mass of the windows",
        *(f"theta/needle short/factor {factor:g}" for factor in config.theta.factors),
        *(f"eval/{task}/{of}" for task in config.eval.tasks for of in ("start", "retmask minus start")),
        *(f"eval/text loss/{of}" for of in ("start", "retmask minus start")),
    )
