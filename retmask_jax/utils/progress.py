"""Progress of long work: a bar with the rate and the time left, with at least a line each minute, however long an
item takes and however many bars follow each other.
"""

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm  # pyrefly: ignore[untyped-import]  tqdm has no types

from retmask_jax.utils.hosts import primary

_DELAY = 1.0  # seconds of work that show nothing
_REDRAW = 0.2  # seconds between two drawings of a bar
_EVERY = 10.0  # seconds between the lines of a log
_SILENCE = 20.0  # seconds of work, under one bar or many, after which one is drawn though none has much to say
_TICK = 1.0  # seconds between two looks at how long the silence lasts
_LINE = "{desc}: {percentage:.0f}% ({n_fmt} of {total_fmt}), {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"


def track(items: Iterable | None, total: int, what: str, unit: str, done: int = 0) -> "_Bar":
    """Iterate over items under a progress bar. In a file or a pipe it is a line every ten seconds and one at the end.

    Work of less than a second shows nothing, and only the first host shows anything. A long item, or many short bars one
    after the other, are shown as well, so that whatever runs under bars is never silent for long.

    Args:
        items: None: the caller updates the bar.
        done: Items of an earlier run, which count in the total but not in the rate.
    """
    if _redraws(sys.stderr):
        drawn = {"mininterval": _REDRAW, "dynamic_ncols": True, "leave": False}
    else:
        drawn = {"mininterval": _EVERY, "bar_format": _LINE, "leave": True, "file": _Lines(sys.stderr)}
    return _Bar(
        items,
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        delay=_DELAY,
        disable=not primary(),
        **drawn,
    )


def _redraws(stream: TextIO) -> bool:
    """Whether a line can be overwritten in this stream: a terminal, or a notebook."""
    notebook = getattr(sys.modules.get("ipykernel.iostream"), "OutStream", ())
    return stream.isatty() or isinstance(stream, notebook)


class _Silence:
    """How many seconds of work under bars passed without a drawing; a thread draws the latest bar when it is long."""

    def __init__(self) -> None:
        self._open: list[weakref.ref] = []
        self._before = 0.0  # seconds under bars that ended without a line
        self._since = 0.0  # when the first of the open bars began, or something was drawn
        self._watching = False

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._open else 0.0)

    def broken(self) -> None:
        self._before, self._since = 0.0, time.monotonic()

    def begin(self, bar: "_Bar") -> None:
        if not self._open:
            self._since = time.monotonic()
        self._open.append(weakref.ref(bar))
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name="progress", daemon=True).start()

    def end(self, bar: "_Bar") -> None:
        seconds = self.seconds
        self._open = [one for one in self._open if one() is not None and one() is not bar]
        if not self._open:
            self._before = seconds

    def _watch(self) -> None:
        while True:
            time.sleep(_TICK)
            bar = self._open[-1]() if self.seconds >= _SILENCE and self._open else None
            if bar is not None:
                bar.refresh()
            del bar


_silence = _Silence()


class _Bar(tqdm):
    """A bar whose last state is drawn as well, where the silence before it was long."""

    shown = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not self.disable:
            _silence.begin(self)

    def display(self, *args: Any, **options: Any) -> Any:
        _silence.broken()
        self.shown = True
        return super().display(*args, **options)

    def close(self) -> None:
        if not getattr(self, "disable", True):
            if self.shown or _silence.seconds >= _SILENCE:
                # else nothing is drawn or cleared
                self.last_print_t = max(self.last_print_t, self.start_t + self.delay)
            _silence.end(self)
        super().close()


class _Lines:
    """A stream in which each drawing of a bar becomes a separate line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()


def with_rate(items: Iterable, tokens: Callable[[Any], int], total: int, what: str, unit: str = "answer") -> Iterator:
    """The items, passed on under a progress bar that also shows how many tokens per second they bring."""
    begin, done = time.monotonic(), 0
    with track(None, total, what, unit) as bar:
        for item in items:
            done += tokens(item)
            bar.set_postfix_str(f"{done / (time.monotonic() - begin):.0f} tokens/s", refresh=False)
            bar.update(1)
            yield item
