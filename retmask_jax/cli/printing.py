"""Tables and messages on the terminal."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from retmask_jax.utils.numbers import Number


def print_numbers(numbers: Mapping[str, Number]) -> None:
    """Print numbers: name, value, 95% interval, n."""
    if not numbers:
        return
    rows = []
    for name, number in numbers.items():
        interval = "" if number.low is None else f"[{number.low:.3f}, {number.high:.3f}]"
        rows.append((name, f"{number.value:.3f}", interval, str(number.n)))
    print_table(("", "value", "95% interval", "n"), rows, justify="right")


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], justify: Literal["left", "right"] = "left"
) -> None:
    """Print a table on the terminal. justify: of all columns but the first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(escape(name), justify=justify if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    width = None if sys.stdout.isatty() else 10_000  # lines of a file are never broken
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def show_log() -> None:
    """RETMASK_LOG=INFO shows what is going on inside."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("retmask_jax").setLevel(os.environ.get("RETMASK_LOG", "WARNING").upper())
