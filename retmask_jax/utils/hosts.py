"""Several hosts that run one program: joining them, who writes files, and values that all of them need."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_JAX = "JAX_COORDINATOR_ADDRESS"
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # tasks of this step; 1 or none: not several

_FAILED = "\x15"  # begins the words of a ValueError, on their way to the other hosts
_MOST_WORDS = 2000  # bytes of an error that all hosts raise


def join(wanted: bool | None) -> None:
    """Make all hosts run one program. Call it before JAX is used.

    The environment says that there are several hosts by JAX's variables (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID), by Slurm or Open MPI tasks, or by the hosts of a TPU slice.

    Args:
        wanted: True: join; False: do not; None: join where the environment says that there are several hosts.

    Raises:
        ValueError: The hosts do not find each other.
    """
    import jax

    found = _found()
    if jax.distributed.is_initialized() or wanted is False or (wanted is None and found is None):
        return
    try:
        if found == _JAX:
            processes, process = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
            jax.distributed.initialize(os.environ[_JAX], processes, process)
        else:
            jax.distributed.initialize()
    except (KeyError, ValueError, RuntimeError, jax.errors.JaxRuntimeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the hosts did not join ({why}): set {_JAX}, JAX_NUM_PROCESSES and JAX_PROCESS_ID on each, "
            "or --config.distributed=False to use one"
        ) from error
    log.info(
        "host %d of %d, %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


def primary() -> bool:
    """Whether this host is the one that writes files and shows progress. Starts no JAX backend."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def several() -> bool:
    """Whether this program runs on several hosts. Starts no JAX backend."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def wait_for_all(name: str) -> None:
    """Wait until all hosts have called this with the same name."""
    if several():
        from jax.experimental import multihost_utils

        from retmask_jax.utils.compiled import waiting

        with waiting():
            multihost_utils.sync_global_devices(name)


def first_alone(work: Callable[[], str | None]) -> str:
    """Do some work on the first host alone, while the others wait.

    Args:
        work: Returns a short text, or None.

    Returns:
        The text, on every host; "" for None.

    Raises:
        ValueError: The work raised one on the first host; it is raised on every host.
    """
    failure, text = None, ""
    if primary():
        try:
            text = work() or ""
        except ValueError as error:
            failure = error
    words = _from_first(_FAILED + str(failure) if failure else text)
    if failure is not None:
        raise failure
    if words.startswith(_FAILED):
        raise ValueError(words.removeprefix(_FAILED))
    return words


def _from_first(text: str) -> str:
    """The first host's text, on every host; of a long text, only the beginning."""
    if not several():
        return text
    import numpy as np
    from jax.experimental import multihost_utils

    padded = text.encode()[:_MOST_WORDS].ljust(_MOST_WORDS, b"\0")
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8))
    return np.asarray(sent).tobytes().rstrip(b"\0").decode(errors="ignore")


def least(value: int) -> int:
    """The smallest value among the hosts, so that all continue with the same."""
    if not several():
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    halves_2 = np.frombuffer(np.int64(value).tobytes(), np.int32)  # JAX has no 64-bit numbers by default
    values_N2 = np.ascontiguousarray(multihost_utils.process_allgather(halves_2), np.int32)
    return int(values_N2.view(np.int64).min())


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays, whole on every host, wherever their parts lie."""
    import jax
    import numpy as np

    def one(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


def _found() -> str | None:
    """The variable of the environment that shows several hosts, or "TPU"; None where nothing does."""
    if os.environ.get(_JAX):
        return _JAX
    for variable in _LAUNCHERS:
        if int(os.environ.get(variable) or 1) > 1:
            return variable
    return "TPU" if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") else None
