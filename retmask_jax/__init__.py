"""Retrieval heads in JAX: find them, mask them, train against the masked model.

Everything a user calls is here, as `import retmask_jax as rm`. Names are loaded when first used, so that the command
line stays quick; type checkers and editors read the imports below instead.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retmask_jax.generation.language_model import LanguageModel, from_params, load, save
    from retmask_jax.generation.logprobs import sequence_logprobs
    from retmask_jax.heads.builtin_cases import find_heads, needle_recall
    from retmask_jax.heads.lists.formats import read_heads, write_heads
    from retmask_jax.heads.profile import profile
    from retmask_jax.heads.scores import HeadScores
    from retmask_jax.model.config import ModelConfig
    from retmask_jax.model.interventions import (
        Interventions,
        mask_heads,
        mask_queries,
        mask_rope,
        random_heads,
        stack,
        stream_heads,
    )
    from retmask_jax.model.rope import rope_pairs
    from retmask_jax.model.transformer import forward
    from retmask_jax.reports.looking.view import look
    from retmask_jax.training.losses import dpo_loss

__version__ = "0.2.0"

_HOME = {
    "load": "generation.language_model",
    "save": "generation.language_model",
    "LanguageModel": "generation.language_model",
    "from_params": "generation.language_model",
    "forward": "model.transformer",
    "ModelConfig": "model.config",
    "Interventions": "model.interventions",
    "mask_heads": "model.interventions",
    "mask_rope": "model.interventions",
    "mask_queries": "model.interventions",
    "random_heads": "model.interventions",
    "rope_pairs": "model.rope",
    "stack": "model.interventions",
    "stream_heads": "model.interventions",
    "HeadScores": "heads.scores",
    "read_heads": "heads.lists.formats",
    "write_heads": "heads.lists.formats",
    "find_heads": "heads.builtin_cases",
    "needle_recall": "heads.builtin_cases",
    "profile": "heads.profile",
    "look": "reports.looking.view",
    "sequence_logprobs": "generation.logprobs",
    "dpo_loss": "training.losses",
}

__all__ = [
    "__version__",
    "load",
    "save",
    "LanguageModel",
    "from_params",
    "forward",
    "ModelConfig",
    "Interventions",
    "mask_heads",
    "mask_rope",
    "mask_queries",
    "random_heads",
    "rope_pairs",
    "stack",
    "stream_heads",
    "HeadScores",
    "read_heads",
    "write_heads",
    "find_heads",
    "needle_recall",
    "profile",
    "look",
    "sequence_logprobs",
    "dpo_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'retmask_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"retmask_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
