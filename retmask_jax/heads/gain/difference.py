"""What `retmask diff` finds: the changes of weights and scores between two checkpoints, and which parts carry the gain."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from retmask_jax.data.needles import Case
from retmask_jax.generation.language_model import LanguageModel, load, outline
from retmask_jax.heads.builtin_cases import builtin_cases
from retmask_jax.heads.detectors import DETECTORS
from retmask_jax.heads.gain.shares import Gain, PartShares, part_shares, parts_of, tokens_read
from retmask_jax.heads.gain.weights import WeightChanges, check_pair, weight_changes
from retmask_jax.heads.lists.formats import read_heads, read_scores
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Head, all_heads

_DETECTOR = "copy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How two checkpoints are compared.

    Attributes:
        n: Cases to answer, and as many to detect with.
        lengths: Tokens of their prompts.
        seed: Of the choice and order of needles and sentences, and of the heads drawn as controls.
        needles: A JSONL file of the needles that are asked for, or a built-in one by name; None: codes.
        scores: A file that scores heads, the best of which are the group of retrieval heads; None: those of the start model.
        threshold: The score that a retrieval head reaches.
        heads: Those whose shares are measured one by one: a number, of the best by score; or a file of heads, or of
            scores, of which those count that reach the threshold. None: all.
        detect: Whether both models' copy scores are computed.
        dtype: Of parameters and computation.
        batch_size: Rows in a pass.
        ignore: As of `load`.
    """

    n: int = 20
    lengths: tuple[int, ...] = (512,)
    seed: int = 1
    needles: str | None = None
    scores: str | None = None
    threshold: float = 0.1
    heads: str | None = None
    detect: bool = True
    dtype: str = "float32"
    batch_size: int = 8
    ignore: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyScores:
    """Mean copy scores [L][H] of the two models, and how many cases count in each."""

    start: list[list[float]]
    trained: list[list[float]]
    counted: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """changes: of weights. copy_scores: None where they were not computed. retrieval: the heads of that group. gains: by
    measure, "logprob" and "recall". parts: groups first, then heads, then MLPs. versions: of the packages, where the
    command has written it."""

    start: str
    trained: str
    settings: Settings
    changes: WeightChanges
    copy_scores: CopyScores | None
    retrieval: list[Head]
    gains: dict[str, Gain]
    parts: list[PartShares]
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def singly(self) -> int:
        """How many heads were measured one by one."""
        return sum(part.kind == "head" for part in self.parts)

    @property
    def heads(self) -> int:
        """How many heads the models have."""
        return sum(map(len, self.changes.q))


def compare(
    start: str,
    trained: str,
    settings: Settings,
    begins: Callable[[ModelConfig, int], None] = lambda config, tokens: None,
) -> Difference:
    """Loads two checkpoints of one architecture and finds what differs, and where the gain lies.

    Args:
        start, trained: Folders, hub ids, .gguf files or "bundled".
        begins: Called before any weight is read, with the models' config and about how many tokens will be read.

    Raises:
        ValueError: The models do not fit each other or are the same, a setting does not fit them, or no detection case
            counts; before any weight is read where that can be known.
    """
    _check(start, trained, settings)
    outlines = [outline(name, ignore=settings.ignore) for name in (start, trained)]
    check_pair(*outlines)
    config = outlines[0].config
    given = None if settings.scores is None else read_scores(settings.scores, config)
    best, chosen = _singly(settings, config)
    cases = builtin_cases(outlines[0], "test", settings.n, settings.lengths, settings.seed, settings.needles)
    expected = parts_of(config, singly=all_heads(config)[-best:] if best else chosen)
    begins(config, tokens_read(config, expected, cases) + 2 * settings.detect * sum(len(c.tokens) for c in cases))
    ours, theirs = (load(name, settings.dtype, ignore=settings.ignore) for name in (start, trained))
    changes = weight_changes(config, ours.params, theirs.params)
    found = _copy_scores(ours, theirs, settings) if settings.detect else None
    scores = given or (None if found is None else HeadScores.from_array(found.start))
    retrieval = [] if scores is None else scores.heads(threshold=settings.threshold)
    if best and scores is not None:  # as `_singly` makes sure of
        chosen = scores.heads(top_k=best)
    parts = parts_of(config, retrieval, chosen, settings.seed)
    gains, rows = part_shares(config, ours.params, theirs.params, cases, parts, batch_size=settings.batch_size)
    return Difference(
        start=start,
        trained=trained,
        settings=settings,
        changes=changes,
        copy_scores=found,
        retrieval=retrieval,
        gains=gains,
        parts=rows,
    )


def _check(start: str, trained: str, settings: Settings) -> None:
    if start == trained or (Path(start).exists() and Path(trained).exists() and Path(start).samefile(trained)):
        raise ValueError(f"START and TRAINED are both {start}: name a model and what was trained from it")
    for name in ("n", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} is {getattr(settings, name)}; it must be at least 1")


def _singly(settings: Settings, config: ModelConfig) -> tuple[int | None, list[Head] | None]:
    """(how many of the best heads are measured one by one, or which heads); (None, None) for all."""
    wanted, total = settings.heads, config.n_layers * config.n_heads
    if wanted is None:
        return None, None
    if not wanted.isdecimal():
        found = read_heads(wanted, config)
        return None, found.scores.heads(threshold=settings.threshold) if found.scores else found.heads
    if int(wanted) > total:
        raise ValueError(f"--heads is {wanted}, the models have {total} heads: leave it out for all")
    if int(wanted) and not settings.detect and settings.scores is None:
        raise ValueError(f"--heads={wanted} takes the best heads by score: add --scores=FILE, or leave out --no_copy")
    return (int(wanted), None) if int(wanted) else (None, [])


def _copy_scores(start: LanguageModel, trained: LanguageModel, settings: Settings) -> CopyScores:
    """The scores of both models on the same cases; ValueError where none counts."""
    cases = builtin_cases(start, "detect", settings.n, settings.lengths, settings.seed)
    ours, theirs = (_detected(name, lm, cases, settings) for name, lm in (("START", start), ("TRAINED", trained)))
    return CopyScores(
        start=ours.mean.tolist(),
        trained=theirs.mean.tolist(),
        counted=(int(ours.counts.max()), int(theirs.counts.max())),
    )


def _detected(name: str, lm: LanguageModel, cases: Sequence[Case], settings: Settings) -> HeadScores:
    try:
        return DETECTORS[_DETECTOR](lm, cases, batch_size=settings.batch_size).scores
    except ValueError as error:
        raise ValueError(f"{name}: {error}; --no_copy leaves copy scores out") from error
