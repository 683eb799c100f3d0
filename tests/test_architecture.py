"""The package's shape: imports go one way, nothing heavy is imported for --help, family names stay in the tables."""

import ast
import collections
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "retmask_jax"

# The packages in the order of the story: each imports only those before it.
PACKAGES = "utils model hf data generation heads training evals runs stages reports pipeline benchmarks aot cli".split()
DATA = "assets"


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__init__.py":
            yield name, path


def _imports(path):
    """(module of the package, whether at the top level) for each import in a file."""
    tree = ast.parse(path.read_text())
    known = {name for name, _ in _modules()}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("retmask_jax"):
            base = node.module.removeprefix("retmask_jax").removeprefix(".")
            whole = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
            names = [name if name in known else base for name in whole]
        yield from (name for name in names if name)


def test_every_module_lies_in_a_package():
    """At the top is nothing but the public names, and each folder says in a sentence what lives in it."""
    assert {name.split(".")[0] for name, _ in _modules()} == set(PACKAGES)
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*PACKAGES, DATA} and [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]
    for init in PACKAGE.glob("*/**/__init__.py"):
        assert re.fullmatch('"""[^"]{20,}[.]"""\n', init.read_text()), init


def test_packages_import_only_those_before_them():
    rank = {name: i for i, name in enumerate(PACKAGES)}
    packages = (
        (name, used, name.split(".")[0], used.split(".")[0]) for name, path in _modules() for used in _imports(path)
    )
    assert not [(name, used) for name, used, ours, theirs in packages if rank[theirs] > rank[ours]]


def test_no_modules_import_each_other():
    uses = {name: {used for used in _imports(path) if used != name} for name, path in _modules()}
    done = set()

    def visit(name, above):
        assert name not in above, f"{' -> '.join([*above[above.index(name) :], name])}"
        if name not in done:
            for used in sorted(uses.get(name, ())):
                visit(used, [*above, name])
            done.add(name)

    for name in uses:
        visit(name, [])


def test_no_module_has_the_name_of_a_public_function():
    import retmask_jax as rm

    assert not {*PACKAGES, DATA} & set(rm.__all__)
    assert all(getattr(rm, name) is not None for name in rm.__all__)


def test_families_are_named_in_the_tables_only():
    family = re.compile(r"llama|qwen|gemma|olmo|mistral|phi", re.IGNORECASE)
    for name, path in _modules():
        if not name.startswith("model.") or name == "model.config":
            continue
        tree = ast.parse(path.read_text())
        words = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        words += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        docs = {
            ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Module))
        }
        # RoPE kinds carry the name their HF form has.
        assert not [w for w in words if family.search(w) and w not in docs and w not in ("llama3", "_llama3")], name


def test_files_and_folders_stay_short():
    assert not {name: n for name, path in _modules() if (n := len(path.read_text().splitlines())) > 400}
    folders = collections.Counter(path.parent for _, path in _modules())
    assert not {folder: n for folder, n in folders.items() if n > 12}


def test_public_functions_are_annotated():
    assert not [
        (name, function.name, bare)
        for name, path in _modules()
        for function in _public_functions(ast.parse(path.read_text()).body)
        if (bare := _bare(function))
    ]


def _public_functions(body):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield from [node] if isinstance(node, ast.FunctionDef) else _public_functions(node.body)


def _bare(function):
    """Names of the parameters without an annotation, and "return" where the result has none."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    bare = [argument.arg for argument in given if argument.annotation is None and argument.arg not in ("self", "cls")]
    return bare + (["return"] if function.returns is None else [])


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from retmask_jax.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "knockout" in done.stdout
