"""What heads look at as one page: a head map to choose from, both answers, and the prompt coloured step by step."""

import base64
from typing import Any

import numpy as np
from markupsafe import Markup

from retmask_jax.heads.looking.looks import MASKED, UNTOUCHED, Looks, Reply
from retmask_jax.reports import html

_LEAST = 1 / 400  # weights below are left out
_ENTRIES = 200_000  # keys in a page, of four bytes each
_KEY_BITS, _WEIGHT_BITS = 20, 12  # of an entry


def looking_page(looks: Looks) -> Markup:
    """The whole page."""
    title = f"Where heads look{f' in {looks.model}' if looks.model else ''}"
    return html.render("look", title=title, data=page_data(looks))


def page_data(looks: Looks) -> dict[str, Any]:
    """What the page's program reads.

    Of each step and head the strongest keys are kept, 64 or as many as fit into the page: of heads that are not chosen fewer.
    They are stored as `counts`, a byte for each step, layer and head, and `keys`, 20 bits of position and 12 of weight for
    each key, the largest weight first.
    """
    n_layers, n_heads = looks.scores.mean.shape
    chosen_LH = np.zeros((n_layers, n_heads), bool)
    chosen_LH[tuple(np.transpose(looks.heads))] = True
    kept = [reply.weights >= _LEAST for reply in looks.replies]
    most = kept[0].shape[-1]
    while most > 1 and sum(map(np.count_nonzero, kept)) > _ENTRIES:
        most //= 2
        kept = [kept_NLHK & (chosen_LH[..., None] | (np.arange(kept_NLHK.shape[-1]) < most)) for kept_NLHK in kept]
    return {
        "model": looks.model,
        "tokens": looks.texts,
        "span": looks.span,
        "layers": n_layers,
        "heads": n_heads,
        "scores": [float(f"{score:.4g}") for score in looks.scores.mean.ravel()],
        "scored": looks.scored,
        "chosen": [layer * n_heads + head for layer, head in looks.heads],
        "replies": [_reply(reply, kept_NLHK) for reply, kept_NLHK in zip(looks.replies, kept, strict=True)],
    }


def _reply(reply: Reply, kept_NLHK: np.ndarray) -> dict[str, Any]:
    weights = np.round(reply.weights[kept_NLHK] * (2**_WEIGHT_BITS - 1)).astype(np.uint32)
    return {
        "name": reply.name,
        "tokens": reply.texts,
        **{name: [float(f"{p:.3g}") for p in reply.probabilities[name]] for name in (UNTOUCHED, MASKED)},
        "counts": _base64(kept_NLHK.sum(axis=-1).astype(np.uint8)),
        "keys": _base64(reply.keys[kept_NLHK].astype(np.uint32) << _WEIGHT_BITS | weights),
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
