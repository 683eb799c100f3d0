"""Retrieval heads in JAX: find them, mask them, train against the masked model.

Everything a user calls is here, as `import retmask_jax as rm`. Names are loaded when first used, so that the command
line stays quick.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "load": "lm", "save": "lm", "LanguageModel": "lm", "from_params": "lm",
    "forward": "model.transformer", "ModelConfig": "model.config",
    "Interventions": "model.interventions", "mask_heads": "model.interventions", "mask_rope": "model.interventions",
    "mask_queries": "model.interventions",
    "random_heads": "model.interventions", "rope_pairs": "model.interventions", "stack": "model.interventions",
    "HeadScores": "head_scores", "profile": "head_profile",
    "sequence_logprobs": "sequence", "dpo_loss": "dpo",
}  # fmt: skip

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'retmask_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"retmask_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
