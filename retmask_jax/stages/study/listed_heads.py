"""The lists of heads that the stages `arena` and `budget` compare, of detectors and of files, and how many heads of each are
ablated."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from retmask_jax.data.builtin_files import path_of
from retmask_jax.heads.knockout import CONTROLS
from retmask_jax.heads.lists.formats import HeadList, read_heads
from retmask_jax.runs.context import Context
from retmask_jax.stages.detect import selection
from retmask_jax.stages.outcomes import kept_in
from retmask_jax.stages.study.detector_runs import run_detector, spread
from retmask_jax.utils.files import digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListRow:
    """A list that is compared.

    Attributes:
        source: "detector" or "file".
        form: Of a file, as in `heads.lists.formats.FORMATS`; "" for a detector.
        heads: How many it has in order; 0 for a detector for which no case counts, which is left out.
        of_kv_heads: It speaks of KV heads, so its heads come in groups that share one.
        cases, counted: Of a detector, how many it ran on and how many of them count; 0 for a file.
    """

    name: str
    source: str
    form: str = ""
    heads: int = 0
    of_kv_heads: bool = False
    cases: int = 0
    counted: int = 0


RANDOM = "random"  # the name of lists that are drawn


def all_lists(context: Context, of: str = "arena") -> tuple[list[ListRow], dict[str, HeadList]]:
    """(a row per detector and file, the lists by name: those of detectors first).

    Args:
        of: The section of the config that names detectors and files.

    Raises:
        ValueError: There is no list, since no case counts for any detector and no file is given; or as of `given_lists`.
    """
    given = given_lists(context, of)
    rows, lists = _detected(context, of)
    rows += [
        ListRow(name=name, source="file", form=found.form, heads=len(found.heads), of_kv_heads=found.of_kv_heads)
        for name, found in given.items()
    ]
    if not lists and not given:
        tried = ", ".join(row.name for row in rows)
        raise ValueError(f"no case counts for {tried}, and no file is given: there is no list of heads to compare")
    return rows, lists | given


def given_lists(context: Context, of: str = "arena") -> dict[str, HeadList]:
    """The lists of files, each under the file's name without its ending, or under its path where that name is taken.

    Raises:
        ValueError: A file is given twice, or as of `read_heads`.
    """
    files, taken = context.config[of].files, (*context.config[of].detectors, *CONTROLS, RANDOM)
    stems = [Path(file).stem for file in files]
    alone = [stems.count(stem) == 1 and stem not in taken for stem in stems]
    if repeated := [file for file in files if files.count(file) > 1]:
        raise ValueError(f"{repeated[0]} is given twice: leave it out once")
    named = {stem if ok else file: file for stem, ok, file in zip(stems, alone, files, strict=True)}
    return {name: read_heads(path_of(file), context.outline.config) for name, file in named.items()}


def sizes_of(context: Context, lists: Mapping[str, HeadList]) -> list[int]:
    """The numbers of heads that are ablated, the same for all lists.

    They are those of the config, or as many as detection's settings choose by the first list's scores, and every list has.

    Raises:
        ValueError: These settings choose none, or as of `check_sizes`.
    """
    model = context.outline.config
    total, lengths = model.n_layers * model.n_heads, {name: len(found.heads) for name, found in lists.items()}
    if sizes := sorted(set(context.config.arena.heads)):
        check_sizes(sizes, lengths, total)
        return sizes
    name, first = next(iter(lists.items()))
    chosen = first.heads if first.scores is None else first.scores.heads(**selection(context))
    if not chosen:
        raise ValueError(
            f"no head of {name} reaches detect.threshold {context.config.detect.threshold}, so it is open how many heads are "
            "compared: set arena.heads, such as 20"
        )
    return [min(len(chosen), total // 2, *lengths.values())]


def check_sizes(sizes: Sequence[int], lengths: Mapping[str, int], total: int) -> None:
    """Raises ValueError for more heads than a list has, or than leave as many others as controls.

    Args:
        lengths: Of the lists, by name.
        total: Heads of the model.
    """
    if 2 * max(sizes) > total:
        raise ValueError(
            f"arena.heads has {max(sizes)}, the model has {total} heads: as many others are needed as controls, so at most "
            f"{total // 2}"
        )
    for name, length in lengths.items():
        if max(sizes) > length:
            raise ValueError(
                f"arena.heads has {max(sizes)}, the list {name} has {length} heads: equal numbers of all lists are compared, "
                "so lower it or leave the list out"
            )


def detection_task(config: ConfigDict, of: str = "arena") -> str:
    """The task that detectors run on."""
    return config[of].detect or config.detect.task


def _detected(context: Context, of: str) -> tuple[list[ListRow], dict[str, HeadList]]:
    """(a row per detector, the lists of those for which cases count).

    Their scores are kept next to answers, so that they are there when files are added.
    """
    rows, lists, section = [], {}, context.config[of]
    if not section.detectors:
        return rows, lists
    cases = context.cases(detection_task(context.config, of))
    chosen = [cases[i] for i in spread(len(cases), section.cases)]
    read = [[case.tokens, case.span, case.statement, case.question, case.needle.answer] for case in chosen]
    options = [context.config.detect.max_new_tokens, context.config.detectors.null_query]
    folder = kept_in(context, "scores") / digest([read, options])
    for name in section.detectors:
        scores = run_detector(context, name, chosen, folder / f"{name}.json").scores
        row = ListRow(name=name, source="detector", cases=len(chosen))
        if scores is not None:
            lists[name] = HeadList("", scores.heads(top_k=scores.mean.size), scores)
            row = dataclasses.replace(row, heads=scores.mean.size, counted=int(scores.counts.max()))
        rows.append(row)
    return rows, lists
