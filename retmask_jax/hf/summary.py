"""Facts of a model, read from its config.json or GGUF file: shapes, RoPE, size in memory. No weight is loaded."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from retmask_jax.hf import end_tokens
from retmask_jax.hf.checkpoint_files import config_name, read_config
from retmask_jax.hf.families import from_hf, report_ignored
from retmask_jax.hf.gguf.file import is_gguf, open_file
from retmask_jax.hf.tokenizer import has_chat_template, has_tokenizer, load_tokenizer
from retmask_jax.hf.wrappers import WRAPPERS, text_config
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.rope import inverse_frequencies
from retmask_jax.model.sharding import plain_shapes

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")


def describe(folder: Path, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the facts of a model as JSON values; sizes are in bytes, wavelengths in tokens.

    stop_ids lists every id that ends an answer, with its token and who names it; row_end is the id that ends a finished
    answer in a training row, unless another was sampled there. wrapper is the model type of what the model is a part of.

    Args:
        ignore: As for `from_hf`.

    Raises:
        ValueError: config.json is missing, names an unsupported family or is not understood.
    """
    hf_config = read_config(folder)
    config = from_hf(hf_config, ignore)
    report_ignored(folder, tuple(ignore))
    total, active = count_parameters(config)
    return {
        "family": text_config(hf_config)["model_type"],
        "wrapper": hf_config["model_type"] if hf_config["model_type"] in WRAPPERS else None,
        "layers": config.n_layers,
        "layer_pattern": list(config.layer_pattern),
        "repeats": config.repeats,
        "tail": list(config.tail),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "query_heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_width": config.head_dim,
        "rotary_pairs": config.n_pairs,
        "context": config.max_length,
        "window": config.window,
        "rope": {kind: _rope(config, kind) for kind in config.ropes},
        "layers_without_rope": list(config.layers_without_rope),
        "norm_placement": config.norm_placement,
        "qk_norm": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "scales": {
            "embeddings": config.embed_scale,
            "scores": config.query_scale,
            "residual": config.residual_scale,
            "logits": config.logit_scale,
        },
        "attention_softcap": config.attention_softcap,
        "logit_softcap": config.logit_softcap,
        "tied_embeddings": config.tied_embeddings,
        "mlp_size": config.mlp_size,
        "expert_layers": sum(config.has_experts(layer) for layer in range(config.n_layers)),
        "experts": config.n_experts,
        "experts_per_token": config.experts_per_token,
        "expert_size": config.expert_size,
        "parameters": total,
        "active_parameters": active,
        "parameter_bytes": {dtype: total * jnp.dtype(dtype).itemsize for dtype in DTYPES},
        "kv_cache_bytes": {
            tokens: kv_cache_bytes(config, tokens)
            for tokens in sorted({min(1024, config.max_length), config.max_length})
        },
        "tokenizer": has_tokenizer(folder),
        "chat_template": has_chat_template(folder),
        "gguf": _gguf(folder),
    } | _ends(folder, config)


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Returns the numbers of all parameters and of the active ones, those of the experts that a token is not sent to
    left out. Tied embeddings count once."""
    shapes: dict[tuple[str, ...], Any] = flatten_dict(plain_shapes(config))
    sizes = {path: leaf.size for path, leaf in shapes.items()}
    total = sum(sizes.values())
    routed = sum(size for path, size in sizes.items() if "experts" in path and "router" not in path)
    idle = routed // max(config.n_experts, 1) * (config.n_experts - config.experts_per_token)
    return total, total - idle


def kv_cache_bytes(config: ModelConfig, tokens: int, dtype: str = "bfloat16") -> int:
    """Returns the bytes of keys and values of a row of so many tokens; a sliding layer stores those in its window
    only."""
    kinds = itertools.islice(itertools.cycle(config.layer_pattern), config.n_layers)
    kept = sum(min(tokens, config.window or tokens) if kind == "sliding" else tokens for kind in kinds)
    return 2 * kept * config.n_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the facts of `describe` as lines of a table, (name, text)."""
    windowed = "sliding" in facts["layer_pattern"]
    caps = {"scores": facts["attention_softcap"], "logits": facts["logit_softcap"]}
    return [
        ("family", facts["family"] + (f", the text part of {facts['wrapper']}" if facts["wrapper"] else "")),
        ("layers", _layers(facts)),
        ("width", f"{facts['hidden_size']:,}, vocabulary {facts['vocab_size']:,}, {_tied(facts)}"),
        ("query heads", f"{facts['query_heads']} per layer, {facts['layers'] * facts['query_heads']:,} in all"),
        ("KV heads", f"{facts['kv_heads']} per layer, {_shared(facts['query_heads'] // facts['kv_heads'])}"),
        ("head width", _head_width(facts)),
        ("rotary pairs", str(facts["rotary_pairs"])),
        ("context", f"{facts['context']:,} tokens"),
        ("window", f"{facts['window']:,} tokens in sliding layers" if windowed else "none"),
        *_rope_rows(facts["rope"]),
        *_without_rope(facts),
        ("norms", _NORMS[facts["norm_placement"]]),
        ("q/k norm", _QK_NORMS[facts["qk_norm"]]),
        ("q/k/v bias", "yes" if facts["qkv_bias"] else "none"),
        ("scales", ", ".join(f"{name} by {x:g}" for name, x in facts["scales"].items() if x) or "none"),
        ("soft caps", ", ".join(f"{name} at {cap:g}" for name, cap in caps.items() if cap) or "none"),
        *_mlp_rows(facts),
        ("parameters", f"{facts['parameters']:,}"),
        *([("  active per token", f"{facts['active_parameters']:,}")] if facts["experts"] else []),
        *((f"  in {dtype}", _memory(n)) for dtype, n in facts["parameter_bytes"].items()),
        *_gguf_rows(facts["gguf"]),
        ("KV cache of a row", "in bfloat16" + ", at most the window's tokens in a sliding layer" * windowed),
        *((f"  {int(tokens):,} tokens", _memory(n)) for tokens, n in facts["kv_cache_bytes"].items()),
        ("tokenizer", "present" if facts["tokenizer"] else "absent: give token ids yourself"),
        ("chat template", "present" if facts["chat_template"] else "absent: set prompt.chat=False"),
        ("stop ids", _STOPS_SHOWN if facts["stop_ids"] else "none: answers end at the token limit only"),
        *((f"  {stop['id']}", _named(stop)) for stop in facts["stop_ids"]),
        ("end of a row", _row_end(facts["row_end"])),
    ]


_NORMS = {
    "pre": "RMS, before attention and MLP",
    "post": "RMS, after attention and MLP",
    "both": "RMS, before and after attention and MLP",
}
_QK_NORMS = {None: "none", "head": "RMS, over each head", "projection": "RMS, over all heads at once"}


_STOPS_SHOWN = "any of these ends an answer (who names it)"


def _ends(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """What ends the model's answers, and what ends the answers that it is trained on."""
    tokenizer = _readable_tokenizer(folder)
    named = {config_name(folder): config.eos_ids} | end_tokens.named_stops(folder, tokenizer)
    ids = end_tokens.union(*named.values())
    stops = [
        {
            "id": i,
            "token": None if tokenizer is None else tokenizer.convert_ids_to_tokens(i),
            "from": [source for source, its in named.items() if i in its],
        }
        for i in ids
    ]
    usual = None if tokenizer is None else end_tokens.Ends.of(tokenizer, ids, chat=True).usual
    return {"stop_ids": stops, "row_end": next((stop for stop in stops if stop["id"] == usual), None)}


def _gguf(folder: Path) -> dict[str, Any] | None:
    """The name that a GGUF file gives its model, and its types of tensors, that with the most bytes first; else None."""
    if not is_gguf(folder):
        return None
    file = open_file(folder)
    sizes: dict[str, list[int]] = {}
    for block in file.blocks.values():
        sizes.setdefault(block.kind, []).append(block.n_bytes)
    types = [{"type": kind, "tensors": len(parts), "bytes": sum(parts)} for kind, parts in sizes.items()]
    return {"name": file.metadata.get("general.name"), "types": sorted(types, key=lambda kind: -kind["bytes"])}


def _readable_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, None if there is none or it cannot be read: a model can be inspected without it."""
    try:
        return load_tokenizer(folder)
    except Exception as error:  # errors of the tokenizers' readers have no base class in common
        log.warning("the tokenizer of %s cannot be read: %s", folder, " ".join(str(error).split())[:200])
        return None


def _named(stop: Mapping[str, Any]) -> str:
    return f"{stop['token'] or ''} ({', '.join(stop['from'])})".lstrip()


def _row_end(stop: Mapping[str, Any] | None) -> str:
    if stop is None:
        return "none, or unknown without a tokenizer"
    return f"{stop['id']} {stop['token']}: ends a finished answer in training, where no other was sampled"


def _rope(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Type and wavelengths of a kind of layer; wavelengths for short and for the longest texts if they depend on the
    length."""
    rope = config.ropes[kind]
    texts = (rope.original_length, config.max_length) if rope.depends_on_length else (config.max_length,)
    spans = {text: 2 * math.pi / np.asarray(inverse_frequencies(config, kind, text), np.float64) for text in texts}
    return {
        "type": rope.kind,
        "theta": rope.theta,
        "factor": None if rope.kind in ("default", "longrope") else rope.factor,
        "wavelengths": [
            {"text": text, "shortest": float(span.min()), "longest": float(span.max())} for text, span in spans.items()
        ],
    }


def _layers(facts: Mapping[str, Any]) -> str:
    """Such as "26: (5 sliding, 1 full) x 4 + 2 sliding"."""
    pattern, tail = _runs(facts["layer_pattern"]), _runs(facts["tail"])
    if len(facts["layer_pattern"]) == 1:
        return f"{facts['layers']} {facts['layer_pattern'][0]}"
    return f"{facts['layers']}: ({pattern}) x {facts['repeats']}" + (f" + {tail}" if tail else "")


def _runs(kinds: Sequence[str]) -> str:
    return ", ".join(f"{len(list(run))} {kind}" for kind, run in itertools.groupby(kinds))


def _tied(facts: Mapping[str, Any]) -> str:
    return "output tied to the embeddings" if facts["tied_embeddings"] else "output of its own"


def _shared(query_heads: int) -> str:
    return "one for each query head" if query_heads == 1 else f"each for {query_heads} query heads"


def _head_width(facts: Mapping[str, Any]) -> str:
    rotated = 2 * facts["rotary_pairs"]
    return str(facts["head_width"]) + (f", of which {rotated} rotate" if rotated < facts["head_width"] else "")


def _rope_rows(ropes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines for each kind of layer, or a single entry if all have the same RoPE."""
    if all(rope == next(iter(ropes.values())) for rope in ropes.values()):
        return _one_rope("RoPE", next(iter(ropes.values())))
    return [row for kind, rope in ropes.items() for row in _one_rope(f"RoPE, {kind} layers", rope)]


def _without_rope(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    still = facts["layers_without_rope"]
    return [("without RoPE", f"{len(still)} of {facts['layers']} layers, so no rotary masks")] if still else []


def _one_rope(name: str, rope: Mapping[str, Any]) -> list[tuple[str, str]]:
    factor = "" if rope["factor"] is None else f", factor {rope['factor']:g}"
    several = len(rope["wavelengths"]) > 1
    return [(name, f"{rope['type']}, theta {rope['theta']:,.0f}{factor}")] + [
        ("  wavelengths" + f", {w['text']:,} tokens" * several, f"{w['shortest']:.2f} to {w['longest']:,.0f} tokens")
        for w in rope["wavelengths"]
    ]


def _mlp_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    dense = ("MLP width", f"{facts['mlp_size']:,}")
    if not facts["experts"]:
        return [dense]
    text = f"{facts['experts']} of width {facts['expert_size']:,}, {facts['experts_per_token']} per token"
    if facts["expert_layers"] == facts["layers"]:
        return [("experts", text)]
    return [dense, ("experts", f"{text}, in {facts['expert_layers']} of {facts['layers']} layers")]


def _gguf_rows(gguf: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a GGUF file calls itself, and a line for each type of its tensors."""
    if gguf is None:
        return []
    kinds = [(f"  {kind['type']}", f"{kind['tensors']} tensors, {_memory(kind['bytes'])}") for kind in gguf["types"]]
    return [("GGUF file", gguf["name"] or "without a name"), *kinds]


def _memory(n: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1, to two decimals."""
    unit = min((max(n, 1).bit_length() - 1) // 10, 3)
    number = f"{n / 1024**unit:,.2f}".removesuffix("0").removesuffix("0").removesuffix(".")
    return f"{number} {('bytes', 'KiB', 'MiB', 'GiB')[unit]}"
