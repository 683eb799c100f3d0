"""A stage that makes a page: NAME.html in the work directory, from the results of other stages."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.runs.workdir import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageResult(Result):
    """path: of the page, within the work directory."""

    path: str


def write_page(
    context: Context, stage: Stage, write: Callable[[Path, Mapping[str, Any], str], None], name: str | None = None
) -> PageResult:
    """Write the page of a stage from the results of those it reads. name: of the file, where it is not that of the stage."""
    path = context.workdir.root / f"{name or stage.name}.html"
    write(path, {needed.name: needed.of(context) for needed in stage.upstream}, str(context.config.model))
    return PageResult(path=path.name, numbers={})
