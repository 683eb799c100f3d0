"""Expert layers: the product of rows with their experts' matrices, and masks through jit, vmap and grad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.layers import rows_times
from retmask_jax.model.transformer import forward

RNG = np.random.default_rng(0)
X_RI, W_XIO = (RNG.normal(size=shape).astype(np.float32) for shape in ((9, 5), (4, 5, 7)))
EXPERT_R = np.array([3, 0, 0, 2, 3, 3, 0, 2, 0])  # expert 1 has no row


def _plain(x_RI, w_XIO, expert_R):
    return jnp.einsum("ri,rio->ro", x_RI, jnp.asarray(w_XIO)[expert_R], precision="highest")


BATCHED = {"x": (0, None, None), "experts": (None, None, 0), "both": (0, None, 0), "all": (0, 0, 0)}


def test_each_row_meets_the_matrix_of_its_expert(close):
    close(jax.jit(rows_times)(X_RI, W_XIO, EXPERT_R), _plain(X_RI, W_XIO, EXPERT_R), 1e-6)


@pytest.mark.parametrize("axes", BATCHED.values(), ids=BATCHED)
def test_batches_and_gradients_in_either_order(axes, close):
    stacks = [np.stack([x, y]) for x, y in ((X_RI, -2 * X_RI), (W_XIO, W_XIO**2), (EXPERT_R, EXPERT_R[::-1]))]
    args = [stack if axis == 0 else stack[0] for stack, axis in zip(stacks, axes, strict=True)]

    def loss(product):
        return lambda *args: jnp.sum(jnp.sin(product(*args)))

    def everything(product):
        batch = jax.vmap(product, axes)
        of_all = [jax.grad(loss(batch), argnums) for argnums in (0, 1)]
        of_each = [jax.vmap(jax.grad(loss(product), argnums), axes) for argnums in (0, 1)]
        return jax.jit(lambda *args: [function(*args) for function in (batch, *of_all, *of_each)])(*args)

    (ours, *gradients), (plain, *plain_gradients) = everything(rows_times), everything(_plain)
    close(ours, plain, 1e-6)
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        close(gradient, plain_gradient, 1e-5)


@pytest.fixture(
    scope="module",
    params=[
        {"n_layers": 2, "expert_pattern": (False, True), "normalise_router": True, "kernel": "plain"},
        pytest.param({"n_layers": 3, "expert_pattern": (True, False)}, id="with a tail", marks=pytest.mark.slow),
    ],
)
def model(request, random_model):
    return random_model(
        ModelConfig(
            **request.param,
            vocab_size=41,
            hidden_size=16,
            mlp_size=20,
            n_heads=4,
            n_kv_heads=2,
            head_dim=4,
            max_length=40,
            layer_pattern=("full", "sliding"),
            window=3,
            n_experts=5,
            experts_per_token=2,
            expert_size=6,
        )
    )


TOKENS = RNG.integers(0, 41, (2, 12))


def test_every_expert_chosen_with_equal_matrices_is_one_mlp(model, close):
    """Where all experts are the same and their weights sum to one, routing cannot matter."""
    config = dataclasses.replace(model.config, normalise_router=True)
    params = jax.tree.map_with_path(
        lambda path, leaf: (
            np.broadcast_to(np.asarray(leaf)[..., :1, :, :], leaf.shape)
            if "experts" in jax.tree_util.keystr(path) and "router" not in jax.tree_util.keystr(path)
            else leaf
        ),
        model.params,
    )
    two = model.replace(config=config, params=params)
    one, all_of_them = (two.replace(config=dataclasses.replace(config, experts_per_token=n)) for n in (1, 5))
    for others in (one, all_of_them):
        close(two.logits(TOKENS), others.logits(TOKENS), 1e-5)
    assert np.abs(two.logits(TOKENS) - model.logits(TOKENS)).max() > 1e-2  # else the experts would not matter


def test_masks_through_vmap_and_grad(model, compiles, close):
    layers = model.config.n_layers
    masks_NLH = RNG.random((6, layers, 4)) < 0.4

    @jax.jit
    def many(masks):
        return jax.vmap(lambda m: forward(model.config, model.params, TOKENS, interventions=Interventions(m)))(masks)

    logits = many(masks_NLH)
    compiles.clear()
    many(~masks_NLH)
    assert not compiles
    close(logits, [model.logits(TOKENS, interventions=Interventions(mask)) for mask in masks_NLH], 1e-5)

    @jax.jit
    @jax.value_and_grad
    def loss(gate):
        return forward(model.config, model.params, TOKENS, interventions=Interventions(gate))[:, -1].sum()

    gate = np.full((layers, 4), 0.3, np.float32)
    _, slope = loss(gate)
    for layer, head in ((0, 1), (layers - 1, 3)):
        step = np.zeros((layers, 4), np.float32)
        step[layer, head] = 1e-2
        close(slope[layer, head], (loss(gate + step)[0] - loss(gate - step)[0]) / 2e-2, 2e-2)
