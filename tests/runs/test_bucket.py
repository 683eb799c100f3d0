"""Work directories on object stores: no folder is renamed, nothing depends on new files being listed at once, and the
addresses of buckets reach Orbax as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers_bucket import mount

from retmask_jax.generation.language_model import load, save
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.model.interventions import mask_heads
from retmask_jax.pipeline.registry import RUN
from retmask_jax.runs.context import checkpoint_fingerprint
from retmask_jax.runs.workdir import Basis, Result, Workdir
from retmask_jax.training.checkpoints import Checkpoints
from retmask_jax.training.loop import _checkpoint_folder
from retmask_jax.utils.files import is_whole, mark_whole
from retmask_jax.utils.store import Store

HERE = Path(__file__).parents[1]
LATE = 2.0  # seconds


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    root = tmp_path / "bucket"
    root.mkdir()
    mount(root, LATE, monkeypatch.setattr)
    return root


def test_the_bucket_renames_no_folder_and_lists_late(bucket):
    (bucket / "folder").mkdir()
    (bucket / "file").write_text("text")
    with pytest.raises(OSError, match="cannot be renamed"):
        (bucket / "folder").rename(bucket / "other")
    assert list(bucket.iterdir()) == os.listdir(bucket) == list(bucket.glob("*")) == []
    (bucket / "file").rename(bucket / "moved")
    assert (bucket / "moved").read_text() == "text"
    os.utime(bucket / "moved", (0, 0))
    assert os.listdir(bucket) == ["moved"]


def test_checkpoints_are_written_read_and_thinned_out(bucket):
    state = {"a": jnp.arange(4.0)}
    with Checkpoints(bucket / "checkpoints", 1, {"data": "f"}) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"a": state["a"] + step}, {"step": step}, loss=float(step))
    with Checkpoints(bucket / "checkpoints", 1, {"data": "f"}) as checkpoints:
        assert checkpoints.latest == 3
        restored, data = checkpoints.restore(state)
        assert restored["a"].tolist() == [3, 4, 5, 6] and data == {"step": 3}
    kept = {step for step in "123" if (bucket / "checkpoints" / step / "commit_success.txt").exists()}
    assert kept == {"1", "3"}  # the best and the newest


def test_a_checkpoint_whose_last_file_is_missing_is_none(bucket):
    state = {"a": jnp.arange(4.0)}
    with Checkpoints(bucket / "checkpoints", 3, {"data": "f"}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {}, loss=1.0)
    (bucket / "checkpoints" / "2" / "commit_success.txt").unlink()
    with Checkpoints(bucket / "checkpoints", 3, {"data": "f"}) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(2, state, {}, loss=1.0)
    with Checkpoints(bucket / "checkpoints", 3, {"data": "f"}) as checkpoints:
        assert checkpoints.latest == 2


def test_a_model_is_written_marked_and_recognised_at_once(bucket):
    save(load("bundled"), bucket / "model")
    assert not is_whole(bucket / "model")
    mark_whole(bucket / "model")
    assert is_whole(bucket / "model") and checkpoint_fingerprint(bucket / "model") == checkpoint_fingerprint(BUNDLED)


def test_answers_that_were_stored_a_moment_ago_are_seen_by_the_next_run(bucket):
    for key in range(3):
        with Store(bucket / "answers") as answers:
            assert len(list(answers)) == key
            answers.add((key,), "text")


def test_what_no_longer_fits_is_set_aside_without_renaming_a_folder(bucket):
    def function(folder):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "weights").write_text("weights")
        return Result(numbers={})

    Workdir(bucket, {}).run("train", Basis(inputs={"weights": "one"}), function)
    Workdir(bucket, {}).run("train", Basis(inputs={"weights": "two"}), lambda folder: Result(numbers={}))
    assert (bucket / "set-aside" / "train-1" / "model" / "weights").read_text() == "weights"
    assert not (bucket / "train" / "model" / "weights").exists()


def test_the_address_of_a_bucket_reaches_orbax_as_it_is(monkeypatch, tmp_path):
    import orbax.checkpoint as ocp

    given = []
    monkeypatch.setattr(ocp, "CheckpointManager", lambda folder, options: given.append(str(folder)))
    Checkpoints("gs://bucket/runs/a", 1, {"data": "f"})
    Checkpoints(tmp_path / "a", 1, {"data": "f"})
    assert given == ["gs://bucket/runs/a", str(tmp_path / "a")]


def test_each_run_has_a_folder_of_its_own_in_the_bucket_and_finds_it_again(tmp_path):
    places = {name: _checkpoint_folder(tmp_path / name, "gs://bucket/runs/") for name in ("retmask-0", "retmask-1")}
    assert all(place.startswith(f"gs://bucket/runs/{name}-") for name, place in places.items())
    assert _checkpoint_folder(tmp_path / "retmask-0", "gs://elsewhere") == places["retmask-0"]
    assert _checkpoint_folder(tmp_path / "retmask-0", "") == tmp_path / "retmask-0" / "checkpoints"


@pytest.mark.slow
def test_the_whole_pipeline_runs_and_goes_on_in_a_bucket(tmp_path):
    """With weights swapped in between, so that every stage is set aside and made again."""
    root, model = tmp_path / "bucket", tmp_path / "model"
    save(load("bundled"), model)
    command = [
        sys.executable,
        str(HERE / "helpers_bucket.py"),
        str(root),
        str(LATE),
        "run",
        f"--config={HERE / 'tiny_small.py'}",
        f"--workdir={root}",
        f"--config.model={model}",
    ]
    done = [subprocess.run(command, capture_output=True, text=True) for _ in range(2)]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    assert [one.stdout.count("unchanged") for one in done] == [0, len(RUN)]
    save(load("bundled"), model, mask_heads(load("bundled").config, [(3, 7)]))
    last = subprocess.run(command, capture_output=True, text=True)
    assert last.returncode == 0 and last.stdout.count("unchanged") == 0, last.stderr[-2000:]
    assert sorted(path.name for path in (root / "set-aside").iterdir()) == sorted(f"{stage.name}-1" for stage in RUN)
    numbers = json.loads((root / "summary.json").read_text())
    assert (
        numbers["knockout/needle short/none"]["value"] > 0.8 > 0.2 > numbers["knockout/needle short/retrieval"]["value"]
    )
