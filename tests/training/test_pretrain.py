"""Small models by recipe: their architecture, how they grow, how they are kept along the way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_tiny import WIDE
from ml_collections import ConfigDict

from retmask_jax.generation.language_model import load, save
from retmask_jax.hf.families import from_hf, to_hf
from retmask_jax.model.lora import Lora
from retmask_jax.model.transformer import forward
from retmask_jax.runs import recipes
from retmask_jax.training.pretrain import _init, grow, kept, model_config, pretrain
from retmask_jax.training.step import _new_adapters

FAMILIES = {"panel_llama": "llama", "panel_qwen3": "qwen3", "panel_olmo3": "olmo3"}
# Norms on both sides, with weights that are added to one: no recipe has it.
BOTH = {"norm_placement": "both", "norm_offset": 1.0}


def _model(name, **changes):
    return recipes.load_recipe(name).pretrain.model.to_dict() | {"hidden_size": 32, "mlp_size": 24} | changes


GROWING = [*((name, {}) for name in FAMILIES), ("panel_llama", BOTH)]


def _grown(random_model, name, changes):
    """(two layers, four layers, parameters of either), the second grown from the first."""
    short, deep = (model_config(_model(name, **changes), layers) for layers in (2, 4))
    params = random_model(short).params
    return short, deep, params, grow(deep, params, random_model(deep, seed=1).params)


def test_a_seed_gives_the_parameters_and_the_adapters_that_it_always_gave():
    """Published models and results were made of them. (What was drawn once; nothing else gives these numbers.)"""
    up = _init(WIDE, jax.random.key(0))["blocks"]["0"]["mlp"]["up"]["kernel"][:, 0, 0]
    np.testing.assert_allclose(up, [-0.03150464, 0.00956522, 0.00116159], rtol=1e-5)
    adapters = jax.jit(_new_adapters, static_argnums=0)(dataclasses.replace(WIDE, lora=Lora(rank=2, alpha=4.0)), 0)
    query = adapters["blocks"]["0"]["attn"]["q"]["kernel_lora_a"][:, 0, 0]
    np.testing.assert_allclose(query, [0.68934566, -0.5129018, -0.19141717], rtol=1e-5)


# `grow` does with panel_qwen3 what it does with panel_llama: both have norms before attention and MLP, and none after.
@pytest.mark.parametrize(
    "name, changes", [pytest.param(*one, marks=pytest.mark.slow if one[0] == "panel_qwen3" else ()) for one in GROWING]
)
def test_growing_keeps_the_function(random_model, close, name, changes):
    short, deep, params, grown = _grown(random_model, name, changes)
    tokens = jnp.arange(60).reshape(2, 30)
    both = jax.jit(lambda grown, params: (forward(deep, grown, tokens), forward(short, params, tokens)))
    close(*both(grown, params), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", GROWING)
def test_added_layers_learn_at_the_pace_of_the_others(random_model, name, changes):
    _, deep, _, grown = _grown(random_model, name, changes)
    tokens, trained = jnp.arange(60).reshape(2, 30), 2 // len(deep.layer_pattern)  # repeats of the pattern
    gradient = jax.jit(jax.grad(lambda p: jnp.square(forward(deep, p, tokens) - 1).mean()))(grown)["blocks"]
    old, added = (
        max(float(jnp.abs(x[part]).max()) for x in jax.tree.leaves(gradient))
        for part in (slice(None, trained), slice(trained, None))
    )
    assert 0.01 * old < added < 10 * old


def test_a_depth_that_cuts_the_layer_pattern_is_refused():
    with pytest.raises(ValueError, match=r"3 layers are no whole number of repeats of \('sliding', 'full'\)"):
        model_config(_model("panel_olmo3"), 3)


@pytest.mark.parametrize("name, family", FAMILIES.items())
def test_a_model_is_written_as_its_family(random_model, tmp_path, name, family):
    config = model_config(_model(name), 4)
    assert to_hf(config)["model_type"] == family and from_hf(to_hf(config)) == config
    lm = random_model(config)
    save(lm, tmp_path)
    again = load(tmp_path)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_on_torch_gives_the_same_logits(random_model, tmp_path, close, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm = random_model(model_config(_model(name), 4))
    save(lm, tmp_path)
    tokens = np.random.default_rng(0).integers(4, lm.config.vocab_size, (2, 80))  # longer than the window
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert model.config.model_type == FAMILIES[name]
    with torch.no_grad():
        close(lm.logits(tokens), model(torch.tensor(tokens)).logits.numpy())


@pytest.mark.slow
def test_models_are_kept_along_the_way_also_of_a_run_that_was_cut_off(tmp_path):
    recipe = _short_recipe(keep_every=2)
    pretrain(recipe, tmp_path / "cut")
    whole = kept(tmp_path / "cut")
    assert [record["step"] for record in whole] == [2, 4, 6]
    assert [record["stage"] for record in whole] == [1, 2, 2]
    assert [record["tokens"] for record in whole] == [2 * 40, 4 * 40, 6 * 40]
    assert [load(tmp_path / "cut/checkpoints" / record["folder"]).config.n_layers for record in whole] == [2, 4, 4]
    # Cut off in the second stage: the first one's are not made again.
    (tmp_path / "cut/stages/stage2").rename(tmp_path / "first")
    pretrain(recipe, tmp_path / "cut")
    assert kept(tmp_path / "cut") == whole


@pytest.mark.slow
def test_keeping_changes_nothing_and_the_last_one_is_what_comes_out(tmp_path):
    lm = pretrain(_short_recipe(keep_every=0), tmp_path / "without")
    assert not kept(tmp_path / "without") and not (tmp_path / "without/checkpoints").exists()
    pretrain(_short_recipe(keep_every=3), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "checkpoints/step_000006").params, lm.params)


def _short_recipe(keep_every: int):
    """Three steps in two layers, three in four, on two rows of 20 tokens."""
    recipe = recipes.load_recipe("panel_llama").pretrain.copy_and_resolve_references().unlock()
    recipe.model.update(hidden_size=16, mlp_size=16)
    recipe.keep_every = keep_every
    recipe.stages = recipe.stages[0], recipe.stages[-1]
    for stage in recipe.stages:
        stage.phases = stage.phases[:1]
        stage.phases[0].update(steps=3, length=20, batch=2)
        stage.phases[0].mix = ConfigDict({"needle": 0.0, "repeats": 1.0, "plain": 0.0})
    return recipe


def test_the_recipes_ask_the_same_of_all_models_and_teach_them_nearly_the_same():
    first, *others = map(recipes.load_recipe, FAMILIES)
    for other in others:
        assert recipes.as_json(other.tasks) == recipes.as_json(first.tasks)
        ours, theirs = (recipes.as_json(config.pretrain) for config in (first, other))
        assert ours.pop("model") != theirs.pop("model")
        for stages in (ours["stages"], theirs["stages"]):
            stages[-1]["phases"][0]["mix"].pop("counterfactual")  # chosen for each
        assert ours == theirs
    longest = max(max(task.lengths, default=0) for task in first.tasks.values())
    assert longest + 8 <= first.pretrain.model.max_length
