"""Interventions: what is ablated in a forward pass, as arrays, and functions that build them.

A mask is an argument like any other: `jax.jit` compiles once for all of its values, `jax.vmap` runs many at once and
`jax.grad` differentiates with respect to a float mask.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsInt

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.exchange.mask_files import MaskFile
from retmask_jax.model.rope import check_all_rotate
from retmask_jax.utils.array_types import Mask

Head = tuple[int, int]

SITES = ("rotary", "projection")

# The arrays of interventions, and their axes where all rows share them.
SHARED_NDIM = {"head_mask": 2, "rope_mask": 3, "head_mean": 3, "query_mask": 2, "query_mean": 3, "stream_mask": 2}

# Fields that say what a mask does, by the mask; masks that do different things cannot run together.
_MEANING = {"rope_mask": ("rope_site",), "stream_mask": ("stream_sink", "stream_window")}


class Interventions(MaskFile, flax.struct.PyTreeNode):
    """The heads and rotary pairs that are ablated in a forward pass.

    Layers are in absolute order, rotary pairs in the order of the inverse frequencies (highest first). A float mask is a
    gate in [0, 1], where 1 means masked. A part that is None masks nothing. Shapes are checked by whatever runs the model.

    Attributes:
        head_mask: bool[L, H] or [B, L, H]. True: the head writes nothing (its output before o_proj is 0).
        rope_mask: bool[L, H, R] or [B, L, H, R]. True: rotary pair r of this query head drops out of q.k.
        rope_site: "rotary" drops the pair from the query after norm and rotation, for that head alone; "projection"
            zeroes it in the outputs of q_proj and k_proj before any norm, as arXiv 2606.21249 did, which reaches every
            query head of the group.
        head_mean: f32[L, H, D] or [B, L, H, D]: what a masked head writes, before o_proj, instead of nothing (None).
        query_mask: bool[L, H] or [B, L, H]. True: the head's query, the output of q_proj with its bias, before any norm and
            rotation, is replaced.
        query_mean: f32[L, H, D] or [B, L, H, D]: the query in its place, instead of zeros (None).
        stream_mask: bool[L, H] or [B, L, H]. True: the head streams (arXiv 2309.17453), that is, it sees only the first
            tokens of its row and its last keys, of those that it sees otherwise. Under a gate g the weights of all other
            keys are multiplied by 1 - g before they are normalised. No cache gets smaller.
        stream_sink: How many tokens at the beginning of a row streaming heads see.
        stream_window: How many keys they see last, with that of the query's own position, as a model's window counts.

    >>> import numpy as np, retmask_jax as rm
    >>> lm = rm.load("bundled")
    >>> tokens = lm.tokenizer(["<bos> the home of emma : rome . the home of emma :"])["input_ids"]
    >>> mask = np.zeros((lm.config.n_layers, lm.config.n_heads), bool)
    >>> mask[3] = True  # every head of the last layer
    >>> logits = lm.logits(tokens, interventions=rm.Interventions(head_mask=mask))
    >>> lm.tokenizer.convert_ids_to_tokens(int(logits[0, -1].argmax()))
    'rome'
    """

    head_mask: Mask[ArrayLike, "... L H"] | None = None
    rope_mask: Mask[ArrayLike, "... L H R"] | None = None
    rope_site: str = flax.struct.field(pytree_node=False, default="rotary")
    head_mean: Float[ArrayLike, "... L H D"] | None = None
    query_mask: Mask[ArrayLike, "... L H"] | None = None
    query_mean: Float[ArrayLike, "... L H D"] | None = None
    stream_mask: Mask[ArrayLike, "... L H"] | None = None
    stream_sink: int = flax.struct.field(pytree_node=False, default=4)
    stream_window: int = flax.struct.field(pytree_node=False, default=256)

    @classmethod
    def none(cls, config: ModelConfig) -> "Interventions":
        """The untouched model: masks of heads and rotary pairs as arrays, all-False.

        >>> import retmask_jax as rm
        >>> untouched = rm.Interventions.none(rm.load("bundled").config)
        >>> untouched.head_mask.shape, untouched.rope_mask.shape, bool(untouched.head_mask.any())
        ((4, 8), (4, 8, 16), False)
        """
        heads = (config.n_layers, config.n_heads)
        return cls(jnp.zeros(heads, bool), jnp.zeros((*heads, config.n_pairs), bool))

    @property
    def has_rows(self) -> bool:
        """Whether any part has a row axis."""
        parts = ((name, getattr(self, name)) for name in SHARED_NDIM)
        return any(part is not None and jnp.ndim(part) > SHARED_NDIM[name] for name, part in parts)

    def __or__(self, other: "Interventions") -> "Interventions":
        """Both at once: logical or, or the maximum where either is a float gate.

        Raises:
            ValueError: The rotary masks are of two sites, heads stream in two ways, the shapes do not fit each other, or
                heads that one side masks would take a mean that only the other side gives.

        >>> import retmask_jax as rm
        >>> config = rm.load("bundled").config
        >>> both = rm.mask_heads(config, [(1, 0)]) | rm.mask_rope(config, [(1, 1)], pairs=[14, 15])
        >>> int(both.head_mask.sum()), int(both.rope_mask.sum())
        (1, 2)
        """
        if not isinstance(other, Interventions):
            return NotImplemented
        masks = {name: n for name, n in SHARED_NDIM.items() if name.endswith("mask")}
        return Interventions(
            **{name: _either(getattr(self, name), getattr(other, name), n) for name, n in masks.items()},
            **_meaning([self, other], "combine"),
            head_mean=_mean_of("head", self, other),
            query_mean=_mean_of("query", self, other),
        )


def stack(interventions: Sequence[Interventions]) -> Interventions:
    """Many shared masks as one with a leading axis: one mask per row of a batch, or the input of a `jax.vmap`.

    Raises:
        ValueError: The rotary masks are of two sites, or heads stream in two ways.

    >>> import retmask_jax as rm
    >>> lm = rm.load("bundled")
    >>> tokens = lm.tokenizer(2 * ["<bos> the home of emma : rome . the home of emma :"])["input_ids"]
    >>> masks = rm.stack([rm.mask_heads(lm.config, heads) for heads in ([], [(1, 0), (1, 1), (1, 2), (1, 3)])])
    >>> masks.head_mask.shape, lm.tokenizer.convert_ids_to_tokens(lm.logits(tokens, interventions=masks)[:, -1].argmax(-1))
    ((2, 4, 8), ['rome', 'moscow'])
    """
    parts = {name: [getattr(iv, name) for iv in interventions] for name in SHARED_NDIM}
    return Interventions(**_meaning(interventions, "stack"), **{name: _stack(masks) for name, masks in parts.items()})


def mask_heads(
    config: ModelConfig, heads: Iterable[Head], mean: Float[ArrayLike, "L H D"] | None = None
) -> Interventions:
    """Interventions that mask these (layer, head).

    Args:
        mean: What the masked heads write instead of nothing (mean-ablation, see `head_outputs.head_statistics`).

    Raises:
        ValueError: The model does not have such a head.

    >>> import retmask_jax as rm
    >>> mask = rm.mask_heads(rm.load("bundled").config, [(1, 0), (1, 3)])
    >>> print(mask.head_mask[1])
    [ True False False  True False False False False]
    """
    head_mask = np.zeros((config.n_layers, config.n_heads), bool)
    for layer, head in _valid_heads(config, heads):
        head_mask[layer, head] = True
    return Interventions(head_mask=jnp.asarray(head_mask), head_mean=None if mean is None else jnp.asarray(mean))


def mask_queries(
    config: ModelConfig, heads: Iterable[Head], mean: Float[ArrayLike, "L H D"] | None = None
) -> Interventions:
    """Interventions that zero the queries of these (layer, head), or replace them by their mean.

    With a query of zeros a head attends to all keys alike and still writes their mean value, as with the block list of
    arXiv 2404.15574's code.

    Args:
        mean: The query in their place, before norm and rotation (LOCOS, arXiv 2607.01002; see
            `head_outputs.head_statistics`). Where a norm goes over all heads of a layer, it changes for the others too.

    Raises:
        ValueError: The model does not have such a head; or, without a mean, some dimensions of its heads, or some layers,
            are not rotated: masks of rotary pairs do not reach those.

    >>> import retmask_jax as rm
    >>> mask = rm.mask_queries(rm.load("bundled").config, [(1, 0), (1, 3)])
    >>> print(mask.rope_mask[1].all(axis=-1))  # every rotary pair of two heads
    [ True False False  True False False False False]
    """
    if mean is not None:
        masked = mask_heads(config, heads)
        return Interventions(query_mask=masked.head_mask, query_mean=jnp.asarray(mean))
    if 2 * config.n_pairs < config.head_dim:
        raise ValueError(
            f"only {2 * config.n_pairs} of the {config.head_dim} dimensions of a head are rotated, so rotary masks cannot "
            "zero a query of this model: use mask_heads"
        )
    return mask_rope(config, heads, range(config.n_pairs))


def mask_rope(
    config: ModelConfig, heads: Iterable[Head], pairs: Iterable[int | np.integer], site: str = "rotary"
) -> Interventions:
    """Interventions that ablate these rotary pairs in these (layer, head).

    Args:
        site: As `rope_site` of `Interventions`.

    Raises:
        ValueError: The model does not have such a head or pair, it has layers without RoPE, or the site is unknown.

    >>> import retmask_jax as rm
    >>> config = rm.load("bundled").config
    >>> mask = rm.mask_rope(config, [(1, 0), (1, 3)], rm.rope_pairs(config, 4, "low"))
    >>> print(mask.rope_mask[1].sum(axis=-1))  # pairs that drop out of each head
    [4 0 0 4 0 0 0 0]
    """
    if site not in SITES:
        raise ValueError(f"site is {site!r}; it must be one of {', '.join(SITES)}")
    check_all_rotate(config)
    indices = [int(pair) for pair in pairs]
    for pair in indices:
        if not 0 <= pair < config.n_pairs:
            raise ValueError(f"rotary pair {pair} is out of range: the model has pairs 0 to {config.n_pairs - 1}")
    rope_mask = np.zeros((config.n_layers, config.n_heads, config.n_pairs), bool)
    for layer, head in _valid_heads(config, heads):
        rope_mask[layer, head, indices] = True
    return Interventions(rope_mask=jnp.asarray(rope_mask), rope_site=site)


def stream_heads(config: ModelConfig, heads: Iterable[Head], sink: int = 4, window: int = 256) -> Interventions:
    """Interventions under which these (layer, head) stream: see `Interventions`.

    Raises:
        ValueError: The model does not have such a head.

    >>> import retmask_jax as rm
    >>> lm = rm.load("bundled")
    >>> tokens = lm.tokenizer(["<bos> the home of emma : rome . the home of emma :"])["input_ids"]
    >>> near = rm.stream_heads(lm.config, [(1, head) for head in range(8)], sink=1, window=4)
    >>> lm.tokenizer.convert_ids_to_tokens(int(lm.logits(tokens, interventions=near)[0, -1].argmax()))
    'moscow'
    """
    masked = mask_heads(config, heads).head_mask
    return Interventions(stream_mask=masked, stream_sink=sink, stream_window=window)


def is_empty(mask: ArrayLike | None) -> bool:
    """Whether a mask surely masks nothing. A mask that is being traced might mask something."""
    return mask is None or (not isinstance(mask, jax.core.Tracer) and not np.any(np.asarray(mask)))


def all_heads(config: ModelConfig) -> list[Head]:
    """Every (layer, head) of the model."""
    return [(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]


def random_heads(
    config: ModelConfig,
    n: int | None = None,
    exclude: Iterable[Head] = (),
    like: Iterable[Head] | None = None,
    seed: int = 0,
) -> list[Head]:
    """Control heads: `n` of all heads outside `exclude`, or for each head in `like` another one of the same layer.

    Heads of `like` are excluded as well.

    Raises:
        ValueError: A layer (or the model) has too few heads left.

    >>> import retmask_jax as rm
    >>> rm.random_heads(rm.load("bundled").config, like=[(1, 0), (1, 1), (3, 7)], seed=0)
    [(1, 5), (1, 6), (3, 1)]
    """
    if (n is None) == (like is None):
        raise ValueError("random_heads takes either n or like, not both and not neither")
    taken = set(_valid_heads(config, exclude))
    rng = np.random.default_rng(seed)
    if n is not None:
        free = [head for head in all_heads(config) if head not in taken]
        return _draw(rng, free, n, "the model")
    like = _valid_heads(config, like or ())
    return _draw_by_layer(rng, _free_by_layer(config, taken | set(like)), Counter(layer for layer, _ in like))


def layer_matched(config: ModelConfig, heads: Iterable[Head], seed: int = 0) -> list[Head]:
    """Control heads: as many heads outside `heads`, of the same layers as far as these have enough.

    Where a layer has too few others, the rest comes from the nearest layers that have some left. Where each has enough,
    these are the heads of `random_heads(config, like=heads, seed=seed)`.

    Raises:
        ValueError: The model has too few heads left.

    >>> import retmask_jax as rm
    >>> layer_matched(rm.load("bundled").config, [(1, head) for head in range(5)])  # three others are left there
    [(0, 0), (0, 4), (1, 5), (1, 6), (1, 7)]
    """
    taken = set(_valid_heads(config, heads))
    free = _free_by_layer(config, taken)
    if sum(map(len, free.values())) < len(taken):
        raise ValueError(f"{len(taken)} other heads are wanted, the model has {sum(map(len, free.values()))} left")
    alike = Counter(layer for layer, _ in taken)
    drawn = {layer: min(n, len(free[layer])) for layer, n in alike.items()}
    for layer in sorted(alike):
        for _ in range(alike[layer] - len(free[layer])):
            nearest = sorted(free, key=lambda other: (abs(other - layer), other))
            place = next(other for other in nearest if drawn.get(other, 0) < len(free[other]))
            drawn[place] = drawn.get(place, 0) + 1
    return _draw_by_layer(np.random.default_rng(seed), free, drawn)


def _meaning(interventions: Sequence[Interventions], verb: str) -> dict[str, Any]:
    """The fields of `_MEANING` for interventions that become one; those that mask nothing have no say.

    Raises:
        ValueError: Masks do different things.
    """
    found = {}
    for part, names in _MEANING.items():
        given = [iv for iv in interventions if not is_empty(getattr(iv, part))] or interventions[:1]
        values = list(dict.fromkeys(tuple(getattr(iv, name) for name in names) for iv in given))
        if len(values) > 1:
            several = " and ".join(", ".join(map(repr, value)) for value in values)
            raise ValueError(f"cannot {verb} interventions whose {part}s have different {', '.join(names)}: {several}")
        found |= dict(zip(names, values[0], strict=True))
    return found


def _mean_of(part: str, a: Interventions, b: Interventions) -> Any:
    """The mean of "head" or "query" under both; ValueError where heads of one would take what only the other gives."""
    of = [(getattr(iv, f"{part}_mask"), getattr(iv, f"{part}_mean")) for iv in (a, b)]
    given = [
        (mean, other_mask) for (_, mean), (other_mask, _) in zip(of, reversed(of), strict=True) if mean is not None
    ]
    fitting = [mean for mean, other_mask in given if is_empty(other_mask)]
    if given and not fitting:
        builder = {"head": "mask_heads", "query": "mask_queries"}[part]
        raise ValueError(f"{part} masks of which one has a mean cannot be combined: give all heads to one {builder}")
    return fitting[0] if fitting else None


def _stack(masks: Sequence[Any]) -> Any:
    """Masks with a new leading axis; a missing one among others is all-False. NumPy arrays stay such."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    xp = np if all(isinstance(mask, np.ndarray) for mask in given) else jnp
    return xp.stack([xp.zeros_like(given[0]) if mask is None else mask for mask in masks])


def _either(a: Any, b: Any, shared_ndim: int) -> Any:
    if a is None or b is None:
        return b if a is None else a
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.ndim > shared_ndim and b.ndim == shared_ndim:
        b = b[None]
    if b.ndim > shared_ndim and a.ndim == shared_ndim:
        a = a[None]
    rows_differ = a.ndim > shared_ndim and 1 not in (a.shape[0], b.shape[0]) and a.shape[0] != b.shape[0]
    if a.shape[-shared_ndim:] != b.shape[-shared_ndim:] or rows_differ:
        raise ValueError(f"masks of shapes {a.shape} and {b.shape} cannot be combined")
    if a.dtype == b.dtype == jnp.bool_:
        return a | b
    dtype = jnp.result_type(*(mask.dtype for mask in (a, b) if mask.dtype != jnp.bool_))
    return jnp.maximum(a.astype(dtype), b.astype(dtype))


def _valid_heads(config: ModelConfig, heads: Iterable[Sequence[SupportsInt]]) -> list[Head]:
    valid = [(int(layer), int(head)) for layer, head in heads]
    for layer, head in valid:
        if not (0 <= layer < config.n_layers and 0 <= head < config.n_heads):
            raise ValueError(
                f"head ({layer}, {head}) is out of range: the model has "
                f"{config.n_layers} layers of {config.n_heads} query heads"
            )
    return valid


def _free_by_layer(config: ModelConfig, taken: set[Head]) -> dict[int, list[Head]]:
    """The heads of each layer that are not taken."""
    return {
        layer: [(layer, head) for head in range(config.n_heads) if (layer, head) not in taken]
        for layer in range(config.n_layers)
    }


def _draw_by_layer(rng: np.random.Generator, free: Mapping[int, list[Head]], wanted: Mapping[int, int]) -> list[Head]:
    layers = sorted(layer for layer, n in wanted.items() if n)
    return [head for layer in layers for head in _draw(rng, free[layer], wanted[layer], f"layer {layer}")]


def _draw(rng: np.random.Generator, free: list[Head], wanted: int, where: str) -> list[Head]:
    if wanted > len(free):
        raise ValueError(f"{where} has {len(free)} free heads, {wanted} are wanted: exclude fewer or ask for fewer")
    return [free[i] for i in sorted(rng.choice(len(free), size=wanted, replace=False))]
