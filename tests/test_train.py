"""Training: exact resume, accumulation, sharding, the optimiser by its equations, and the reference on disk."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers_tiny import CONFIG, copying_params, in_float64, reference_logprob

from retmask_jax import train as training
from retmask_jax.data.preferences import PairRows, Rows, batches
from retmask_jax.progress import track
from retmask_jax.sharding import make_mesh, param_shardings
from retmask_jax.train import Settings, make_optimizer, schedule, train

SETTINGS = Settings(
    objective="dpo", learning_rate=3e-3, final_learning_rate=3e-4, warmup=0.3, steps=6, batch_size=4,
    microbatch_size=2, beta=0.5, label_smoothing=0.0, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1, clip=1.0,
    compute_dtype="float32", remat=False, checkpoint_every=2, seed=0,
)  # fmt: skip
SIDES = ("chosen", "rejected")


def example_rows(n=11, width=16):
    """Pairs with a common beginning and answers of different lengths."""
    rng = np.random.default_rng(2)
    begun = rng.integers(4, CONFIG.vocab_size, (n, width))
    sides = {}
    for side in SIDES:
        tokens, mask = begun.copy(), np.zeros((n, width), bool)
        for i in range(n):
            end = 7 + rng.integers(2, width - 7)
            tokens[i, 7:] = rng.integers(4, CONFIG.vocab_size, width - 7)
            tokens[i, end:] = 0
            mask[i, 7:end] = True
        sides[side] = Rows(tokens.astype(np.int32), mask)
    return PairRows(**sides, cut=0, prompts_cut=0)


ROWS = example_rows()


def one_device():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def run(folder, settings=SETTINGS, params=None, fingerprint="f"):
    """(final params, metrics.jsonl)."""
    params = copying_params() if params is None else params
    params = train(CONFIG, params, ROWS, settings, folder, one_device(), fingerprint=fingerprint)
    return params, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (params, metrics, folder)."""
    folder = tmp_path_factory.mktemp("whole")
    return *run(folder), folder


def _assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def _largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


# --- the run as a whole ---


def test_training_prefers_the_chosen_answers(whole):
    _, metrics, _ = whole
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    first, last = metrics[0], metrics[-1]
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < 0.5 * np.log(2)
    assert last["margin"] > 1 and last["accuracy"] == 1
    rates = [float(schedule(SETTINGS)(step)) for step in range(6)]
    assert [row["learning_rate"] for row in metrics] == pytest.approx(rates)
    assert all(row["gradient_norm"] > 0 for row in metrics)


def test_the_start_parameters_are_left_alone(tmp_path, whole):
    start = copying_params()
    trained, _ = run(tmp_path, params=start)
    _assert_same_bits(start, copying_params())
    assert _largest_difference(trained, start) > 1e-3
    _assert_same_bits(trained, whole[0])


class _Stopped(Exception):
    pass


def _interrupt_after(monkeypatch, steps):
    """Training dies when it reports its step number `steps`."""

    def patched(items, total, what, unit):
        bar = track(items, total, what, unit)
        if unit != "step":
            return bar
        advance, done = bar.update, 0

        def update(n=1):
            nonlocal done
            done += n
            if done >= steps:
                raise _Stopped
            advance(n)

        bar.update = update
        return bar

    monkeypatch.setattr(training, "track", patched)


@pytest.mark.parametrize("steps", [5, 2])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch, whole, steps):
    """Stopped at step 5, with the checkpoint of step 4 behind it; and at step 2, before there is any."""
    params, metrics, _ = whole
    with monkeypatch.context() as patch, pytest.raises(_Stopped):
        _interrupt_after(patch, steps)
        run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    assert path.exists() == (steps == 5)
    if path.exists():
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
        # Killed while the next checkpoint was written: its metrics are there already, its state is not.
        path.write_text(path.read_text() + '{"step": 5, "loss": 99.0}\n{"step": 6, "loss": 99.0}\n')
    updates, update = [], training._update
    monkeypatch.setattr(training, "_update", lambda *args: updates.append(1) or update(*args))
    resumed, rows = run(tmp_path)
    assert len(updates) == (2 if steps == 5 else 6)
    _assert_same_bits(resumed, params)
    assert rows == metrics


def test_a_finished_run_is_not_trained_again(whole, monkeypatch):
    params, metrics, folder = whole
    monkeypatch.setattr(training, "_update", lambda *_: pytest.fail("a step was made"))
    again, rows = run(folder, params=jax.tree.map(jnp.zeros_like, params))
    _assert_same_bits(again, params)
    assert rows == metrics


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path, whole):
    params, metrics, _ = whole
    together, rows = run(tmp_path, dataclasses.replace(SETTINGS, microbatch_size=4))
    assert _largest_difference(together, params) < 1e-6
    for one, other in zip(rows, metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_batch_size_must_be_a_multiple_of_the_microbatch():
    with pytest.raises(ValueError, match="batch_size 4 is no multiple of microbatch_size 3"):
        dataclasses.replace(SETTINGS, microbatch_size=3)
    with pytest.raises(ValueError, match="objective is 'ppo'; it must be one of dpo, sft"):
        dataclasses.replace(SETTINGS, objective="ppo")


def test_supervised_training_lowers_the_loss_of_its_rows(tmp_path):
    """The loss is per answer token of the whole batch, though its two microbatches have different numbers of them."""
    settings = dataclasses.replace(SETTINGS, objective="sft", steps=20, checkpoint_every=20)
    start = copying_params()
    params, metrics = run(tmp_path, settings, start)

    def loss(params, rows):
        tokens, masks = ROWS.chosen.tokens[rows], ROWS.chosen.loss_mask[rows]
        total = sum(reference_logprob(in_float64(params), *row) for row in zip(tokens, masks, strict=True))
        return -total / masks.sum()

    first = batches({"row": np.arange(len(ROWS))}, SETTINGS.batch_size, SETTINGS.seed)[0]["row"]
    halves = ROWS.chosen.loss_mask[first].reshape(2, -1).sum(axis=1)
    assert halves[0] != halves[1]
    assert metrics[0]["loss"] == pytest.approx(loss(start, first), rel=1e-4)
    assert loss(params, slice(None)) < 0.7 * loss(start, slice(None))
    assert len(metrics) == 20
    assert not (tmp_path / "reference.npz").exists()


def test_a_bfloat16_model_is_trained_in_float32(whole):
    """An update of 1e-6 would vanish in a bfloat16 parameter."""
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), copying_params())
    state = training.init_state(start, make_optimizer(SETTINGS), one_device())
    kinds = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state, whole[0]))}
    assert kinds == {np.dtype("float32"), np.dtype("int32")}  # integers count the updates


@pytest.mark.parametrize(("dtype", "short"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_weights_enter_products_in_the_compute_dtype_and_gradients_leave_in_float32(dtype, short):
    """Traced only: bfloat16 is slow on a CPU."""
    settings = dataclasses.replace(SETTINGS, objective="sft", compute_dtype=dtype)
    batch = {"chosen": ROWS.chosen.tokens, "chosen_mask": ROWS.chosen.loss_mask}
    traced = jax.make_jaxpr(jax.grad(lambda p: training.pair_loss(CONFIG, settings, p, batch)[0]))(copying_params())
    assert {aval.dtype for aval in traced.out_avals} == {np.dtype("float32")}
    kernel = f"[{CONFIG.mlp_size},{CONFIG.hidden_size}]"
    assert {word.split(":")[1] for word in str(traced).split() if word.endswith(kernel)} >= {short + kernel}
    assert ("bf16" in str(traced)) == (dtype == "bfloat16")


# --- the reference ---


def _reference(folder):
    with np.load(folder / "reference.npz") as stored:
        return dict(stored)


def test_reference_holds_the_start_models_log_probabilities(whole):
    stored, params = _reference(whole[2]), in_float64(copying_params())
    for side in SIDES:
        rows = getattr(ROWS, side)
        expected = [reference_logprob(params, *row) for row in zip(rows.tokens, rows.loss_mask, strict=True)]
        np.testing.assert_allclose(stored[f"ref_{side}"], expected, rtol=1e-4)


def _plant(folder, whole, fingerprint="f", **changes):
    folder.mkdir(exist_ok=True)
    stored = _reference(whole[2]) | {"fingerprint": fingerprint}
    np.savez(folder / "reference.npz", **stored | changes)


def test_reference_is_read_where_the_fingerprint_matches_and_else_computed(tmp_path, whole):
    shifted = _reference(whole[2])["ref_chosen"] - 3
    _plant(tmp_path / "same", whole, ref_chosen=shifted)
    _, metrics = run(tmp_path / "same")
    assert metrics[0]["reward_chosen"] == pytest.approx(3 * SETTINGS.beta, rel=1e-3)
    _plant(tmp_path / "other", whole, fingerprint="another model", ref_chosen=shifted)
    _, metrics = run(tmp_path / "other")
    assert metrics == whole[1]
    stored = _reference(tmp_path / "other")
    assert str(stored["fingerprint"]) == "f"
    np.testing.assert_array_equal(stored["ref_chosen"], _reference(whole[2])["ref_chosen"])


def test_a_loss_that_is_not_finite_raises_naming_the_step(tmp_path, whole):
    """The reference of one row is NaN; the step that meets it first is named, and its state is not kept."""
    loader = batches({"row": np.arange(len(ROWS))}, SETTINGS.batch_size, SETTINGS.seed)
    first_seen = {row: step for step in reversed(range(6)) for row in loader[step]["row"].tolist()}
    row = next(row for row, step in first_seen.items() if step == 2)
    broken = _reference(whole[2])["ref_chosen"].copy()
    broken[row] = np.nan
    _plant(tmp_path, whole, ref_chosen=broken)
    with pytest.raises(ValueError, match="train: the loss is nan at step 2; lower train.learning_rate"):
        run(tmp_path)
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == whole[1][:2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


@pytest.mark.parametrize("norm", ["parameter_norm", "gradient_norm"])
def test_a_step_that_breaks_the_parameters_raises_though_its_loss_was_finite(tmp_path, monkeypatch, whole, norm):
    """Its loss is that of the parameters before it: the broken ones must not reach a checkpoint."""
    params, metrics, _ = whole
    assert metrics[-1]["parameter_norm"] == pytest.approx(float(optax.tree.norm(params)), rel=1e-5)
    update = training._update

    def breaking(*args):
        state, values = update(*args)
        return state, values | ({norm: np.inf} if int(state.step) == 4 else {})

    monkeypatch.setattr(training, "_update", breaking)
    with pytest.raises(ValueError, match=f"train: the {norm.replace('_', ' ')} is inf at step 3; lower"):
        run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


# --- the optimiser ---


def test_learning_rate_warms_up_and_follows_a_cosine():
    settings = dataclasses.replace(SETTINGS, steps=200, warmup=0.1, learning_rate=4e-3, final_learning_rate=1e-3)
    rate = np.array([float(schedule(settings)(step)) for step in range(201)])
    assert rate[0] == 0
    np.testing.assert_allclose(rate[[10, 20, 110, 200]], [2e-3, 4e-3, 2.5e-3, 1e-3], rtol=1e-5)
    cosine = 1e-3 + 3e-3 * (1 + np.cos(np.pi * np.arange(181) / 180)) / 2
    np.testing.assert_allclose(rate[20:], cosine, rtol=1e-4)
    assert float(schedule(dataclasses.replace(settings, warmup=0.0))(1)) == pytest.approx(4e-3)
    assert float(schedule(dataclasses.replace(settings, steps=1))(0)) == pytest.approx(4e-3)  # its only step counts
    assert float(schedule(dataclasses.replace(settings, steps=5, warmup=1.0))(4)) == pytest.approx(4e-3)


def test_updates_are_adamw_with_clipping_and_norm_scales_do_not_decay():
    """Against the equations of AdamW in float64, over gradients below and above the clipping norm."""
    rng = np.random.default_rng(8)
    settings = dataclasses.replace(SETTINGS, learning_rate=0.1, weight_decay=0.5)
    params = {"attn": {"kernel": rng.normal(size=(3, 4))}, "norm": {"scale": rng.normal(size=4)}}
    grads = [jax.tree.map(lambda x, c=c: c * rng.normal(size=x.shape), params) for c in (0.01, 3.0, 0.1, 0.0)]
    optimizer = make_optimizer(settings)
    ours, update = jax.tree.map(jnp.float32, params), jax.jit(optimizer.update)
    state = optimizer.init(ours)
    for grad in grads:
        updates, state = update(jax.tree.map(jnp.float32, grad), state, ours)
        ours = optax.apply_updates(ours, updates)

    m, v = jax.tree.map(np.zeros_like, params), jax.tree.map(np.zeros_like, params)
    for t, grad in enumerate(grads, 1):
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grad)))
        rate = float(schedule(settings)(t - 1))
        for part, leaf, decay in (("attn", "kernel", 0.5), ("norm", "scale", 0.0)):
            g, p = grad[part][leaf] / max(1, norm), params[part][leaf]
            m[part][leaf] = 0.9 * m[part][leaf] + 0.1 * g
            v[part][leaf] = 0.95 * v[part][leaf] + 0.05 * g**2
            step = m[part][leaf] / (1 - 0.9**t) / (np.sqrt(v[part][leaf] / (1 - 0.95**t)) + settings.eps)
            params[part][leaf] = p - rate * (step + decay * p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, params)


def test_decay_shrinks_all_parameters_of_the_model_but_the_norm_scales():
    optimizer, params = make_optimizer(SETTINGS), jax.tree.map(lambda _: jnp.arange(1.0, 4.0), copying_params())
    nothing, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    _, state = optimizer.update(nothing, state, params)  # the rate of the first update is 0
    updates, _ = optimizer.update(nothing, state, params)
    share = float(schedule(SETTINGS)(1)) * SETTINGS.weight_decay
    kinds = set()
    for path, update in jax.tree.leaves_with_path(updates):
        before = functools.reduce(lambda tree, entry: tree[entry.key], path, params)
        kinds.add(path[-1].key)
        np.testing.assert_allclose(update, 0 if path[-1].key == "scale" else -share * before, rtol=1e-5)
    assert kinds == {"kernel", "embedding", "scale"}


# --- several devices ---


def several_devices(folder: Path):
    """Train on a mesh of 2 x 2 x 2 devices and on one; prints the largest difference (run in a process of its own)."""
    settings = dataclasses.replace(SETTINGS, steps=3, microbatch_size=4)
    mesh = make_mesh({"data": 2, "fsdp": -1, "tensor": 2})
    placed = jax.device_put(copying_params(), param_shardings(CONFIG, mesh))
    update, shares = training._update, []
    training._update = lambda *args: shares.append(args[-1]["chosen"].addressable_shards[0].data.shape) or update(*args)
    many = train(CONFIG, placed, ROWS, settings, folder / "many", mesh, fingerprint="f")
    assert shares == [(1, 16)] * 3  # a batch of 4 over data x fsdp
    kernel = many["blocks"]["0"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    assert len(kernel.sharding.device_set) == 8
    one, metrics = run(folder / "one", settings)
    ours = [json.loads(line) for line in (folder / "many" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in metrics], rel=1e-4)
    assert _largest_difference(one, copying_params()) > 1e-3
    print("largest difference:", _largest_difference(many, one))


@pytest.mark.slow
def test_training_on_eight_devices_equals_training_on_one(tmp_path):
    here = Path(__file__).parent
    code = f"import test_train; test_train.several_devices(test_train.Path({str(tmp_path)!r}))"
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split("largest difference:")[1]) < 1e-5


def test_a_mesh_that_does_not_fit_the_devices_raises():
    devices = jax.devices()[:1]
    assert dict(make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in (
        {"data": 2, "fsdp": 1, "tensor": 1},
        {"data": 2, "fsdp": -1, "tensor": 1},
        {"data": -1, "fsdp": -1, "tensor": 1},
    ):
        with pytest.raises(ValueError, match="a mesh of data=.* does not fit 1 devices"):
            make_mesh(sizes, devices)
