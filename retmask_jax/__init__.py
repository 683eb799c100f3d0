"""Retrieval heads in JAX: find them, mask them, train against the masked model.

Everything a user calls is here, as `import retmask_jax as rm`. Names are loaded when first used, so that the command
line stays quick; type checkers and editors read the imports below instead.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retmask_jax.dpo import dpo_loss
    from retmask_jax.head_profile import profile
    from retmask_jax.head_scores import HeadScores
    from retmask_jax.lm import LanguageModel, from_params, load, save
    from retmask_jax.model.config import ModelConfig
    from retmask_jax.model.interventions import (
        Interventions,
        mask_heads,
        mask_queries,
        mask_rope,
        random_heads,
        rope_pairs,
        stack,
    )
    from retmask_jax.model.transformer import forward
    from retmask_jax.sequence import sequence_logprobs

__version__ = "0.2.0"

_HOME = {
    "load": "lm", "save": "lm", "LanguageModel": "lm", "from_params": "lm",
    "forward": "model.transformer", "ModelConfig": "model.config",
    "Interventions": "model.interventions", "mask_heads": "model.interventions", "mask_rope": "model.interventions",
    "mask_queries": "model.interventions",
    "random_heads": "model.interventions", "rope_pairs": "model.interventions", "stack": "model.interventions",
    "HeadScores": "head_scores", "profile": "head_profile",
    "sequence_logprobs": "sequence", "dpo_loss": "dpo",
}  # fmt: skip

__all__ = [
    "__version__", "load", "save", "LanguageModel", "from_params", "forward", "ModelConfig", "Interventions", "mask_heads",
    "mask_rope", "mask_queries", "random_heads", "rope_pairs", "stack", "HeadScores", "profile", "sequence_logprobs", "dpo_loss",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'retmask_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"retmask_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
