"""Model architecture as data: every difference between models is a field of `ModelConfig`."""

import dataclasses
import math

KERNELS = ("auto", "plain", "blocked", "cudnn", "splash")
LAYER_KINDS = ("full", "sliding")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DENSE_LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding; which fields count depends on `kind`, see `rope.inverse_frequencies`.

    original_length: tokens of the context before scaling. attention_scale: cos and sin are multiplied by it.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 0
    attention_scale: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"RoPE type {self.kind!r} is not supported (supported: {', '.join(ROPE_KINDS)})")
        if self.kind == "longrope" and not (self.short_factors and self.long_factors):
            raise ValueError("RoPE type 'longrope' needs short_factors and long_factors, one per rotary pair")

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the text."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters of dense layers: their rank, alpha (the product of the two matrices counts alpha / rank times)
    and the layers that have them."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = DENSE_LAYERS

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1 or not self.alpha > 0:
            raise ValueError(
                f"LoRA rank {self.rank} must be a whole number of at least 1 and alpha {self.alpha} positive"
            )
        unknown = [name for name in self.targets if name not in DENSE_LAYERS]
        if unknown or not self.targets:
            raise ValueError(f"LoRA targets are {self.targets}; they must be some of {', '.join(DENSE_LAYERS)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every architectural difference is a field. Frozen and hashable, so it can be a static argument of `jax.jit`.

    Layer i is of kind layer_pattern[i % period]; the repeats of the pattern are scanned, what remains is the tail.
    Raises ValueError for sizes, choices and patterns that do not fit each other.

    >>> import retmask_jax as rm
    >>> config = rm.ModelConfig(
    ...     vocab_size=64, hidden_size=32, mlp_size=48, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=16,
    ...     max_length=128, layer_pattern=("sliding", "full"), window=32,
    ... )
    >>> config.n_pairs, config.repeats, config.tail
    (8, 2, ('sliding',))
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float = 1e-5
    norm_placement: str = "pre"  # "pre": x + f(norm(x)); "post": x + norm(f(x)); "both"
    norm_offset: float = 0.0  # added to every norm's weight
    qk_norm: str | None = None  # of queries and keys: "head", each over its width; "projection", all heads at once
    qkv_bias: bool = False
    activation: str = "silu"
    tied_embeddings: bool = False
    embed_scale: float | None = None  # embeddings are multiplied by it, rounded to their dtype
    residual_scale: float | None = None  # what attention and MLP add to the residual stream is multiplied by it
    logit_scale: float | None = None  # logits are multiplied by it, before their cap
    query_scale: float | None = None  # of q.k; None: head_dim ** -0.5
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    logit_softcap: float | None = None
    layer_pattern: tuple[str, ...] = ("full",)  # "full" or "sliding"
    window: int | None = None  # keys a query of a sliding layer sees, that of its position included
    rope: Rope = Rope()
    sliding_rope: Rope | None = None  # of sliding layers; None: the same
    rotary_dim: int | None = None  # rotated dimensions at the front of a head; None: all
    rope_pattern: tuple[bool, ...] = (True,)  # which layers of the pattern have RoPE; one entry: all alike
    expert_pattern: tuple[bool, ...] = (False,)  # which layers of the pattern have experts; one entry: all alike
    n_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalise_router: bool = False  # the chosen experts' weights sum to one
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    lora: Lora | None = None  # adapters of the dense layers, while they are trained
    kernel: str = "auto"  # of attention, see `attend`: how it is computed, not what comes out

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_choices()
        self._check_layers()

    @property
    def n_pairs(self) -> int:
        """Number of rotary pairs of a head, R."""
        return (self.rotary_dim or self.head_dim) // 2

    @property
    def attention_scale(self) -> float:
        """What q.k is multiplied by before the softmax."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def repeats(self) -> int:
        """How often the layer pattern is scanned; what remains of the layers is the unrolled tail."""
        return self.n_layers // len(self.layer_pattern)

    @property
    def tail(self) -> tuple[str, ...]:
        """Layer kinds after the last whole repeat of the pattern."""
        return self.layer_pattern[: self.n_layers - self.repeats * len(self.layer_pattern)]

    @property
    def ropes(self) -> dict[str, Rope]:
        """The rotary embedding of each layer kind that occurs with one."""
        own = {"full": self.rope, "sliding": self.sliding_rope or self.rope}
        rotating = {kind for place, kind in enumerate(self.layer_pattern) if self.has_rope(place)}
        return {kind: own[kind] for kind in LAYER_KINDS if kind in rotating}

    @property
    def layers_without_rope(self) -> tuple[int, ...]:
        """The layers whose queries and keys are not rotated, in absolute order."""
        return tuple(layer for layer in range(self.n_layers) if not self.has_rope(layer))

    @property
    def depends_on_length(self) -> bool:
        """Whether rotary frequencies change with the length of the text."""
        return any(rope.depends_on_length for rope in self.ropes.values())

    def has_experts(self, place: int) -> bool:
        """Whether the layers at this place of the pattern have experts instead of one MLP."""
        return self.expert_pattern[place % len(self.expert_pattern)]

    def first_like(self, place: int) -> int:
        """The first place of the pattern whose layers compute the same as those at this place."""
        traits = [(kind, self.has_rope(i), self.has_experts(i)) for i, kind in enumerate(self.layer_pattern)]
        return traits.index(traits[place])

    def has_rope(self, place: int) -> bool:
        """Whether the layers at this place of the pattern have RoPE."""
        return self.rope_pattern[place % len(self.rope_pattern)]

    def _check_sizes(self) -> None:
        names = ["vocab_size", "hidden_size", "mlp_size", "n_layers", "n_heads", "n_kv_heads", "head_dim", "max_length"]
        names += ["n_experts", "experts_per_token", "expert_size"] if any(self.expert_pattern) else []
        names += ["window"] if "sliding" in self.layer_pattern else []
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        rotary = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if rotary % 2 or not 0 < rotary <= self.head_dim:
            raise ValueError(f"rotary width {rotary} must be even and at most head_dim {self.head_dim}")
        if self.experts_per_token > self.n_experts:
            raise ValueError(f"{self.experts_per_token} experts per token of only {self.n_experts}")
        factors = ("embed_scale", "residual_scale", "logit_scale", "query_scale")
        for name in ("norm_eps", *factors, "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name} is {value!r}; it must be a positive number")

    def _check_choices(self) -> None:
        choices = {
            "norm_placement": ("pre", "post", "both"),
            "qk_norm": (None, "head", "projection"),
            "activation": ACTIVATIONS,
            "tied_embeddings": (False, True),
            "qkv_bias": (False, True),
            "kernel": KERNELS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if not any(value is one or (type(value) is str and value == one) for one in allowed):
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")

    def _check_layers(self) -> None:
        if not 1 <= len(self.layer_pattern) <= self.n_layers:
            raise ValueError(f"layer_pattern has {len(self.layer_pattern)} layers, the model {self.n_layers}")
        unknown = set(self.layer_pattern) - set(LAYER_KINDS)
        if unknown:
            raise ValueError(f"layer kind {unknown.pop()!r} is unknown; known are {', '.join(LAYER_KINDS)}")
        for name in ("expert_pattern", "rope_pattern"):
            if len(entries := getattr(self, name)) not in (1, len(self.layer_pattern)):
                raise ValueError(f"{name} has {len(entries)} entries, layer_pattern {len(self.layer_pattern)}")
        if not any(self.rope_pattern[: self.n_layers]):
            raise ValueError(f"rope_pattern is {self.rope_pattern}; at least one layer must have RoPE")
        for rope in self.ropes.values():
            for factors in (rope.short_factors, rope.long_factors):
                if factors and len(factors) != self.n_pairs:
                    raise ValueError(f"longrope has {len(factors)} factors, a head {self.n_pairs} rotary pairs")


def shortest_pattern(layers: tuple) -> tuple:
    """The shortest pattern that gives `layers` when repeated and cut: ("a", "b", "a") -> ("a", "b")."""
    for period in range(1, len(layers) + 1):
        if all(layer == layers[i % period] for i, layer in enumerate(layers)):
            return layers[:period]
    return layers
