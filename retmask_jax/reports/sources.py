"""Results of other runs, to be put side by side: files of head scores, and work directories."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retmask_jax.heads.profile import Scored
from retmask_jax.heads.scores import HeadScores
from retmask_jax.reports.findings import Member
from retmask_jax.runs.workdir import Workdir
from retmask_jax.stages.detect import DetectResult

_THRESHOLD = 0.1


def read_models(sources: Sequence[Path], kv_heads: Sequence[int] = (), threshold: float | None = None) -> list[Scored]:
    """Head scores of each source, a file in RetMask's format or a work directory in which `detect` has finished.

    kv_heads: key/value heads of the files' models, one for all or one each; work directories know their own.
    threshold: None: 0.1 for a file, for a work directory what its heads were chosen by. Raises ValueError for a source
    that is missing or broken, and for kv_heads that are too many or too few.
    """
    files = [source for source in sources if not source.is_dir()]
    if files and len(kv_heads) not in (1, len(files)):
        raise ValueError(
            f"--kv_heads has {len(kv_heads)} numbers for {len(files)} files of scores: give num_key_value_heads of their "
            "models, one for all or one each (8,4)"
        )
    if kv_heads and not files:
        raise ValueError(f"--kv_heads={kv_heads[0]} does not apply: work directories know their own")
    of_file = dict(zip(files, kv_heads * len(files) if len(kv_heads) == 1 else kv_heads, strict=False))
    models = []
    for name, source in zip(_names(sources), sources, strict=True):
        if source.is_dir():
            models.append(_of_run(name, source, threshold))
        else:
            reached = _THRESHOLD if threshold is None else threshold
            models.append(Scored(name, HeadScores.load(source), of_file[source], reached))
    return models


def read_studies(roots: Sequence[Path]) -> list[Member]:
    """The results of every finished stage of each work directory; ValueError for one that is none."""
    members = []
    for name, root in zip(_names(roots), roots, strict=True):
        finished = sorted(path.parent.name for path in root.glob("*/result.json"))
        if not finished:
            raise ValueError(f"{root} is no work directory with results: run `retmask study --workdir={root}` first")
        members.append(Member(name, {stage: Workdir(root, {}).result(stage, dict) for stage in finished}))
    return members


def read_gains(roots: Sequence[Path], number: str) -> list[dict[str, Any]]:
    """Gini coefficient of detection and one number of evaluation of each work directory, for `gain_against_sparsity`.

    number: such as "eval/needle long/retmask minus start". ValueError where a source has none of that name.
    """
    return [_gain(name, root, number) for name, root in zip(_names(roots), roots, strict=True)]


def _of_run(name: str, root: Path, threshold: float | None) -> Scored:
    result = Workdir(root, {}).result("detect", DetectResult)
    scores = root / "detect" / "scores.json"
    if result.n_kv_heads is None:
        raise ValueError(
            f"{root} does not say its key/value heads (it is of an older version): give {scores} and --kv_heads"
        )
    reached = result.reached if threshold is None else threshold
    return Scored(name, HeadScores.load(scores), result.n_kv_heads, reached)


def _gain(name: str, root: Path, number: str) -> dict[str, Any]:
    if not root.is_dir():
        raise ValueError(f"{root} is no work directory: only those have an evaluation")
    detect, evaluation = (Workdir(root, {}).result(stage, dict) for stage in ("detect", "eval"))
    if number not in evaluation["numbers"]:
        changes = ", ".join(name for name in evaluation["numbers"] if name.endswith(" minus start"))
        raise ValueError(f"eval in {root} has no number {number!r}; its changes are {changes}")
    weights = detect["provenance"]["inputs"]["weights"]
    return {
        "name": name,
        "weights": weights,
        "gini": detect["numbers"]["detect/gini"]["value"],
        "gain": evaluation["numbers"][number],
    }


def _names(sources: Sequence[Path]) -> list[str]:
    """What tells the paths apart: the last part that is not the same in all, or the whole where that would be of two."""
    parts = [(source.resolve() if source.is_dir() else source.with_suffix("")).parts for source in sources]
    while len(parts) > 1 and len({path[-1] for path in parts}) == 1 and all(len(path) > 1 for path in parts):
        parts = [path[:-1] for path in parts]
    count = Counter(path[-1] for path in parts)
    return [path[-1] if count[path[-1]] == 1 else str(source) for path, source in zip(parts, sources, strict=True)]
