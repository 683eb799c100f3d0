"""Weights as stored: training starts from them, adapters are merged into them, whatever dtype is computed in."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest
from helpers_results import detected, training_step
from helpers_tiny import CONFIG, copying_lm
from helpers_training import ROWS, SETTINGS, one_device
from safetensors.numpy import load_file

from retmask_jax.generation.language_model import load, save
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.runs import context as context_module
from retmask_jax.runs import recipes
from retmask_jax.runs.context import Context
from retmask_jax.runs.workdir import Workdir
from retmask_jax.stages import train as train_module
from retmask_jax.training.loop import train
from retmask_jax.utils.files import write_json, write_jsonl

TARGETS = ("q", "o", "up")
ADAPTERS = dataclasses.replace(
    SETTINGS,
    lora_rank=2,
    lora_alpha=4.0,
    lora_targets=TARGETS,
    weight_decay=0.0,
    compute_dtype="bfloat16",
    learning_rate=1e-4,
    final_learning_rate=1e-5,
    steps=4,
    microbatch_size=4,
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The copying model as a float32 checkpoint."""
    folder = tmp_path_factory.mktemp("start")
    save(copying_lm(), folder)
    return folder


def _stored(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_small_updates_of_adapters_move_every_weight_of_a_float32_checkpoint(start, tmp_path):
    """Computed in bfloat16, where a change of 1e-5 of a weight is lost in half of them."""
    lm = load(start, ADAPTERS.start_dtype)
    params = train(CONFIG, lambda: lm.params, ROWS, ADAPTERS, tmp_path / "run", one_device(), identity={"data": "f"})
    save(lm.replace(config=dataclasses.replace(lm.config, lora=ADAPTERS.lora), params=params), tmp_path / "trained")
    before, after = _stored(start), _stored(tmp_path / "trained")
    assert before.keys() == after.keys()
    changes = []
    for name, tensor in before.items():
        assert after[name].dtype == np.float32
        moved = after[name] != tensor
        if name.split(".")[-2].removesuffix("_proj") in TARGETS:
            assert moved.mean() > 0.95, name
            changes.append(np.median(np.abs(after[name] - tensor) / np.abs(tensor)))
        else:
            assert not moved.any(), name
    assert len(changes) == 6 and np.median(changes) < 2**-10  # a quarter of the step between bfloat16 numbers
    assert load(tmp_path / "trained").config == load(start).config


def test_merged_weights_are_the_stored_ones_and_the_adapters_product(start, tmp_path):
    lm = load(start, "bfloat16")
    attn, rng = lm.params["blocks"]["0"]["attn"], np.random.default_rng(0)
    a, b = (rng.normal(0, 1e-3, (2, *shape)).astype(np.float32) for shape in ((32, 2), (2, 128)))
    q = attn["q"] | {"kernel_lora_a": a, "kernel_lora_b": b}
    blocks = {"0": lm.params["blocks"]["0"] | {"attn": attn | {"q": q}}}
    config = dataclasses.replace(lm.config, lora=dataclasses.replace(ADAPTERS, lora_targets=("q",)).lora)
    save(lm.replace(config=config, params=lm.params | {"blocks": blocks}), tmp_path)
    before, after = _stored(start), _stored(tmp_path)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        expected = before.pop(name).astype(np.float64) + 2.0 * (a[layer].astype(np.float64) @ b[layer]).T
        np.testing.assert_allclose(after.pop(name), expected, rtol=2e-7, atol=1e-9)
    assert all(after[name].tobytes() == tensor.tobytes() for name, tensor in before.items())


@pytest.mark.parametrize("settings, dtype", [({}, "float32"), ({"train.lora_rank": 2}, "bfloat16")])
def test_the_stage_trains_from_the_weights_as_stored_and_exports_what_did_not_change_as_stored(
    tmp_path, monkeypatch, settings, dtype
):
    """In every other stage the config's bfloat16 holds."""
    overrides = {
        "dtype": "bfloat16",
        "train.compute_dtype": "bfloat16",
        "train.batch_size": 2,
        "train.microbatch_size": 2,
    }
    overrides |= {"train.arms": '("retmask",)'} | settings
    context = Context(recipes.load_recipe("tiny", [(k, str(v)) for k, v in overrides.items()]), Workdir(tmp_path, {}))
    write_json(tmp_path / "detect" / "result.json", vars(detected([(1, 0)])))
    question = [{"role": "user", "content": "the home of emma : rome . the home of emma :"}]
    sides = {"chosen": "rome", "chosen_finished": True, "rejected": "oslo", "rejected_finished": True}
    pairs = [{"id": str(i), "messages": question} | sides for i in range(2)]
    write_jsonl(tmp_path / "pairs" / "retmask-0.jsonl.gz", pairs)
    starts = []

    def untrained(config, load_params, rows, settings, folder, mesh, **_):
        write_jsonl(folder / "metrics.jsonl", [vars(training_step(1, 0.5))])
        starts.append(load_params())
        return starts[-1]

    monkeypatch.setattr(train_module, "train", untrained)
    assert {x.dtype for x in jax.tree.leaves(context.lm.params)} == {jax.numpy.dtype("bfloat16")}
    train_module.train_stage(context, tmp_path / "train")
    expected = jax.tree.map(lambda x: x.astype(dtype), load(BUNDLED).params)
    jax.tree.map(np.testing.assert_array_equal, starts[0], expected)
    (model,) = (path.parent for path in (tmp_path / "train" / "retmask-0").glob("model/config.json"))
    exported, bundled = _stored(model), _stored(BUNDLED)
    assert {name: x.tobytes() for name, x in exported.items()} == {name: x.tobytes() for name, x in bundled.items()}
    assert {x.dtype for x in jax.tree.leaves(context.lm.params)} == {jax.numpy.dtype("bfloat16")}


def test_the_start_model_is_loaded_in_one_dtype_at_a_time(tmp_path, monkeypatch):
    """The context lets its own go before it reads the weights again, and reads nothing where the dtype is the same."""
    context = Context(recipes.load_recipe("tiny", [("dtype", "bfloat16")]), Workdir(tmp_path, {}))
    held = weakref.ref(context.lm.params["norm"]["scale"])
    loads = []
    monkeypatch.setattr(
        context_module, "load", lambda *args, **kw: loads.append((args[1], held())) or load(*args, **kw)
    )
    assert context.start_params("float32")["norm"]["scale"].dtype == np.float32
    assert loads == [("float32", None)]
    mine = context.lm.params["norm"]["scale"]
    assert context.start_params(context.config.dtype)["norm"]["scale"] is mine and "lm" not in context.__dict__
    assert [dtype for dtype, _ in loads] == ["float32", "bfloat16"]
