"""Every public name has an example in its docstring, which runs as it stands and prints what it says."""

import doctest
import inspect

import pytest

import retmask_jax as rm

PUBLIC = [name for name in rm.__all__ if name != "__version__"]
METHODS = [
    f"{name}.{method}" for name in ("LanguageModel", "HeadScores") for method, value in vars(getattr(rm, name)).items()
    if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod))
]  # fmt: skip
NAMES = [*PUBLIC, *METHODS, "Interventions.none", "Interventions.__or__"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_prints_what_it_says(name, tmp_path, monkeypatch):
    """In a folder and with names of its own, as it would be pasted."""
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(docstring(name), {}, name, None, None)
    assert example.examples, f"{name} has no example"
    assert any(line.want for line in example.examples), f"the example of {name} prints nothing"
    told = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=told.append).failed == 0, "".join(told)


def docstring(name):
    value = rm
    for part in name.split("."):
        value = getattr(value, part)
    return value.__doc__ or ""
