"""Every notebook runs at small size, and shows what the code at hand gives; quick tests look its calls up only."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from make_notebooks import FOLDER, clean, real_model, run, sources, texts

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = str(Path(__file__).with_name("tiny_small.py"))
NUMBER = re.compile(r"-?\d+\.\d+")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all notebooks: what one has found, detected heads say, the next one finds there, as it would at a user's."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def kernel(folder):
    """One for all notebooks, emptied before each: half of a small run would be importing and compiling again."""
    manager = KernelManager()
    manager.start_kernel(cwd=str(folder))
    yield manager
    manager.shutdown_kernel(now=True)


@every_notebook
def test_what_a_notebook_calls_is_there_and_takes_its_arguments(path):
    """Names from the package, as far as they can be known without running: modules, functions, and their arguments."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    tree = ast.parse("\n".join(re.sub(r"^[%!].*$", "", cell, flags=re.MULTILINE) for cell in cells))
    known, checked = _imported(tree), 0
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = _looked_up(call.func, known)
        starred = any(isinstance(argument, ast.Starred) for argument in call.args)
        if callable(function) and not starred and not any(keyword.arg is None for keyword in call.keywords):
            inspect.signature(function).bind(*call.args, **{str(keyword.arg): 0 for keyword in call.keywords})
            checked += 1
    assert checked >= 2


def test_the_look_up_of_calls_finds_what_is_not_there():
    known = _imported(ast.parse("import retmask_jax as rm"))
    with pytest.raises(AttributeError, match="mask_tails"):
        _looked_up(ast.parse("rm.mask_tails", mode="eval").body, known)


def _imported(tree: ast.Module) -> dict:
    """{name in the notebook: what it stands for} of the imports from the package."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [name for name in node.names if name.name == "retmask_jax"]
            known |= {name.asname or name.name: importlib.import_module(name.name) for name in ours}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("retmask_jax"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                known[name.asname or name.name] = getattr(module, name.name)
    return known


def _looked_up(node: ast.expr, known: dict):
    """What an expression such as rm.Interventions.none stands for; None where only running it would tell."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _looked_up(node.value, known)) is not None:
        return getattr(owner, node.attr)
    return None


@every_notebook
@pytest.mark.slow
def test_a_notebook_runs_at_small_size(path, folder, kernel):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    run(notebook, folder, SMALL, "bundled", timeout=300, kernel=kernel)
    shown = "\n".join(texts(notebook))
    for words in re.findall(r"<!-- shows: (.*?) -->", "\n".join(cell.source for cell in notebook.cells)):
        assert words in shown


@every_notebook
def test_a_notebook_is_short_and_shows_what_its_cells_gave(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 25 and path.stat().st_size < 400_000
    assert notebook.metadata.get("sources") == sources(notebook), f"{path.name} was changed: run `make notebooks`"
    promised = re.findall(r"<!-- shows: (.*?) -->", "\n".join(cell.source for cell in notebook.cells))
    assert all(words in "\n".join(texts(notebook)) for words in promised)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(outputs) >= 5 and not [output for output in outputs if output.output_type == "error"]
    assert not re.search(r"/(tmp|home|root|work)/|site-packages|\r", "\n".join(texts(notebook)))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.real if path.stem[0] == "1" else pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_at_full_size_shows_what_is_kept(path, tmp_path):
    """The first one needs a real model."""
    kept, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    run(notebook, tmp_path, model=real_model())
    clean(notebook, tmp_path)
    for before, now in zip(texts(kept), texts(notebook), strict=True):
        assert NUMBER.sub("#", now) == NUMBER.sub("#", before)
        values = [[float(number) for number in NUMBER.findall(text)] for text in (now, before)]
        assert values[0] == pytest.approx(values[1], rel=0.02, abs=0.02)
