"""`retmask export --what=scores`: head scores, or lists of heads, in the forms that others read."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from retmask_jax.cli.parser import HEAD_FORMS, PAIR_FORMS
from retmask_jax.heads.lists.formats import FORMATS, HEADS_ALONE, HeadList, read_heads, write_heads
from retmask_jax.model.interventions import Head
from retmask_jax.pipeline.registry import check_upstream
from retmask_jax.runs.context import Context
from retmask_jax.stages.detect import choose_heads, head_scores, retrieval_heads
from retmask_jax.stages.knockout import KNOCKOUT
from retmask_jax.utils.hosts import primary


def format_of(what: str, form: str | None, scores: Path | None) -> str:
    """The format of an export, the usual one where none is named.

    Args:
        what: Is exported; "scores" has formats of `FORMATS`, all else those of `export_pairs`.
        form: That is asked for.
        scores: A file of heads to write, which only goes with "scores".
    """
    forms = HEAD_FORMS if what == "scores" else PAIR_FORMS
    if scores is not None and what != "scores":
        raise ValueError(
            f"--scores={scores} goes with --what=scores alone, and --what is {what}: leave one of them out"
        )
    if form not in (None, *forms):
        raise ValueError(f"--format={form} does not go with --what={what}, whose formats are {', '.join(forms)}")
    return form or forms[0]


def export_heads(context: Context, heads: Sequence[Head] | None, file: Path | None, form: str, out: Path) -> None:
    """Write heads in one of `FORMATS`.

    Args:
        heads: The heads of a list; None for those of the file, or of detection in the work directory.
        file: Of heads, in any form; None for detection. Of scores, detection's settings choose the heads of a list.
    """
    if heads is not None and file is not None:
        raise ValueError(f"--heads and --scores={file} both say which heads: leave one of them out")
    found = heads if heads is not None else _detected(context) if file is None else _read(context, file, form)
    write_heads(out, found, form, context.outline.config, str(context.config.model))
    if primary():
        print(f"wrote {out}: {FORMATS[form].about}")


def _detected(context: Context) -> HeadList:
    """What detection found in the work directory; ValueError where it has not run, or with other settings."""
    check_upstream(context, KNOCKOUT)  # whose heads are those of an up-to-date detection
    return HeadList("", retrieval_heads(context), head_scores(context))


def _read(context: Context, file: Path, form: str) -> HeadList:
    """What a file says; where only heads are to be written, of scores those that detection's settings choose."""
    found = read_heads(file, context.outline.config)
    if found.scores is None or form not in HEADS_ALONE:
        return found
    return dataclasses.replace(found, heads=choose_heads(context, found.scores))
