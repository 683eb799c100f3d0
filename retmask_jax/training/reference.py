"""The start model's log-probabilities of every pair: a pass of its own, stored pair by pair and resumed where it
stopped."""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, PyTree

from retmask_jax.data.pair_formats import SIDES
from retmask_jax.data.pair_rows import PairRows, Part, parts
from retmask_jax.model import sharding
from retmask_jax.model.config import ModelConfig
from retmask_jax.training.objective import pair_logprobs
from retmask_jax.utils.hosts import to_host
from retmask_jax.utils.progress import track
from retmask_jax.utils.store import Store

log = logging.getLogger(__name__)


def reference_logprobs(
    config: ModelConfig,
    load_params: Callable[[], PyTree],
    rows: PairRows,
    folder: Path,
    mesh: Mesh,
    *,
    batch_size: int,
    compute_dtype: str,
    allowed_widths: tuple[list[int], ...],
    identity: Mapping[str, Any],
) -> Float32[np.ndarray, "N 2"]:
    """Returns the log-probabilities of chosen and rejected answers, in nats: those that are stored, and the missing
    ones computed and stored.

    Args:
        load_params: Gives the start model's parameters; called only if a pair is missing.
        folder: Folder of the store, whose keys are the numbers of the pairs.
        batch_size: Pairs in a forward pass.
        compute_dtype: Dtype that the parameters are cast to.
        allowed_widths: Widths that prompts, and answers, are padded to; each combination is a compiled program.
        identity: What the log-probabilities depend on: the start model, the data and how they were made into rows.

    Raises:
        ValueError: The store has another identity, or a log-probability is not finite.
    """
    if (older := folder.with_suffix(".npz")).exists():
        log.warning("%s was written by an earlier version and is not read; %s takes its place", older, folder)
    values_ND = np.full((len(rows), len(SIDES)), np.nan, np.float32)
    with Store(folder, identity) as store:
        missing = np.array(store.missing([(pair,) for pair in range(len(rows))]), int)
        for pair in np.setdiff1d(np.arange(len(rows)), missing).tolist():
            values_ND[pair] = store[pair,]
        if len(missing):
            cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(compute_dtype), tree))
            params = cast(load_params())
            stored = len(rows) - len(missing)
            with sharding.using(mesh), track(None, len(rows), "reference log-probabilities", "pair", stored) as bar:
                size = sharding.full_share(batch_size, sharding.ROW_AXES)
                for part in parts(rows.sizes, missing, size, allowed_widths):
                    pad = functools.partial(_padded, rows, part, config.pad_id)
                    batch = sharding.place_rows(mesh, len(part.pairs), pad)
                    values_ND[part.pairs] = to_host(batch_logprobs(config, params, batch))
                    _add(store, part.pairs, values_ND)
                    bar.update(len(set(part.pairs)))
    _check_finite(rows, values_ND)
    return values_ND


@functools.partial(jax.jit, static_argnums=0)
@sharding.row_parallel("batch")
def batch_logprobs(config: ModelConfig, params: PyTree, batch: Mapping[str, Array]) -> Float32[Array, "B 2"]:
    """Log-probabilities of the chosen and the rejected answers of a batch of pairs, split over the devices."""
    return pair_logprobs(config, params, batch)


def _padded(rows: PairRows, part: Part, pad_id: int, at: slice) -> dict[str, np.ndarray]:
    """Some rows of a part, as `pair_logprobs` takes them."""
    return rows.forked(part.pairs[at], part.widths, pad_id)


def _add(store: Store, pairs: np.ndarray, values_ND: np.ndarray) -> None:
    """Stores the log-probabilities of some pairs. Those that are not finite are left out, since JSON has no such
    numbers."""
    for pair in pairs.tolist():
        if np.isfinite(values_ND[pair]).all():
            store.add((pair,), values_ND[pair].tolist())


def _check_finite(rows: PairRows, values_ND: np.ndarray) -> None:
    broken = np.flatnonzero(~np.isfinite(values_ND).all(axis=1))
    if len(broken):
        raise ValueError(
            f"the start model's log-probability of pair {rows.ids[broken[0]]} is {values_ND[broken[0]].tolist()}: "
            "leave it out, or compute in float32"
        )
