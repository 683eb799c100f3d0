"""The whole method on the bundled tiny model, in under five minutes on two CPU cores.

    retmask run --config=tiny

Finds the heads that copy from context, masks them, masks rotary pairs in them, trains with RetMask on prompts without
labels, trains one control in the same way (rejected answers from random heads of equal activity), and compares.

    retmask pretrain --config=tiny --workdir=runs/pretrain

This makes the bundled model and its data files, in about 10 minutes on two cores.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.model = "bundled"
    config.cpu_devices = 8
    config.prompt.template = "{context} {question}"

    # The model was trained on up to 512 tokens: 128 is short, 640 is longer than anything it has seen.
    needles = {"needles": "bundled/test_needles.jsonl", "haystack": "bundled/test_text.txt", "max_new_tokens": 8}
    facts = needles | {"needles": "bundled/test_facts.jsonl", "max_new_tokens": 3}
    config.tasks = ConfigDict(
        {
            "detect": default.task(
                "bundled/detect_needles.jsonl",
                "bundled/detect_text.txt",
                lengths=(128, 256, 384),
                per_length=40,
                distractors=5,
                seed=1,
                max_new_tokens=8,
            ),
            "needle short": default.task(**needles, lengths=(128,), per_length=96, distractors=3, seed=2),
            "needle long": default.task(**needles, lengths=(640,), per_length=96, distractors=15, seed=3),
            "context short": default.task(**facts, lengths=(128,), per_length=96, distractors=3, seed=4),
            "context long": default.task(**facts, lengths=(512,), per_length=256, distractors=3, seed=5),
            "closed-book": default.task("bundled/closed_book.jsonl", max_new_tokens=3),
            "niah": default.task(
                **needles,
                lengths=(128, 256, 384, 512, 640),
                depths=(0.0, 0.25, 0.5, 0.75, 1.0),
                per_length=40,
                distractors=7,
                seed=6,
            ),
            # Three of RULER's tasks in the words that the model knows: one needle over lengths, one of four keys, and a
            # haystack of needles only (34 of 11 tokens and the question fill 384).
            "ruler single": default.task(**needles, lengths=(128, 256, 512), per_length=32, seed=7),
            "ruler multikey": default.task(**needles, lengths=(512,), per_length=96, distractors=3, seed=8),
            "ruler all needles": default.task(**needles, lengths=(384,), per_length=96, distractors=33, seed=9),
        }
    )
    config.text.file = "bundled/test_text.txt"
    config.text.length = 256
    config.text.windows = 32

    config.detect.max_new_tokens = 8
    config.knockout.tasks = ("needle short", "context short", "closed-book")
    config.arena.cases = 24
    config.budget.window, config.budget.length, config.budget.cases = 16, 128, 24
    config.rope.tasks = ("needle short",)
    config.rope.pairs = (2, 4, 8)

    config.pairs.prompts = "bundled/prompts.jsonl.gz"
    config.pairs.n_prompts = 320
    config.pairs.max_new_tokens = 8

    # At 3e-5 the model follows contexts more often and forgets nothing; at 1e-4 it forgets.
    config.train.arms = ("retmask", "activity_matched")
    config.train.learning_rate = 3e-5
    config.train.final_learning_rate = 3e-6
    config.train.steps = 60
    config.train.batch_size = 8
    config.train.microbatch_size = 8
    config.train.compute_dtype = "float32"  # bfloat16 is slower on a CPU
    config.train.remat = False
    config.train.widths = 1  # compiling takes longer than padding
    config.train.checkpoint_every = 20

    config.eval.tasks = (
        *("needle short", "needle long", "context short", "context long", "closed-book"),
        *("ruler single", "ruler multikey", "ruler all needles"),
    )
    config.eval.grids = ("niah",)

    config.headlines = (
        "detect/cases counted",
        "detect/heads",
        "detect/gini",
        "knockout/needle short/none",
        *(f"knockout/needle short/{kind}" for kind in ("retrieval", "layer-matched", "any layer", "activity-matched")),
        "knockout/idle heads",
        "knockout/context short: from memory/retrieval",
        "knockout/closed-book/retrieval",
        "rope/needle short/lowest 4 pairs",
        "rope/needle short/highest 4 pairs",
        "rope/needle short/highest minus lowest quarter",
        "eval/needle long/start",
        "eval/context long/start",
        "eval/context long/retmask",
        "eval/context long/retmask minus start",
        "eval/context long/activity_matched minus start",
        "eval/closed-book/retmask minus start",
        "eval/text loss/start",
        "eval/text loss/retmask minus start",
    )

    config.pretrain = _pretrain()
    return config


def _pretrain() -> ConfigDict:
    """The training of the bundled model, which grows in depth, heads and length.

    A copying circuit forms fast in two layers with four heads and many repeated sequences, and hardly at all in a model
    that has four layers from the start.
    """
    learn = {"repeats": 0.7, "needle": 0.2, "plain": 0.1}
    use = {"repeats": 0.5, "needle": 0.35, "plain": 0.15}
    broad = {"repeats": 0.12, "needle": 0.7, "plain": 0.18}
    settle = {"repeats": 0.1, "needle": 0.45, "plain": 0.45}
    # Contexts that contradict memory are rare until the last stage: their number decides how often the model follows
    # them.
    rare, some = 0.006, 0.3
    recipe = ConfigDict()
    recipe.seed = 0
    recipe.keep_every = 100  # a model is kept every so many steps, for `retmask dynamics`; 0: none
    recipe.model = ConfigDict(
        {
            "hidden_size": 128,
            "mlp_size": 256,
            "n_heads": 8,
            "n_kv_heads": 4,
            "head_dim": 32,
            "max_length": 1024,
            "rope_theta": 1e4,
        }
    )
    recipe.stages = (
        stage(2, 4, 4e-3, [phase(330, 72, 64, learn, needles=2)]),
        stage(2, 4, 4e-3, [phase(280, 72, 64, use, needles=2)]),
        stage(
            4,
            8,
            3e-3,
            [
                phase(120, 128, 32, broad, needles=4, questions=2, counterfactual=rare),
                phase(150, 256, 16, broad, needles=8, questions=4, counterfactual=rare, drop=0.1),
                phase(220, 512, 8, broad, needles=12, questions=6, counterfactual=rare, drop=0.1),
            ],
        ),
        stage(4, 8, 5e-4, [phase(140, 512, 8, settle, needles=12, questions=6, counterfactual=some, drop=0.3)]),
    )
    recipe.data = ConfigDict(
        {
            "seeds": {"detect": 101, "test": 102},
            "facts_seed": 103,
            "prompts_seed": 104,
            "needles": 128,
            "sentences": 2000,
            "prompts": 512,
            "prompt_lengths": (96, 248),
            "prompts_facts": 0.75,
        }
    )
    return recipe


def stage(layers: int, active_heads: int, lr: float, phases) -> ConfigDict:
    """One optimiser run on a model of so many layers, with only the first heads active."""
    return ConfigDict({"layers": layers, "active_heads": active_heads, "lr": lr, "phases": tuple(phases)})


def phase(steps, length, batch, mix, *, needles, questions=1, counterfactual=0.0, drop=0.0) -> ConfigDict:
    """Steps on batches of one shape; each head is dropped with probability `drop` per row."""
    mix = mix | {
        "most_needles": needles,
        "questions": questions,
        "counterfactual": counterfactual,
        "counterfactual_lengths": (64, length),
        "overrides": 4,
    }
    return ConfigDict({"steps": steps, "length": length, "batch": batch, "head_drop": drop, "mix": mix})
