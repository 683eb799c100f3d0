"""Python in a process of its own, whose CPU is as many devices as a test wants."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import QUICK_FLAGS

_TESTS = Path(__file__).parent


def environment(devices: int | None, *, kept: bool = True, **more: str) -> dict[str, str]:
    """What such a process inherits. It finds the package that is tested, and the tests' helpers.

    devices: None leaves the number to the process, or to `more`. kept: whether its programs are, for others that need them.
    """
    unwanted = ("JAX_NUM_CPU_DEVICES", *(() if kept else ("JAX_COMPILATION_CACHE_DIR",)))
    inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
    number = "" if devices is None else f"--xla_force_host_platform_device_count={devices} "
    found = os.pathsep.join(map(str, (_TESTS, _TESTS.parent)))
    return inherited | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": number + QUICK_FLAGS, "PYTHONPATH": found} | more


def printed(*arguments: object, env: dict[str, str]) -> str:
    """What Python with these arguments prints; fails, with the end of its errors, where it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
