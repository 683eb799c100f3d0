"""The worked examples of CONTRIBUTING.md do what the text says."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, STORED

from retmask_jax import families
from retmask_jax.lm import load

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def test_a_family_is_one_entry(monkeypatch, close):
    folder = GOLDEN / "example"
    with pytest.raises(ValueError, match="model_type 'gemma' is not supported.*CONTRIBUTING.md"):
        load(folder)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    exec(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], vars(families).copy())
    with np.load(folder / "golden.npz") as golden:
        lm = load(folder)
        close(lm.logits(golden["tokens"])[:, STORED], golden["logits"])


def test_every_module_is_on_the_map():
    package = Path(families.__file__).parent
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    named = set(re.findall(r"`([\w/]+\.py|[\w/]+/)`", TEXT))
    missing = {m for m in modules if m not in named and not any(m.startswith(n) for n in named if n.endswith("/"))}
    assert not missing
