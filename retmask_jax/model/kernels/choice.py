"""Which kernel computes a call of attention: the one that is asked for, or the fastest that the call and the device allow."""

import functools
import logging

import jax

from retmask_jax.model.config import KERNELS
from retmask_jax.model.kernels import cudnn
from retmask_jax.model.kernels.blocked import Scores, platform

log = logging.getLogger(__name__)


def kernel_for(dtype: str, length: int, width: int) -> tuple[str, str | None]:
    """The kernel that "auto" chooses here for a prompt without a cache, and why it is not cuDNN's.

    Without a window and a soft cap. The reason is None, except on GPUs that cuDNN's kernel does not suit.
    """
    backend, unsuited = target()
    chosen = choose("auto", backend, unsuited, dtype, length, width, True, Scores(width**-0.5), False)
    return chosen, unsuited if backend == "gpu" else None


def target() -> tuple[str, str | None]:
    """(the platform that a program is traced for, why cuDNN's kernel does not run there or None).

    The devices are those of the mesh that is set, which may be a topology that is not attached, else the default devices.
    While a program is traced only the kind of a mesh's devices is known; attached devices of that kind are asked what they
    can do.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    devices = jax.devices()
    if target is not None:
        same = [
            device
            for device in devices
            if (device.platform, device.device_kind) == (target.platform, target.device_kind)
        ]
        devices = same or [target]
    return platform(), cudnn.unsuited(devices)


@functools.cache
def choose(
    kernel: str,
    backend: str,
    unsuited: str | None,
    dtype: str,
    length: int,
    width: int,
    alone: bool,
    scores: Scores,
    streams: bool,
) -> str:
    """The kernel for `length` queries; logged once per kind of call.

    Args:
        unsuited: From `cudnn.unsuited`, for the devices.
        alone: Whether the keys are those of the queries alone, without a cache before them.
        streams: Whether heads stream, which only the kernels written here know.

    Raises:
        ValueError: The kernel is unknown, or cannot compute the call.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; it must be one of {', '.join(KERNELS)}")
    if (kernel == "splash" and not alone) or (kernel == "cudnn" and length == 1):
        kernel = "auto"  # splash knows no keys before the queries, and one query needs no blocks
    if streams and kernel in ("splash", "cudnn"):
        raise ValueError(f"the {kernel} kernel knows no streaming heads (stream_mask): choose auto, blocked or plain")
    reason = "has no streaming heads" if streams else cudnn.unsupported(dtype, width, scores) or unsuited
    if kernel == "cudnn" and reason is not None:
        raise ValueError(f"the cudnn kernel {reason}: choose another kernel")
    if kernel != "auto":
        return kernel
    chosen = "plain" if length == 1 else "blocked"
    if alone and backend == "tpu" and not streams:
        chosen = "splash"
    elif backend == "gpu" and length > 1 and reason is None:
        chosen = "cudnn"
    where = ("alone" if alone else "after a cache") + (", with streaming heads" if streams else "")
    log.info("attention of %d positions %s, %s on %s: %s kernel", length, where, dtype, backend, chosen)
    return chosen
