"""Joining hosts: what the environment says, and what a user is told when they do not find each other."""

import jax
import numpy as np
import pytest

from retmask_jax.utils import hosts, memory

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
)


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` is called with."""
    calls = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    return calls


@pytest.mark.parametrize(
    ("environment", "wanted", "calls"),
    [
        ({}, None, []),
        ({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, None, []),
        ({"SLURM_STEP_NUM_TASKS": "16"}, None, [()]),
        ({"SLURM_STEP_NUM_TASKS": "16"}, False, []),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, [()]),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, None, [()]),
        ({}, True, [()]),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, None, [("a:1", 3, 2)]),
    ],
)
def test_hosts_that_the_environment_names_are_joined(joined, monkeypatch, environment, wanted, calls):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.join(wanted)
    assert joined == calls


def test_an_environment_that_says_half_is_refused_in_one_line(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    with pytest.raises(ValueError, match="the hosts did not join .'JAX_NUM_PROCESSES'.: set JAX_COORDINATOR_ADDRESS, "):
        hosts.join(None)


def test_one_host_writes_and_waits_for_nobody():
    assert hosts.primary() and not hosts.several()
    hosts.wait_for_all("nobody")
    tree = hosts.to_host({"a": jax.numpy.arange(3), "b": 2.5})
    assert isinstance(tree["a"], np.ndarray) and tree["a"].tolist() == [0, 1, 2] and tree["b"] == 2.5


def test_memory_is_asked_of_the_devices_of_this_host(monkeypatch):
    """Those of another host do not say, and raise."""
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("a device of another host is asked"))
    assert memory.capacity() >= memory.limit() > 0 and memory.known() in (False, True)
