"""Mean outputs and queries of heads on plain text, for mean-ablation, and how much their rotary pairs vary, for matched
controls."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from retmask_jax.generation.batching import full_batches
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.attention import EVERYWHERE, Probe
from retmask_jax.model.inference import hidden_rows
from retmask_jax.model.interventions import Head
from retmask_jax.model.masking import normalise
from retmask_jax.model.sharding import full_share, mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host

POSITIONS = 64  # measured in each text, evenly spread


@dataclasses.dataclass(frozen=True)
class HeadStatistics:
    """Statistics of each head over the positions of some texts.

    Attributes:
        mean_LHD: Mean output of the head, before o_proj.
        covariance_LHRR: Covariance of what two rotary pairs add to q.k, over the keys that a query sees; mean over
            queries, without the scale of attention. Dimensions that are not rotated count as one more pair, the last.
        query_LHD: Mean query of the head: the output of q_proj, bias included, before any norm and rotation.
    """

    mean_LHD: Float32[np.ndarray, "L H D"]
    covariance_LHRR: Float32[np.ndarray, "L H R R"]
    query_LHD: Float32[np.ndarray, "L H D"]

    def mean_for(self, mode: str) -> Float32[np.ndarray, "L H D"] | None:
        """The mean that a mode of `knockout.ablate` writes, or None."""
        return {"mean": self.mean_LHD, "query_mean": self.query_LHD}.get(mode)


def head_statistics(lm: LanguageModel, texts_NT: Int[np.ndarray, "N T"], *, batch_size: int = 8) -> HeadStatistics:
    """Measures the model without interventions at POSITIONS positions of each text.

    Raises:
        ValueError: The texts exceed the model's context.
    """
    texts_NT = np.asarray(check_tokens(lm.config, texts_NT))
    rows_P = np.unique(np.linspace(0, texts_NT.shape[1] - 1, POSITIONS).astype(np.int32))

    def work(todo: list[int], batch_size: int):
        for batch in full_batches(todo, min(batch_size, full_share(len(todo)))):
            found = to_host(_statistics(lm.config, lm.params, texts_NT[batch], np.tile(rows_P, (len(batch), 1))))
            yield batch, list(zip(*found, strict=True))

    with mesh_of(lm.params):
        results = memory.in_batches(len(texts_NT), batch_size, "head statistics", "text", work)
    return HeadStatistics(*map(_mean, zip(*results, strict=True)))


def variance_removed(
    statistics: HeadStatistics, heads: Sequence[Head], pairs_NR: Bool[np.ndarray, "N R"]
) -> Float64[np.ndarray, "N heads"]:
    """Computes the share of the variance of q.k over keys that masking the pairs of each row removes.

    The share is 1 - var(remaining pairs) / var(all pairs). It is negative where the masked pairs had cancelled others.
    """
    pairs_NR = np.asarray(pairs_NR, bool)
    shares = []
    for layer, head in heads:
        covariance_RR = statistics.covariance_LHRR[layer, head].astype(np.float64)
        kept_NR = np.ones((len(pairs_NR), len(covariance_RR)))
        kept_NR[:, : pairs_NR.shape[1]] -= pairs_NR
        shares.append(
            1 - np.einsum("nr,rq,nq->n", kept_NR, covariance_RR, kept_NR, optimize=True) / covariance_RR.sum()
        )
    return np.stack(shares, axis=1)


def _mean(per_text: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the mean over texts in f32, summed in f64."""
    return np.asarray(np.mean(per_text, axis=0, dtype=np.float64), np.float32)


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_BT", "rows_BP")
def _statistics(config, params, tokens_BT, rows_BP):
    """Returns the mean f32[B,L,H,D], the covariance f32[B,L,H,R,R] and the mean query f32[B,L,H,D] of each row."""
    spans_B12 = jnp.broadcast_to(jnp.array(EVERYWHERE), (len(tokens_BT), 1, 2))
    asked = Probe(rows_BP, spans_B12, values=True, pairs=config.n_pairs, projected=True)
    probed = hidden_rows(config, params, tokens_BT, normalise(config), rows_BP, probe=asked).probed
    assert probed is not None and probed.values is not None and probed.pairs is not None  # they were asked for
    assert probed.projected is not None
    return probed.values[..., 0, :].mean(axis=1), probed.pairs[:, 0], probed.projected.mean(axis=1)
