"""Compiled programs: kept on disk from one process to the next, counted, and how long a person waits for them.

JAX keeps, finds and evicts the programs, under a lock that several processes share; a file that is damaged is compiled
again. Here is where they are kept, for how long, and what came of it.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Generator, Hashable, Mapping
from pathlib import Path
from typing import NamedTuple

import filelock
import jax

log = logging.getLogger(__name__)

OFF = "off"
_SETTING = "RETMASK_PROGRAMS"
_PROGRAM, _USED = "-cache", "-atime"  # ends of JAX's files: a program, and when it was last used
_LOCK = ".lockfile"  # JAX's
_PATIENCE = 5.0  # seconds to wait for it
_GIB = 2**30
_DAY = 86_400
_THREADS = 4
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_FOUND = "/jax/compilation_cache/cache_hits"


class Limits(NamedTuple):
    """How many programs are kept: GiB in their folder, above which those make room that were used least recently, and days
    since a program was last used."""

    gib: float = 4.0
    days: float = 30.0


LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Kept:
    """The programs in a folder."""

    folder: Path
    programs: int
    bytes: int


def user_cache() -> Path:
    """The folder of this package in the user's cache directory; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "retmask_jax"


def programs_folder() -> Path | None:
    """Where programs are kept unless a config says otherwise; None: nowhere.

    RETMASK_PROGRAMS names a folder, or is "off". Else it is one in the user's cache directory, for processors like this
    one: a program for a CPU may use instructions that another CPU lacks.
    """
    named = os.environ.get(_SETTING)
    if named:
        return None if named == OFF else Path(named)
    return user_cache() / f"programs-{_processor()}"


def keep_programs(folder: str | Path | None = None, limits: Limits = LIMITS) -> Path | None:
    """From now on keep what this process compiles, and compile nothing that is kept; returns the folder.

    Where JAX has been given a folder of its own (JAX_COMPILATION_CACHE_DIR), or its cache is off, nothing changes.

    Args:
        folder: None: `programs_folder`; "off": nowhere.

    Returns:
        None where nothing is kept.
    """
    folder = programs_folder() if folder is None else None if folder == OFF else Path(folder)
    enabled, of_jax = _of_jax()
    if not enabled or folder is None:
        return None
    if of_jax is not None and of_jax != str(folder):
        return Path(of_jax)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unused(folder, limits.days)
    except OSError as error:
        log.warning("compiled programs are not kept: %s: %s", error.filename or folder, error.strerror)
        return None
    jax.config.update("jax_compilation_cache_max_size", int(limits.gib * _GIB))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def kept(folder: Path) -> Kept:
    """What a folder of programs holds."""
    sizes = [_size(path) for path in folder.glob(f"*{_PROGRAM}")]
    return Kept(folder, len(sizes), sum(sizes))


@dataclasses.dataclass(frozen=True)
class Spent:
    """What the main thread of a process has spent, in seconds, and the programs that it needed.

    Attributes:
        compiling: Tracing and compiling programs, or reading them where they were kept.
        waiting: Waiting for files, the hub, servers and other hosts.
        programs: Programs that were made ready to run, by any thread.
        found: Those of them that had been kept.
    """

    compiling: float = 0.0
    waiting: float = 0.0
    programs: int = 0
    found: int = 0

    def __sub__(self, before: "Spent") -> "Spent":
        return Spent(*(getattr(self, f.name) - getattr(before, f.name) for f in dataclasses.fields(self)))

    def rounded(self) -> "Spent":
        """With seconds of one decimal."""
        return dataclasses.replace(self, compiling=round(self.compiling, 1), waiting=round(self.waiting, 1))

    def in_words(self, seconds: float) -> str:
        """What became of some seconds.

        >>> Spent(compiling=9.5, waiting=1.0, programs=12, found=4).in_words(20.0)
        '9.5 s compiling (12 programs, 4 of them kept), 9.5 s running, 1.0 s waiting'
        """
        running = max(0.0, seconds - self.compiling - self.waiting)
        programs = f"{self.programs} programs, {self.found} of them kept"
        return f"{self.compiling:.1f} s compiling ({programs}), {running:.1f} s running, {self.waiting:.1f} s waiting"


def spent() -> Spent:
    """What this process has spent so far."""
    return _meter.spent


class Ahead:
    """Programs that are compiled side by side in threads, while the first of them works.

    Only for accelerators: on a CPU compiling would take the cores from the work.
    """

    def __init__(self, compile_each: Mapping[Hashable, Callable[[], object]]) -> None:
        """compile_each: in the order in which they are needed; the first is left to who needs it."""
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="compile")
        later = list(compile_each.items())[1:] if jax.default_backend() != "cpu" else []
        self._begun = {key: self._pool.submit(compile_one) for key, compile_one in later}
        self._pool.shutdown(wait=False)

    def wait(self, key: Hashable) -> None:
        """Until a program is compiled. An error is not raised here: it comes again when the program is called."""
        if key in self._begun:
            concurrent.futures.wait([self._begun[key]])


class _Meter:
    """Adds up what JAX reports."""

    def __init__(self) -> None:
        self.spent = Spent()
        self._lock = threading.Lock()
        self._waits = False
        self._parts: list[tuple[float, float]] = []  # (end, seconds) of reports that a later one may enclose

    def duration(self, event: str, duration_secs: float, **_: object) -> None:
        if event not in _COMPILING:
            return
        with self._lock:
            now, programs = time.time(), int(event == _COMPILING[-1])
            more = 0.0
            if threading.current_thread() is threading.main_thread():
                # A program that is traced may trace others, whose seconds are in its own.
                inside = sum(part for end, part in self._parts if end > now - duration_secs)
                self._parts = [part for part in self._parts if part[0] <= now - duration_secs][-64:] + [
                    (now, duration_secs)
                ]
                more = duration_secs - inside
            self._add(compiling=more, programs=programs)

    def event(self, event: str, **_: object) -> None:
        if event == _FOUND:
            with self._lock:
                self._add(found=1)

    @contextlib.contextmanager
    def waiting(self) -> Generator[None, None, None]:
        """What passes inside counts as waiting (`Spent`); one inside another counts once."""
        if self._waits or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._waits, begin, before = True, time.time(), self.spent.compiling
        try:
            yield
        finally:
            self._waits = False
            with self._lock:
                self._add(waiting=time.time() - begin - (self.spent.compiling - before))

    def _add(self, **more: float) -> None:
        self.spent = dataclasses.replace(
            self.spent, **{name: getattr(self.spent, name) + n for name, n in more.items()}
        )


_meter = _Meter()
waiting = _meter.waiting
jax.monitoring.register_event_duration_secs_listener(_meter.duration)
jax.monitoring.register_event_listener(_meter.event)


def _of_jax() -> tuple[bool, str | None]:
    """(whether JAX may keep programs, the folder that it was given)."""
    enabled, folder = (
        getattr(jax.config, f"jax_{name}") for name in ("enable_compilation_cache", "compilation_cache_dir")
    )
    return enabled, folder


def _processor() -> str:
    """A name for the instructions that this processor knows."""
    known = platform.machine()
    with contextlib.suppress(OSError):  # other systems have no such file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(known.encode()).hexdigest()[:8]


def _remove_unused(folder: Path, days: float) -> None:
    """Remove programs that were last used so many days ago, unless another process keeps the folder busy."""
    oldest = time.time() - days * _DAY
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / _LOCK, timeout=_PATIENCE):
        for path in folder.glob(f"*{_USED}"):
            if path.stat().st_mtime < oldest:
                path.with_name(path.name.removesuffix(_USED) + _PROGRAM).unlink(missing_ok=True)
                path.unlink()


def _size(path: Path) -> int:
    """Bytes of a file; 0 where another process has just removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
