"""The stages that make pages: `report`, `study` and `comparison`, each from the results of other stages."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.runs.context import Context

# The stages whose results each page shows.
REPORTED = ("detect", "knockout", "rope", "pairs", "train", "eval")
STUDIED = ("detect", "detectors", "knockout", "rope", "utility", "theta", "dynamics")
COMPARED = ("compare",)


def report_stage(context: Context, folder: Path) -> dict[str, Any]:
    """One self-contained HTML page from the results of all stages."""
    from retmask_jax.reports.pages import write_report

    return _page(context, "report", REPORTED, write_report)


def study_stage(context: Context, folder: Path) -> dict[str, Any]:
    """One self-contained HTML page from the results of the causal study's stages."""
    from retmask_jax.reports.study import write_study

    return _page(context, "study", STUDIED, write_study)


def comparison_stage(context: Context, folder: Path) -> dict[str, Any]:
    """One self-contained HTML page from the result of `compare`."""
    from retmask_jax.reports.pages import write_comparison

    return _page(context, "comparison", COMPARED, write_comparison)


def _page(context: Context, name: str, stages: Sequence[str], write: Callable[..., None]) -> dict[str, Any]:
    """NAME.html in the work directory, from the results of some stages."""
    path = context.workdir.root / f"{name}.html"
    write(path, {stage: context.workdir.result(stage) for stage in stages}, str(context.config.model))
    return {"path": path.name, "numbers": {}}
