"""Types of what public functions take, in jaxtyping's notation: a kind of number, a kind of array, and its axes.

Axes: B rows, T tokens, P positions, N new tokens, V words of the vocabulary, L layers, H query heads, R rotary pairs, D
dimensions of a head. `...` is a row axis, or nothing.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import AbstractDtype, Int


class Mask(AbstractDtype):
    """Booleans, or gates from 0 to 1."""

    dtypes = ["bool", "bfloat16", "float16", "float32", "float64"]


Array = jax.Array | np.ndarray  # on the devices, or on the host
Tokens = Int[ArrayLike, "B T"] | Sequence[Sequence[int]]
Lengths = Int[ArrayLike, " B"] | Sequence[int]
