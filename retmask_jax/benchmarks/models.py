"""The models of the benchmarks: the bundled one, checkpoints of random weights in two shapes, and any model by its name."""

import concurrent.futures
import contextlib
import dataclasses
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from retmask_jax.benchmarks.harness import cores
from retmask_jax.data.builtin_files import haystack, path_of
from retmask_jax.data.needles import read_sentences
from retmask_jax.data.prompter import Prompter
from retmask_jax.generation.language_model import from_params, load, save
from retmask_jax.hf.checkpoint_files import read_config
from retmask_jax.hf.families import from_hf
from retmask_jax.hf.hub import BUNDLED, resolve
from retmask_jax.hf.tokenizer import load_tokenizer
from retmask_jax.model.config import ModelConfig, Rope
from retmask_jax.model.sharding import make_mesh, param_shapes
from retmask_jax.runs import recipes

_SPREAD = 0.02  # standard deviation of random weights, transformers' initializer_range
_PART = 2**22  # numbers drawn at a time

_SHAPES = {
    "30m": ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        mlp_size=1408,
        n_layers=8,
        n_heads=8,
        n_kv_heads=4,
        head_dim=64,
        max_length=2**17,
        rope=Rope(theta=5e5),
    ),
    # Llama-3.1-8B
    "8b": ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        mlp_size=14336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        max_length=2**17,
        rope=Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192),
    ),
}
DTYPES = {"bundled": "float32", "30m": "float32", "8b": "bfloat16"}
OWN = "own"  # a model that was named, instead of one of these sizes


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model of a benchmark, as both sides load it.

    Attributes:
        size: "bundled", "30m", "8b" or OWN.
        name: In tables.
        folder: A checkpoint of Hugging Face.
        dtype: Of parameters and computation.
    """

    size: str
    name: str
    folder: Path
    dtype: str

    @property
    def tolerance(self) -> float:
        """The largest difference between two sides' logits that rounding explains, as a share of the largest logit."""
        return 1e-4 if self.dtype == "float32" else 3e-2

    def setting(self, length: int, config: ModelConfig) -> dict[str, Any]:
        """The part of a report's settings that says which model ran on how many tokens."""
        return {"size": self.name, "dtype": self.dtype, "length": length, "layers": config.n_layers}


def shape(size: str, **changes: Any) -> ModelConfig:
    """The config of a random model. changes: other values of its fields; None leaves a field as it is."""
    return dataclasses.replace(_SHAPES[size], **{name: value for name, value in changes.items() if value is not None})


@contextlib.contextmanager
def subject(size: str, model: str | None = None, **changes: Any) -> Generator[Subject]:
    """The model of a benchmark, for a `with` block; a folder that is made for it is removed after it.

    Args:
        size: Of the model, unless one is named.
        model: A folder, hub id or .gguf file, whose weights are then written out for both sides.
        changes: As in `shape`.
    """
    if (size == "bundled" or model) and any(value is not None for value in changes.values()):
        raise ValueError(f"{model or 'the bundled model'} is what it is: --layers needs --size=30m or 8b")
    if model is None and size == "bundled":
        yield Subject(size, size, BUNDLED, DTYPES[size])
        return
    found = resolve(model) if model else None
    dtype = DTYPES[size] if found is None else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if model is not None and found is not None and found.is_dir():
        yield Subject(OWN, Path(model).name if Path(model).is_dir() else model, found, dtype)
        return
    with tempfile.TemporaryDirectory(prefix="retmask-bench-") as made:
        folder = Path(made)
        if found is None:
            write_random(shape(size, **changes), folder, dtype)
            yield Subject(size, size, folder, dtype)
        else:
            save(load(found, dtype), folder)
            yield Subject(OWN, found.stem, folder, dtype)


def read_shape(folder: Path) -> ModelConfig:
    """The model config of a checkpoint."""
    return from_hf(read_config(folder))


def mesh(devices: int | None = None) -> Mesh:
    """A data mesh of so many devices. None: as a peer uses them, one accelerator or all cores of a CPU."""
    if devices is None:
        devices = jax.device_count() if jax.default_backend() == "cpu" else 1
    return make_mesh({"data": devices, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])


def write_random(config: ModelConfig, folder: Path, dtype: str) -> None:
    """Write a checkpoint of weights drawn from a normal distribution; norm scales are one."""
    flat, tree = jax.tree.flatten_with_path(param_shapes(config), is_leaf=lambda x: hasattr(x, "unbox"))
    rng = np.random.default_rng(0)
    leaves = [_draw(rng, path, boxed.unbox(), dtype) for path, boxed in flat]
    save(from_params(config, jax.tree.unflatten(tree, leaves)), folder)


def random_tokens(vocab_size: int, *shape: int, seed: int = 0) -> Int32[np.ndarray, "..."]:
    """Random tokens in an array of this shape; never the first 16 ids, where special tokens are."""
    return np.random.default_rng(seed).integers(16, vocab_size, shape, dtype=np.int32)


def bundled_prompter() -> Prompter:
    """The prompter of the tiny recipe on the bundled model."""
    section = recipes.load_recipe("tiny").prompt
    return Prompter(load_tokenizer(BUNDLED), section.template, section.chat, section.template_kwargs.to_dict())


def text_or_random(subject: Subject, n: int, length: int) -> Int32[np.ndarray, "n length"]:
    """Windows of a text that the model knows how to read; random tokens for a model that has no tokenizer."""
    tokenizer: Any = load_tokenizer(subject.folder) if subject.size in ("bundled", OWN) else None
    if tokenizer is None:
        return random_tokens(read_shape(subject.folder).vocab_size, n, length)
    bundled = subject.size == "bundled"
    sentences = read_sentences(path_of("bundled/test_text.txt")) if bundled else haystack("builtin:essays", (length,))
    ids = tokenizer(" ".join(sentences), add_special_tokens=False)["input_ids"]
    starts = np.linspace(0, len(ids) - length, n).astype(int)
    return np.array([ids[start : start + length] for start in starts], np.int32)


def _draw(rng: np.random.Generator, path: tuple[Any, ...], leaf: Any, dtype: str) -> jax.Array:
    if path[-1].key == "scale":
        return jnp.ones(leaf.shape, dtype)
    return jnp.asarray(_normal(rng, leaf.shape), dtype)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """f32[shape], drawn by all cores in parts of one size, so that every machine draws the same numbers."""
    out = np.empty(shape, np.float32)
    parts = [out.reshape(-1)[at : at + _PART] for at in range(0, out.size, _PART)]

    def draw(rng, part):
        rng.standard_normal(out=part, dtype=np.float32)
        part *= _SPREAD

    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        list(pool.map(draw, rng.spawn(len(parts)), parts))
    return out
