"""`retmask export --what=scores`: head scores, or lists of heads, in the forms that others read."""

from collections.abc import Sequence
from pathlib import Path

from retmask_jax.cli.parser import HEAD_FORMS, PAIR_FORMS
from retmask_jax.heads.lists.formats import FORMATS, HeadList, read_heads, write_heads
from retmask_jax.model.interventions import Head
from retmask_jax.runs.context import Context
from retmask_jax.stages.detect import choose_heads, head_scores, retrieval_heads
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
    config = context.outline.config
    if heads is not None:
        write_heads(out, heads, form, config, str(context.config.model))
    else:
        found = (
            HeadList("", retrieval_heads(context), head_scores(context)) if file is None else read_heads(file, config)
        )
        if file is not None and found.scores is not None and FORMATS[form].names_heads:
            found = HeadList("", choose_heads(context, found.scores), found.scores)
        write_heads(out, found, form, config, str(context.config.model))
    if primary():
        print(f"wrote {out}: {FORMATS[form].about}")
