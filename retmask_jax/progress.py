"""Progress of long work: a bar with the rate and the time left."""

import sys
from collections.abc import Iterable

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
