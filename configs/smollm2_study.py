"""Both studies of SmolLM2-135M-Instruct, in which few heads retrieve: what the heads do, and RetMask with its controls.

    make models
    retmask study --config=smollm2_study                # or one stage after the other: detect, detectors, knockout, ...
    retmask rates --config=smollm2_study                # after `retmask pairs`: which learning rate?
    retmask run --config=smollm2_study                  # RetMask: with the flags that `rates` prints

The settings, with their reasons, are in configs/_real.py; `--plan` says how long each stage takes here.
All weights are trained, of ten arms. The second seed of the paper's arms is a run of its own, on the same heads:

    mkdir runs/smollm2_study-1
    cp -r runs/smollm2_study/{config.json,detect,knockout,rope,measured} runs/smollm2_study-1
    retmask run --config=smollm2_study --config.train.seeds=1 --config.train.arms='("retmask", "any_layer", "layer_matched")' \
        --workdir=runs/smollm2_study-1

Hardware: two CPU cores of 64 GFLOP/s each: about two hours for the study, nine more for RetMask. On a GPU all of it is minutes.
"""

from ml_collections import ConfigDict
from retmask_jax.configs import _real


def get_config() -> ConfigDict:
    config = _real.real("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    config.train.arms = _real.ARMS
    config.train.lora_rank = 0
    config.train.learning_rate, config.train.final_learning_rate = 1e-5, 1e-6
    config.rates.learning_rates = (3e-6, 1e-5, 3e-5)
    return config
