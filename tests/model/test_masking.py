"""Interventions as dense arrays: every form has the same fields, with a row axis."""

import jax
import numpy as np
import pytest

from retmask_jax.model.interventions import Interventions, mask_heads, mask_rope, stack
from retmask_jax.model.masking import normalise, normalise_each

ROWS, L, H, R, D = 2, 3, 4, 4, 8  # of the tiny model


def _shapes(masks):
    return [x.shape for x in jax.tree.leaves(masks)]


@pytest.mark.parametrize("form", ["None", "no parts", "arrays"])
def test_the_untouched_model_is_one_form(tiny, form):
    iv = {"None": None, "no parts": Interventions(), "arrays": Interventions.none(tiny.config)}[form]
    masks = normalise(tiny.config, iv)
    assert _shapes(masks) == [(1, L, H), (1, L, H, R), (1, L, 1, 1)] + [(1, L, H), (1, L, 1, 1)] and masks.rows == 1
    assert not any(x.any() for x in jax.tree.leaves(masks))
    assert masks.head_BLH.dtype == masks.rope_BLHR.dtype == masks.query_BLH.dtype == bool
    assert masks.mean_BLHD.dtype == masks.query_mean_BLHD.dtype == np.float32


def test_each_part_has_its_own_row_axis(tiny):
    rng = np.random.default_rng(0)
    gate, pairs, mean = (
        rng.random((ROWS, L, H)),
        rng.random((L, H, R)) < 0.5,
        rng.normal(size=(L, H, tiny.config.head_dim)),
    )
    queries, asked = gate < 0.5, np.stack([mean] * ROWS)
    masks = normalise(tiny.config, Interventions(gate, pairs, "projection", mean, queries[0], asked), ROWS)
    assert _shapes(masks) == [(ROWS, L, H), (1, L, H, R), (1, *mean.shape), (1, L, H), (ROWS, *mean.shape)]
    assert (masks.rope_site, masks.rows, masks.head_BLH.dtype) == ("projection", ROWS, np.float32)
    second = masks.take(np.array([1, 1, 1]))
    np.testing.assert_array_equal(second.head_BLH, np.float32(gate[[1, 1, 1]]))
    assert second.rope_BLHR is masks.rope_BLHR
    assert {x.shape[0] for x in jax.tree.leaves(masks.repeated(ROWS))} == {ROWS}


def test_several_masks_are_rows_of_one(tiny):
    heads, mean = [(0, 1)], np.ones((L, H, tiny.config.head_dim), np.float32)
    masks = normalise_each(tiny.config, [Interventions(), mask_heads(tiny.config, heads, mean), Interventions()])
    assert _shapes(masks) == [(3, L, H), (3, L, H, R), (3, *mean.shape), (3, L, H), (3, L, 1, 1)]
    assert np.argwhere(masks.head_BLH).tolist() == [[1, 0, 1]]
    assert masks.mean_BLHD.any(axis=(1, 2, 3)).tolist() == [False, True, False]
    assert normalise_each(tiny.config, [Interventions()] * 2).rows == 2


def test_what_cannot_run_together(tiny):
    sites = [mask_rope(tiny.config, [(0, 0)], [0], site) for site in ("rotary", "projection")]
    with pytest.raises(ValueError, match="different rotary sites .projection, rotary."):
        normalise_each(tiny.config, sites)
    with pytest.raises(ValueError, match=r"\[L, H\]"):
        normalise_each(tiny.config, [stack([mask_heads(tiny.config, [])] * 2)])
