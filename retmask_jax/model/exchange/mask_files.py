"""Masks as a file: safetensors with a tensor for each array, and the fields that are no arrays as its metadata.

Which arrays and fields there are, and what their axes are called, is read from the dataclass.
"""

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from retmask_jax.model.config import ModelConfig
from retmask_jax.utils.files import check_file, write_atomically

_WHAT = "retmask_jax masks"
_AXES = {"L": "layers", "H": "query heads", "R": "rotary pairs", "D": "dimensions of a head"}


class MaskFile:
    """Methods of a frozen dataclass whose arrays are annotated with their axes, such as "... L H"; `...` is a row axis or
    nothing."""

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file that `load` reads, in the safetensors format. A process that is killed leaves no part of it.

        Raises:
            ValueError: Two arrays are of models of different shapes.

        >>> import pathlib, retmask_jax as rm
        >>> rm.mask_heads(rm.load("bundled").config, [(1, 0), (1, 3)]).save("mask.safetensors")
        >>> pathlib.Path("mask.safetensors").stat().st_size < 1000
        True
        """
        from safetensors.numpy import save

        arrays, others = _split(self)
        about = {name: json.dumps(value) for name, value in others.items()}
        about |= {"what": _WHAT, "shape": json.dumps(_sizes(type(self), arrays))}
        write_atomically(Path(path), save(arrays, metadata=about))

    @classmethod
    def load(cls, path: str | os.PathLike, config: ModelConfig | None = None) -> Self:
        """Reads what `save` wrote, as NumPy arrays, bit for bit.

        Args:
            config: Of the model that is to be masked; None: the shapes are checked when the model runs.

        Raises:
            ValueError: The file is missing, damaged or no masks; it has a part that this version does not know; or it is of
                a model of another shape, with both shapes.

        >>> import retmask_jax as rm
        >>> config = rm.load("bundled").config
        >>> rm.mask_rope(config, [(1, 3)], [14, 15], site="projection").save("mask.safetensors")
        >>> mask = rm.Interventions.load("mask.safetensors", config)
        >>> mask.rope_mask.shape, int(mask.rope_mask.sum()), mask.rope_site
        ((4, 8, 16), 2, 'projection')
        """
        arrays, about = _read(Path(path))
        known = {field.name for field in _fields(cls)}
        if unknown := {*arrays, *about} - known - {"what", "shape"}:
            raise ValueError(f"{path} has {min(unknown)}, which this version does not know: update retmask_jax")
        _check(path, _sizes(cls, arrays), config)
        return cls(**arrays, **{name: _hashable(json.loads(text)) for name, text in about.items() if name in known})


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)


def _split(masks: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns (the arrays that are there, the fields that are no arrays), by name."""
    values = {field.name: getattr(masks, field.name) for field in _fields(masks)}
    others = {field.name for field in _fields(masks) if not field.metadata.get("pytree_node", True)}
    arrays = {
        name: np.ascontiguousarray(value) for name, value in values.items() if name not in others and value is not None
    }
    return arrays, {name: values[name] for name in others}


def _sizes(cls: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns the sizes of the axes by letter; ValueError where two arrays, or an array and its annotation, differ."""
    sizes: dict[str, int] = {}
    for field in _fields(cls):
        axes = _axes(field)
        if field.name not in arrays or axes is None:
            continue
        shape = arrays[field.name].shape
        if len(shape) - len(axes) not in (0, 1):
            raise ValueError(f"{field.name} has shape {shape}; its axes are {', '.join(axes)}, with or without rows")
        for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"{field.name} has {size} {_AXES.get(axis, axis)}, another part {sizes[axis]}")
    return sizes


def _axes(field: dataclasses.Field) -> list[str] | None:
    """The letters of a field's axes, without that of rows; None where its annotation has none."""
    found = {of_type.dim_str for of_type in typing.get_args(field.type) if hasattr(of_type, "dim_str")}
    return [axis for axis in found.pop().split() if axis != "..."] if found else None


def _hashable(value: Any) -> Any:
    """A value of JSON as a static field takes it, which is a key of compiled programs."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (arrays by name, metadata); ValueError for a file that is none of masks."""
    import safetensors

    try:
        with safetensors.safe_open(check_file(path, "mask file"), framework="numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a file, not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is no safetensors file ({error}): give one that Interventions.save wrote") from error
    if about.get("what") != _WHAT:
        raise ValueError(f"{path} holds other things than masks: give a file that Interventions.save wrote")
    return arrays, about


def _check(path: str | os.PathLike, sizes: Mapping[str, int], config: ModelConfig | None) -> None:
    """Raises ValueError where arrays of these sizes do not fit a model."""
    if config is None:
        return
    model = {"L": config.n_layers, "H": config.n_heads, "R": config.n_pairs, "D": config.head_dim}
    known = [axis for axis in sizes if axis in model]
    if any(sizes[axis] != model[axis] for axis in known):
        theirs, ours = (" x ".join(f"{of[axis]} {_AXES[axis]}" for axis in known) for of in (sizes, model))
        raise ValueError(
            f"{path} is for a model of {theirs}, this one has {ours}: load the masks that were made for it"
        )
