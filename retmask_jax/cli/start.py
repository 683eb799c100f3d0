"""The process of the `retmask` command: one whose memory comes in huge pages where the system gives them for the asking.

XLA on a CPU asks the system for new memory at every step of training and every batch, which by default comes in pages of
4 KiB, each set to zero when it is first touched. glibc decides when a process starts, so the command starts once more.
"""

import os
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_HUGE = "glibc.malloc.hugetlb=1"
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never": the choice is in brackets


def start() -> int:
    """`main`, in this process or, with huge pages, in one that takes its place and number; returns the exit status.

    Where the user has set GLIBC_TUNABLES, and where the system gives huge pages to all or to none, nothing changes.
    """
    if _TUNABLES not in os.environ and _on_request():
        os.environ[_TUNABLES] = _HUGE
        os.execv(sys.executable, sys.orig_argv)
    from retmask_jax.cli.main import main

    return main()


def _on_request() -> bool:
    try:
        return "[madvise]" in _SYSTEM.read_text()
    except OSError:  # another system
        return False
