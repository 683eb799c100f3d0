"""The README's experiment runs as printed, and says what it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_experiment_runs_as_printed_with_one_compile_per_use(caplog):
    import jax

    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    printed = re.search(r"```python\n.*?```\s+It prints\s+```\n(.*?)```", README, re.DOTALL).group(1)
    output, scope = io.StringIO(), {}
    with contextlib.redirect_stdout(output):
        exec(code, scope)
    assert numbers(output.getvalue()) == pytest.approx(numbers(printed), abs=0.02)

    compiled = jax.jit(jax.vmap(scope["logp"]))
    compiled(scope["masks"])
    compiled(jax.tree.map(lambda mask: ~mask, scope["masks"]))
    assert compiled._cache_size() == 1


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]


def test_commands_and_files_of_the_readme_exist():
    root = Path(__file__).parent.parent
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for name in re.findall(r"--config=(\w+)\b(?!\.)", README):
        assert (root / "configs" / f"{name}.py").exists(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / link).exists(), link
