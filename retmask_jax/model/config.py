"""Model architecture as data: `ModelConfig`, read from and written to the Hugging Face config format."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# Attributes of an HF config that change nothing in a forward pass at inference or here in training.
_IRRELEVANT = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "dtype", "initializer_range", "model_type",
    "pretraining_tp", "torch_dtype", "transformers_version", "use_cache", "_attn_implementation_autoset",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `kind` is default, linear or llama3; the other fields are those of its HF form."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every architectural difference is a field. Frozen and hashable, so it can be a static argument of `jax.jit`."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float = 1e-5
    activation: str = "silu"
    tied_embeddings: bool = False
    rope: Rope = Rope()
    layer_pattern: tuple[str, ...] = ("full",)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "mlp_size", "n_layers", "n_heads", "n_kv_heads", "head_dim", "max_length")
        for name in sizes:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if type(self.tied_embeddings) is not bool:
            raise ValueError(f"tied_embeddings is {self.tied_embeddings!r}; it must be True or False")
        if not 1 <= len(self.layer_pattern) <= self.n_layers:
            raise ValueError(f"layer_pattern has {len(self.layer_pattern)} layers, the model {self.n_layers}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary pairs need an even width")

    @property
    def n_pairs(self) -> int:
        """Number of rotary pairs of a head, R."""
        return self.head_dim // 2

    @property
    def repeats(self) -> int:
        """How often the layer pattern is scanned; what remains of the layers is the unrolled tail."""
        return self.n_layers // len(self.layer_pattern)

    @property
    def tail(self) -> tuple[str, ...]:
        """Layer kinds behind the last whole repeat of the pattern."""
        return self.layer_pattern[: self.n_layers - self.repeats * len(self.layer_pattern)]


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read an HF config (the content of config.json), closed-world.

    Raises ValueError naming the model type if it is unsupported, or the attribute if one is not understood.
    """
    family = hf.get("model_type")
    if family not in _READERS:
        raise ValueError(
            f"model_type {family!r} is not supported (supported: {', '.join(sorted(_READERS))}); "
            "CONTRIBUTING.md says how to add a family"
        )
    reader = _Reader(hf)
    config = _READERS[family](reader)
    reader.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The HF config of a model made here, as the content of a config.json (Llama's form)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config.rope),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "pad_token_id": config.pad_id,
        "torch_dtype": "float32",
    }


class _Reader:
    """Hands out the attributes of an HF config and remembers which were asked for."""

    def __init__(self, hf: Mapping[str, Any]):
        self._hf = hf
        self._seen = set(_IRRELEVANT)

    def get(self, name: str, default: Any = ...) -> Any:
        self._seen.add(name)
        value = self._hf.get(name)
        if value is not None:
            return value
        if default is ...:
            raise ValueError(f"config.json has no {name!r}, which a {self._hf['model_type']} model needs")
        return default

    def size(self, name: str) -> int:
        value = self.get(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"config.json has {name}={value!r}; it must be a whole number of at least 1")
        return value

    def expect(self, name: str, only: Any) -> None:
        value = self.get(name, only)
        if value != only:
            raise ValueError(
                f"config.json has {name}={value!r}; only {only!r} is supported for {self._hf['model_type']}"
            )

    def finish(self) -> None:
        unknown = sorted(set(self._hf) - self._seen)
        if unknown:
            shown = ", ".join(f"{name}={self._hf[name]!r}" for name in unknown)
            raise ValueError(
                f"config.json has attributes that are not understood, so the model could be wrong: {shown}"
            )


def _read_llama(hf: _Reader) -> ModelConfig:
    hf.expect("attention_bias", False)
    hf.expect("mlp_bias", False)
    heads, hidden = hf.size("num_attention_heads"), hf.size("hidden_size")
    eos = hf.get("eos_token_id", ())
    max_length = hf.get("max_position_embeddings")
    return ModelConfig(
        vocab_size=hf.get("vocab_size"),
        hidden_size=hidden,
        mlp_size=hf.get("intermediate_size"),
        n_layers=hf.get("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=hf.get("num_key_value_heads", heads),
        head_dim=hf.get("head_dim", hidden // heads),
        max_length=max_length,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=_activation(hf.get("hidden_act", "silu")),
        tied_embeddings=hf.get("tie_word_embeddings", False),
        rope=_read_rope(hf, max_length),
        bos_id=hf.get("bos_token_id", None),
        eos_ids=tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        pad_id=max(0, hf.get("pad_token_id", 0)),
    )


_READERS = {"llama": _read_llama}


def _activation(name: str) -> str:
    if name != "silu":
        raise ValueError(f"config.json has hidden_act={name!r}; only 'silu' is supported")
    return name


# The parameters of each RoPE kind: HF name -> field of Rope.
_ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}


def _read_rope(hf: _Reader, max_length: int) -> Rope:
    """Both forms: `rope_theta` and `rope_scaling` at the top, or everything in `rope_parameters`."""
    top_theta = hf.get("rope_theta", None)
    scaling = dict(hf.get("rope_scaling", None) or {})
    scaling |= dict(hf.get("rope_parameters", None) or {})
    theta = scaling.pop("rope_theta", top_theta or 10000.0)
    if top_theta not in (None, theta):
        raise ValueError(f"config.json has rope_theta={top_theta!r} and, in its RoPE parameters, {theta!r}: keep one")
    kinds = {scaling.pop("rope_type", None), scaling.pop("type", None)} - {None} or {"default"}
    if len(kinds) > 1:
        raise ValueError(f"config.json names two RoPE types: {', '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"RoPE type {kind!r} is not supported (supported: {', '.join(_ROPE_FIELDS)})")
    wanted = _ROPE_FIELDS[kind]
    if kind == "llama3":
        scaling.setdefault("original_max_position_embeddings", max_length)
    if set(scaling) != set(wanted):
        raise ValueError(f"RoPE type {kind!r} takes {sorted(wanted)}, config.json has {sorted(scaling)}")
    values = {field: scaling[name] for name, field in wanted.items()}
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values.values()):
        raise ValueError(f"RoPE parameters must be numbers, config.json has {scaling}")
    return Rope(kind=kind, theta=float(theta), **values)


def _rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    return {"rope_type": rope.kind} | {name: getattr(rope, field) for name, field in _ROPE_FIELDS[rope.kind].items()}
