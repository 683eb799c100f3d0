"""Memory: what a compiled program needs, what the device has, and what to report when that is not enough."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import psutil  # pyrefly: ignore[untyped-import]  psutil has no types

from retmask_jax.utils.progress import track

log = logging.getLogger(__name__)

_SIZE = re.compile(r"allocat\w* (\d+) bytes|allocat\w* ([\d.]+ ?[KMGT]i?B)", re.IGNORECASE)


class OutOfMemory(ValueError):
    """The device ran out of memory; the message says where, how much was requested and what to change."""


def limit() -> int:
    """Free bytes of this host's first device; for a CPU, one device's share of what is free on the machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available // jax.local_device_count()  # with what the page cache would give back


def known() -> bool:
    """Whether this host's first device reports its memory. A CPU does not: all programs of the machine share its memory."""
    return "bytes_limit" in (jax.local_devices()[0].memory_stats() or {})


def capacity() -> int:
    """Bytes of this host's first device; for a CPU, one device's share of the machine's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or psutil.virtual_memory().total // jax.local_device_count()


def needed(compiled: Any) -> int:
    """Bytes that a compiled program takes in addition to its arguments, by the compiler's report."""
    report = compiled.memory_analysis()
    return report.temp_size_in_bytes + report.output_size_in_bytes


def largest_batch(compile_for: Callable[[int], Any], wanted: int, what: str) -> tuple[int, Any]:
    """(batch size, compiled program): `wanted`, or the first of its halves that fits into the device's free memory.

    Args:
        compile_for: Compiles the program for a batch size, ahead of time.

    Raises:
        OutOfMemory: A batch of one does not fit.
    """
    batch_size = wanted
    while True:
        compiled, free = compile_for(batch_size), limit()
        if needed(compiled) <= free:
            return batch_size, compiled
        if batch_size == 1:
            raise OutOfMemory(
                f"{what}: one row needs {_gib(needed(compiled))}, {_gib(free)} are free: shorten the rows"
            )
        log.warning(
            "%s: a batch of %d needs %s, %s are free; trying half", what, batch_size, _gib(needed(compiled)), _gib(free)
        )
        batch_size = max(1, batch_size // 2)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that a device, or the host, has no memory left."""
    of_device = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return of_device or isinstance(error, MemoryError)


def explain(error: Exception, what: str, advice: str) -> OutOfMemory:
    """The error in one line: the work, the bytes that were requested if the error names them, and the setting to change."""
    found = _SIZE.search(str(error))
    wanted = "" if found is None else f" when {_gib(int(found[1])) if found[1] else found[2]} more were wanted"
    return OutOfMemory(f"{what} ran out of memory{wanted}: {advice}")


def in_batches(
    n: int,
    batch_size: int,
    what: str,
    unit: str,
    work: Callable[[list[int], int], Iterator],
    note: Callable[[int, Any], str] | None = None,
    known: Mapping[int, Any] | None = None,
    done: Callable[[int, Any], None] | None = None,
) -> list:
    """The results of n items, in order, under a progress bar. When memory runs out, the rest is done in half the batch.

    Args:
        work: Takes the indices that have no result yet and the batch size; yields (indices of a batch, their results). A
            batch may repeat an index to be full.
        note: Called for each new result with its index; what it returns is shown after the bar.
        known: Results by index that need no work.
        done: Called for each new result with its index.

    Raises:
        OutOfMemory: A single row is too much.
    """
    known = known or {}
    results: list[Any] = [known.get(i) for i in range(n)]
    if len(known) == n:
        return results

    def run(batch_size: int) -> None:
        for batch, found in work([i for i, result in enumerate(results) if result is None], batch_size):
            new = {i: result for i, result in zip(batch, found, strict=True) if results[i] is None}
            for i, result in new.items():
                if note is not None:
                    bar.set_postfix_str(note(i, result), refresh=False)
                if done is not None:
                    done(i, result)
                results[i] = result
            bar.update(len(new))

    with track(None, n, what, unit, done=len(known)) as bar:
        in_smaller_batches(run, batch_size, what)
    return results


def in_smaller_batches(run: Callable[[int], Any], batch_size: int, what: str, setting: str = "batch_size") -> Any:
    """run(batch size); when memory runs out, again with half the batch, down to one row.

    Raises:
        OutOfMemory: A single row is too much.
    """
    while True:
        try:
            return run(batch_size)
        except jax.errors.JaxRuntimeError as error:
            batch_size = halved(error, batch_size, what, setting)


def halved(error: Exception, batch_size: int, what: str, setting: str = "batch_size") -> int:
    """The batch size to continue with after an error of JAX.

    Raises:
        JaxRuntimeError: The error, if it is not about memory.
        OutOfMemory: A single row is too much.
    """
    if not is_out_of_memory(error):
        raise error
    if batch_size == 1:
        raise explain(error, what, "one row is too many: shorten it, or use a bigger device or mesh") from error
    log.warning("%s; going on with half", explain(error, what, f"{setting} is {batch_size}"))
    return batch_size // 2


def _gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB"
