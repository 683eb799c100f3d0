"""Other RoPE bases of one model, and the checkpoints of a training run in their order."""

import dataclasses

import numpy as np
import pytest

from retmask_jax.model.config import Rope
from retmask_jax.model.rope import inverse_frequencies
from retmask_jax.stages.study.variants import find_checkpoints, with_base


def test_a_base_is_multiplied_in_every_kind_of_layer_and_nothing_else_changes(tiny):
    config = dataclasses.replace(
        tiny.config,
        layer_pattern=("sliding", "full"),
        window=9,
        rope=Rope("linear", 500.0, 4.0),
        sliding_rope=Rope(theta=100.0),
    )
    changed = with_base(tiny.replace(config=config), 2.0)
    assert changed.params is tiny.params
    assert (changed.config.rope, changed.config.sliding_rope) == (Rope("linear", 1000.0, 4.0), Rope(theta=200.0))
    assert dataclasses.replace(changed.config, rope=config.rope, sliding_rope=config.sliding_rope) == config
    ratio = inverse_frequencies(changed.config) / inverse_frequencies(config)
    np.testing.assert_allclose(ratio, 2.0 ** -(np.arange(config.n_pairs) / config.n_pairs), rtol=1e-5)


def test_factor_one_is_the_same_program(tiny):
    assert with_base(tiny, 1.0).config == tiny.config and hash(with_base(tiny, 1.0).config) == hash(tiny.config)
    with pytest.raises(ValueError, match="multiplied by -2: factors must be positive"):
        with_base(tiny, -2)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/step_2", "a/step_10", "a/step_9", "b/checkpoint-500", "c/final", "c/step_1", "d/step_2"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "step_3").write_text("a file")


def test_checkpoints_are_in_the_order_of_their_numbers(folders):
    found = find_checkpoints(("a/step_*", "b/checkpoint-500"))
    assert [(c.source, c.revision, c.step) for c in found] == [
        ("a/step_2", None, 2),
        ("a/step_9", None, 9),
        ("a/step_10", None, 10),
        ("b/checkpoint-500", None, 500),
    ]


def test_revisions_have_steps_and_what_has_none_is_numbered_as_it_comes(folders):
    found = find_checkpoints(("x/y@stage1-step1000-tokens5B", "x/y@step20"))
    assert [(c.source, c.revision, c.step) for c in found] == [
        ("x/y", "step20", 20),
        ("x/y", "stage1-step1000-tokens5B", 1000),
    ]
    assert found[0].name == "x/y@step20"
    commit = "1234567890abcdef1234567890abcdef12345678"
    for names in (("c/step_1", "c/final"), ("c/step_1", f"x/y@{commit}")):
        assert [c.step for c in find_checkpoints(names)] == [0, 1]
    assert find_checkpoints(()) == []


@pytest.mark.parametrize(
    "name, said",
    [
        ("a/nothing", "checkpoint a/nothing is not there: name a folder"),
        ("a/step_3", "checkpoint a/step_3 is not there"),
        ("nowhere/step_*", "no folder matches the checkpoints nowhere/step_"),
        ("x@main", "checkpoint x@main is not there"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named(folders, name, said):
    with pytest.raises(ValueError, match=said):
        find_checkpoints((name,))


def test_two_checkpoints_of_one_step_are_not_one_run(folders):
    with pytest.raises(ValueError, match="a/step_2 and d/step_2 are both of step 2"):
        find_checkpoints(("a/step_2", "d/step_2"))
