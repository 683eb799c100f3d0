"""Losses against references in float64, written from the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_tiny import CONFIG, copying_params, in_float64, reference_logprob

from retmask_jax.model.interventions import mask_heads
from retmask_jax.model.masking import normalise
from retmask_jax.model.transformer import forward
from retmask_jax.training.losses import contrast_loss, dpo_loss
from retmask_jax.training.objective import part_loss
from retmask_jax.training.settings import Settings

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


def test_ipo_hinge_and_simpo_equal_their_equations():
    """arXiv 2310.12036 eq. 17, 2309.06657 and 2405.14734 eq. 6, with their slopes by hand; float64."""
    args = [jnp.asarray(x, jnp.float32) for x in LOGPS]
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    h, beta, gamma = np.log(np.exp(chosen - ref_chosen) / np.exp(rejected - ref_rejected)), 0.3, 0.7
    simpo = beta * chosen - beta * rejected - gamma
    cases = {
        "ipo": ((h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta)), {}),
        "hinge": (np.maximum(0, 1 - beta * h), np.where(beta * h < 1, -beta, 0), {}),
        "simpo": (-np.log(_sigmoid(simpo)), beta * (_sigmoid(simpo) - 1), {"gamma": gamma}),
    }
    assert (cases["hinge"][0] == 0).any() and (cases["hinge"][0] > 0).any()
    for kind, (expected, slope, options) in cases.items():
        loss = dpo_loss(*args, beta=beta, kind=kind, **options)
        np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5, err_msg=kind)
        grads = jax.grad(lambda *xs: dpo_loss(*xs, beta=beta, kind=kind, **options).sum(), (0, 1))(*args)  # noqa: B023
        np.testing.assert_allclose(grads, np.stack([slope, -slope]), rtol=1e-3, atol=1e-5, err_msg=kind)
    np.testing.assert_array_equal(dpo_loss(args[0], args[1], None, None, kind="simpo"), dpo_loss(*args, kind="simpo"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ppo"}, "kind of loss is 'ppo'; it must be one of sigmoid, ipo, hinge, simpo"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing is 0.1, which ipo does not have"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it must be at least 0 and less than 0.5"),
        ({"gamma": 0.5}, "gamma is 0.5, which only simpo has, not sigmoid"),
        ({"beta": 0.0}, "beta is 0.0; it must be more than 0"),
    ],
)
def test_options_a_loss_does_not_have_raise(options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*jnp.zeros((4, 1)), **options)


def test_contrast_loss_is_the_divergence_from_the_sharpened_distribution():
    """KL(t, p) with t = p (p/q)^s / sum, in float64; its gradient holds t fixed: p - t at the logits."""
    rng = np.random.default_rng(4)
    normal, ablated = rng.normal(size=(2, 3, 5, 11)) * 2
    loss_of = jax.jit(contrast_loss)
    slopes_of = jax.jit(jax.grad(lambda *given: contrast_loss(*given).sum(), (0, 1)))
    for strength in (0.0, 0.5, 4.0):
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (normal, ablated))
        target = p * (p / q) ** strength
        target /= target.sum(-1, keepdims=True)
        expected = (target * np.log(target / p)).sum(-1)
        logits = np.float32(normal), np.float32(ablated)
        np.testing.assert_allclose(loss_of(*logits, strength), expected, rtol=1e-4, atol=1e-5)
        to_normal, to_ablated = slopes_of(*logits, strength)
        np.testing.assert_allclose(to_normal, p - target, rtol=1e-3, atol=1e-5)
        assert not np.asarray(to_ablated).any()


# --- the whole loss, through the model ---

PROMPTS, ANSWERS = (9, 6), ((6, 11), (12, 5))  # lengths of two pairs: of their prompts, of chosen and rejected answers


@pytest.fixture(scope="module")
def batch():
    """Two pairs as training has them, the rest of prompts and answers any tokens, and a reference apart."""
    rng = np.random.default_rng(1)
    answers = rng.integers(4, CONFIG.vocab_size, (2, 2, 12)).astype(np.int32)
    return {
        "prompts": rng.integers(4, CONFIG.vocab_size, (2, 10)).astype(np.int32),
        "lengths": np.int32(PROMPTS),
        "answers": answers,
        "counted": np.arange(12) < np.array(ANSWERS)[..., None],
        "longest": np.int32([64, 64]),
        "reference": np.float32([[-30.0, -31.0], [-63.0, -64.0]]),
        "weight": np.float32([0.5, 0.5]),
    }


def _row(batch, pair, side):
    """(tokens, which the loss counts) of one prompt with one answer."""
    parts = batch["prompts"][pair, : PROMPTS[pair]], batch["answers"][pair, side, : ANSWERS[pair][side]]
    return np.concatenate(parts), np.arange(sum(map(len, parts))) >= PROMPTS[pair]


@pytest.fixture(scope="module")
def chosen(batch):
    """The chosen answers of the two pairs as rows, as other objectives have them."""
    tokens, counted = np.full((2, 20), 5, np.int32), np.zeros((2, 20), bool)
    for pair in range(2):
        row, mask = _row(batch, pair, 0)
        tokens[pair, : len(row)], counted[pair, : len(row)] = row, mask
    return {"tokens": tokens, "counted": counted, "weight": batch["weight"]}


def _settings(**changes):
    values = {
        "objective": "dpo",
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup": 0.1,
        "steps": 4,
        "seed": 0,
        "batch_size": 2,
        "microbatch_size": 2,
        "beta": 0.3,
        "compute_dtype": "float32",
        "remat": False,
    }
    return Settings(**values | changes)


@pytest.fixture(scope="module")
def plain(batch):
    """[pair][side]: (log-probability, its gradient), float64. Rows are filled up to one length, so that one program does."""

    def filled(tokens, counted):
        return (np.pad(row, (0, 20 - len(row))) for row in (tokens, counted))

    with jax.enable_x64(True):
        function = jax.jit(jax.value_and_grad(lambda p, tokens, mask: reference_logprob(p, tokens, mask, xp=jnp)))
        params = jax.tree.map(jnp.asarray, in_float64(copying_params()))
        found = [[function(params, *filled(*_row(batch, pair, side))) for side in range(2)] for pair in range(2)]
        assert found[0][0][0].dtype == jnp.float64
        return jax.tree.map(np.asarray, found)


def _plain_loss(plain, batch, settings):
    """(loss, gradient) of the two pairs by the chain rule, from the losses of the equations."""
    logps = np.array([[logp for logp, _ in sides] for sides in plain])
    lengths = np.array(ANSWERS)
    if settings.objective == "sft":
        n = lengths[:, 0].sum()
        loss, slopes = -logps[:, 0].sum() / n, np.array([[-1 / n, 0]] * 2)
    else:
        per = lengths if settings.averages else np.ones((2, 2))
        reference = batch["reference"].astype(float) * settings.has_reference
        smoothing, beta = settings.label_smoothing, settings.beta
        good, bad = ((logps - reference) / per).T
        margin = beta * (good - bad) - settings.gamma
        losses = -(1 - smoothing) * np.log(_sigmoid(margin)) - smoothing * np.log(_sigmoid(-margin))
        slope = beta * (_sigmoid(margin) - (1 - smoothing)) / 2
        loss = (losses - settings.nll_weight * logps[:, 0] / lengths[:, 0]).mean()
        slopes = np.stack([slope, -slope], axis=1) / per
        slopes[:, 0] -= settings.nll_weight / lengths[:, 0] / 2
    terms = [jax.tree.map(lambda g, s=slopes[i, j]: s * g, plain[i][j][1]) for i in range(2) for j in range(2)]
    return loss, jax.tree.map(lambda *parts: sum(parts), *terms)


CASES = {
    "smoothed": {"label_smoothing": 0.1},
    "per token, with nll": {"per_token": True, "nll_weight": 0.7, "beta": 3.0},
    "simpo": {"loss": "simpo", "gamma": 0.4, "beta": 2.0},
    "sft, remat": {"objective": "sft", "remat": True},
}


# How the model enters is one thing for all losses of preferences, whose equations are held above.
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, marks=pytest.mark.slow if name in ("smoothed", "simpo") else (), id=name)
        for name, changes in CASES.items()
    ],
)
def test_training_loss_and_gradient_equal_a_plain_float64_model(batch, chosen, plain, changes):
    settings = _settings(**changes)
    if settings.objective == "sft":
        batch = chosen | {"weight": np.full(2, 1 / chosen["counted"].sum(), np.float32)}
    loss, grads = jax.jit(jax.value_and_grad(lambda p: part_loss(CONFIG, settings, p, batch)[0]))(copying_params())
    expected_loss, expected = _plain_loss(plain, batch, settings)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for (path, grad), reference in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        scale = np.abs(reference).max()
        assert scale > 1e-5, path
        np.testing.assert_allclose(grad, reference, rtol=1e-3, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))


def test_contrast_through_the_model_is_that_of_its_logits_at_the_answers(chosen):
    """And its gradient, with the masked pass held fixed."""
    masked, settings = mask_heads(CONFIG, [(1, 0), (0, 1)]), _settings(objective="contrast", contrast_strength=0.8)
    tokens, counted = chosen["tokens"], chosen["counted"][:, 1:]

    def by_logits(params):
        fixed = jax.lax.stop_gradient(params)
        pair = forward(CONFIG, params, tokens), forward(CONFIG, fixed, tokens, interventions=masked)
        return 0.5 * (contrast_loss(*pair, 0.8)[:, :-1] * counted).sum()

    ours = jax.jit(jax.value_and_grad(lambda p: part_loss(CONFIG, settings, p, chosen, normalise(CONFIG, masked))[0]))(
        copying_params()
    )
    expected = jax.jit(jax.value_and_grad(by_logits))(copying_params())
    assert ours[0] > 0.01
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_training_loss_starts_at_log_2_and_reports_rewards(batch):
    """With the start model's own log-probabilities as the reference; then with rewards of known size."""
    params, settings = in_float64(copying_params()), _settings()
    own = np.float32([[reference_logprob(params, *_row(batch, i, j)) for j in range(2)] for i in range(2)])
    loss = jax.jit(lambda p, b: part_loss(CONFIG, settings, p, b))
    value, _ = loss(copying_params(), batch | {"reference": own})
    np.testing.assert_allclose(value, np.log(2), rtol=1e-4)
    own -= np.float32([[2.0, 1.0], [-1.0, 1.0]])
    _, metrics = loss(copying_params(), batch | {"reference": own})
    expected = {"reward_chosen": 0.15, "reward_rejected": 0.3, "margin": -0.15, "accuracy": 0.5}
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-3)
