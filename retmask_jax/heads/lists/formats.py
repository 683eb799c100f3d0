"""Files of heads in the forms that others publish and read, in one table: recognised by content, read and written.

Most score query heads. DuoAttention scores KV heads: read here, each query head has the score of its KV head, so a group of
query heads stays together; written, a KV head has the best score of its query heads, since it must be kept for that one.
Read and written again, such a file is the same.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retmask_jax.heads.scores import HeadScores, from_pairs, parse_name, to_pairs, unique_names
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head
from retmask_jax.utils.files import read_text, write_atomically


@dataclasses.dataclass(frozen=True)
class HeadList:
    """The heads of a file, and their scores if it has any.

    Attributes:
        form: One of `FORMATS`.
        heads: Best first: all heads of the model where the file scores them.
        scores: None where the file only names heads.
        of_kv_heads: The file speaks of KV heads, so all query heads of one have the same score.
    """

    form: str
    heads: list[Head]
    scores: HeadScores | None = None
    of_kv_heads: bool = False


class Format(NamedTuple):
    """A form of files. fits: whether content has it: a JSON value, or the text where it is no JSON. read, write: as
    `read_heads` and `write_heads` call them; None: not written. about: what a file that is written holds."""

    fits: Callable[[Any], bool]
    read: Callable[[Path, Any, ModelConfig], HeadList]
    write: Callable[[HeadList, ModelConfig, str], str] | None
    about: str


def read_heads(path: str | os.PathLike, config: ModelConfig) -> HeadList:
    """Reads a file of heads, whichever of `FORMATS` it has.

    Args:
        config: Of the model that the heads belong to.

    Raises:
        ValueError: The file cannot be read, has none of the forms, names no head or one that the model does not have, or
            scores another number of layers or heads. The message is one line with the path and what to do.

    >>> import pathlib, retmask_jax as rm
    >>> pathlib.Path("qr.yaml").write_text('attn_head_set: "3-1,0-2"')
    24
    >>> rm.read_heads("qr.yaml", rm.load("bundled").config)
    HeadList(form='qrhead', heads=[(3, 1), (0, 2)], scores=None, of_kv_heads=False)
    """
    path = Path(path)
    content = _content(path)
    form = next((name for name, form in FORMATS.items() if form.fits(content)), None)
    if form is None:
        raise ValueError(
            f"{path} has no heads in a form that is known here: {', '.join(FORMATS)} (see heads/README.md)"
        )
    found = FORMATS[form].read(path, content, config)
    return dataclasses.replace(found, heads=_of_model(path, found.heads, config), form=form)


def read_scores(path: str | os.PathLike, config: ModelConfig) -> HeadScores:
    """Reads the scores of a file of heads; errors as of `read_heads`, and for a file that only names heads."""
    found = read_heads(path, config)
    if found.scores is None:
        raise ValueError(f"{path} names {len(found.heads)} heads and scores none: give a file that scores all heads")
    return found.scores


def write_heads(
    path: str | os.PathLike,
    found: HeadList | HeadScores | Sequence[Head],
    form: str,
    config: ModelConfig,
    model: str = "",
) -> None:
    """Writes heads in one of `FORMATS`.

    Args:
        found: Where a form has scores and these are heads alone, they score 1 and all others 0. Where a form has heads
            alone, these are the heads of a `HeadList`, or all heads of scores, best first.
        config: Of the model that the heads belong to.
        model: Its name, which some forms hold.

    Raises:
        ValueError: No such form, or it cannot hold this.

    >>> import pathlib, retmask_jax as rm
    >>> rm.write_heads("heads.yaml", [(3, 1), (0, 2)], "qrhead", rm.load("bundled").config)
    >>> print(pathlib.Path("heads.yaml").read_text().splitlines()[0])
    attn_head_set: "3-1,0-2"
    """
    write = FORMATS[form].write if form in FORMATS else None
    if write is None:
        raise ValueError(f"heads cannot be written as {form!r}; the forms are {', '.join(written_forms())}")
    if isinstance(found, HeadScores):
        found = _scored("what is to be written", found, config)
    elif not isinstance(found, HeadList):
        pairs = np.reshape(found, (-1, 2)).tolist()
        found = HeadList("", _of_model("what is to be written", [(layer, head) for layer, head in pairs], config))
    write_atomically(Path(path), write(found, config, model))


def written_forms() -> list[str]:
    """The names of the forms that `write_heads` writes."""
    return [name for name, form in FORMATS.items() if form.write is not None]


def _content(path: Path) -> Any:
    """The JSON value of a file that begins like an object or a list, the text of any other."""
    text = read_text(path, "file of heads")
    if text.lstrip()[:1] not in ("{", "["):
        return text
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: unique_names(path, pairs))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}): write the file again") from error


def _of_model(where: str | Path, heads: Iterable[Head], config: ModelConfig) -> list[Head]:
    """The heads, each once; ValueError unless there are some and the model has them."""
    heads, shape = list(dict.fromkeys(heads)), (config.n_layers, config.n_heads)
    if not heads:
        raise ValueError(f"{where} names no head: add one, such as [15, 30] in a JSON list")
    for head in heads:
        if not all(0 <= index < size for index, size in zip(head, shape, strict=True)):
            raise ValueError(
                f"{where}: head {list(head)} is out of range: the model has {shape[0]} layers of {shape[1]} query heads"
            )
    return heads


# --- reading: (path, content, config) -> what it says; `read_heads` adds the form and checks the heads ---


def _read_pairs(path: Path, pairs: Any, config: ModelConfig) -> HeadList:
    return _scored(path, from_pairs(path, pairs), config)


def _read_locos(path: Path, envelope: dict, config: ModelConfig) -> HeadList:
    return _read_pairs(path, envelope["scores"], config)


def _read_ranking(path: Path, entries: list, config: ModelConfig) -> HeadList:
    """[["layer-head", score], ...]."""
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(
                f'{path}: {entry!r:.40} scores no head: write ["layer-head", score], such as ["15-30", 0.5]'
            )
    pairs = unique_names(path, [(name, [score]) for name, score in entries])
    return _read_pairs(path, pairs, config)


def _read_profile(path: Path, profile: dict, config: ModelConfig) -> HeadList:
    try:
        scores = HeadScores.from_array(np.array(profile["argmax_scores"], np.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: argmax_scores are not numbers of layers by heads ({error})") from error
    return _scored(path, scores, config)


def _read_list(path: Path, entries: list, config: ModelConfig) -> HeadList:
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and all(type(index) is int for index in entry)):
            raise ValueError(f"{path}: {entry!r:.40} is no head: write [layer, head], such as [15, 30]")
    return HeadList("", [(layer, head) for layer, head in entries])


def _read_yaml(path: Path, text: str, config: ModelConfig) -> HeadList:
    names = str(_yaml(text)["attn_head_set"])
    if names == "full_heads":
        raise ValueError(
            f"{path}: attn_head_set is full_heads, all heads and no choice of them: give a file that names some"
        )
    return HeadList("", [parse_name(path, name.strip()) for name in names.split(",") if name.strip()])


def _read_gates(path: Path, text: str, config: ModelConfig) -> HeadList:
    """A line per layer with a gate per KV head."""
    gates = _table(text)
    widths, shape = sorted({len(row) for row in gates}), (config.n_layers, config.n_kv_heads)
    if (len(gates), widths) != (shape[0], [shape[1]]):
        columns = " to ".join(map(str, dict.fromkeys((widths[0], widths[-1]))))
        raise ValueError(
            f"{path} scores {len(gates)} layers of {columns} KV heads, the model has {shape[0]} of {shape[1]}: give scores of "
            "this architecture"
        )
    gate_LK = np.clip(np.array(gates, np.float32), 0, 1)
    scores = HeadScores.from_array(np.repeat(gate_LK, config.n_heads // config.n_kv_heads, axis=1))
    return dataclasses.replace(_scored(path, scores, config), of_kv_heads=True)


def _scored(where: str | Path, scores: HeadScores, config: ModelConfig) -> HeadList:
    """All heads of scores, best first; ValueError where these are of another model."""
    shape = (config.n_layers, config.n_heads)
    if scores.mean.shape != shape:
        layers, heads = scores.mean.shape
        raise ValueError(
            f"{where} scores {layers} layers of {heads} heads, the model has {shape[0]} of {shape[1]}: give scores of this "
            "architecture"
        )
    return HeadList("", scores.heads(top_k=scores.mean.size), scores)


# --- writing: (what is known of the heads, config, the model's name) -> the text of the file ---


def _write_pairs(found: HeadList, config: ModelConfig, model: str) -> str:
    return json.dumps(to_pairs(_scores_of(found, config))) + "\n"


def _write_headkv(found: HeadList, config: ModelConfig, model: str) -> str:
    """HeadKV shares a budget by the heads' part of the sum, raised to a power."""
    scores = _scores_of(found, config)
    if scores.counts.min() == 0 or scores.mean.min() < 0 or scores.mean.max() <= 0:
        raise ValueError(
            f"HeadKV divides mean scores by their sum, and needs one of at least 0 for each head; these are "
            f"{scores.mean.min():.3g} to {scores.mean.max():.3g}, of {scores.counts.min()} cases or more: take other scores"
        )
    return _write_pairs(found, config, model)


def _write_locos(found: HeadList, config: ModelConfig, model: str) -> str:
    scores = _scores_of(found, config)
    meta = {"model": model, "num_trials_passed": int(scores.counts.max())}
    return json.dumps({"meta": meta, "scores": to_pairs(scores)}) + "\n"


def _write_ranking(found: HeadList, config: ModelConfig, model: str) -> str:
    scores = _scores_of(found, config)
    ranked = [(f"{i}-{j}", float(scores.mean[i, j])) for i, j in scores.heads(top_k=scores.mean.size)]
    return json.dumps(ranked) + "\n"


def _write_list(found: HeadList, config: ModelConfig, model: str) -> str:
    return json.dumps(_of_model("what is to be written", found.heads, config)) + "\n"


def _write_yaml(found: HeadList, config: ModelConfig, model: str) -> str:
    values = {
        "attn_head_set": ",".join(f"{i}-{j}" for i, j in _of_model("what is to be written", found.heads, config)),
        "model_base_class": model.rsplit("/", 1)[-1],
        "model_name_or_path": model,
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


def _write_gates(found: HeadList, config: ModelConfig, model: str) -> str:
    mean_LH = _scores_of(found, config).mean
    best_LK = mean_LH.reshape(config.n_layers, config.n_kv_heads, -1).max(axis=2)
    low, high = float(best_LK.min()), float(best_LK.max())
    if low < 0 or high > 1:
        best_LK = (best_LK - low) / max(high - low, 1e-30)
    return "".join("\t".join(repr(float(gate)) for gate in row) + "\n" for row in best_LK)


def _scores_of(found: HeadList, config: ModelConfig) -> HeadScores:
    """The scores; where there are none, 1 for each head that is named and 0 for all others."""
    if found.scores is not None:
        return found.scores
    named_LH = np.zeros((config.n_layers, config.n_heads), np.float32)
    named_LH[tuple(np.transpose(found.heads))] = 1
    return HeadScores.from_array(named_LH)


# --- recognising ---


def _yaml(text: Any) -> dict:
    """The mapping of a YAML text; an empty one for anything else."""
    import yaml  # pyrefly: ignore[untyped-import]  it has no types

    try:
        value = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError:
        value = None
    return value if isinstance(value, dict) else {}


def _table(text: Any) -> list[list[float]]:
    """The finite numbers of a text, line by line; nothing for any other text."""
    try:
        rows = [[float(word) for word in line.split()] for line in text.splitlines() if line.strip()]
    except (AttributeError, ValueError):
        return []
    return rows if rows and all(np.isfinite(row).all() for row in rows) else []


def _is_ranking(content: Any) -> bool:
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, list) and bool(first) and isinstance(first[0], str)


HEADS_ALONE = ("qrhead", "list")  # forms without scores
# The first form that fits a file is its form.
FORMATS: dict[str, Format] = {
    "locos": Format(
        lambda content: isinstance(content, dict) and isinstance(content.get("scores"), dict),
        _read_locos,
        _write_locos,
        "scores of each case, as LOCOS writes and reads them",
    ),
    "profile": Format(
        lambda content: isinstance(content, dict) and "argmax_scores" in content,
        _read_profile,
        None,
        "the argmax scores of a profile of arXiv 2606.21249",
    ),
    "retmask": Format(
        lambda content: isinstance(content, dict),
        _read_pairs,
        _write_pairs,
        "scores of each case, as RetMask and Retrieval_Head write them",
    ),
    "headkv": Format(
        lambda content: False,  # it is read as RetMask's
        _read_pairs,
        _write_headkv,
        "the same on one line, with a score for every head, as HeadKV reads it",
    ),
    "qrhead-scores": Format(
        _is_ranking, _read_ranking, _write_ranking, "mean scores, best first, as QRHead's detection writes them"
    ),
    "list": Format(lambda content: isinstance(content, list), _read_list, _write_list, "heads, best first"),
    "duoattention": Format(
        lambda content: bool(_table(content)),
        _read_gates,
        _write_gates,
        "a number from 0 to 1 for each KV head, the best score of its query heads; scores beyond are scaled to that range",
    ),
    "qrhead": Format(
        lambda content: "attn_head_set" in _yaml(content),
        _read_yaml,
        _write_yaml,
        "heads, best first, as QRRetriever reads them",
    ),
}
