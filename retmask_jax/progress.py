"""Progress of long work: a bar with the rate and the time left."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

from retmask_jax.hosts import primary


def track(items: Iterable, total: int, what: str, unit: str):
    """Iterate over items under a progress bar; one line every ten seconds where the output is not a terminal.

    Work of less than a second shows none, nor do hosts but the first.
    """
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        items, total=total, desc=what, unit=unit, unit_scale=unit == "B", mininterval=interval, delay=1.0,
        dynamic_ncols=True, leave=False, disable=not primary(),
    )  # fmt: skip


def with_rate(items: Iterable, tokens: Callable[[Any], int], total: int, what: str, unit: str = "answer") -> Iterator:
    """The items, passed on under a progress bar that also shows how many tokens a second they bring."""
    begin, done = time.monotonic(), 0
    with track(None, total, what, unit) as bar:
        for item in items:
            done += tokens(item)
            bar.set_postfix_str(f"{done / (time.monotonic() - begin):.0f} tokens/s", refresh=False)
            bar.update(1)
            yield item
