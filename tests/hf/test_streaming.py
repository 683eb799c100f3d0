"""A checkpoint goes to its device shards part by part: host memory stays near one shard, nothing is read twice."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from retmask_jax.generation.language_model import load

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 32003,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}


def _make_checkpoint(folder: Path, config, dtype) -> int:
    """A random checkpoint, one file per layer; its size in bytes."""
    rng = np.random.default_rng(0)
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    kv, mlp = config["num_key_value_heads"] * config["head_dim"], config["intermediate_size"]
    of_layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "self_attn.q_norm": (config["head_dim"],),
        "self_attn.k_norm": (config["head_dim"],),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    parts = [{"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}]
    for layer in range(config["num_hidden_layers"]):
        parts.append({f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()})
    folder.mkdir()
    weight_map, size = {}, 0
    for number, shapes in enumerate(parts):
        tensors = {f"{n}.weight": rng.standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()}
        save_file(tensors, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"part-{number}.safetensors")
        size += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return size


def _stream(folder, dtype):
    script = Path(__file__).parents[1] / "stream_checkpoint.py"
    done = subprocess.run([sys.executable, script, folder, dtype], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_each_device_gets_its_part_and_nothing_is_read_twice(tmp_path):
    small = CONFIG | {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    size = _make_checkpoint(tmp_path / "model", small, "float16")
    seen = _stream(tmp_path / "model", "float32")
    assert seen["devices"] == 8
    assert seen["read"] == size  # fp16 norms are whole on every device, yet read once
    assert seen["largest_read"] <= seen["largest_shard"]
    assert seen["buffers"] == seen["parts"]  # what several devices have whole lies in memory once
    leaves = [leaf[..., :1] for leaf in jax.tree.leaves(load(tmp_path / "model").params)]
    assert seen["checksum"] == pytest.approx(sum(np.abs(np.asarray(x, np.float64)).sum() for x in leaves), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("stored, dtype", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")])
def test_host_memory_stays_near_one_shard(tmp_path, stored, dtype):
    import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)

    layers = 22 if stored == "float32" else 40
    config = CONFIG | {"num_hidden_layers": layers, "torch_dtype": stored}
    size = _make_checkpoint(tmp_path / "model", config, np.dtype(stored))
    assert size > 1e9
    seen = _stream(tmp_path / "model", dtype)
    print({name: f"{value / 1e6:.1f} MB" for name, value in seen.items() if value > 1000})
    print(f"{seen['parameters'] / seen['seconds'] / 1e9:.2f} GB/s")
    assert seen["over"] <= 1.5 * seen["largest_shard"] + 200e6
    assert seen["read"] == size
