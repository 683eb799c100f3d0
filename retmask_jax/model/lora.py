"""Low-rank adapters (LoRA, arXiv 2106.09685) by qwix: next to each dense kernel W lie A and B, for W + (alpha / rank) A B."""

import functools
from typing import cast

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from retmask_jax.model.config import Lora

SUFFIXES = _A, _B = "_lora_a", "_lora_b"  # of the name of a kernel: the names of its adapters


def with_adapters(module: nn.Module, lora: Lora) -> nn.Module:
    """The linen module with adapters in the dense layers that `lora` names."""
    import qwix

    where = f".*/({'|'.join(lora.targets)})"
    provider = qwix.LoraProvider(module_path=where, rank=lora.rank, alpha=lora.alpha)
    return cast(nn.Module, qwix.apply_lora_to_model(module, provider))


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """(adapters, the rest) of parameters with adapters, both nested dicts."""
    flat = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1].endswith((_A, _B))}
    return unflatten_dict(adapters), unflatten_dict({p: leaf for p, leaf in flat.items() if p not in adapters})


def join(*parts: PyTree) -> PyTree:
    """The inverse of `split`."""
    return unflatten_dict({path: leaf for part in parts for path, leaf in flatten_dict(part).items()})


def add(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, lora: Lora) -> np.ndarray:
    """The kernel with its adapters added on the host, in float32 or wider; this is what `save` writes."""
    wide = kernel.astype(jax.numpy.promote_types(kernel.dtype, np.float32))
    change = np.float32(lora.alpha / lora.rank) * (a.astype(np.float32) @ b.astype(np.float32))
    return np.add(wide, change, out=wide, where=change != 0)  # -0.0 keeps its sign


def merged(params: PyTree, lora: Lora) -> PyTree:
    """Parameters without adapters: each kernel with its adapters added, in float32 and back in the kernel's dtype.

    In bfloat16 this loses what is small compared with the kernel; `save` adds adapters to the weights as stored instead.
    """
    flat = flatten_dict(params)

    def add(path, kernel):
        a, b = (flat.get((*path[:-1], path[-1] + end)) for end in (_A, _B))
        return kernel if a is None else _add(kernel, a, b, lora.alpha / lora.rank)

    return unflatten_dict({p: add(p, leaf) for p, leaf in flat.items() if not p[-1].endswith((_A, _B))})


@functools.partial(jax.jit, static_argnums=3)
def _add(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    product = jax.numpy.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    added = (kernel.astype(product.dtype) + scale * product).astype(kernel.dtype)
    return jax.numpy.where(product == 0, kernel, added)
