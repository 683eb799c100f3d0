"""The process of the `retmask` command: its memory comes in huge pages where the system gives them for the asking, and
Python looks for garbage less often.

XLA on a CPU asks the system for new memory at every step of training and every batch, which by default comes in pages of
4 KiB, each set to zero when it is first touched. glibc decides when a process starts, so the command starts once more.

Tracing programs makes and drops many small objects. By default Python searches them for circles after every 700, and once
more through all modules when the process ends.
"""

import gc
import os
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_HUGE = "glibc.malloc.hugetlb=1"
_GARBAGE = 20_000, 20, 50  # objects made before a search of the newest, and such searches before one of older objects
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never": the choice is in brackets


def start() -> int:
    """`main`, in this process or, with huge pages, in one that takes its place and number; returns the exit status.

    Where the user has set GLIBC_TUNABLES, and where the system gives huge pages to all or to none, nothing changes.
    """
    if _TUNABLES not in os.environ and _on_request():
        os.environ[_TUNABLES] = _HUGE
        os.execv(sys.executable, sys.orig_argv)
    gc.set_threshold(*_GARBAGE)
    from retmask_jax.cli.main import main

    status = main()
    gc.freeze()  # what is left goes with the process, unsearched
    return status


def _on_request() -> bool:
    try:
        return "[madvise]" in _SYSTEM.read_text()
    except OSError:  # another system
        return False
