"""Fingerprints: every byte of every file counts, and what is remembered is never used for a file that has changed."""

import os
import shutil
import time

import numpy as np
import pytest

from retmask_jax.hf.hub import BUNDLED
from retmask_jax.runs.context import checkpoint_fingerprint
from retmask_jax.utils import fingerprints
from retmask_jax.utils.fingerprints import fingerprint

OLD = 10**9 * 1_700_000_000  # ns: long before now


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, in which files of any size are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_REMEMBERED", 1)
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """Names of the files whose content is read."""
    names, read = [], fingerprints._read
    monkeypatch.setattr(fingerprints, "_read", lambda file, progress: names.append(file.name) or read(file, progress))
    return names


def _written(path, content: bytes, age=OLD):
    path.write_bytes(content)
    os.utime(path, ns=(age, age))
    return path


@pytest.mark.parametrize("place", [0, 2**20 - 1, 2**20, 3 * 2**20 - 1])
def test_a_change_of_any_byte_changes_the_fingerprint_of_a_large_file(tmp_path, place):
    """Also after the first megabyte, where the weights of a checkpoint begin to differ."""
    content = np.random.default_rng(0).integers(0, 256, 3 * 2**20, np.uint8)
    path = _written(tmp_path / "weights", content.tobytes())
    before = fingerprint(path)
    content[place] ^= 1
    assert fingerprint(_written(path, content.tobytes(), OLD + 1)) != before


def test_a_checkpoint_that_differs_in_its_last_bytes_alone_is_another(tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("notes, which no result depends on")
    assert checkpoint_fingerprint(tmp_path / "model") == checkpoint_fingerprint(BUNDLED)
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert checkpoint_fingerprint(tmp_path / "model") != checkpoint_fingerprint(BUNDLED)


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path, reads):
    path = _written(tmp_path / "weights", b"one")
    assert fingerprint(path) == fingerprint(path) and reads == ["weights"]
    assert fingerprint(_written(path, b"two", OLD + 1)) != fingerprint(_written(tmp_path / "other", b"one"))
    assert reads == ["weights", "weights", "other"]


def test_a_file_that_replaces_another_of_the_same_size_and_time_is_read(tmp_path, reads):
    path = _written(tmp_path / "weights", b"one")
    before = fingerprint(path)
    os.replace(_written(tmp_path / "new", b"two"), path)
    assert fingerprint(path) != before and reads == ["weights", "weights"]


def test_a_file_that_was_only_just_written_is_not_remembered(tmp_path, reads):
    """It could change again under the same time stamp."""
    path = _written(tmp_path / "weights", b"one", time.time_ns())
    assert fingerprint(path) == fingerprint(path) and reads == ["weights", "weights"]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"identity": 1}'])
def test_a_damaged_memory_is_passed_over(tmp_path, own_cache, damage, reads):
    path = _written(tmp_path / "weights", b"one")
    before = fingerprint(path)
    (kept,) = own_cache.rglob("*.json")
    kept.write_bytes(damage)
    assert fingerprint(path) == before and len(reads) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, own_cache):
    own_cache.write_text("a file where the folder should be")
    path = _written(tmp_path / "weights", b"one")
    assert fingerprint(path) == fingerprint(path)
