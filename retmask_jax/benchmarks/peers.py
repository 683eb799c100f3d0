"""What others run today, on Hugging Face transformers and torch: detection, masks by hooks, generation.

torch is imported by what needs it, so that the package works without.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from retmask_jax.benchmarks.harness import cores


def require(name: str) -> ModuleType:
    """A package of the extra `bench`; ValueError if it is not installed. torch uses all cores."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported ({error}): install retmask_jax[bench]") from error
    if name == "torch":
        module.set_num_threads(cores())
    return module


def load_peer(folder: Path, dtype: str, attention: str = "sdpa"):
    """The transformers model of a checkpoint, on the GPU where torch has one."""
    torch, transformers = require("torch"), require("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=False
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@dataclasses.dataclass(frozen=True)
class Looked:
    """tokens: i64[N] decoded; argmax: i64[N,L,H], keys looked at most; copied: tokens each head copied, [L][H][...];
    weights: attention to all keys, [N][L][H,S], if kept."""

    tokens: np.ndarray
    argmax: np.ndarray
    copied: list[list[list[int]]]
    weights: list


def published_detection(
    model,
    prompt: Sequence[int],
    span: tuple[int, int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    fixed: Sequence[int] | None = None,
    keep_weights: bool = False,
) -> Looked:
    """One case by the published detector (arXiv 2404.15574): prefill, then greedy steps that return attention weights.

    Each step's weights are searched layer by layer and head by head; a head that looks most at a position of the span
    [start, end) and finds the step's token there copies it. The prompt goes through a fused kernel, as published.
    stop_ids end the decoding. fixed: tokens to decode whatever the model prefers.
    """
    torch, transformers = require("torch"), require("transformers")
    start, end = span
    prompt_ids = torch.tensor([prompt], device=model.device)
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    tokens, argmax, weights = [], [], []
    copied: list[list[list[int]]] = [[[] for _ in range(n_heads)] for _ in range(n_layers)]
    with torch.no_grad():
        cache = transformers.DynamicCache()
        model.set_attn_implementation("sdpa")
        model(prompt_ids[:, :-1], None, None, cache, use_cache=True, logits_to_keep=1)
        model.set_attn_implementation("eager")
        step_ids = prompt_ids[:, -1:]
        for step in range(max_new_tokens if fixed is None else len(fixed)):
            out = model(step_ids, None, None, cache, use_cache=True, output_attentions=True)
            step_ids = out.logits[0, -1].argmax() if fixed is None else torch.tensor(fixed[step], device=model.device)
            token = step_ids.item()
            if token in stop_ids:
                break
            keys_LH = np.zeros((n_layers, n_heads), np.int64)
            for layer in range(n_layers):
                for head in range(n_heads):
                    for key in out.attentions[layer][0][head][-1].topk(1).indices:
                        if start <= key < end and token == prompt_ids[0, key].item():
                            copied[layer][head].append(token)
                        keys_LH[layer, head] = key
            tokens.append(token)
            argmax.append(keys_LH)
            if keep_weights:
                weights.append([layer[0, :, -1].float().cpu().numpy() for layer in out.attentions])
            step_ids = step_ids.view(1, 1)
    return Looked(np.array(tokens), np.array(argmax), copied, weights)


@contextlib.contextmanager
def hooked(model, heads_by_layer: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Hooks before o_proj that zero the columns of masked heads."""
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


def hooked_sweep(
    model, tokens_MT: np.ndarray, masks: Sequence[Mapping[int, Sequence[int]]], one_by_one: bool = False
) -> np.ndarray:
    """f32[N,M,V]: last-position logits of the prompts under each mask {layer: heads}, one batch a mask.

    one_by_one: a forward pass for each prompt, as published scripts evaluate.
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


def generate(model, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int) -> np.ndarray:
    """i64[B,N]: greedy continuations of left-padded prompts by transformers' generate, which no token stops."""
    torch = require("torch")
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad_id)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt)
    seen = torch.arange(width) >= torch.tensor([[width - len(prompt)] for prompt in prompts])
    # Without an EOS id neither side stops, and no logit has to be suppressed.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(
            tokens.to(model.device),
            attention_mask=seen.long().to(model.device),
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            pad_token_id=pad_id,
        )
    return out[:, width:].cpu().numpy()


def next_logits(model, tokens: Sequence[int]) -> np.ndarray:
    """f32[V]: logits of the token after `tokens`."""
    torch = require("torch")
    with torch.no_grad():
        ids = torch.tensor([list(tokens)], device=model.device)
        return model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu().numpy()
