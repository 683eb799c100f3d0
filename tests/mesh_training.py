"""Train on a mesh in a process of its own: `python mesh_training.py FOLDER '{"mesh": {...}, ...}'`.

Writes params.npz and metrics.jsonl into FOLDER. Options: mesh; stop_at, the step in which the process gets a signal, how
("term" or "kill") and who (the host, 0); processes, process and port of several hosts.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax


def main(folder: Path, options: dict) -> None:
    if options.get("processes"):
        jax.distributed.initialize(f"127.0.0.1:{options['port']}", options["processes"], options["process"])
    import numpy as np
    from flax.traverse_util import flatten_dict
    from helpers_tiny import CONFIG, copying_params
    from helpers_training import ROWS, SETTINGS

    from retmask_jax.model.sharding import make_mesh, param_shardings
    from retmask_jax.training import loop as training
    from retmask_jax.utils.hosts import primary, to_host

    settings = dataclasses.replace(
        SETTINGS,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        warmup=0.1,
        steps=10,
        checkpoint_every=3,
        batch_size=8,
        microbatch_size=8,
        reference_batch_size=8,
    )
    mesh = make_mesh(options["mesh"])
    update = training._update

    def stopping(run, state, *rest):
        if int(state.step) == options.get("stop_at") and jax.process_index() == options.get("who", 0):
            os.kill(os.getpid(), signal.SIGTERM if options["how"] == "term" else signal.SIGKILL)
            time.sleep(1)  # the steps that are left take less than the word to the other host, where cores are busy
        return update(run, state, *rest)

    training._update = stopping

    def load():
        shardings = param_shardings(CONFIG, mesh)
        return jax.tree.map(
            lambda x, at: jax.make_array_from_callback(x.shape, at, lambda index: np.asarray(x)[index]),
            copying_params(),
            shardings,
        )

    try:
        params = training.train(CONFIG, load, ROWS, settings, folder, mesh, identity={"data": "f"})
    except training.Stopped as stopped:
        print(stopped)
        return
    arrays = {"/".join(path): x for path, x in flatten_dict(to_host(params)).items()}
    if primary():
        np.savez(folder / "params.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
