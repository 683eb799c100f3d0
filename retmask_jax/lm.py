"""LanguageModel: configuration, parameters and tokenizer of one model, loaded from and saved to HF checkpoints."""

import dataclasses
import functools
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax import hub, weights
from retmask_jax.generate import Generated, generate
from retmask_jax.hosts import primary
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.transformer import check_tokens, forward
from retmask_jax.sharding import mesh_of

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_KEPT_SUFFIXES = (".json", ".jinja", ".model", ".txt")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model ready to use: config, params (a pytree) and tokenizer (None where the folder has none)."""

    config: ModelConfig
    params: Any
    tokenizer: Any
    source: weights.Source

    def logits(self, tokens, lengths=None, interventions=None, positions=None):
        """f32[B,T,V] next-token logits of right-padded tokens i32[B,T], or f32[B,P,V] at positions i32[B,P].

        Jitted: one program per shape, whatever the mask. Errors as in `forward`.
        """
        tokens = check_tokens(self.config, tokens, lengths)
        filled = (interventions or Interventions()).fill(self.config, tokens.shape[0])
        lengths = lengths if self.config.depends_on_length else None  # else they change nothing but the program
        with mesh_of(self.params):
            return _logits(self.config, self.params, tokens, lengths, filled, positions)

    def generate(self, tokens, lengths, max_new_tokens, temperature=0.0, top_p=1.0, seed=0, interventions=None,
                 stop_ids=None) -> Generated:  # fmt: skip
        """Continue right-padded prompts i32[B,T] of the given lengths i32[B]; see `retmask_jax.generate.generate`."""
        return generate(
            self.config, self.params, tokens, lengths, max_new_tokens=max_new_tokens, temperature=temperature,
            top_p=top_p, seed=seed, interventions=interventions, stop_ids=stop_ids,
        )  # fmt: skip

    def with_kernel(self, kernel: str) -> "LanguageModel":
        """The same model with another attention kernel ("auto", "plain", "blocked", "cudnn" or "splash")."""
        return self.replace(config=dataclasses.replace(self.config, kernel=kernel))

    def replace(self, **changes) -> "LanguageModel":
        """A copy with other params (or any other field)."""
        return dataclasses.replace(self, **changes)


def load(path_or_hub_id: str | os.PathLike, dtype: str = "float32", mesh=None, *, revision: str | None = None,
         token: str | bool | None = None, cache_dir: str | os.PathLike | None = None) -> LanguageModel:  # fmt: skip
    """Load an HF checkpoint: a local folder, a hub id such as "meta-llama/Llama-3.2-1B", or "bundled".

    dtype is that of the parameters and the computation; mesh places the parameters by the sharding rules; revision,
    token and cache_dir are for a hub id, see `retmask_jax.hub.resolve`. Raises ValueError in one line for a missing
    folder, a model the hub does not give out, an unsupported model or a damaged file.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    folder = hub.resolve(path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir)
    config, params, source = weights.read(folder, dtype, mesh)
    return LanguageModel(config, params, load_tokenizer(folder), source)


def save(lm: LanguageModel, folder: str | os.PathLike, interventions: Interventions | None = None,
         dtype: str | None = None) -> None:  # fmt: skip
    """Write an HF checkpoint that transformers and other tools load.

    dtype None keeps each tensor's stored dtype, so an untouched model saves back bit for bit. A shared bool head_mask
    is baked in (its columns of o_proj are zero); float, per-row and rotary masks cannot be and raise ValueError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    folder = Path(folder)
    weights.write(folder, lm.config, lm.params, lm.source, _bakeable(lm.config, interventions), dtype)
    if not primary():
        return
    if lm.source.folder is not None:
        for path in sorted(Path(lm.source.folder).iterdir()):
            ours = path.name == "config.json" or path.name.endswith(".safetensors.index.json")
            if path.suffix in _KEPT_SUFFIXES and not ours and path.resolve() != (folder / path.name).resolve():
                shutil.copyfile(path, folder / path.name)
    elif lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)


def from_params(config: ModelConfig, params, tokenizer=None) -> LanguageModel:
    """A LanguageModel around parameters made here; `save` writes it in the format of a family that can express
    it, see `families.to_hf`."""
    return LanguageModel(config, params, tokenizer, weights.Source(None, {}))


def load_tokenizer(folder: Path):
    """The folder's tokenizer, or None if it has none."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    return _auto_tokenizer().from_pretrained(folder, local_files_only=True)


def _auto_tokenizer():
    """transformers' class, imported without its advice to install torch, which is not needed here."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[quiet]
    return AutoTokenizer


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, lengths, interventions, positions):
    return forward(config, params, tokens, lengths, interventions=interventions, positions=positions)


def _bakeable(config: ModelConfig, interventions: Interventions | None):
    """The shared bool head mask of interventions as an array, or None; ValueError for what weights cannot express."""
    if interventions is None:
        return None
    iv = interventions.fill(config)
    if iv.head_mask.dtype != jnp.bool_ or iv.head_mask.ndim != 2:
        raise ValueError(
            f"only a shared bool head_mask can be baked into weights, this is {iv.head_mask.dtype}{iv.head_mask.shape}"
        )
    if bool(jnp.any(iv.rope_mask != 0)):
        raise ValueError("a rotary mask cannot be baked into weights: save without it and apply it at run time")
    if iv.head_mean is not None:
        raise ValueError("a head's mean cannot be baked into weights: save without it and apply it at run time")
    return np.asarray(iv.head_mask)
