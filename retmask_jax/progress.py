"""Progress of long work: a bar with the rate and the time left."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

from retmask_jax.hosts import primary

_DELAY = 1.0  # seconds of work that show nothing
_REDRAW = 0.2  # seconds between two drawings of a bar
_EVERY = 10.0  # seconds between the lines of a log
_LINE = "{desc}: {percentage:.0f}% ({n_fmt} of {total_fmt}), {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"


def track(items: Iterable, total: int, what: str, unit: str, done: int = 0):
    """Iterate over items under a progress bar; where the output is a file or a pipe, a line every ten seconds and at the end.

    Work of less than a second shows nothing, nor do hosts but the first. done: items of an earlier run, which count in
    the total but not in the rate.
    """
    if _redraws(sys.stderr):
        drawn = {"mininterval": _REDRAW, "dynamic_ncols": True, "leave": False}
    else:
        drawn = {"mininterval": _EVERY, "bar_format": _LINE, "leave": True, "file": _Lines(sys.stderr)}
    return tqdm(items, total=total, initial=done, desc=what, unit=unit, unit_scale=unit == "B", delay=_DELAY,
                disable=not primary(), **drawn)  # fmt: skip


def _redraws(stream) -> bool:
    """Whether a line can be drawn over on it: a terminal, or a notebook."""
    notebook = getattr(sys.modules.get("ipykernel.iostream"), "OutStream", ())
    return stream.isatty() or isinstance(stream, notebook)


class _Lines:
    """A stream on which each drawing of a bar becomes a line of its own."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()


def with_rate(items: Iterable, tokens: Callable[[Any], int], total: int, what: str, unit: str = "answer") -> Iterator:
    """The items, passed on under a progress bar that also shows how many tokens a second they bring."""
    begin, done = time.monotonic(), 0
    with track(None, total, what, unit) as bar:
        for item in items:
            done += tokens(item)
            bar.set_postfix_str(f"{done / (time.monotonic() - begin):.0f} tokens/s", refresh=False)
            bar.update(1)
            yield item
