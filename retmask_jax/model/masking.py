"""Masks as the model takes them: interventions are checked and made dense once, then applied layer by layer."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import SITES, Interventions, is_empty
from retmask_jax.model.kernels.blocked import Streams
from retmask_jax.model.layers import split_layers
from retmask_jax.model.rope import check_all_rotate
from retmask_jax.utils.array_types import Array, Mask


class Masks(flax.struct.PyTreeNode):
    """Interventions in the one form that everything below the public functions takes; `normalise` makes it.

    Every array has a row axis, which is 1 where all rows share the array. Layers are in absolute order.

    Attributes:
        head_BLH: bool, or a float gate: heads whose output is replaced.
        rope_BLHR: bool, or a float gate: rotary pairs that drop out of q.k.
        mean_BLHD: f32, what a masked head writes; zeros of shape [1, L, 1, 1] where no mean was given.
        query_BLH: bool, or a float gate: heads whose query is replaced.
        query_mean_BLHD: f32, the query in its place; zeros of shape [1, L, 1, 1] where no mean was given.
        streams: Heads that stream, with a gate [#B, L, H]; None where it is known that none does, since only some kernels
            know such heads.
        rope_site: As in `Interventions`.
    """

    head_BLH: Mask[Array, "#B L H"]
    rope_BLHR: Mask[Array, "#B L H R"]
    mean_BLHD: Float[Array, "#B L #H #D"]
    query_BLH: Mask[Array, "#B L H"]
    query_mean_BLHD: Float[Array, "#B L #H #D"]
    streams: Streams | None
    rope_site: str = flax.struct.field(pytree_node=False)

    @property
    def rows(self) -> int:
        """The length of the row axis: 1 where all rows share all masks."""
        return max(len(array) for array in jax.tree.leaves(self))

    def repeated(self, rows: int) -> "Masks":
        """The same masks with a row axis of this length, so that shared and per-row masks run one program."""

        def repeat(array):
            xp = np if isinstance(array, np.ndarray) else jnp
            return xp.broadcast_to(array, (rows, *array.shape[1:]))

        return jax.tree.map(repeat, self)

    def take(self, rows: Int[Array, " N"]) -> "Masks":
        """The masks of some rows; arrays that all rows share stay as they are."""
        return jax.tree.map(lambda array: array if len(array) == 1 else array[rows], self)

    def by_layer(self, config: ModelConfig) -> "ByLayer":
        """`LayerMasks` in the arrangement of `split_layers`, which the blocks are scanned with."""
        first = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), self)
        parts = first.head_BLH, first.rope_BLHR, first.mean_BLHD, first.query_BLH, first.query_mean_BLHD, first.streams
        return split_layers(config, LayerMasks(*parts, self.rope_site))


class LayerMasks(flax.struct.PyTreeNode):
    """The masks of one layer, and what they do to its arrays."""

    head_BH: jax.Array
    rope_BHR: jax.Array
    mean_BHD: jax.Array
    query_BH: jax.Array
    query_mean_BHD: jax.Array
    streams: Streams | None
    rope_site: str = flax.struct.field(pytree_node=False)

    def mask_heads(self, out_BTHD: Shaped[jax.Array, "B T H D"]) -> Shaped[jax.Array, "B T H D"]:
        """The heads' outputs, with those of masked heads replaced by zero or by their mean."""
        return _replaced(out_BTHD, self.head_BH, self.mean_BHD)

    def mask_queries(self, q_BTHD: Shaped[jax.Array, "B T H D"]) -> Shaped[jax.Array, "B T H D"]:
        """The outputs of q_proj, with those of masked heads replaced by zero or by their mean."""
        return _replaced(q_BTHD, self.query_BH, self.query_mean_BHD)

    def mask_query_pairs(self, q_BTHD: Shaped[jax.Array, "B T H D"]) -> Shaped[jax.Array, "B T H D"]:
        """The queries without their masked rotary pairs."""
        return _dropped(q_BTHD, _dimensions(self.rope_BHR, q_BTHD.shape[-1])[:, None])

    def mask_key_pairs(self, k_BTKD: Shaped[jax.Array, "B T K D"]) -> Shaped[jax.Array, "B T K D"]:
        """The keys without the rotary pairs that any query head of their group masks (of gates, the largest counts)."""
        kv_heads, width = k_BTKD.shape[2:]
        rope_BKGR = self.rope_BHR.reshape(len(self.rope_BHR), kv_heads, -1, self.rope_BHR.shape[-1])
        return _dropped(k_BTKD, _dimensions(rope_BKGR.max(axis=2), width)[:, None])


ByLayer = dict[str, dict[str, LayerMasks]]  # {"blocks": {place in the pattern: its masks}, "tail": {place: its masks}}


def normalise(config: ModelConfig, interventions: Interventions | None = None, rows: int | None = None) -> Masks:
    """Check interventions against the model and make them dense. None, and parts that are None, mask nothing.

    Arrays that are not being traced become NumPy arrays, so that nothing is compiled here.

    Args:
        rows: The rows of the batch; None where any number of them will do.

    Raises:
        ValueError: A shape, a type or the rotary site does not fit; or a rotary mask, unless all of it is seen to be False,
            for a model that has layers without RoPE.
    """
    iv = Interventions() if interventions is None else interventions
    if iv.rope_site not in SITES:
        raise ValueError(f"rope_site is {iv.rope_site!r}; it must be one of {', '.join(SITES)}")
    if not is_empty(iv.rope_mask):
        check_all_rotate(config)
    heads = (config.n_layers, config.n_heads)
    return Masks(
        _dense_mask("head_mask", iv.head_mask, heads, rows),
        _dense_mask("rope_mask", iv.rope_mask, (*heads, config.n_pairs), rows),
        _dense_mean("head_mean", iv.head_mean, (*heads, config.head_dim), rows),
        _dense_mask("query_mask", iv.query_mask, heads, rows),
        _dense_mean("query_mean", iv.query_mean, (*heads, config.head_dim), rows),
        _streams(iv, heads, rows),
        iv.rope_site,
    )


def normalise_each(config: ModelConfig, masks: Sequence[Interventions]) -> Masks:
    """Several shared masks as one, with a row for each.

    Raises:
        ValueError: As for `normalise`; also where one has a row axis, the rotary sites differ, or heads stream in two ways.
    """
    dense = [normalise(config, iv) for iv in masks]
    if len({one.rope_site for one in dense}) != 1:
        sites = ", ".join(sorted({one.rope_site for one in dense}))
        raise ValueError(f"masks that run together have different rotary sites ({sites}): run each site alone")
    dense = alike(dense)
    if any(iv.has_rows for iv in masks):
        raise ValueError("masks that run together must be shared by all rows: [L, H] and [L, H, R], without a row axis")

    def join(*arrays):
        xp = np if all(isinstance(array, np.ndarray) for array in arrays) else jnp
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
        return xp.concatenate([xp.broadcast_to(array, shape) for array in arrays])

    return jax.tree.map(join, *dense)


def alike(masks: Sequence[Masks]) -> list[Masks]:
    """The same masks with streaming heads in all of them, where one has any, so that one program takes them.

    Raises:
        ValueError: Heads stream in two ways.
    """
    ways = {(one.streams.sink, one.streams.window): one.streams for one in masks if one.streams is not None}
    if len(ways) > 1:
        listed = " and ".join(f"{sink} and {window}" for sink, window in sorted(ways))
        raise ValueError(f"masks that run together have streams of different sink and window: {listed}; run each alone")
    none = [streams.replace(gate=np.zeros((1, *streams.gate.shape[1:]), bool)) for streams in ways.values()]
    return [one if one.streams is not None or not none else one.replace(streams=none[0]) for one in masks]


def _streams(iv: Interventions, heads: tuple[int, int], rows: int | None) -> Streams | None:
    """Heads that stream, with a row axis; None where none does."""
    if iv.stream_sink < 0 or iv.stream_window < 1:
        raise ValueError(
            f"streaming heads see {iv.stream_sink} tokens and a window of {iv.stream_window}: stream_sink must be at least 0 "
            "and stream_window at least 1"
        )
    gate = _dense_mask("stream_mask", iv.stream_mask, heads, rows)
    return None if is_empty(gate) else Streams(gate, iv.stream_sink, iv.stream_window)


def _dense_mask(name: str, mask: Any, shape: tuple[int, ...], rows: int | None) -> Any:
    """The mask with a row axis; all-False where it is None."""
    if mask is None:
        return np.zeros((1, *shape), bool)
    mask = _array(mask)
    if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.floating):
        raise ValueError(f"{name} has type {mask.dtype}; it must be bool, or float for a gate in [0, 1]")
    return _with_rows(name, mask, shape, rows)


def _dense_mean(name: str, mean: Any, shape: tuple[int, ...], rows: int | None) -> Any:
    """The mean with a row axis; zeros that stand for every head and dimension where it is None."""
    if mean is None:
        return np.zeros((1, shape[0], 1, 1), np.float32)
    mean = _array(mean)
    if not jnp.issubdtype(mean.dtype, jnp.floating):
        raise ValueError(f"{name} has type {mean.dtype}; it must be float")
    return _with_rows(name, mean, shape, rows)


def _array(values: Any) -> Any:
    """The values as JAX would take them: the same array while it is traced, else a NumPy array."""
    if isinstance(values, jax.core.Tracer):
        return values
    values = np.asarray(values)
    return values.astype(jax.dtypes.canonicalize_dtype(values.dtype), copy=False)


def _with_rows(name: str, array: Any, shape: tuple[int, ...], rows: int | None) -> Any:
    """The array with a row axis, or ValueError where its shape does not fit the model and the batch."""
    if array.shape == shape:
        return array[None]
    if array.ndim == len(shape) + 1 and array.shape[1:] == shape and rows in (None, len(array)):
        return array
    per_row = ("B" if rows is None else rows, *shape)
    raise ValueError(f"{name} has shape {array.shape}; the model and batch need {shape} or {per_row}")


def _replaced(x_BTHD: Any, mask_BH: Any, mean_BHD: Any) -> Any:
    """x, with the mean of a head where it is masked; a float mask goes from one to the other."""
    mask_BTHD, mean_BTHD = mask_BH[:, None, :, None], mean_BHD[:, None].astype(x_BTHD.dtype)
    if mask_BTHD.dtype == jnp.bool_:
        return jnp.where(mask_BTHD, mean_BTHD, x_BTHD)
    return _dropped(x_BTHD, mask_BTHD) + mean_BTHD * mask_BTHD.astype(x_BTHD.dtype)


def _dropped(x_BTHD: Any, mask_BTHD: Any) -> Any:
    """x, zero where it is masked; a float mask is a gate. Axes of the mask that are 1 broadcast."""
    if mask_BTHD.dtype == jnp.bool_:
        return jnp.where(mask_BTHD, jnp.zeros((), x_BTHD.dtype), x_BTHD)
    return x_BTHD * (1 - mask_BTHD).astype(x_BTHD.dtype)


def _dimensions(mask_BHR: Any, width: int) -> Any:
    """The mask of a head's dimensions: pair r is dimensions r and r + R; those after 2R are never rotated nor masked."""
    unrotated = jnp.zeros((*mask_BHR.shape[:-1], width - 2 * mask_BHR.shape[-1]), mask_BHR.dtype)
    return jnp.concatenate([mask_BHR, mask_BHR, unrotated], axis=-1)
