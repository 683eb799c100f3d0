"""Where work without gradients runs under a mesh made for training: a decoding step moves no weight between devices, and
answers are those of one device."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from conftest import QUICK_FLAGS

# The recipes' mesh on eight devices, each of which is said to have so many bytes; None: what the machine says.
_DECODE = textwrap.dedent("""
    import json, sys, tempfile
    from pathlib import Path
    import jax, numpy as np
    from retmask_jax.generation import continuous as stream
    from retmask_jax.utils import memory
    from retmask_jax.configs import _papers
    from retmask_jax.runs.context import Context
    from retmask_jax.aot.hlo import read_work
    from retmask_jax.generation.language_model import load
    from retmask_jax.model.interventions import mask_heads
    from retmask_jax.model.kernels.blocked import compiled_for
    from retmask_jax.runs.workdir import Workdir

    config = _papers.retmask_method("bundled", threshold=0.1)
    config.dtype, config.kernel = "float32", "plain"
    compiled, run, capacity = [], stream.decode_rows, memory.capacity

    def decode(*arguments):
        if not compiled:
            compiled.append(run.lower(*arguments).compile().as_text())
        return run(*arguments)

    stream.decode_rows = decode
    rng = np.random.default_rng(0)
    lengths = (60, 3, 41, 7, 12, 50, 9, 33, 1, 20)
    whole = load("bundled")
    masks = [mask_heads(whole.config, some) for some in ([], [(1, 0), (1, 3)])]
    requests = [stream.Request(rng.integers(16, 256, n).tolist(), mask=i % 2) for i, n in enumerate(lengths)]

    def answers(lm):
        found = dict(stream.generate_stream(lm.config, lm.params, requests, batch_size=config.batch_size,
                                            max_new_tokens=12, masks=masks, stop_ids=()))
        return [found[i].tokens.tolist() for i in range(len(lengths))]

    expected = answers(whole)

    def decoded(said):
        memory.capacity = capacity if said is None else lambda: said
        context = Context(config, Workdir.open(Path(tempfile.mkdtemp()), config))
        compiled.clear()
        # A TPU's attention has no loop over rows; a CPU's, which the compiler cannot split, has one.
        with compiled_for("tpu"):
            split = answers(context.lm)
        work = read_work(compiled[0])
        leaves = jax.tree.leaves(context.lm.params)
        begun = context.start_params(context.config.dtype)
        return {
            "same": split == expected, "sent": work.sent, "weights": sum(x.nbytes for x in leaves),
            "held": sum(x.addressable_shards[0].data.nbytes for x in leaves), "rows": config.batch_size,
            "mesh": dict(leaves[0].sharding.mesh.shape),
            "trained": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(begun)),
        }

    print(json.dumps(decoded(json.loads(sys.argv[1]))))
""")


LITTLE = 3_000_000  # of 2.8 MB of weights


def _decoded(memory):
    """What decoding is where each device has so many bytes, in a process of its own."""
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICK_FLAGS}"}
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", _DECODE, json.dumps(memory)], env=inherited | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_under_the_recipes_mesh_a_decoding_step_moves_nothing_where_a_copy_fits_each_device():
    found = _decoded(None)
    assert sum(found["sent"].values()) == 0, found
    assert found["same"] and found["held"] == found["weights"] and found["mesh"]["data"] == 8
    assert found["trained"] < found["weights"] / 7  # training gets them over all devices, as its mesh says


@pytest.mark.slow
def test_under_the_recipes_mesh_a_decoding_step_moves_activations_alone_where_no_copy_fits():
    found = _decoded(LITTLE)
    assert found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 4, "context": 1} and found["same"], found
    assert found["held"] < found["weights"] / 3
    layers, width, vocabulary = 4, 128, 354
    activations = found["rows"] * (3 * layers * width + vocabulary) * 4
    assert 0 < sum(found["sent"].values()) < 2 * activations < found["weights"] / 10, found
