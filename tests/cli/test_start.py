"""The command's process: started once more where that gives huge pages, with the same arguments, and nowhere else; garbage
is looked for less often, and not at the end."""

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from retmask_jax.cli import main, start


class Replaced(Exception):
    """What would have become of the process."""


@pytest.fixture
def told(monkeypatch):
    """What Python's search for garbage is told, and when the command runs."""
    told = []
    garbage = SimpleNamespace(set_threshold=lambda *sizes: told.append(sizes), freeze=lambda: told.append("no more"))
    monkeypatch.setattr(start, "gc", garbage)
    return told


@pytest.fixture
def begin(monkeypatch, tmp_path, told):
    """begin(what the system's file says, GLIBC_TUNABLES): what `start` gives, or raises `Replaced`."""

    def replaced(program, arguments):
        raise Replaced(program, arguments, os.environ["GLIBC_TUNABLES"])

    def call(says, tunables=None):
        system = tmp_path / "enabled"
        if says is not None:
            system.write_text(says)
        monkeypatch.setattr(start, "_SYSTEM", system)
        monkeypatch.setattr(os, "execv", replaced)
        monkeypatch.setattr(main, "main", lambda: told.append("the command") or "main")
        monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "retmask", "detect", "--config=a b"])
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        if tunables is not None:
            monkeypatch.setenv("GLIBC_TUNABLES", tunables)
        return start.start()

    return call


def test_the_process_starts_once_more_with_the_same_arguments(begin):
    with pytest.raises(Replaced) as replaced:
        begin("always [madvise] never\n")
    arguments = ["python", "-X", "dev", "retmask", "detect", "--config=a b"]
    assert replaced.value.args == (sys.executable, arguments, "glibc.malloc.hugetlb=1")


@pytest.mark.parametrize(
    ("says", "tunables"),
    [
        ("[always] madvise never\n", None),
        ("always madvise [never]\n", None),
        (None, None),  # no such file
        ("always [madvise] never\n", "glibc.malloc.hugetlb=1"),  # as it has been started once more
        ("always [madvise] never\n", ""),  # the user's choice
    ],
)
def test_nothing_changes_elsewhere(begin, says, tunables):
    assert begin(says, tunables) == "main"
    assert os.environ.get("GLIBC_TUNABLES") == tunables


def test_garbage_is_looked_for_less_often_and_not_at_the_end(begin, told):
    begin(None)
    sizes, *others = told
    assert others == ["the command", "no more"] and all(map(int.__gt__, sizes, (700, 10, 10)))


def test_a_process_that_starts_once_more_ends_with_the_status_of_the_command(tmp_path):
    """As the installed script: a mistake is one line and status 2, whichever way the process was started."""
    (tmp_path / "enabled").write_text("always [madvise] never")
    script = tmp_path / "retmask"
    script.write_text(
        textwrap.dedent(f"""
            import os, pathlib, sys
            from retmask_jax.cli import start
            print(os.getpid(), "GLIBC_TUNABLES" in os.environ, flush=True)
            start._SYSTEM = pathlib.Path({str(tmp_path / "enabled")!r})
            sys.exit(start.start())
        """)
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, str(script), "nothing of this name"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (first, before), (second, after) = (line.split() for line in done.stdout.splitlines())
    assert (first, before, after) == (second, "False", "True")
    assert done.returncode == 2 and "nothing of this name" in done.stderr
