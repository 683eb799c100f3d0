"""Compiled programs are kept between processes, within limits, and what they cost is counted."""

import json
import logging
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from retmask_jax.utils import compiled

# Compiles two programs and prints what that took.
_WORK = """
import json, sys, jax, jax.numpy as jnp
from retmask_jax.utils import compiled
folder = compiled.keep_programs(sys.argv[1])
total = jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((8, 8)))
spent = compiled.spent()
found = {"total": float(total), "programs": spent.programs, "found": spent.found}
print(json.dumps(found | {"kept": compiled.kept(folder).programs}))
"""


def _start(folder):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "RETMASK_"))}
    command = [sys.executable, "-c", _WORK, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def _result(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out)


def test_what_a_process_compiled_no_later_one_compiles(tmp_path):
    """Two that begin together may both compile, and neither disturbs the other; damaged files are compiled again."""
    together = [_result(one) for one in [_start(tmp_path), _start(tmp_path)]]
    later = _result(_start(tmp_path))
    assert later["found"] == later["programs"] == later["kept"] >= 2
    for path in tmp_path.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:20])
    damaged = _result(_start(tmp_path))
    assert damaged["found"] == 0 and damaged["programs"] == later["programs"]
    assert len({one["total"] for one in [*together, later, damaged]}) == 1


@pytest.fixture
def settings(monkeypatch):
    """What JAX is told, without telling it."""
    told = {}
    monkeypatch.delenv("RETMASK_PROGRAMS", raising=False)
    monkeypatch.setattr(compiled, "_of_jax", lambda: (True, None))
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    return told


def test_programs_that_were_not_used_for_long_are_removed_and_others_stay(tmp_path, settings):
    for name, days in (("old", 40), ("new", 1)):
        for end in ("-cache", "-atime"):
            (tmp_path / f"{name}{end}").write_bytes(b"x" * 8)
            os.utime(tmp_path / f"{name}{end}", (time.time() - days * 86_400,) * 2)
    assert compiled.keep_programs(tmp_path, compiled.Limits(gib=0.5, days=30)) == tmp_path
    assert sorted(path.name for path in tmp_path.glob("*-*")) == ["new-atime", "new-cache"]
    assert compiled.kept(tmp_path) == compiled.Kept(tmp_path, 1, 8)
    assert settings["jax_compilation_cache_max_size"] == 2**29
    assert settings["jax_compilation_cache_dir"] == str(tmp_path)


def test_the_folder_is_the_users_for_this_kind_of_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RETMASK_PROGRAMS", raising=False)
    ours = compiled.programs_folder()
    assert ours.parent == tmp_path / "retmask_jax" and ours == compiled.programs_folder()
    monkeypatch.setattr(compiled.platform, "machine", lambda: "another")
    assert compiled.programs_folder() != ours
    monkeypatch.setenv("RETMASK_PROGRAMS", str(tmp_path / "mine"))
    assert compiled.programs_folder() == tmp_path / "mine"


def test_what_the_user_has_chosen_for_jax_stays(monkeypatch, tmp_path, settings):
    monkeypatch.setenv("RETMASK_PROGRAMS", "off")
    assert compiled.keep_programs() is None and compiled.keep_programs("off") is None
    monkeypatch.setattr(compiled, "_of_jax", lambda: (True, "/theirs"))
    assert str(compiled.keep_programs(tmp_path)) == "/theirs"
    monkeypatch.setattr(compiled, "_of_jax", lambda: (False, None))
    assert compiled.keep_programs(tmp_path) is None
    assert not settings


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, settings, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert compiled.keep_programs(tmp_path / "file" / "programs") is None
    assert "compiled programs are not kept" in caplog.text and not settings


def test_a_busy_folder_is_used_without_being_cleared(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(compiled, "_PATIENCE", 0.01)
    with compiled.filelock.FileLock(tmp_path / ".lockfile"):
        assert compiled.keep_programs(tmp_path) == tmp_path


def test_programs_and_seconds_are_counted_as_this_jax_reports_them():
    """A program that is traced inside another counts once: no more seconds than passed."""
    before, begin = compiled.spent(), time.time()
    inner = jax.jit(lambda x: jnp.tanh(x) * 3)
    jax.jit(lambda x: sum(inner(x + i) for i in range(40)))(jnp.ones(3)).block_until_ready()
    spent = compiled.spent() - before
    assert spent.programs >= 1 and 0 < spent.compiling <= time.time() - begin


def test_waiting_counts_once_and_only_in_the_main_thread():
    before = compiled.spent()
    with compiled.waiting(), compiled.waiting():
        time.sleep(0.05)
    other = threading.Thread(target=compiled.waiting()(time.sleep), args=(0.05,))
    other.start()
    other.join()
    assert 0.05 <= (compiled.spent() - before).waiting < 0.1


def test_programs_are_compiled_side_by_side_where_the_cores_are_not_needed(monkeypatch):
    """All but the first, in other threads; the calls then compile nothing, and an error waits for its call."""
    made = {}

    def job(n):
        made[n] = threading.current_thread()
        if n == 3:
            raise ValueError("refused")

    jobs = {n: lambda n=n: job(n) for n in (1, 2, 3)}
    compiled.Ahead(jobs).wait(2)
    assert not made  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ahead = compiled.Ahead(jobs)
    for n in jobs:
        ahead.wait(n)
    assert sorted(made) == [2, 3] and threading.main_thread() not in made.values()


def test_what_a_thread_compiled_a_call_finds():
    function = jax.jit(lambda x: jnp.cos(x @ x))
    thread = threading.Thread(target=lambda: function.lower(jax.ShapeDtypeStruct((3, 3), jnp.float32)).compile())
    thread.start()
    thread.join()
    x, before = jnp.zeros((3, 3)), compiled.spent()
    function(x)
    assert (compiled.spent() - before).programs == 0
