"""What the recipes of small models of different architecture share. It is not a recipe.

All use the tasks, data files and case seeds of this module, so that their cases are paired: the same questions for
models that learned the same language and the same facts by the same stages. Only the share of contradictions in the
last stage differs. It was chosen on seed 0: at 0.3 the models shaped as Llama, Qwen3 and OLMo-3 followed the longest
contexts in .89, .99 and .81 of the cases, at 0.2 the first in .81, at 0.12 the second in .69. For the other seed it was
not tuned.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import tiny, tiny_study


def member(name: str, contradictions: float, **architecture) -> ConfigDict:
    """The tiny recipe for a model trained on up to 256 tokens.

    contradictions: share of the last stage's rows that contradict memory. It decides how often the model follows them,
    and is chosen so that training can still raise it. architecture: fields of the ModelConfig.
    """
    config = tiny_study.study(tiny.get_config())
    config.model = f"runs/{name}-0/tiny"
    lengths = {
        "detect": (96, 160, 224),
        "needle short": (128,),
        "needle long": (320,),
        "context short": (128,),
        "context long": (256,),
        "niah": (64, 128, 192, 256, 320),
    }
    for task, values in lengths.items():
        config.tasks[task].lengths = values
    config.tasks["needle long"].distractors = 7
    config.rope.pairs = ()  # an eighth, a quarter and a half, since heads differ in width between models
    config.train.arms = ("retmask",)
    config.eval.grids = ()
    config.eval.tasks = tuple(task for task in config.eval.tasks if not task.startswith("ruler"))
    for task in [task for task in config.tasks if task.startswith("ruler")]:
        del config.tasks[task]
    config.headlines = tuple(name for name in config.headlines if not name.startswith("rope/")) + (
        "rope/needle short/highest minus lowest quarter",
        "rope/needle short/centre of mass of the windows",
        "eval/context long/start",
        "eval/context long/retmask minus start",
    )
    config.pretrain.model.max_length = 512
    config.pretrain.model.update(architecture)
    config.pretrain.stages = _stages(contradictions)
    return config


def _stages(contradictions: float) -> tuple[ConfigDict, ...]:
    """The stages of the tiny recipe with shorter texts."""
    learn = {"repeats": 0.7, "needle": 0.2, "plain": 0.1}
    use = {"repeats": 0.5, "needle": 0.35, "plain": 0.15}
    broad = {"repeats": 0.12, "needle": 0.7, "plain": 0.18}
    settle = {"repeats": 0.1, "needle": 0.45, "plain": 0.45}
    rare = 0.006
    return (
        tiny.stage(2, 4, 4e-3, [tiny.phase(300, 72, 64, learn, needles=2)]),
        tiny.stage(2, 4, 4e-3, [tiny.phase(250, 72, 64, use, needles=2)]),
        tiny.stage(
            4,
            8,
            3e-3,
            [
                tiny.phase(100, 128, 32, broad, needles=4, questions=2, counterfactual=rare),
                tiny.phase(250, 256, 16, broad, needles=8, questions=4, counterfactual=rare, drop=0.1),
            ],
        ),
        tiny.stage(
            4,
            8,
            5e-4,
            [tiny.phase(100, 256, 16, settle, needles=8, questions=4, counterfactual=contradictions, drop=0.3)],
        ),
    )
