"""Settings of knock-out and rope: what cannot work is refused in one line before anything runs."""

import dataclasses
from types import SimpleNamespace

import pytest

from retmask_jax.model.config import ModelConfig
from retmask_jax.runs import recipes
from retmask_jax.stages import rope
from retmask_jax.stages.knockout import KNOCKOUT
from retmask_jax.stages.rope import ROPE

MODEL = ModelConfig(
    vocab_size=8, hidden_size=8, mlp_size=8, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=32, max_length=640
)


def _config(*overrides):
    return recipes.load_recipe("tiny_study", [tuple(text.split("=", 1)) for text in overrides])


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "knockout.modes=('mean',)",
            r"knockout.modes is \('mean',\); it must begin with zero, and may have mean, query, query_mean",
        ),
        ("knockout.modes=('zero', 'median')", "it must begin with zero"),
        ("rope.sites=('projection',)", "rope.sites .* must begin with rotary, and may have projection"),
        ("text.file=", "rope.matched is measured on plain text: set text.file"),
    ],
)
def test_settings_that_no_model_can_have_are_refused(override, message):
    def check(*overrides):
        KNOCKOUT.check(_config(*overrides))
        ROPE.check(_config(*overrides))

    check()
    with pytest.raises(ValueError, match=message):
        check(override)


@pytest.mark.parametrize(
    "override, message",
    [
        ("knockout.curve=(1, 64)", "a curve over 64 heads: the model has 32"),
        ("rope.windows=17", "rope.windows has 17, the model has 16 rotary pairs: lower it"),
        ("rope.pairs=(2, 20)", "rope.pairs has 20, the model has 16 rotary pairs"),
        ("rope.patch_pairs=17", "rope.patch_pairs has 17"),
    ],
)
def test_settings_beyond_the_model_are_refused(override, message):
    def check(*overrides, model=MODEL):
        context = SimpleNamespace(config=_config(*overrides), outline=SimpleNamespace(config=model))
        KNOCKOUT.check_model(context)
        ROPE.check_model(context)

    check()
    with pytest.raises(ValueError, match=message):
        check(override)
    with pytest.raises(ValueError, match="only 16 of the 32 dimensions of a head are rotated"):
        check("rope.windows=8", "rope.pairs=(2,)", model=dataclasses.replace(MODEL, rotary_dim=16))


def test_a_model_with_layers_without_rope_takes_no_rotary_masks():
    """Its heads can be masked; of the stages only those that need rotary masks are refused."""
    model = dataclasses.replace(MODEL, layer_pattern=("full",) * 2, rope_pattern=(True, False))
    outline, heads_alone = SimpleNamespace(config=model), "knockout.modes=('zero', 'mean')"
    why = r"the model has no RoPE in 2 of its 4 layers \(1, 3\), so it takes no rotary masks"
    with pytest.raises(ValueError, match=rf"^rope.tasks names needle short.*, but {why}: set rope.tasks to \(\)$"):
        ROPE.check_fit(SimpleNamespace(config=_config(), outline=outline))
    ROPE.check_fit(SimpleNamespace(config=_config("rope.tasks=()"), outline=outline))
    with pytest.raises(ValueError, match=f"^{why}: mask heads"):
        KNOCKOUT.check_model(SimpleNamespace(config=_config("knockout.modes=('zero', 'query')"), outline=outline))
    KNOCKOUT.check_model(SimpleNamespace(config=_config(heads_alone), outline=outline))


def test_without_tasks_the_stage_rope_asks_for_no_rotary_mask(monkeypatch, random_model, tmp_path):
    lm = random_model(dataclasses.replace(MODEL, layer_pattern=("full",) * 2, rope_pattern=(True, False)))
    monkeypatch.setattr(rope, "retrieval_heads", lambda context: [(0, 1)])
    config = _config("rope.tasks=()", "rope.matched=0", "rope.text=False", "text.file=")
    result = ROPE.work(SimpleNamespace(config=config, lm=lm), tmp_path)
    assert result.rows == result.means == result.contrasts == result.costs == [] and result.n_pairs == 16
