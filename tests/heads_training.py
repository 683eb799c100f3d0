"""Train some heads of a small model that has biases, experts and shared KV heads.

`python heads_training.py FOLDER '{"mesh": {...}, ...}'` does it on a mesh, in a process with devices of its own.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from helpers_tiny import CONFIG as TINY
from helpers_training import ROWS, SETTINGS

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.sharding import make_mesh, plain_shapes
from retmask_jax.training.loop import train

CONFIG = ModelConfig(
    vocab_size=TINY.vocab_size,
    hidden_size=16,
    mlp_size=20,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    max_length=64,
    qkv_bias=True,
    qk_norm="head",
    expert_pattern=(True,),
    n_experts=4,
    experts_per_token=2,
    expert_size=12,
)
# The same with experts in every other layer, and a tail of one. To train it takes long to compile.
MIXED = dataclasses.replace(CONFIG, layer_pattern=("full", "full"), expert_pattern=(False, True))
# None of layer 2, of layer 1 both readers of KV head 1.
HEADS = ((0, 1), (1, 2), (1, 3), (3, 0), (4, 2))
# One program: no reference, one width, the whole batch at once.
ALONE = dataclasses.replace(
    SETTINGS, objective="sft", heads=HEADS, steps=20, checkpoint_every=20, microbatch_size=4, widths=1, clip=0.1
)


def start_params(config=CONFIG):
    """f32 parameters; no entry is zero."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.uniform(0.5, 1.5, leaf.shape) if path[-1].key == "scale" else rng.normal(0, 0.3, leaf.shape)
        return jnp.asarray(values.astype(np.float32))

    return jax.tree.map_with_path(draw, plain_shapes(config))


def trained_params(folder, mesh, settings=ALONE):
    """The final parameters, with adapters where the settings have them."""
    return train(CONFIG, start_params, ROWS, settings, folder, mesh, identity={"data": "f"})


def main(folder: Path, options: dict) -> None:
    mesh = make_mesh(options.pop("mesh"))
    params = trained_params(folder, mesh, dataclasses.replace(ALONE, **options))
    np.savez(folder / "params.npz", **{"/".join(path): np.asarray(x) for path, x in flatten_dict(params).items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
