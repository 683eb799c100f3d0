"""Losses against references in float64, written from the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_tiny import CONFIG, copying_params, in_float64, reference_logprob

from retmask_jax.dpo import dpo_loss, sft_loss
from retmask_jax.train import Settings, pair_loss

LOGPS = 4 * np.random.default_rng(0).standard_normal((4, 50)) - 10


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _equation_7(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
    """Loss of arXiv 2305.18290, eq. 7, with a share `smoothing` of the preferences the wrong way round; float64."""
    ratio_w, ratio_l = np.exp(chosen) / np.exp(ref_chosen), np.exp(rejected) / np.exp(ref_rejected)
    right = _sigmoid(beta * np.log(ratio_w) - beta * np.log(ratio_l))
    return -(1 - smoothing) * np.log(right) - smoothing * np.log(1 - right)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_loss_and_gradient_equal_the_equation(beta, smoothing):
    args = [jnp.asarray(x, jnp.float32) for x in LOGPS]
    loss = dpo_loss(*args, beta=beta, label_smoothing=smoothing)
    assert loss.shape == (50,)
    np.testing.assert_allclose(loss, _equation_7(*LOGPS, beta, smoothing), rtol=1e-5)

    grads = jax.grad(lambda *xs: dpo_loss(*xs, beta=beta, label_smoothing=smoothing).sum(), (0, 1, 2, 3))(*args)
    # d loss / d margin by hand: sigma(margin) - (1 - smoothing); the margin is beta * (w - ref_w - l + ref_l).
    margin = beta * (LOGPS[0] - LOGPS[2] - LOGPS[1] + LOGPS[3])
    slope = beta * (_sigmoid(margin) - (1 - smoothing))
    for grad, sign in zip(grads, (1, -1, -1, 1), strict=True):
        np.testing.assert_allclose(grad, sign * slope, rtol=1e-4, atol=1e-6)


def test_dpo_loss_is_finite_where_the_equation_overflows():
    big = jnp.float32([2000.0, -2000.0])
    zero = jnp.zeros(2)
    np.testing.assert_allclose(dpo_loss(big, zero, zero, zero, beta=1.0), [0, 2000], atol=1e-6)
    grad = jax.grad(lambda x: dpo_loss(x, zero, zero, zero, beta=1.0).sum())(big)
    np.testing.assert_allclose(grad, [0, -1], atol=1e-6)


def test_loss_of_the_untrained_policy_is_log_2():
    chosen, rejected = jnp.asarray(LOGPS[0]), jnp.asarray(LOGPS[1])
    for smoothing in (0.0, 0.3):
        loss = dpo_loss(chosen, rejected, chosen, rejected, beta=0.7, label_smoothing=smoothing)
        np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_unknown_kind_raises():
    with pytest.raises(ValueError, match="kind is 'hinge'; it must be one of sigmoid"):
        dpo_loss(*jnp.zeros((4, 1)), kind="hinge")


def test_sft_loss_weighs_tokens_not_rows():
    assert float(sft_loss(jnp.float32([-6.0, -2.0]), 4)) == 2.0


# --- the whole loss, through the model ---

ROWS = ("chosen", "rejected")


@pytest.fixture(scope="module")
def batch():
    """Two pairs of rows of 20 tokens, their answers in the middle (the rest is padding), and a reference apart."""
    rng = np.random.default_rng(1)
    batch = {}
    for name in ROWS:
        batch[name] = rng.integers(4, CONFIG.vocab_size, (2, 20)).astype(np.int32)
        batch[f"{name}_mask"] = np.zeros((2, 20), bool)
        for row, (start, end) in enumerate([(9, 15), (6, 18)]):
            batch[f"{name}_mask"][row, start:end] = True
        batch[f"ref_{name}"] = np.float32([-31.0, -64.0]) + (name == "chosen")
    return batch


def _settings(**changes):
    values = {
        "objective": "dpo", "learning_rate": 1e-3, "final_learning_rate": 1e-4, "warmup": 0.1, "steps": 4,
        "batch_size": 2, "microbatch_size": 2, "beta": 0.3, "label_smoothing": 0.1, "b1": 0.9, "b2": 0.95, "eps": 1e-8,
        "weight_decay": 0.1, "clip": 1.0, "compute_dtype": "float32", "remat": False, "checkpoint_every": 1, "seed": 0,
    }  # fmt: skip
    return Settings(**values | changes)


@pytest.fixture(scope="module")
def plain(batch):
    """{row kind: [(log-probability, its gradient) of each row]}, float64."""
    with jax.enable_x64(True):
        function = jax.jit(jax.value_and_grad(lambda p, tokens, mask: reference_logprob(p, tokens, mask, xp=jnp)))
        params = jax.tree.map(jnp.asarray, in_float64(copying_params()))
        rows = {name: [function(params, batch[name][i], batch[f"{name}_mask"][i]) for i in range(2)] for name in ROWS}
        assert rows["chosen"][0][0].dtype == jnp.float64
        return jax.tree.map(np.asarray, rows)


def _plain_loss(plain, batch, settings):
    """(loss, gradient) of the two pairs by the chain rule."""
    logps = {name: np.array([logp for logp, _ in plain[name]]) for name in ROWS}
    if settings.objective == "sft":
        n = batch["chosen_mask"].sum()
        loss, slopes = -logps["chosen"].sum() / n, {"chosen": [-1 / n] * 2, "rejected": [0, 0]}
    else:
        references = [batch[f"ref_{name}"].astype(float) for name in ROWS]
        args = *logps.values(), *references
        loss = _equation_7(*args, settings.beta, settings.label_smoothing).mean()
        margin = settings.beta * (args[0] - args[2] - args[1] + args[3])
        slope = settings.beta * (_sigmoid(margin) - (1 - settings.label_smoothing)) / 2
        slopes = {"chosen": slope, "rejected": -slope}
    terms = [jax.tree.map(lambda g, s=slopes[name][i]: s * g, plain[name][i][1]) for name in ROWS for i in range(2)]
    return loss, jax.tree.map(lambda *parts: sum(parts), *terms)


@pytest.mark.parametrize("changes", [{}, {"objective": "sft", "remat": True}], ids=["dpo", "sft, remat"])
def test_training_loss_and_gradient_equal_a_plain_float64_model(batch, plain, changes):
    settings = _settings(**changes)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: pair_loss(CONFIG, settings, p, batch)[0]))(copying_params())
    expected_loss, expected = _plain_loss(plain, batch, settings)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for (path, grad), reference in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        scale = np.abs(reference).max()
        assert scale > 1e-4, path
        np.testing.assert_allclose(grad, reference, rtol=1e-3, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))


def test_training_loss_starts_at_log_2_and_reports_rewards(batch):
    """With the start model's own log-probabilities as the reference; then with rewards of known size."""
    params, settings = in_float64(copying_params()), _settings(label_smoothing=0.0)
    own = {
        f"ref_{name}": np.float32(
            [reference_logprob(params, batch[name][i], batch[f"{name}_mask"][i]) for i in range(2)]
        )
        for name in ROWS
    }
    loss = jax.jit(lambda p, b: pair_loss(CONFIG, settings, p, b))
    value, _ = loss(copying_params(), batch | own)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-4)
    own["ref_chosen"] -= np.float32([2.0, -1.0])
    own["ref_rejected"] -= np.float32([1.0, 1.0])
    _, metrics = loss(copying_params(), batch | own)
    expected = {"reward_chosen": 0.15, "reward_rejected": 0.3, "margin": -0.15, "accuracy": 0.5}
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-3)
