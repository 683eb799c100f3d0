"""What heads look at, made up: what the page is tried on."""

import numpy as np

from retmask_jax.heads.looking.looks import Looks, Reply
from retmask_jax.heads.scores import HeadScores


def made_up(shape=(3, 4), length=40, answers=("7 1 .", "no ."), texts=None, keys=64, heads=((1, 2), (2, 0)), **changes):
    """At step n the chosen heads look at token 10 + n with 0.6, and at the first with 0.3; others look everywhere."""
    rng, texts = np.random.default_rng(0), texts or ["<s>", *(f" w{i}" for i in range(1, length))]
    scores_LH = rng.random(shape) / 4
    scores_LH[tuple(np.transpose(heads))] = np.linspace(1, 0.5, len(heads))
    fields = {
        "model": "made/up",
        "prompt": np.arange(length),
        "texts": texts,
        "span": (10, 12),
        "scores": HeadScores.from_array(scores_LH),
        "scored": "copy score in this prompt",
        "heads": list(heads),
        "replies": [
            _reply(rng, name, [f" {word}" for word in answer.split()], shape, length, min(keys, length), heads)
            for name, answer in zip(("untouched", "masked"), answers, strict=True)
        ],
    }
    return Looks(**fields | changes)


def _reply(rng, name, texts, shape, length, n_keys, heads):
    n = len(texts)
    weights_NLHK = -np.sort(-rng.dirichlet(np.full(n_keys, 0.2), (n, *shape)).astype(np.float32), axis=-1)
    begin_NLH1 = rng.integers(length, size=(n, *shape, 1))
    keys_NLHK = ((begin_NLH1 + length // n_keys * np.arange(n_keys)) % length).astype(np.int32)
    attention = np.zeros((n, length + n, len(heads)), np.float32)
    for i, (layer, head) in enumerate(heads):
        weights_NLHK[:, layer, head] = [0.6, 0.3, *[0.0] * (n_keys - 2)]
        keys_NLHK[:, layer, head] = -1
        keys_NLHK[:, layer, head, 0], keys_NLHK[:, layer, head, 1] = 10 + np.arange(n), 0
        attention[np.arange(n), 10 + np.arange(n), i], attention[:, 0, i] = 0.6, 0.3
    chances = {"untouched": np.linspace(0.9, 0.5, n), "masked": np.linspace(0.02, 0.4, n)}
    return Reply(
        name=name,
        tokens=np.arange(n),
        texts=texts,
        probabilities=chances,
        keys=keys_NLHK,
        weights=weights_NLHK,
        attention=attention,
    )
