"""The work directory: one writer at a time, and what may change between runs."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from retmask_jax.cli.main import main
from retmask_jax.runs import workdir
from retmask_jax.runs.lock import check_free, locked
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.runs.workdir import Basis, Result, Workdir, settings_of

HOLDER = """
import sys, time
from retmask_jax.runs.lock import locked

with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes tmp_path/work."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "work"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_that_another_process_writes_is_refused_until_it_dies(holder, tmp_path, capsys):
    root = tmp_path / "work"
    wanted = f"retmask: work directory {root} is being written by process {holder.pid} on {socket.gethostname()}: "
    for stage in ("run", "detect"):
        assert main([stage, "--config=tiny", f"--workdir={root}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(wanted) and error.count("\n") == 1
    with pytest.raises(ValueError, match="is being written by process"):
        Workdir(root, {}).run("detect", Basis(), lambda folder: pytest.fail("ran"))
    assert [path.name for path in root.iterdir()] == [".lock"]
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    check_free(root)
    held = []
    Workdir(root, {}).run("detect", Basis(), lambda folder: held.append(_is_held(root)) or Result(numbers={}))
    assert held == [True] and not _is_held(root)


def test_looking_for_a_writer_leaves_no_folder(tmp_path):
    check_free(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_folder_with_nothing_but_a_lock_is_ours(tmp_path):
    with locked(tmp_path):
        pass
    assert Workdir.open(tmp_path, load_recipe("tiny")).root == tmp_path


def test_servers_may_move_between_runs(tmp_path):
    def open_with(urls, concurrency=64, **pairs):
        overrides = {"endpoints": urls, "concurrency": concurrency} | pairs
        config = load_recipe("tiny", [(f"pairs.{name}", str(value)) for name, value in overrides.items()])
        return Workdir.open(tmp_path, config)

    def of_pairs(work):
        return Basis(settings_of(work.config, ("pairs.*",)))

    ran = []
    work = open_with({"normal": "http://a", "retmask": "http://b"})
    assert work.run("pairs", of_pairs(work), lambda folder: ran.append(1) or Result(numbers={}))
    assert json.loads((tmp_path / "config.json").read_text())["pairs"]["endpoints"]["normal"] == "http://a"
    again = open_with({"retmask": "http://c", "normal": "http://d"}, concurrency=8)
    assert again.run("pairs", of_pairs(again), lambda folder: ran.append(2) or Result(numbers={})) is False
    assert ran == [1]
    with pytest.raises(ValueError, match="pairs.endpoints: .*there, .* here"):
        open_with({})
    with pytest.raises(ValueError, match="pairs.temperature: 0.6 there, 0.7 here"):
        open_with({"normal": "http://a", "retmask": "http://b"}, temperature=0.7)


def _is_held(root) -> bool:
    """Whether whoever opens the lock anew is refused, as another process is."""
    try:
        check_free(root)
    except ValueError:
        return True
    return False


# --- what a result rests on ---


def _run(work, ran, settings=("train.*",), inputs=None, stage="train", files=("a.txt",)):
    """Whether a stage is skipped; else it writes some files and notes that it ran."""

    def function(folder):
        ran.append(stage)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{name} of run {len(ran)}")
        return Result(numbers={})

    return not work.run(stage, Basis(settings_of(work.config, settings), inputs or {}), function)


def _files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _opened(root, aside=False, **changes):
    return Workdir.open(root, load_recipe("tiny", [(key, str(value)) for key, value in changes.items()]), aside)


@pytest.mark.parametrize(
    "key, value",
    [
        ("batch_size", 3),
        ("cpu_devices", 2),
        ("kernel", "blocked"),
        ("mesh.fsdp", 2),
        ("distributed", False),
        ("train.microbatch_size", 2),
        ("train.reference_batch_size", 4),
        ("train.checkpoint_every", 7),
        ("train.keep", 1),
        ("train.remat", True),
        ("train.widths", 2),
        ("train.profile", (1, 2)),
        ("train.checkpoint_folder", "gs://bucket"),
        ("pairs.concurrency", 2),
        ("pairs.timeout", 5.0),
        ("pairs.retries", 1),
        ("headlines", ()),
    ],
)
def test_what_only_says_how_to_compute_may_change_at_any_time(tmp_path, key, value):
    ran = []
    assert not _run(_opened(tmp_path), ran, ("*",))
    assert _run(_opened(tmp_path, **{key: value}), ran, ("*",)) and ran == ["train"]


def test_settings_of_a_stage_that_has_not_begun_may_change(tmp_path):
    ran = []
    _run(_opened(tmp_path), ran, ("detect.*",), stage="detect")
    work = _opened(tmp_path, **{"train.steps": 7, "eval.tasks": ("closed-book",)})
    assert _run(work, ran, ("detect.*",), stage="detect") and not _run(work, ran)
    with pytest.raises(ValueError, match="train.steps: 7 there, 60 here"):
        _opened(tmp_path)


def test_another_version_of_a_package_keeps_results_and_what_a_cut_run_left(tmp_path, monkeypatch, caplog):
    """The README tells people to install again after a preemption."""
    ran, answers = [], tmp_path / "pairs" / "answers" / "000000.jsonl"

    def cut(folder):
        answers.parent.mkdir()
        answers.write_text("an answer\n")
        raise KeyboardInterrupt

    work = _opened(tmp_path)
    _run(work, ran)
    basis = Basis(settings_of(work.config, ("pairs.*",)))
    with pytest.raises(KeyboardInterrupt):
        work.run("pairs", basis, cut)
    before = workdir.versions()
    monkeypatch.setattr(workdir, "versions", lambda: before | {"jax": "99.0", "retmask_jax": "98.0"})
    assert _run(_opened(tmp_path), ran) and ran == ["train"]
    assert f"train: what is kept was made with retmask_jax {before['retmask_jax']}, now 98.0, jax" in caplog.text
    kept = []
    assert _opened(tmp_path).run("pairs", basis, lambda folder: kept.append(answers.read_text()) or Result(numbers={}))
    assert kept == ["an answer\n"] and _opened(tmp_path).provenance("pairs").versions["jax"] == "99.0"
    assert "pairs: what is kept was made with" in caplog.text


@pytest.mark.parametrize("finished", [True, False])
def test_what_no_longer_fits_is_set_aside_whole_and_said(tmp_path, caplog, finished):
    ran, names = [], ("a.txt", "model/weights", "model/deep/er")
    _run(_opened(tmp_path), ran, inputs={"weights": "one"}, files=names)
    if not finished:
        (tmp_path / "train" / "result.json").unlink()
    before = _files(tmp_path / "train")
    assert not _run(_opened(tmp_path), ran, inputs={"weights": "two"}, files=names[:1])
    assert _files(tmp_path / "set-aside" / "train-1") == before
    assert set(_files(tmp_path / "train")) == {"a.txt", "started.json", "result.json"}
    (line,) = caplog.messages
    assert line == (
        "train is made again (weights: 'one' there, 'two' here); what was there is kept in "
        f"{tmp_path / 'set-aside' / 'train-1'}"
    )
    assert not _run(_opened(tmp_path), ran, inputs={"weights": "three"})
    assert sorted(path.name for path in (tmp_path / "set-aside").iterdir()) == ["train-1", "train-2"]


def test_other_settings_set_a_stage_aside_only_where_the_user_says_so(tmp_path):
    ran = []
    _run(_opened(tmp_path), ran)
    before = _files(tmp_path)
    with pytest.raises(ValueError, match="train.steps: 60 there, 7 here.*--set-aside"):
        _opened(tmp_path, **{"train.steps": 7})
    assert _files(tmp_path) == before
    assert not _run(_opened(tmp_path, aside=True, **{"train.steps": 7}), ran)
    kept = {name.removeprefix("train/"): content for name, content in before.items() if name.startswith("train/")}
    assert _files(tmp_path / "set-aside" / "train-1") == kept


@pytest.mark.parametrize("finished", [True, False])
def test_folders_that_stay_are_left_where_they_are_and_named(tmp_path, caplog, finished):
    names, work = ("run-0/model", "run-1/deep/model", "rate/run-2/model", "rate/run-3/model"), _opened(tmp_path)
    _run(work, [], inputs={"weights": "one"}, files=names)
    if not finished:
        (tmp_path / "train" / "result.json").unlink()
    before, asked, basis = _files(tmp_path / "train"), [], Basis(inputs={"weights": "two"})
    left = lambda folder: asked.append(folder) or ("run-0", "rate/run-3")  # noqa: E731
    there = []
    work.run("train", basis, lambda folder: there.extend(_files(folder)) or Result(numbers={}), stays=left)
    assert asked == [tmp_path / "train"] and set(there) == {"run-0/model", "rate/run-3/model", "started.json"}
    moved = {name: content for name, content in before.items() if name not in there or name == "started.json"}
    assert _files(tmp_path / "set-aside" / "train-1") == moved
    assert caplog.messages[0].endswith("train-1, but for rate/run-3, run-0, made from what has not changed")
    assert not work.run("train", basis, pytest.fail, stays=pytest.fail)  # nothing is asked where nothing has changed


@pytest.mark.parametrize("staying", [(), ("run-0",)])
def test_a_move_that_is_cut_off_goes_on_in_the_same_place(tmp_path, monkeypatch, staying):
    ran, replace = [], os.replace
    _run(_opened(tmp_path), ran, files=("a", "b", "c", "run-0/model"))
    before = _files(tmp_path / "train")
    with monkeypatch.context() as patch:
        moved = []
        patch.setattr(
            os, "replace", lambda old, new: moved.append(old) if len(moved) < 2 and not replace(old, new) else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            workdir.set_aside(tmp_path / "train", tmp_path / "set-aside", staying)
    assert len(staying) < len(_files(tmp_path / "train")) < len(before)
    workdir.set_aside(tmp_path / "train", tmp_path / "set-aside", staying)
    left = {name: before.pop(name) for name in before.copy() if name.split("/")[0] in staying}
    assert _files(tmp_path / "set-aside" / "train-1") == before and _files(tmp_path / "train") == left


def test_a_work_directory_of_version_0_1_is_refused_in_one_line_or_set_aside(tmp_path):
    old = {"provenance": {"stage": "train", "config": "0", "inputs": {}, "versions": {"retmask_jax": "0.1.0"}}}
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "result.json").write_text(json.dumps(old))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="made by retmask_jax 0.1.0.*another --workdir, or add --set-aside"):
        _opened(tmp_path)
    assert not _run(_opened(tmp_path, aside=True), [])
    assert json.loads((tmp_path / "set-aside" / "train-1" / "result.json").read_text()) == old


def test_a_key_that_a_later_version_adds_changes_no_result(tmp_path):
    ran, work = [], _opened(tmp_path)
    newer = dataclasses.replace(work, config=work.config | {"train": work.config["train"] | {"new": 1}})
    assert not _run(work, ran) and _run(newer, ran)


def test_template_arguments_that_are_added_make_another_config(tmp_path):
    _run(_opened(tmp_path), [], ("prompt.*",))
    with pytest.raises(ValueError, match="prompt.template_kwargs: {} there, {'enable_thinking': False} here"):
        _opened(tmp_path, **{"prompt.template_kwargs": {"enable_thinking": False}})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Newer(Result):
    more: int


def test_a_result_of_another_form_is_kept_and_the_stage_goes_on_from_its_files(tmp_path, caplog):
    ran = []
    _run(_opened(tmp_path), ran, files=("answers",))
    before, work = _files(tmp_path / "train"), _opened(tmp_path)
    with pytest.raises(
        ValueError, match="written by another version .* missing required field `more`.*run `retmask train`"
    ):
        work.result("train", _Newer)
    basis = Basis(settings_of(work.config, ("train.*",)))
    for number in (1, 2):
        assert work.run("train", basis, lambda folder: Result(numbers={}), kind=_Newer)
        assert (tmp_path / "set-aside" / f"train-result-{number}.json").exists()
    assert (tmp_path / "set-aside" / "train-result-1.json").read_bytes() == before["result.json"]
    assert (tmp_path / "train" / "answers").read_bytes() == before["answers"]
    assert "it is kept in" in caplog.text
    assert work.run("train", basis, lambda folder: _Newer(numbers={}, more=1), kind=_Newer)
    assert not work.run("train", basis, lambda folder: pytest.fail("ran"), kind=_Newer)
