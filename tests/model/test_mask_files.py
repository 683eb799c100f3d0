"""Masks as a file: bit for bit there and back, whatever fields there are, refused where they fit no model."""

import os

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from retmask_jax.model.exchange.mask_files import MaskFile
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.array_types import Mask

RNG = np.random.default_rng(0)
HEADS, PAIRS, MEANS = (3, 4), (3, 4, 4), (3, 4, 8)  # of the tiny model


def _gate(shape, dtype):
    """Values of all bits, among them one that is no number: what is not shown comes back as well."""
    values = RNG.random(shape).astype(dtype)
    values.flat[0] = np.nan
    return values


MASKS = {
    "heads": Interventions(head_mask=RNG.random(HEADS) < 0.5),
    "all": Interventions(RNG.random(HEADS) < 0.5, RNG.random(PAIRS) < 0.5, "projection", _gate(MEANS, np.float32)),
    "rows": Interventions(RNG.random((5, *HEADS)) < 0.5, rope_mask=RNG.random(PAIRS) < 0.5),
    "gates": Interventions(head_mask=_gate(HEADS, np.float32), rope_mask=_gate((2, *PAIRS), np.float16)),
    "bfloat16": Interventions(head_mask=jnp.asarray(_gate(HEADS, ml_dtypes.bfloat16))),
    "float64": Interventions(rope_mask=_gate(PAIRS, np.float64)),
    "turned": Interventions(head_mask=(RNG.random(HEADS[::-1]) < 0.5).T),  # not contiguous
    "nothing": Interventions(),
}


def _bits(masks):
    return {name: _bits_of(value) for name, value in vars(masks).items()}


def _bits_of(value):
    plain = value is None or isinstance(value, (str, tuple, int))
    return value if plain else (np.asarray(value).dtype, np.shape(value), np.asarray(value).tobytes())


@pytest.mark.parametrize("name", MASKS)
def test_masks_come_back_bit_for_bit(tiny, tmp_path, name):
    MASKS[name].save(tmp_path / "mask.safetensors")
    again = Interventions.load(tmp_path / "mask.safetensors", tiny.config)
    assert _bits(again) == _bits(MASKS[name])
    assert jax.tree.structure(again) == jax.tree.structure(MASKS[name])


def test_a_file_is_safetensors_with_the_models_shape(tmp_path):
    from safetensors import safe_open

    MASKS["all"].save(tmp_path / "mask.safetensors")
    with safe_open(tmp_path / "mask.safetensors", framework="numpy") as file:
        assert sorted(file.keys()) == ["head_mask", "head_mean", "rope_mask"]
        assert file.metadata() == {
            "what": "retmask_jax masks",
            "shape": '{"L": 3, "H": 4, "R": 4, "D": 8}',
            "rope_site": '"projection"',
            "stream_sink": "4",
            "stream_window": "256",
        }


def test_masks_of_another_model_are_refused_with_both_shapes(tiny, five_layers, tmp_path):
    MASKS["all"].save(tmp_path / "mask.safetensors")
    with pytest.raises(
        ValueError,
        match="is for a model of 3 layers x 4 query heads x 4 rotary pairs x 8 dimensions of a head, this one has 5 layers x "
        "4 query heads x 2 rotary pairs x 4 dimensions of a head: load",
    ):
        Interventions.load(tmp_path / "mask.safetensors", five_layers[0].config)
    with pytest.raises(ValueError, match="rope_mask has 5 query heads, another part 4"):
        Interventions(np.zeros(HEADS, bool), np.zeros((3, 5, 4), bool)).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"head_mask has shape \(3,\); its axes are L, H, with or without rows"):
        Interventions(np.zeros(3, bool)).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_no_file_of_masks_is_refused_in_one_line(tmp_path, read_golden):
    (tmp_path / "text").write_text("no tensors")
    weights = read_golden("qwen3").folder / "model.safetensors"
    for path, words in (("gone", "does not exist"), ("text", "is no safetensors file"), (weights, "other things than")):
        with pytest.raises(ValueError, match=words) as caught:
            Interventions.load(tmp_path / path)
        assert "\n" not in str(caught.value)


def test_a_write_that_is_cut_off_leaves_the_file_of_before(tmp_path, monkeypatch):
    MASKS["heads"].save(tmp_path / "mask")

    def cut(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(OSError, match="no space left"):
        MASKS["all"].save(tmp_path / "mask")
    assert _bits(Interventions.load(tmp_path / "mask")) == _bits(MASKS["heads"])
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]


class _Later(MaskFile, flax.struct.PyTreeNode):
    """Masks of a later version, with fields that the file's code has never heard of."""

    head_mask: Mask[ArrayLike, "... L H"] | None = None
    stream_mask: Mask[ArrayLike, "... L H"] | None = None
    query_mean: Float[ArrayLike, "... L H D"] | None = None
    order: Int[ArrayLike, " X"] | None = None
    windows: tuple[int, ...] = flax.struct.field(pytree_node=False, default=(4, 512))
    sink: int = flax.struct.field(pytree_node=False, default=4)


def test_fields_of_later_versions_are_carried_and_earlier_ones_refuse_them(tiny, tmp_path):
    later = _Later(
        stream_mask=RNG.random((2, *HEADS)).astype(np.float32),
        query_mean=_gate(MEANS, np.float32),
        order=np.arange(5),
        windows=(1, 2),
        sink=0,
    )
    later.save(tmp_path / "later")
    again = _Later.load(tmp_path / "later", tiny.config)
    assert _bits(again) == _bits(later) and hash(again.windows)
    with pytest.raises(ValueError, match="has order, which this version does not know: update retmask_jax"):
        Interventions.load(tmp_path / "later")
    MASKS["heads"].save(tmp_path / "earlier")
    with pytest.raises(ValueError, match="has rope_site"):  # a field that a version no longer has
        _Later.load(tmp_path / "earlier")
    with pytest.raises(ValueError, match="query_mean has 5 layers, another part 3"):
        _Later(stream_mask=np.zeros(HEADS, bool), query_mean=np.zeros((5, 4, 8))).save(tmp_path / "wrong")
