"""Load a checkpoint over a mesh of simulated devices and report the memory it took; run by test_streaming.py.

python tests/stream_checkpoint.py FOLDER DTYPE        # prints one JSON object, sizes in bytes
"""

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from retmask_jax.generation.language_model import load
from retmask_jax.hf import checkpoint_files
from retmask_jax.model.sharding import make_mesh


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def watch(peak: list[int], done: threading.Event) -> None:
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)


def main(folder: str, dtype: str) -> None:
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[-1]))
    read_sizes, read = [], checkpoint_files.SafeTensor.read

    def counted(self, *bounds):
        block = read(self, *bounds)
        read_sizes.append(block.nbytes)
        return block

    checkpoint_files.SafeTensor.read = counted
    start, peak, done = anonymous(), [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, done), daemon=True)
    watcher.start()
    begin = time.perf_counter()
    params = jax.block_until_ready(load(folder, dtype=dtype, mesh=mesh).params)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(params)
    parts = [[(str(s.index), s.data) for s in leaf.addressable_shards] for leaf in leaves]
    buffers = {data.unsafe_buffer_pointer(): data.nbytes for of_leaf in parts for _, data in of_leaf}
    print(
        json.dumps(
            {
                "over": peak[0] - start - sum(buffers.values()),
                "buffers": len(buffers),
                "parts": sum(len({index for index, _ in of_leaf}) for of_leaf in parts),
                "parameters": sum(leaf.nbytes for leaf in leaves),
                "largest_shard": max(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards),
                "devices": len({s.device for leaf in leaves for s in leaf.addressable_shards}),
                "read": sum(read_sizes),
                "largest_read": max(read_sizes),
                "seconds": seconds,
                "checksum": float(sum(np.abs(np.asarray(leaf[..., :1], np.float64)).sum() for leaf in leaves)),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
