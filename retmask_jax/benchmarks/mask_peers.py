"""Sweeps of masks as others run them today: hooks on transformers, TransformerLens, nnsight.

Each returns the logits after the last token of every prompt under every mask {layer: heads}, one forward pass for each
mask, and unembeds no other position.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from retmask_jax.benchmarks.peers import load_peer, require

Tokens = Int[np.ndarray, "M T"]
Logits = Float32[np.ndarray, "N M V"]
HeadsByLayer = Mapping[int, Sequence[int]]


def hooked_sweep(model: Any, tokens_MT: Tokens, masks: Sequence[HeadsByLayer], one_by_one: bool = False) -> Logits:
    """By hooks on a model of transformers.

    Args:
        one_by_one: a forward pass for each prompt, as published scripts evaluate, instead of one for each mask.
    """
    torch = require("torch")
    tokens = torch.from_numpy(tokens_MT).long().to(model.device)
    parts = tokens.split(1) if one_by_one else [tokens]
    out = []
    with torch.no_grad():
        for heads_by_layer in masks:
            with hooked(model, heads_by_layer):
                logits = [model(part, use_cache=False, logits_to_keep=1).logits[:, 0].float() for part in parts]
            out.append(torch.cat(logits).cpu().numpy())
    return np.stack(out)


@contextlib.contextmanager
def hooked(model: Any, heads_by_layer: HeadsByLayer) -> Generator[None]:
    """Mask heads within a `with` block, by hooks that zero their columns before o_proj."""
    width = model.config.head_dim

    def zero(heads, module, inputs):
        masked = inputs[0].clone()
        for head in heads:
            masked[..., head * width : (head + 1) * width] = 0
        return (masked, *inputs[1:])

    handles = [
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(functools.partial(zero, heads))
        for layer, heads in heads_by_layer.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def transformer_lens_sweep(folder: Path, dtype: str) -> Callable[[Tokens, Sequence[HeadsByLayer]], Logits]:
    """By TransformerLens: `run_with_hooks` on the outputs of heads, `hook_z`."""
    torch, lens = require("torch"), require("transformer_lens")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    boot = lens.TransformerBridge.boot_transformers
    model = boot(str(folder), device=device, dtype=getattr(torch, dtype), hf_model=load_peer(folder, dtype))

    def zero(heads, z_BTHD, hook):
        z_BTHD[:, :, heads] = 0
        return z_BTHD

    def run(tokens_MT: Tokens, masks: Sequence[HeadsByLayer]) -> Logits:
        tokens = torch.from_numpy(tokens_MT).long().to(device)
        out = []
        with torch.no_grad():
            for heads_by_layer in masks:
                hooks = [
                    (f"blocks.{layer}.attn.hook_z", functools.partial(zero, list(heads)))
                    for layer, heads in heads_by_layer.items()
                ]
                logits = model.run_with_hooks(tokens, fwd_hooks=hooks, use_cache=False, logits_to_keep=1)
                out.append(logits[:, -1].float().cpu().numpy())
        return np.stack(out)

    return run


def nnsight_sweep(folder: Path, dtype: str) -> Callable[[Tokens, Sequence[HeadsByLayer]], Logits]:
    """By nnsight: a trace that sets columns of the input of o_proj to 0."""
    torch, nnsight = require("torch"), require("nnsight")
    peer = load_peer(folder, dtype)
    model = nnsight.NNsight(peer)
    width = peer.config.head_dim

    def run(tokens_MT: Tokens, masks: Sequence[HeadsByLayer]) -> Logits:
        tokens = torch.from_numpy(tokens_MT).long().to(peer.device)
        out = []
        with torch.no_grad():
            for heads_by_layer in masks:
                with model.trace(tokens, use_cache=False, logits_to_keep=1):
                    for layer, heads in heads_by_layer.items():
                        z_BTX = model.model.layers[layer].self_attn.o_proj.input
                        for head in heads:
                            z_BTX[..., head * width : (head + 1) * width] = 0
                    logits = model.lm_head.output.save()
                out.append(logits[:, -1].float().cpu().numpy())
        return np.stack(out)

    return run
