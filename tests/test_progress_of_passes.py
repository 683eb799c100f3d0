"""No loop over a model's passes is without a bar, read from the sources of the whole package.

A pass is a call of a compiled function that gets parameters. It may stand by itself; what repeats it, however far away,
does so under a bar of `progress`, which is never silent for long (test_progress.py).
"""

import ast
import dataclasses
from pathlib import Path

import pytest

import retmask_jax

PACKAGE = Path(retmask_jax.__file__).parent
# Measured against a clock, with output of their own between the measurements.
LEFT_OUT = ("benchmarks",)
BARS = {"track", "with_rate", "in_batches"}  # what they are given runs under a bar
HELD = {"programs.gradients", "programs.accumulate"}  # compiled functions that an object holds
GENERATORS = {("generation.continuations", "shared_batches")}  # public, but what they yield is worked on under a bar
COMPILED = {"compile", "largest_batch"}  # what gives a compiled program
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.Lambda)


def unbarred_loops(sources: dict[str, str]) -> set[str]:
    """ "module.function" of every loop over passes that runs under no bar; sources: module -> text."""
    package = _Package(sources)
    return {
        f.name
        for f in package.functions.values()
        for call in f.calls
        if call.in_loop
        and not call.barred
        and f.key not in package.under_bar
        and (call.is_pass or package.passing & set(call.targets))
    }


@dataclasses.dataclass
class _Call:
    targets: tuple  # keys of the functions that may be meant
    in_loop: bool
    barred: bool
    is_pass: bool


@dataclasses.dataclass
class _Function:
    key: tuple[str, str]  # module, name
    compiled: bool
    calls: list[_Call]

    @property
    def name(self) -> str:
        return ".".join(self.key)


class _Package:
    """functions; passing: those that make a pass under no bar of their own; under_bar: those that only run under one."""

    def __init__(self, sources: dict[str, str]):
        trees = {module: ast.parse(text) for module, text in sources.items()}
        self.defined = {
            (module, node.name)
            for module, tree in trees.items()
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
        }
        self.methods = {
            (module, method.name)
            for module, tree in trees.items()
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            for method in node.body
            if isinstance(method, ast.FunctionDef)
        }
        self.functions: dict[tuple, _Function] = {}
        for module, tree in trees.items():
            names = _imported(tree) | {name: (module, name) for of, name in self.defined if of == module}
            for node in tree.body:
                for one in node.body if isinstance(node, ast.ClassDef) else [node]:
                    if isinstance(one, ast.FunctionDef):
                        self._add(module, one, names)
        self.passing = self._passing()
        self.under_bar = self._under_bar()

    def _add(self, module: str, node: ast.FunctionDef, names: dict) -> None:
        found = self.functions.setdefault((module, node.name), _Function((module, node.name), False, []))
        compiled = any("jax.jit" in ast.unparse(one) for one in node.decorator_list)
        found.compiled |= compiled and bool({"params", "shared"} & {arg.arg for arg in node.args.args})
        if not compiled:
            _Reader(self, names, found.calls).read(node)

    def _passing(self) -> set[tuple]:
        compiled = {key for key, f in self.functions.items() if f.compiled}
        found: set[tuple] = set(compiled)
        while True:
            more = {
                key
                for key, f in self.functions.items()
                for call in f.calls
                if not call.barred and (call.is_pass or found & set(call.targets))
            } | compiled
            if more == found:
                return found
            found = more

    def _under_bar(self) -> set[tuple]:
        """Private functions, and generators, of which every call is under a bar, or in a function that is."""
        sites: dict[tuple, list] = {}
        for key, f in self.functions.items():
            for call in f.calls:
                for target in call.targets:
                    sites.setdefault(target, []).append((key, call.barred))
        found = {key for key in sites if key[1].startswith("_") or key in GENERATORS}
        while True:
            kept = {key for key in found if all(barred or caller in found for caller, barred in sites[key])}
            if kept == found:
                return found
            found = kept


class _Reader:
    """Collects the calls of a function, functions within it included: where they are called they stand."""

    def __init__(self, package: _Package, names: dict, calls: list):
        self.package, self.names, self.calls = package, names, calls
        self.inner: dict[str, ast.AST] = {}
        self.programs: set[str] = set()

    def read(self, node: ast.FunctionDef) -> None:
        nested = [one for one in ast.walk(node) if isinstance(one, ast.FunctionDef) and one is not node]
        self.inner = {one.name: one for one in nested}
        self.programs = {
            name.id
            for one in ast.walk(node)
            if isinstance(one, ast.Assign) and self._calls_any(one.value, COMPILED)
            for target in one.targets
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        }
        self._block(node.body, False, False, ())

    def _block(self, nodes, in_loop: bool, barred: bool, inside: tuple) -> None:
        for node in nodes:
            self._visit(node, in_loop, barred, inside)

    def _visit(self, node, in_loop: bool, barred: bool, inside: tuple) -> None:
        if isinstance(node, ast.FunctionDef):
            return  # where it is named
        if isinstance(node, ast.With):
            shown = barred or any(self._calls_any(item.context_expr, BARS) for item in node.items)
            self._block([item.context_expr for item in node.items], in_loop, barred, inside)
            return self._block(node.body, in_loop, shown, inside)
        if isinstance(node, ast.For):
            shown = barred or self._calls_any(node.iter, BARS)
            self._visit(node.iter, in_loop, shown, inside)
            return self._block([*node.body, *node.orelse], True, shown, inside)
        if isinstance(node, _LOOPS):
            generators = getattr(node, "generators", [])
            shown = barred or any(self._calls_any(one.iter, BARS) for one in generators)
            if generators:
                self._visit(generators[0].iter, in_loop, shown, inside)
            repeated = [child for child in ast.iter_child_nodes(node) if child not in generators[:1]]
            return self._block(repeated, True, shown, inside)
        if isinstance(node, ast.Call):
            barred = barred or self._name(node) in BARS
            self._call(node, in_loop, barred)
        if isinstance(node, ast.Name) and node.id in self.inner and node.id not in inside:
            # A function within this one, called or handed on: to what may call it again and again.
            body = self.inner[node.id].body
            return self._block(body, in_loop, barred, (*inside, node.id))
        self._block(ast.iter_child_nodes(node), in_loop, barred, inside)

    def _call(self, node: ast.Call, in_loop: bool, barred: bool) -> None:
        name, targets, is_pass = self._name(node), (), False
        if isinstance(node.func, ast.Name):
            targets = (self.names[name],) if name in self.names else ()
            is_pass = name in self.programs
        elif isinstance(node.func, ast.Attribute):
            module = self.names.get(node.func.value.id) if isinstance(node.func.value, ast.Name) else None
            if module is not None and (module[1] or module[0], name) in self.package.defined:
                targets = ((module[1] or module[0], name),)
            else:
                targets = tuple(key for key in self.package.methods if key[1] == name)
            is_pass = ".".join(ast.unparse(node.func).split(".")[-2:]) in HELD
        self.calls.append(_Call(targets, in_loop, barred, is_pass))

    def _calls_any(self, node, wanted: set[str]) -> bool:
        return any(isinstance(one, ast.Call) and self._name(one) in wanted for one in ast.walk(node))

    def _name(self, call: ast.Call) -> str:
        return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _imported(tree) -> dict[str, tuple[str, str]]:
    """{name: (module, function)} of what is imported from the package; modules are imported like functions."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("retmask_jax"):
            module = node.module.removeprefix("retmask_jax").lstrip(".")
            for alias in node.names:
                found[alias.asname or alias.name] = (module, alias.name) if module else ("", alias.name)
    return found


def _sources() -> dict[str, str]:
    files = {file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py")}
    return {
        ".".join(file.with_suffix("").parts): (PACKAGE / file).read_text()
        for file in files
        if file.parts[0] not in LEFT_OUT
    }


def test_every_loop_over_passes_of_the_package_has_a_bar():
    assert unbarred_loops(_sources()) == set()


ONE_PASS = """
@functools.partial(jax.jit, static_argnums=0)
def _logprobs(config, params, tokens):
    return hidden(config, params, tokens)

def logprobs(lm, tokens):
    return _logprobs(lm.config, lm.params, tokens)
"""
USE = "from retmask_jax.one import logprobs\nfrom retmask_jax import memory\n"
WORK = " def work(todo, n):\n  for i in todo:\n   yield logprobs(lm, i)\n"
INNER = "def _g(lm, rows):\n for row in rows:\n  yield logprobs(lm, row)"


@pytest.mark.parametrize(
    "text, found",
    [
        # What `activity` was: a pass per head and window.
        (
            "def activity(lm, masks):\n for mask in masks:\n  parts = [logprobs(lm, rows) for rows in lm]",
            {"two.activity"},
        ),
        ("def f(lm, rows):\n for row in track(rows, 1, '', ''):\n  logprobs(lm, row)", set()),
        ("def f(lm, rows):\n with track(None, 1, '', '') as bar:\n  return [logprobs(lm, row) for row in rows]", set()),
        ("def f(lm, rows):\n" + WORK + " return memory.in_batches(1, 1, '', '', work)", set()),
        ("def f(lm, rows):\n" + WORK + " return list(work(rows, 1))", {"two.f"}),
        ("def f(lm, rows):\n return g(lm, rows)\ndef g(lm, row):\n return logprobs(lm, row)", set()),  # one pass
        ("def f(lm, rows):\n while rows:\n  g(lm, rows.pop())\ndef g(lm, row):\n return logprobs(lm, row)", {"two.f"}),
        ("def f(lm, rows):\n return with_rate(_g(lm, rows), 1)\n" + INNER, set()),
        ("def f(lm, rows):\n return _g(lm, rows)\n" + INNER, {"two._g"}),
        ("def f(size):\n p, program = memory.largest_batch(size)\n for i in range(size):\n  program(i)", {"two.f"}),
    ],
)
def test_what_counts_as_a_loop_without_a_bar(text, found):
    assert unbarred_loops({"one": ONE_PASS, "two": USE + text}) == found
