"""Runs the notebooks of colab/ and keeps what they print and draw: `make notebooks`, or with the names of some.

    RETMASK_MODELS=models python tests/make_notebooks.py [1_quickstart ...]

Progress bars, warnings, times and temporary paths are left out, so that a notebook changes only where its results do.
"""

import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

from retmask_jax.hf.packaged_models import MODELS

FOLDER = Path(__file__).parent.parent / "colab"


def run(
    notebook, folder: Path, config: str | None = None, model: str | None = None, timeout: int = 1200, kernel=None
) -> None:
    """Execute all cells but the installing one in a folder.

    config, model: Instead of the notebook's own. kernel: A running one's manager (None: a new one).
    """
    kept = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.source.startswith("%pip install"):
            cell.source = ""
        for name, value in {"CONFIG": config, "MODEL": model}.items():
            if value is not None and cell.cell_type == "code":
                cell.source = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
    # `!retmask` finds the command of this Python; a notebook needs no more than the default of a terminal's colours.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        resources = {"metadata": {"path": folder}}
        # Coalesced: what one cell prints is one text, however it comes in.
        client = nbclient.NotebookClient(
            notebook, timeout=timeout, resources=resources, km=kernel, coalesce_streams=True
        )
        client.execute()
    finally:
        for cell, source in zip(notebook.cells, kept, strict=True):
            cell.source = source


def clean(notebook, folder: Path) -> None:
    """Leave of the outputs what a reader wants and a second run gives again, and say which sources gave it."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "text" in output:
                output["text"] = _plain(output["text"], folder)
            if "text/plain" in output.get("data", {}):
                output["data"]["text/plain"] = _plain(output["data"]["text/plain"], folder)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "sources": sources(notebook),
    }


def real_model() -> str | None:
    """The file of the real model of the notebooks in the folder RETMASK_MODELS, where that is set; else it is on the hub."""
    folder = os.environ.get("RETMASK_MODELS")
    return None if folder is None else str(Path(folder).resolve() / MODELS["smollm2"].file)


def sources(notebook) -> str:
    """A hash of the code that made the outputs."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]


def texts(notebook) -> list[str]:
    """What each code cell has shown and then printed, as text; pictures by their place alone.

    What is printed comes in parts, and sometimes after what was shown later.
    """
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(map(_text, sorted(outputs, key=lambda one: one.output_type == "stream"))) for outputs in cells]


def _text(output) -> str:
    data = output.get("data", {})
    return output.get("text") or ("(a picture)" if "image/png" in data else data.get("text/plain", "")) + "\n"


def _plain(text: str, folder: Path) -> str:
    """Without what progress bars have overwritten, colours, seconds and temporary folders."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text.replace(str(folder), "").replace("\r\n", "\n"))
    text = re.sub(r"^.*\r", "", text, flags=re.MULTILINE)
    return re.sub(r"^(\w+: )\d+ s$", r"\1done", text, flags=re.MULTILINE)


def main(names: list[str]) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, Path(folder), model=real_model())
            clean(notebook, Path(folder))
        nbformat.write(notebook, path)
        print(f"wrote {path.name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
