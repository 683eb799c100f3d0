"""What two checkpoints have in common, and how far their weights lie apart: by head, MLP, norms and the rest."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from retmask_jax.data.builtin_files import path_of
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.config import ModelConfig
from retmask_jax.utils.files import read_text
from retmask_jax.utils.hosts import to_host
from retmask_jax.utils.progress import track

# What does not change the logits of the same tokens.
_NOT_THE_MODEL = ("bos_id", "eos_ids", "pad_id", "kernel")
_SAMPLE = "builtin:essays"
_CHARACTERS = 5000

Change = float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightChanges:
    """The Frobenius norm of the difference of weights over that of the start model's; None where only those are 0.

    q, o: [L][H]. k, v: [L][K]. mlps, norms: [L], of all weights of a layer's MLP or experts, and of all its norms. ends: by
    name, of the embedding, the final norm and an output matrix.
    """

    q: list[list[Change]]
    k: list[list[Change]]
    v: list[list[Change]]
    o: list[list[Change]]
    mlps: list[Change]
    norms: list[Change]
    ends: dict[str, Change]


def check_pair(start: LanguageModel, trained: LanguageModel) -> None:
    """ValueError, naming what differs, unless both are of one architecture and write texts alike. Params may be None."""
    fields = (field.name for field in dataclasses.fields(ModelConfig) if field.name not in _NOT_THE_MODEL)
    ours, theirs = start.config, trained.config
    different = [name for name in fields if getattr(ours, name) != getattr(theirs, name)]
    if different:
        named = ", ".join(f"{name} {getattr(ours, name)!r} and {getattr(theirs, name)!r}" for name in different[:3])
        raise ValueError(
            f"START and TRAINED are not of one architecture: {named}: name a model and what was trained from it"
        )
    for name, lm in {"START": start, "TRAINED": trained}.items():
        if lm.tokenizer is None:
            raise ValueError(f"{name} has no tokenizer, which prompts need: add its files to the folder")
    if difference := _differing_tokens(start.tokenizer, trained.tokenizer):
        raise ValueError(
            f"the tokenizers of START and TRAINED differ: {difference}: both models must read the same tokens"
        )


def weight_changes(config: ModelConfig, start: PyTree, trained: PyTree) -> WeightChanges:
    """How far the weights of two models lie apart, computed on the host in float64, layer by layer.

    Raises:
        ValueError: No weight differs.
    """
    layers = track(range(config.n_layers), config.n_layers, "weights", "layer")
    blocks = zip(_blocks(config, start), _blocks(config, trained), strict=True)
    rows = [_of_block(config, *pair) for _, pair in zip(layers, blocks, strict=True)]
    names = [name for name in start if name not in ("blocks", "tail")]
    ends = {name: _relative([_both(start[name], trained[name])], 1)[0] for name in names}
    changes = WeightChanges(**{name: [row[name] for row in rows] for name in rows[0]}, ends=ends)
    if all(change == 0 for change in jax.tree.leaves(dataclasses.asdict(changes), is_leaf=lambda x: x is None)):
        raise ValueError("START and TRAINED have the same weights: name a model and what was trained from it")
    return changes


Both = tuple[list[np.ndarray], list[np.ndarray]]  # the arrays of a part in the two models


def _blocks(config: ModelConfig, params: PyTree) -> Iterator[PyTree]:
    """The parameters of each layer in absolute order."""
    period = len(config.layer_pattern)
    scanned = {place: to_host(block) for place, block in params["blocks"].items()}
    for layer in range(period * config.repeats):
        yield jax.tree.map(lambda leaf, r=layer // period: leaf[r], scanned[str(layer % period)])
    for place in range(len(config.tail)):
        yield to_host(params["tail"][str(place)])


def _of_block(config: ModelConfig, start: PyTree, trained: PyTree) -> dict[str, Any]:
    """{name: the change of a layer's part, or a list over its heads}."""
    heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads, "o": config.n_heads}
    ours, theirs = start["attn"], trained["attn"]
    changes: dict[str, Any] = {
        name: _relative([_both(ours[name], theirs[name])], n, axis=0 if name == "o" else -1)
        for name, n in heads.items()
    }
    of_mlp = [name for name in start if name in ("mlp", "experts")]
    norms = [_both(start[name], trained[name]) for name in start if name not in ("attn", *of_mlp)]
    norms += [_both(ours[name], theirs[name]) for name in ours if name not in heads]
    changes["mlps"] = _relative([_both(start[name], trained[name]) for name in of_mlp], 1)[0]
    changes["norms"] = _relative(norms, 1)[0]
    return changes


def _both(start: PyTree, trained: PyTree) -> Both:
    ours, theirs = ([np.asarray(leaf) for leaf in jax.tree.leaves(to_host(tree))] for tree in (start, trained))
    return ours, theirs


def _relative(parts: Sequence[Both], n: int, axis: int = -1) -> list[Change]:
    """The change of each of n equal slices along an axis, of all arrays of the parts together."""
    moved_N, size_N = np.zeros(n), np.zeros(n)
    for ours, theirs in parts:
        for start, trained in zip(ours, theirs, strict=True):
            wide = [np.moveaxis(array, axis, 0).reshape(n, -1).astype(np.float64) for array in (start, trained)]
            moved_N += np.square(wide[1] - wide[0]).sum(axis=1)
            size_N += np.square(wide[0]).sum(axis=1)
    pairs = zip(np.sqrt(moved_N).tolist(), np.sqrt(size_N).tolist(), strict=True)
    return [moved / size if size else None if moved else 0.0 for moved, size in pairs]


def _differing_tokens(start: Any, trained: Any) -> str:
    """How two tokenizers differ, or nothing: in their vocabulary, or in how they write a text."""
    ours, theirs = (tokenizer.get_vocab() for tokenizer in (start, trained))
    for token in sorted(set(ours) | set(theirs), key=lambda token: (ours.get(token, len(ours)), token)):
        if ours.get(token) != theirs.get(token):
            places = (_place(vocabulary, token) for vocabulary in (ours, theirs))
            return f"{token!r} is {' and '.join(places)}"
    text = read_text(path_of(_SAMPLE))[:_CHARACTERS]
    return "" if start(text)["input_ids"] == trained(text)["input_ids"] else "they split one text in two ways"


def _place(vocabulary: Mapping[str, int], token: str) -> str:
    return f"token {vocabulary[token]}" if token in vocabulary else "no token"
