"""One training run on meshes of simulated devices, on several hosts, killed and told to stop: always the same outcome."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers_processes import environment
from helpers_tiny import copying_params

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1]
MESHES = {
    "8 x 1": {"data": 8},
    "4 x 2": {"data": 4, "fsdp": 2},
    "2 x 2 x 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "context 2": {"data": 2, "fsdp": 2, "context": 2},
}


def _start(folder, devices, options) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "mesh_training.py"), str(folder), json.dumps(options)]
    return subprocess.Popen(
        command, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _run(folder, devices=1, status=0, hosts=1, **options):
    """(losses, {path: parameter}) of a run; the parameters are empty for one that ended early."""
    if hosts > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options |= {"processes": hosts, "port": free.getsockname()[1]}
    running = [_start(folder, devices, options | ({"process": i} if hosts > 1 else {})) for i in range(hosts)]
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == status, errors[-3000:]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saved = folder / "params.npz"
    return losses, dict(np.load(saved)) if saved.exists() else {}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run on one device."""
    return _run(tmp_path_factory.mktemp("one"), mesh={"data": 1})


def _assert_same(found, one):
    """Losses to 1e-5, and the change of the parameters to a thousandth of its norm."""
    start = {"/".join(path): np.asarray(x, np.float64) for path, x in flatten_dict(copying_params()).items()}
    np.testing.assert_allclose(found[0], one[0], rtol=1e-5)
    norm = functools.partial(_norm_of_difference, one[1])
    assert norm(start) > 0.1
    assert norm(found[1]) < 1e-3 * norm(start)


def _norm_of_difference(a, b):
    return np.sqrt(sum(((a[name] - b[name].astype(np.float64)) ** 2).sum() for name in a))


@pytest.mark.parametrize("name", MESHES)
def test_training_on_eight_devices_equals_training_on_one(tmp_path, one, name):
    _assert_same(_run(tmp_path, 8, mesh=MESHES[name]), one)


def test_training_on_two_hosts_equals_training_on_one(tmp_path, one):
    """Four devices each; every host has half of the rows and writes its share of the checkpoints."""
    _assert_same(_run(tmp_path, 4, hosts=2, mesh={"data": 2, "fsdp": 4}), one)


def test_two_hosts_stop_at_the_same_step_when_one_is_told_to_and_go_on_as_one(tmp_path, one):
    _run(tmp_path, 2, hosts=2, mesh={"data": 4}, stop_at=4, how="term", who=1)
    stopped = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 5 <= stopped < 10
    _assert_same(_run(tmp_path, 2, mesh={"data": 1, "fsdp": 2}), one)


@pytest.mark.parametrize(("how", "status", "kept"), [("kill", -signal.SIGKILL, 5), ("term", 0, 6)])
def test_a_run_that_was_ended_goes_on_to_the_same_bits(tmp_path, one, how, status, kept):
    """Killed in step 6, with a checkpoint of step 3 behind it; told to stop in it, with one of step 6."""
    losses, _ = _run(tmp_path, status=status, mesh={"data": 1}, stop_at=5, how=how)
    assert losses == one[0][:kept]
    losses, params = _run(tmp_path, mesh={"data": 1})
    assert losses == one[0]
    for name, value in params.items():
        np.testing.assert_array_equal(value, one[1][name], err_msg=name)


def test_a_checkpoint_of_one_mesh_goes_on_on_another(tmp_path, one):
    _run(tmp_path, 4, mesh={"data": 2, "fsdp": 2}, stop_at=5, how="term")
    _assert_same(_run(tmp_path, 8, mesh=MESHES["2 x 2 x 2"]), one)


SAVE = """
import sys
import jax
if len(sys.argv) > 3:
    jax.distributed.initialize("127.0.0.1:" + sys.argv[3], 2, int(sys.argv[4]))
import numpy as np
from retmask_jax.generation.language_model import load, save
from retmask_jax.model.config import Lora
from retmask_jax.model.interventions import mask_heads
from retmask_jax.model.sharding import make_mesh, param_shardings
import dataclasses

mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": jax.device_count() // 2})
lm = load(sys.argv[1], "bfloat16", mesh)
config = dataclasses.replace(lm.config, lora=Lora(2, 4.0, ("up",)))
places = param_shardings(config, mesh)["blocks"]["0"]["mlp"]["up"]
up, rng = dict(lm.params["blocks"]["0"]["mlp"]["up"]), np.random.default_rng(0)
for end, width in (("kernel_lora_a", 0), ("kernel_lora_b", 2)):
    layers, inside, outside = up["kernel"].shape
    array = rng.normal(0, 1e-3, (layers, 2, outside) if width else (layers, inside, 2)).astype(np.float32)
    up[end] = jax.make_array_from_callback(array.shape, places[end], lambda index, array=array: array[index])
block = lm.params["blocks"]["0"]
block = block | {"mlp": block["mlp"] | {"up": up}}
save(lm.replace(config=config, params=lm.params | {"blocks": {"0": block}}), sys.argv[2], mask_heads(config, [(1, 0)]))
"""


def test_two_hosts_save_what_one_device_saves(tmp_path):
    """Weights as stored in float32, adapters merged into them and a baked mask; the parameters are bfloat16 and in parts."""
    from safetensors.numpy import load_file

    from retmask_jax.hf.hub import BUNDLED

    found = []
    for hosts, devices in ((1, 2), (2, 2)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-c", SAVE, str(BUNDLED), str(tmp_path / str(hosts))]
        several = [[port, str(host)] for host in range(hosts)] if hosts > 1 else [[]]
        running = [
            subprocess.Popen(command + more, env=environment(devices), stderr=subprocess.PIPE, text=True)
            for more in several
        ]
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
        found.append(load_file(tmp_path / str(hosts) / "model.safetensors"))
    stored = load_file(BUNDLED / "model.safetensors")
    for name, tensor in stored.items():
        assert found[0][name].tobytes() == found[1][name].tobytes(), name
        same = found[0][name] == tensor
        if "up_proj" in name:
            assert same.mean() < 0.05
        elif name == "model.layers.1.self_attn.o_proj.weight":
            assert same[:, 32:].all() and not found[0][name][:, :32].any()
        else:
            assert same.all(), name


def test_two_hosts_run_the_whole_pipeline_as_one(tmp_path):
    """The same numbers in the summary, written once, by the command as users start it."""
    summaries = []
    for hosts in (1, 2):
        root, running = tmp_path / str(hosts), []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        for host in range(hosts):
            joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(host)}
            env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | (joined if hosts == 2 else {})
            command = [
                sys.executable,
                "-m",
                "retmask_jax.cli.main",
                "run",
                f"--config={HERE / 'tiny_small.py'}",
                f"--workdir={root}",
            ]
            running.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        outputs = [process.communicate(timeout=900) for process in running]
        assert all(process.returncode == 0 for process in running), outputs[-1][1][-3000:]
        # The library that connects the hosts prints lines of its own.
        printed = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in outputs]
        assert any("every number" in line for line in printed[0]) and not any(printed[1:])
        summaries.append(json.loads((root / "summary.json").read_text()))
    one, two = summaries
    assert one.keys() == two.keys()
    for name in one:
        assert two[name]["value"] == pytest.approx(one[name]["value"], rel=1e-3, abs=1e-3), name
