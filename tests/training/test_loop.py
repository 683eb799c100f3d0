"""Training: exact resume, accumulation, sharding, the optimiser by its equations, and the reference on disk."""

import dataclasses
import functools
import json
import os
import signal
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from helpers_tiny import CONFIG, copying_params, in_float64, reference_logprob
from helpers_tiny import reference as reference_model
from helpers_training import ROWS, SETTINGS, one_device

from retmask_jax.data.pair_rows import batches
from retmask_jax.generation.decode import generate
from retmask_jax.generation.language_model import from_params, load, save
from retmask_jax.model import lora as adapters
from retmask_jax.model.flops import training_flops
from retmask_jax.model.interventions import mask_heads
from retmask_jax.model.sharding import AXES, make_mesh
from retmask_jax.model.transformer import forward
from retmask_jax.training import loop as training
from retmask_jax.training import reference
from retmask_jax.training.checkpoints import Checkpoints
from retmask_jax.training.loop import Stopped, train
from retmask_jax.training.metrics import Metrics
from retmask_jax.training.objective import part_loss
from retmask_jax.training.optimizer import make_optimizer, schedule
from retmask_jax.training.step import make_programs
from retmask_jax.utils.compiled import spent
from retmask_jax.utils.files import digest
from retmask_jax.utils.progress import track
from retmask_jax.utils.store import Store

IDENTITY = {"data": "f"}


def run(folder, settings=SETTINGS, params=None, identity=IDENTITY, config=CONFIG, **options):
    """(final params, metrics.jsonl less the times)."""
    params = copying_params() if params is None else params
    params = train(config, lambda: params, ROWS, settings, folder, one_device(), identity=identity, **options)
    return params, _metrics(folder)


def _metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("tokens_per_second", 1) > 0 for row in rows)
    return rows


logits_of = jax.jit(forward, static_argnums=0)


def _first_batch():
    return next(batches(len(ROWS), SETTINGS.batch_size, SETTINGS.seed))


@pytest.fixture(scope="module")
def waits():
    """What the run of `whole` waited for before each part of a batch: (key, programs that this process has compiled)."""
    return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory, waits):
    """An uninterrupted run, of which all programs are compiled ahead: (params, metrics, folder)."""

    class AllFirst:
        def __init__(self, compile_each):
            for compile_one in compile_each.values():
                compile_one()
            self.keys = set(compile_each)

        def wait(self, key):
            assert key in self.keys
            waits.append((key, spent().programs))

    folder = tmp_path_factory.mktemp("whole")
    make_programs.cache_clear()  # of which nothing is compiled yet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.compiled, "Ahead", AllFirst)
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

    def patched(items, total, what, unit, done=0):
        bar = track(items, total, what, unit, done)
        if unit != "step":
            return bar
        advance = bar.update

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
    assert [row["step"] for row in _metrics(tmp_path)] == list(range(1, steps + 1))
    # Killed while it wrote: the metrics of a step are there already, its state is not.
    path.write_text(path.read_text() + '{"step": 6, "loss": 99.0}\n{"step": 7, "lo')
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
    settings = dataclasses.replace(SETTINGS, objective="sft", steps=10, checkpoint_every=10)
    start = copying_params()
    params, metrics = run(tmp_path, settings, start)

    def loss(params, pairs):
        rows = ROWS.chosen(pairs, (64,), 0)
        total = sum(reference_logprob(in_float64(params), *row) for row in zip(*rows.values(), strict=True))
        return -total / rows["counted"].sum()

    first = _first_batch()
    assert len(set(np.diff(ROWS.bounds[first], axis=1)[:, 1])) > 1
    assert metrics[0]["loss"] == pytest.approx(loss(start, first), rel=1e-4)
    assert loss(params, range(len(ROWS))) < 0.7 * loss(start, range(len(ROWS)))
    assert len(metrics) == 10
    assert not (tmp_path / "reference").exists()


def test_training_against_the_ablated_model_needs_no_rejected_answers(tmp_path):
    """Their tokens do not count, and the answers of the normal model become more likely against the masked one's."""
    masked = mask_heads(CONFIG, [(1, 0), (1, 2)])
    settings = dataclasses.replace(SETTINGS, objective="contrast", steps=8, checkpoint_every=8, microbatch_size=4)
    params, metrics = run(tmp_path / "one", settings, ablated=masked)
    other = dataclasses.replace(ROWS, flat=ROWS.flat.copy())
    for _, _, rejected, end in ROWS.bounds:
        other.flat[rejected:end] = 5
    mesh = one_device()
    again = train(CONFIG, copying_params, other, settings, tmp_path / "two", mesh, identity=IDENTITY, ablated=masked)
    _assert_same_bits(params, again)
    assert not (tmp_path / "one" / "reference").exists() and metrics[0]["loss"] > 0

    def separation(params):
        """Mean of log p/q of the chosen tokens: p of the model, q of the same with heads masked."""
        rows, ratios = ROWS.chosen(range(len(ROWS)), (64,), 0), []
        for tokens, counted in zip(rows["tokens"], rows["counted"][:, 1:], strict=True):
            normal, ablated = (
                reference_model(params, tokens, mask)[0][:-1] for mask in (None, np.asarray(masked.head_mask))
            )
            ratio = scipy.special.log_softmax(normal, axis=-1) - scipy.special.log_softmax(ablated, axis=-1)
            ratios += ratio[np.arange(len(ratio)), tokens[1:]][counted > 0].tolist()
        return np.mean(ratios)

    assert abs(separation(in_float64(params))) > abs(separation(in_float64(copying_params()))) + 0.01


def test_a_bfloat16_model_is_trained_in_float32(whole):
    """An update of 1e-6 would vanish in a bfloat16 parameter."""
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), copying_params())
    state = make_programs(CONFIG, SETTINGS, one_device()).begin(start, 0)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state, whole[0]))}
    assert kinds == {np.dtype("float32"), np.dtype("int32")}  # integers count the updates


@pytest.mark.parametrize(("dtype", "short"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_weights_enter_products_in_the_compute_dtype_and_gradients_leave_in_float32(dtype, short):
    """Traced only: bfloat16 is slow on a CPU."""
    settings = dataclasses.replace(SETTINGS, objective="sft", compute_dtype=dtype)
    batch = ROWS.chosen(range(4), (64,), 0) | {"weight": np.ones(4, np.float32)}
    traced = jax.make_jaxpr(jax.grad(lambda p: part_loss(CONFIG, settings, p, batch)[0]))(copying_params())
    assert {aval.dtype for aval in traced.out_avals} == {np.dtype("float32")}
    kernel = f"[{CONFIG.mlp_size},{CONFIG.hidden_size}]"
    assert {word.split(":")[1] for word in str(traced).split() if word.endswith(kernel)} >= {short + kernel}
    assert ("bf16" in str(traced)) == (dtype == "bfloat16")


# --- the reference ---


def test_programs_compiled_ahead_are_those_that_updates_take(whole, waits):
    """Of both kinds: the gradients of the first part of a batch, and those that are added to them."""
    (first, before), (second, after), *_ = [(adds, programs) for (_, adds), programs in waits]
    assert (first, second) == (False, True) and after == before
    assert len(waits) == 2 * len(whole[1])


def _reference(folder):
    """f32[N,2]: what is stored; NaN where nothing is."""
    values_ND = np.full((len(ROWS), 2), np.nan, np.float32)
    with Store(folder / "reference") as store:
        for (pair,) in store:
            values_ND[pair] = store[pair,]
    return values_ND


def test_reference_holds_the_start_models_log_probabilities(whole):
    stored, params = _reference(whole[2]), in_float64(copying_params())
    for pair, (start, *ends) in enumerate(ROWS.bounds):
        prompt, *answers = np.split(ROWS.flat[start : ends[-1]], np.array(ends[:-1]) - start)
        for side, answer in enumerate(answers):
            row, counted = np.concatenate([prompt, answer]), np.arange(len(prompt) + len(answer)) >= len(prompt)
            assert stored[pair, side] == pytest.approx(reference_logprob(params, row, counted), rel=1e-4)


def _one_step(folder, monkeypatch, **options):
    """The metrics of a run that ends after its first step."""
    with monkeypatch.context() as patch, pytest.raises(_Stopped):
        _interrupt_after(patch, 1)
        run(folder, **options)
    return _metrics(folder)


def _plant(folder, values_ND, identity=IDENTITY):
    """Stores log-probabilities, less those that are NaN."""
    with Store(folder / "reference", identity) as store:
        for pair, values in enumerate(values_ND.tolist()):
            if not np.isnan(values).any():
                store.add((pair,), values)


def test_runs_of_one_identity_share_the_reference_that_the_first_of_them_computes(tmp_path, whole, monkeypatch):
    shared, faster = tmp_path / "shared", dataclasses.replace(SETTINGS, learning_rate=10 * SETTINGS.learning_rate)
    first = _one_step(tmp_path / "first", monkeypatch, reference=shared)
    monkeypatch.setattr("retmask_jax.training.reference.batch_logprobs", None)
    second = _one_step(tmp_path / "second", monkeypatch, reference=shared, settings=faster)
    assert first == whole[1][:1] and second[0]["loss"] == first[0]["loss"]
    assert not [
        tmp_path / name / "reference" for name in ("first", "second") if (tmp_path / name / "reference").exists()
    ]
    with pytest.raises(ValueError, match="shared was made with another data f, now g"):
        run(tmp_path / "third", reference=shared, identity=IDENTITY | {"data": "g"})


def test_reference_is_read_where_the_identity_matches_and_refused_where_it_does_not(tmp_path, whole, monkeypatch):
    shifted = _reference(whole[2]) - np.float32([3, 0])
    _plant(tmp_path / "same", shifted)
    metrics = _one_step(tmp_path / "same", monkeypatch)
    assert metrics[0]["reward_chosen"] == pytest.approx(3 * SETTINGS.beta, rel=1e-3)
    _plant(tmp_path / "other", shifted, {"data": "f", "model": "another"})
    message = "other/reference was made with another model another, now m: delete it or move it away to make it again"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "other", identity={"data": "f", "model": "m"})


def test_reference_goes_on_where_it_was_cut_off(tmp_path, whole, monkeypatch):
    """Rows that are there are not computed again: of a changed one the change stays."""
    values = _reference(whole[2])
    values[[2, 5, 6]] = np.nan
    values[4] -= 3
    _plant(tmp_path, values)
    _one_step(tmp_path, monkeypatch)
    expected = _reference(whole[2])
    expected[4] -= 3
    np.testing.assert_allclose(_reference(tmp_path), expected, rtol=1e-5)


def test_a_reference_that_is_stopped_keeps_every_part_that_was_computed(tmp_path, whole, monkeypatch):
    compute, calls = reference.batch_logprobs, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*args)

    settings = dataclasses.replace(SETTINGS, reference_batch_size=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference, "batch_logprobs", stopping)
        run(tmp_path, settings)
    stored = _reference(tmp_path)
    assert np.isnan(stored).any(axis=1).sum() == len(ROWS) - 4
    np.testing.assert_allclose(stored, np.where(np.isnan(stored), np.nan, _reference(whole[2])), rtol=1e-5)


def test_a_reference_of_an_earlier_version_stays_and_is_reported(tmp_path, whole, caplog):
    np.savez(tmp_path / "reference.npz", fingerprint="f", logprobs=np.zeros((len(ROWS), 2), np.float32))
    _, metrics = run(tmp_path)
    assert f"{tmp_path / 'reference.npz'} was written by an earlier version and is not read" in caplog.text
    assert (tmp_path / "reference.npz").exists() and metrics == whole[1]


def test_a_loss_that_is_not_finite_raises_naming_the_step_and_the_pairs(tmp_path, whole, monkeypatch):
    """The state of the broken step is not kept."""
    update = training._update

    def breaking(*args):
        state, values = update(*args)
        return state, values | ({"loss": np.nan} if int(state.step) == 3 else {})

    monkeypatch.setattr(training, "_update", breaking)
    loader = batches(len(ROWS), SETTINGS.batch_size, SETTINGS.seed)
    ids = [ROWS.ids[pair] for pair in [next(loader) for _ in range(3)][2]]
    message = f"train: the loss is nan at step 2, whose batch is pairs {', '.join(ids)}: lower train.learning_rate"
    with pytest.raises(ValueError, match=message):
        run(tmp_path)
    assert _metrics(tmp_path) == whole[1][:2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_a_reference_that_is_not_finite_names_the_pair(tmp_path, whole):
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), copying_params())
    with pytest.raises(ValueError, match="log-probability of pair pair 0 is .nan, nan.: leave it out"):
        run(tmp_path, params=broken)


@pytest.mark.parametrize("norm", ["parameter_norm", "gradient_norm"])
def test_a_step_that_breaks_the_parameters_raises_though_its_loss_was_finite(tmp_path, monkeypatch, whole, norm):
    """Its loss is that of the parameters before it: the broken ones must not reach a checkpoint."""
    params, metrics, _ = whole
    norm_of_all = np.sqrt(
        sum(np.square(leaf, dtype=np.float64).sum() for leaf in map(np.asarray, jax.tree.leaves(params)))
    )
    assert metrics[-1]["parameter_norm"] == pytest.approx(norm_of_all, rel=1e-5)
    update = training._update

    def breaking(*args):
        state, values = update(*args)
        return state, values | ({norm: np.inf} if int(state.step) == 4 else {})

    monkeypatch.setattr(training, "_update", breaking)
    with pytest.raises(ValueError, match=f"train: the {norm.replace('_', ' ')} is inf at step 3, whose batch"):
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
    nothing, state, update = jax.tree.map(np.zeros_like, params), optimizer.init(params), jax.jit(optimizer.update)
    _, state = update(nothing, state, params)  # the rate of the first update is 0
    updates, _ = update(nothing, state, params)
    share = float(schedule(SETTINGS)(1)) * SETTINGS.weight_decay
    kinds = set()
    for path, update in jax.tree.leaves_with_path(updates):
        before = functools.reduce(lambda tree, entry: tree[entry.key], path, params)
        kinds.add(path[-1].key)
        np.testing.assert_allclose(update, 0 if path[-1].key == "scale" else -share * before, rtol=1e-5)
    assert kinds == {"kernel", "embedding", "scale"}


# --- adapters ---


def test_adapters_are_trained_alone_and_merged(tmp_path):
    """Frozen layers stay bit for bit; the first loss is that of the start model; what is saved is a plain model."""
    settings = dataclasses.replace(
        SETTINGS, lora_rank=2, lora_alpha=8.0, lora_targets=("q", "o", "up"), weight_decay=0.0, microbatch_size=4
    )
    params, metrics = run(tmp_path / "run", settings)
    start = copying_params()
    save(from_params(dataclasses.replace(CONFIG, lora=settings.lora), params), tmp_path / "saved")
    params = load(tmp_path / "saved").params
    assert jax.tree.structure(params) == jax.tree.structure(start)
    assert metrics[0]["loss"] == pytest.approx(np.log(2), rel=1e-4) and metrics[-1]["loss"] < 0.6
    for (path, leaf), before in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(start), strict=True):
        moved = np.abs(np.asarray(leaf) - np.asarray(before)).reshape(-1, *leaf.shape[-2:] if leaf.ndim > 1 else (1, 1))
        trained = path[-1].key == "kernel" and path[-2].key in settings.lora_targets
        assert (moved.max() > 1e-4) == trained, jax.tree_util.keystr(path)
        if trained:
            change = (np.asarray(leaf, np.float64) - np.asarray(before))[0]
            assert np.linalg.matrix_rank(change, tol=1e-5) <= 2


def test_merged_adapters_are_the_model_that_was_trained():
    """In a model whose layers scale what they add, which adapters are a part of."""
    lora = dataclasses.replace(SETTINGS, lora_rank=3).lora
    plain = dataclasses.replace(CONFIG, residual_scale=0.7, logit_scale=2.0)
    config = dataclasses.replace(plain, lora=lora)
    shapes = make_programs(plain, dataclasses.replace(SETTINGS, lora_rank=3), one_device()).state.params
    start, rng = copying_params(), np.random.default_rng(0)
    joined = adapters.join(jax.tree.map(lambda x: np.float32(0.1 * rng.standard_normal(x.shape)), shapes), start)
    tokens = ROWS.chosen(range(3), (64,), 0)["tokens"]
    with_adapters = logits_of(config, joined, tokens)
    merged = logits_of(plain, adapters.merged(joined, lora), tokens)
    scale = np.abs(merged).max()
    np.testing.assert_allclose(with_adapters, merged, atol=1e-5 * scale)
    assert np.abs(merged - logits_of(plain, start, tokens)).max() > 1e-2 * scale
    with pytest.raises(ValueError, match="a model with adapters cannot generate: merge them first"):
        generate(config, joined, tokens, [7] * 3, max_new_tokens=1)


def test_first_moments_may_be_kept_in_bfloat16():
    """The state has them so, and an update changes the parameters nearly as with float32 ones."""
    settings = dataclasses.replace(SETTINGS, first_moment_dtype="bfloat16")
    moments = make_programs(CONFIG, settings, one_device()).state.opt_state[1][0]
    assert {x.dtype for x in jax.tree.leaves(moments.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(moments.nu)} == {jnp.dtype("float32")}
    grads, params = {"kernel": np.linspace(-1, 1, 7, dtype=np.float32)}, {"kernel": np.ones(7, np.float32)}
    updates = []
    for each in (settings, SETTINGS):
        optimizer = make_optimizer(each)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(3):
            changes, state = update(grads, state, params)
        updates.append(np.asarray(changes["kernel"]))
    np.testing.assert_allclose(*updates, rtol=0.02)
    assert (updates[0] != updates[1]).any()


# --- run control ---


def test_a_run_that_is_told_to_stop_writes_a_checkpoint_and_goes_on_to_the_same_bits(tmp_path, monkeypatch, whole):
    update, handler = training._update, signal.getsignal(signal.SIGTERM)

    def told(*args):
        if int(args[1].step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Stopped, match="told to stop; a checkpoint of step 3 is written"),
    ):
        patch.setattr(training, "_update", told)
        run(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == handler
    params, metrics = run(tmp_path)
    _assert_same_bits(params, whole[0])
    assert metrics == whole[1]


def test_the_newest_and_the_best_checkpoints_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2, identity=IDENTITY) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
            checkpoints.save(step, {"x": jnp.full(3, step)}, {"next_index": step}, loss)
        assert checkpoints.latest == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]
    with (
        Checkpoints(tmp_path, keep=2, identity={"data": "g"}) as other,
        pytest.raises(ValueError, match="another data f, now g"),
    ):
        other.restore({"x": jax.device_put(jnp.zeros(3), one_device().devices.flat[0])})


def test_checkpoints_of_an_earlier_version_are_read_where_their_hash_is_that_of_the_identity(tmp_path):
    with Checkpoints(tmp_path, keep=1, identity=IDENTITY) as checkpoints:
        checkpoints.save(3, {"x": jnp.full(3, 7.0)}, {"next_index": 5}, 1.0)
    (about,) = (path for path in (tmp_path / "3" / "about").iterdir() if b"identity" in path.read_bytes())
    stored = json.loads(about.read_text())
    about.write_text(json.dumps({name: stored[name] for name in ("data", "loss")} | {"fingerprint": digest(IDENTITY)}))
    shapes = {"x": jax.device_put(jnp.zeros(3), one_device().devices.flat[0])}
    with Checkpoints(tmp_path, keep=1, identity=IDENTITY) as checkpoints:
        state, data = checkpoints.restore(shapes)
        assert state["x"].tolist() == [7.0] * 3 and data == {"next_index": 5}
    message = f"was made with another input {digest(IDENTITY)}, now {digest({'data': 'g'})}: delete it"
    with Checkpoints(tmp_path, keep=1, identity={"data": "g"}) as other, pytest.raises(ValueError, match=message):
        other.restore(shapes)


def test_metrics_go_to_tensorboard_too(whole):
    from tensorboardX.proto import event_pb2

    paths = sorted((whole[2] / "tensorboard").iterdir())
    data, losses = b"".join(path.read_bytes() for path in paths), []
    while data:  # records of TFRecord: length, its checksum, the bytes, theirs
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        losses += [value.simple_value for value in event.summary.value if value.tag == "loss"]
        data = data[16 + size :]
    assert losses == pytest.approx([row["loss"] for row in whole[1]])


def test_a_project_of_weights_and_biases_gets_the_numbers(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("finished")
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options) or run))
    with Metrics(tmp_path, 0, "a project", "train x") as metrics:
        metrics.add({"step": 1, "loss": 0.5})
    assert calls == [{"project": "a project", "name": "train x", "dir": str(tmp_path)}, (1, {"loss": 0.5}), "finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="train.wandb names a project, but wandb is not installed: pip install wandb"):
        Metrics(tmp_path, 0, "a project")


def test_speed_is_of_real_tokens_and_needed_operations(monkeypatch):
    """Half of what a prompt and both of its answers need at the device's peak takes half of it."""
    programs = make_programs(CONFIG, SETTINGS, one_device())
    run = training._Run(CONFIG, SETTINGS, ROWS, ROWS.sizes, None, one_device(), programs, ([64], [16]), None)
    pairs = np.array([3, 8])
    tokens = sum(int(end - start) for start, _, _, end in ROWS.bounds[pairs])
    assert training._speed(run, pairs, 2.0) == {"tokens_per_second": tokens / 2}
    monkeypatch.setattr(training, "peak_flops", lambda: 1e9)
    needed = 0.0
    for start, chosen, rejected, end in ROWS.bounds[pairs].tolist():
        needed += training_flops(CONFIG, chosen - start, (rejected - chosen, end - rejected))
    assert training._speed(run, pairs, 2.0)["flops_utilisation"] == pytest.approx(needed / 2 / 1e9)
    alone = dataclasses.replace(run, settings=dataclasses.replace(SETTINGS, objective="sft"))
    assert (
        training._speed(alone, pairs, 2.0)["tokens_per_second"]
        == (ROWS.bounds[pairs, 2] - ROWS.bounds[pairs, 0]).sum() / 2
    )


def test_rows_that_do_not_divide_over_the_mesh_are_refused():
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 3})
    message = "train.microbatch_size 2 does not divide over 6 devices .mesh.data 2 x mesh.fsdp 3.: make it a multiple"
    with pytest.raises(ValueError, match=message):
        training.check_mesh(SETTINGS, mesh)


def test_the_steps_asked_for_are_traced_and_no_others(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with training._profile(tmp_path, (1, 2)) as before:
        for step, so_far in enumerate([[], [str(tmp_path / "profile")], [str(tmp_path / "profile"), "stop"]]):
            before(step)
            assert calls == so_far


@pytest.mark.slow
def test_a_trace_of_the_steps_asked_for_is_written(tmp_path):
    with training._profile(tmp_path, (1, 2)) as before:
        for step in range(3):
            before(step)
            jnp.ones(3).block_until_ready()
            assert bool(list((tmp_path / "profile").rglob("*.xplane.pb"))) == (step == 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": (3, 3)}, "train.profile is"),
        ({"compute_dtype": "float16"}, "train.compute_dtype is 'float16'; it must be float32 or bfloat16"),
        ({"profile": (3,)}, "train.profile is"),
        ({"lora_rank": 2, "lora_targets": ("query",)}, "LoRA targets are"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is 0.1, which ipo does not have"),
    ],
)
def test_settings_that_do_not_fit_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


# --- several devices ---


def test_a_mesh_that_does_not_fit_the_devices_raises():
    devices = jax.devices()[:1]
    assert dict(make_mesh({"data": 1, "fsdp": -1}, devices).shape) == dict.fromkeys(AXES, 1)
    for sizes in (
        {"data": 2, "fsdp": 1, "tensor": 1},
        {"data": 2, "fsdp": -1, "tensor": 1},
        {"data": -1, "fsdp": -1, "tensor": 1},
    ):
        with pytest.raises(ValueError, match="a mesh of data=.* does not fit 1 devices"):
            make_mesh(sizes, devices)
