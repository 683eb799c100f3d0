"""The start model's log-probabilities of every pair: a pass of its own, kept on disk, resumed where it was cut off."""

import functools
import io
import time
from pathlib import Path

import jax
import numpy as np

from retmask_jax.data.pair_rows import SIDES, PairRows, parts
from retmask_jax.model import sharding
from retmask_jax.training.objective import pair_logprobs
from retmask_jax.utils.files import write_atomically
from retmask_jax.utils.hosts import to_host, wait_for_all
from retmask_jax.utils.progress import track

_SAVE_EVERY = 60  # seconds


def reference_logprobs(
    config,
    load_params,
    rows: PairRows,
    path: Path,
    mesh,
    *,
    batch_size: int,
    compute_dtype: str,
    allowed_widths,
    fingerprint: str,
) -> np.ndarray:
    """f32[N,2]: log-probabilities of chosen and rejected answers, from the file or computed and put there.

    load_params() gives the model, and is called if anything is missing. batch_size: pairs in a forward pass. Raises
    ValueError where the file has another fingerprint, and where a log-probability is not finite.
    """
    values = _kept(path, fingerprint, len(rows))
    missing = np.flatnonzero(np.isnan(values).any(axis=1))
    if len(missing):
        cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(compute_dtype), tree))
        params = cast(load_params())
        saved = time.monotonic()
        kept = len(rows) - len(missing)
        with sharding.using(mesh), track(None, len(rows), "reference log-probabilities", "pair", kept) as bar:
            for part in parts(rows, missing, sharding.full_share(batch_size, sharding.ROW_AXES), allowed_widths):
                batch = sharding.place_rows(
                    mesh, len(part.pairs), lambda at, part=part: rows.padded(part.pairs[at], part.width, config.pad_id)
                )
                values[part.pairs] = np.stack(to_host(batch_logprobs(config, params, batch)), axis=1)
                bar.update(len(set(part.pairs)))
                if time.monotonic() - saved > _SAVE_EVERY:
                    _keep(path, fingerprint, values)
                    saved = time.monotonic()
        _keep(path, fingerprint, values)
        wait_for_all("reference")
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(broken):
        raise ValueError(
            f"the start model's log-probability of pair {rows.ids[broken[0]]} is {values[broken[0]].tolist()}: "
            "leave it out, or compute in float32"
        )
    return values


@functools.partial(jax.jit, static_argnums=0)
@sharding.row_parallel("batch")
def batch_logprobs(config, params, batch):
    """(f32[B], f32[B]): log-probabilities of chosen and rejected answers of a batch of pairs, split over the devices."""
    return pair_logprobs(config, params, batch)


def _kept(path: Path, fingerprint: str, n: int) -> np.ndarray:
    """What the file holds; NaN where nothing was computed yet."""
    if not path.exists():
        return np.full((n, len(SIDES)), np.nan, np.float32)
    with np.load(path) as stored:
        if str(stored["fingerprint"]) != fingerprint:
            raise ValueError(
                f"{path} holds log-probabilities of another model, data, template or masks (fingerprint "
                f"{stored['fingerprint']}, now {fingerprint}): delete it to compute them again"
            )
        return stored["logprobs"]


def _keep(path: Path, fingerprint: str, values: np.ndarray) -> None:
    stream = io.BytesIO()
    np.savez(stream, fingerprint=fingerprint, logprobs=values)
    write_atomically(path, stream.getvalue())
