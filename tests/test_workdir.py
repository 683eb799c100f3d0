"""The work directory: one writer at a time, and what may change between runs."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from retmask_jax.main import main
from retmask_jax.recipes import load_recipe
from retmask_jax.workdir import Basis, Workdir, check_free, locked, settings_of

HOLDER = """
import sys, time
from retmask_jax.workdir import locked

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
    result, _ = Workdir(root, {}).run("detect", Basis(), lambda folder: {"held": _is_held(root)})
    assert result["held"] and not _is_held(root)


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
    assert work.run("pairs", of_pairs(work), lambda folder: ran.append(1) or {})[1] is False
    assert json.loads((tmp_path / "config.json").read_text())["pairs"]["endpoints"]["normal"] == "http://a"
    again = open_with({"retmask": "http://c", "normal": "http://d"}, concurrency=8)
    assert again.run("pairs", of_pairs(again), lambda folder: ran.append(2) or {})[1] is True
    assert ran == [1]
    with pytest.raises(ValueError, match="pairs.endpoints: .*there, .* here"):
        open_with({})
    with pytest.raises(ValueError, match="pairs.temperature: 0.6 there, 0.7 here"):
        open_with({"normal": "http://a", "retmask": "http://b"}, temperature=0.7)


def _is_held(root) -> bool:
    code = "import sys; from retmask_jax.workdir import check_free; check_free(sys.argv[1])"
    return subprocess.run([sys.executable, "-c", code, root], capture_output=True).returncode != 0
