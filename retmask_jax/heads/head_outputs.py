"""What heads write and how their rotary pairs vary on plain text: the stuff of mean-ablation and of matched controls."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax.generation.batching import full_batches
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.attention import EVERYWHERE, Probe
from retmask_jax.model.inference import hidden_rows
from retmask_jax.model.interventions import Head
from retmask_jax.model.masks import normalise
from retmask_jax.model.sharding import full_share, mesh_of, row_parallel
from retmask_jax.model.transformer import check_tokens
from retmask_jax.utils import memory
from retmask_jax.utils.hosts import to_host

POSITIONS = 64  # of each text that are looked at, evenly spread


@dataclasses.dataclass(frozen=True)
class HeadStatistics:
    """mean_LHD: f32[L,H,D], the mean of what a head writes, before o_proj.

    covariance_LHRR: f32[L,H,R,R], how what each two rotary pairs add to q.k varies together over the keys that a query
    sees, mean over queries, without the scale of attention; what is not rotated counts as one pair more, the last.
    """

    mean_LHD: np.ndarray
    covariance_LHRR: np.ndarray


def head_statistics(lm: LanguageModel, texts, *, batch_size: int = 8) -> HeadStatistics:
    """Of the untouched model, mean over texts i32[N,T] and POSITIONS of each. Raises ValueError for texts too long."""
    texts = np.asarray(check_tokens(lm.config, texts))
    rows_P = np.unique(np.linspace(0, texts.shape[1] - 1, POSITIONS).astype(np.int32))

    def work(todo: list[int], batch_size: int):
        for batch in full_batches(todo, min(batch_size, full_share(len(todo)))):
            found = to_host(_statistics(lm.config, lm.params, texts[batch], np.tile(rows_P, (len(batch), 1))))
            yield batch, list(zip(*found, strict=True))

    with mesh_of(lm.params):
        results = memory.in_batches(len(texts), batch_size, "head statistics", "text", work)
    return HeadStatistics(
        *(np.mean(part, axis=0, dtype=np.float64).astype(np.float32) for part in zip(*results, strict=True))
    )


def variance_removed(statistics: HeadStatistics, heads: Sequence[Head], pairs_NR) -> np.ndarray:
    """f64[N,heads]: the share of the variance of q.k over keys that is gone without the pairs of each row, bool[N,R].

    1 - var(what remains) / var(all); below 0 where what is taken out had cancelled some of the rest.
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


@functools.partial(jax.jit, static_argnums=0)
@row_parallel("tokens_BT", "rows_BP")
def _statistics(config, params, tokens_BT, rows_BP):
    """(f32[B,L,H,D], f32[B,L,H,R,R])."""
    spans_B12 = jnp.broadcast_to(jnp.array(EVERYWHERE), (len(tokens_BT), 1, 2))
    asked = Probe(rows_BP, spans_B12, values=True, pairs=config.n_pairs)
    probed = hidden_rows(config, params, tokens_BT, normalise(config), rows_BP, probe=asked).probed
    return probed.values[..., 0, :].mean(axis=1), probed.pairs[:, 0]
