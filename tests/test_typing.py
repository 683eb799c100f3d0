"""What type checkers and editors see: the lazy names, and the marker of a typed package."""

import ast
import inspect
from pathlib import Path

import retmask_jax as rm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "retmask_jax"


def test_type_checkers_see_the_names_that_are_loaded_lazily():
    """The imports for them name the modules that run time loads from; __all__ is written out, as they cannot compute it."""
    tree = ast.parse(inspect.getsource(rm))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname or alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"retmask_jax.{home}" for name, home in rm._HOME.items()}
    (written,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    assert ast.literal_eval(written) == ["__version__", *rm._HOME]


def test_the_wheel_has_every_file_that_is_not_code():
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "package_data"
    )
    patterns = ast.literal_eval(call.value)["retmask_jax"]
    shipped = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert PACKAGE / "py.typed" in data and data <= shipped
