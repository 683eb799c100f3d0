"""Write tests/golden: small random Llama checkpoints, and what transformers computes with them.

    python tests/make_golden.py      # needs torch and transformers; the tests themselves do not

Each folder is a checkpoint as transformers saves it, and golden.npz: tokens i32[B,T], head_mask
bool[L,H], rope_mask bool[L,H,R], logits f32[B,T,V] under no mask, each mask alone and the rotary
mask at both sites (float32, eager attention, no padding), and the greedy continuation i32[B,12].
"""

import contextlib
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

FOLDER = Path(__file__).parent / "golden"
ROWS, LENGTH, NEW_TOKENS = 2, 24, 12
SHARD_SIZE = "40KB"
SEED = 60

_SHAPE = dict(
    vocab_size=61, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=96, rms_norm_eps=1e-5,
    initializer_range=0.25, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip

_MHA = dict(
    num_hidden_layers=3, num_key_value_heads=4, head_dim=6,
    rope_parameters=dict(rope_type="default", rope_theta=5e3),
)  # fmt: skip
_TIED = dict(head_dim=10, tie_word_embeddings=True)
# The last two store an architecture of the first ones otherwise: the tests compile it once.
VARIANTS = {
    "mha": _MHA,
    "gqa_tied": _TIED,
    "llama3_mqa": dict(num_key_value_heads=1, head_dim=16, rope_parameters=_LLAMA3),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    "sharded": _MHA,
    "bf16": _TIED,
}


def build(changes, seed: int) -> LlamaForCausalLM:
    """A random model whose norms differ from one another, so that none can be taken for another."""
    torch.manual_seed(seed)
    config = LlamaConfig(**_SHAPE | changes)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def load(folder: Path) -> LlamaForCausalLM:
    """A checkpoint in float32, with the attention that the masks below know how to reach."""
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def random_masks(config: LlamaConfig, rng: np.random.Generator):
    """(bool[L,H], bool[L,H,R]): a third of the heads; about half the pairs of half the heads."""
    shape = (config.num_hidden_layers, config.num_attention_heads)
    order_LH, other_LH = (rng.permutation(np.prod(shape)).reshape(shape) for _ in range(2))
    pairs_LHR = rng.random((*shape, config.head_dim // 2)) < 1 / 2
    return order_LH < order_LH.size / 3, pairs_LHR & (other_LH < other_LH.size / 2)[..., None]


def torch_logits(model, tokens, head_mask=None, rope_mask=None, rope_site="rotary") -> np.ndarray:
    """f32[B,T,V] of the model with masks put in by hooks."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if head_mask is not None:
            _mask_heads(stack, model, torch.tensor(head_mask))
        if rope_mask is not None:
            sites = {"rotary": _mask_rotated_queries, "projection": _mask_projections}
            sites[rope_site](stack, model, torch.tensor(rope_mask))
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def torch_greedy(model, tokens) -> np.ndarray:
    """i32[B,12]; refuses a model that nearly ties, where rounding would decide."""
    tokens = torch.tensor(tokens, dtype=torch.long)
    model.generation_config.eos_token_id = None
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    logits = torch_logits(model, out.numpy())[:, LENGTH - 1 : -1]
    ordered = np.sort(logits, axis=-1)
    lead = (ordered[..., -1] - ordered[..., -2]).min()
    assert lead > 1e-3 * np.abs(logits).max(), "two tokens nearly tie: choose another seed"
    return out[:, LENGTH:].numpy().astype(np.int32)


def _mask_heads(stack, model, head_mask):
    for layer, block in enumerate(model.model.layers):
        kept = (~head_mask[layer]).repeat_interleave(model.config.head_dim)
        o_proj = block.self_attn.o_proj
        hook = o_proj.register_forward_pre_hook(lambda _, args, kept=kept: (args[0] * kept,))
        stack.callback(hook.remove)


def _mask_rotated_queries(stack, model, rope_mask):
    """One head's query loses the pair after rotation; its group's key keeps it."""
    eager = modeling_llama.eager_attention_forward

    def masked(module, query, *args, **kwargs):
        kept_HD = ~_dims(rope_mask[module.layer_idx])
        return eager(module, query * kept_HD[None, :, None], *args, **kwargs)

    stack.enter_context(mock.patch.object(modeling_llama, "eager_attention_forward", masked))


def _mask_projections(stack, model, rope_mask):
    """A KV head loses the pair when any query head of its group names it."""
    for layer, block in enumerate(model.model.layers):
        attention = block.self_attn
        groups = rope_mask[layer].reshape(model.config.num_key_value_heads, -1, rope_mask.shape[-1])
        for linear, pairs in (
            (attention.q_proj, rope_mask[layer]),
            (attention.k_proj, groups.any(dim=1)),
        ):
            kept = ~_dims(pairs).flatten()
            hook = linear.register_forward_hook(lambda _, __, out, kept=kept: out * kept)
            stack.callback(hook.remove)


def _dims(pairs):
    """Rotary pair r is the dimensions r and r + R."""
    return torch.cat([pairs, pairs], dim=-1)


def _write(name: str, changes, seed: int) -> None:
    model = build(changes, seed).to(torch.bfloat16 if name == "bf16" else torch.float32)
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE if name == "sharded" else "1GB")
    # Read back: a cast to bfloat16 and back would leave the rotary frequencies rounded too.
    model = load(folder)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    head_mask, rope_mask = random_masks(model.config, rng)
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens,
        head_mask=head_mask,
        rope_mask=rope_mask,
        logits=torch_logits(model, tokens),
        logits_heads=torch_logits(model, tokens, head_mask),
        logits_rotary=torch_logits(model, tokens, rope_mask=rope_mask),
        logits_projection=torch_logits(model, tokens, rope_mask=rope_mask, rope_site="projection"),
        greedy=torch_greedy(model, tokens),
    )


if __name__ == "__main__":
    for seed, (name, changes) in enumerate(VARIANTS.items(), start=SEED):
        _write(name, changes, seed)
