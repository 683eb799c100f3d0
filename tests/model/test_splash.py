import functools
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_processes import environment, printed
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from retmask_jax.model.attention import Keys, Scores, attend
from retmask_jax.model.kernels import shares, splash
from retmask_jax.model.sharding import RULES


def draw(batch, length, heads, kv_heads, width, dtype=jnp.float32):
    """Queries, keys, values and a gradient of the output."""
    queries, keys = (batch, length, heads, width), (batch, kv_heads, length, width)
    rng = np.random.default_rng(length)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in (queries, keys, keys, queries)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def out_and_gradients(attention, scores, q, k, v, grad):
    out, pullback = jax.vjp(lambda *qkv: attention(*qkv, scores), q, k, v)
    return out, *pullback(grad)


interpreted = functools.partial(splash.splash_attend, interpret=True)


def plain(q, k, v, scores):
    return attend(q, Keys.of(k.swapaxes(1, 2), v.swapaxes(1, 2)), scores, kernel="plain")


@pytest.mark.parametrize(
    ("shape", "scores"),
    [
        ((2, 130, 4, 2, 16), Scores(0.25)),
        ((1, 257, 4, 1, 80), Scores(0.3, window=50, cap=4.0)),
        ((1, 520, 2, 2, 8), Scores(0.5, window=200)),
        ((1, 520, 3, 1, 8), Scores(0.5, cap=2.0)),
    ],
)
def test_splash_equals_the_plain_kernel(shape, scores, close):
    """One block or five, windows across blocks, caps, groups: outputs and gradients."""
    arrays = draw(*shape)
    ours, exact = (out_and_gradients(attention, scores, *arrays) for attention in (interpreted, plain))
    for a, b in zip(ours, exact, strict=True):
        close(a, b, 1e-4)


def test_bfloat16_stays_bfloat16_and_close(close):
    arrays = draw(1, 130, 2, 1, 64, jnp.bfloat16)
    ours = out_and_gradients(interpreted, Scores(0.125), *arrays)
    exact = out_and_gradients(plain, Scores(0.125), *(x.astype(jnp.float32) for x in arrays))
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(ours, exact, strict=True):
        close(a, b, 2e-2)


def test_float32_products_are_exact_forward_and_backward():
    def products(dtype):
        arrays = draw(1, 128, 1, 1, 8, dtype)
        program = str(jax.make_jaxpr(functools.partial(out_and_gradients, splash.splash_attend, Scores(1.0)))(*arrays))
        return program.count("dot_general["), program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")

    n, exact = products(jnp.float32)
    assert n == exact > 5
    assert products(jnp.bfloat16) == (n, 0)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 300, 641])
def test_the_mask_gives_the_kernel_what_the_librarys_own_masks_give(window):
    shape = (640, 640)
    own = (
        splash_attention.CausalMask(shape)
        if window is None
        else splash_attention.LocalMask(shape, (window - 1, 0), offset=0)
    )
    for process in (mask_info.process_mask, mask_info.process_mask_dkv):
        a, b = (
            process(splash_attention.MultiHeadMask([mask]), (128, 128))[0] for mask in (splash._Band(640, window), own)
        )
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_blocks_pad_little():
    assert splash._blocks(1) == (128, 128)
    assert splash._blocks(257) == (384, 384)
    assert splash._blocks(513) == (128, 640)
    assert splash._blocks(8191) == (512, 8192)
    assert splash._blocks(8193) == (512, 8704)
    assert splash._blocks(8192, shares=4) == (512, 8192)
    assert splash._blocks(1200, shares=4) == (384, 1536)  # of each share of the queries


def test_what_splash_cannot_do_is_named():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    q, kv = shape((2, 130, 4, 64)), shape((2, 2, 130, 64))
    assert splash.unsupported(q, kv, kv) is None
    assert "130 queries look at 131 keys" in splash.unsupported(q, *[shape((2, 2, 131, 64))] * 2)
    assert "4 query heads do not share 3" in splash.unsupported(q, *[shape((2, 3, 130, 64))] * 2)
    assert "512 wide" in splash.unsupported(shape((2, 130, 4, 512)), *[shape((2, 2, 130, 512))] * 2)
    assert "bfloat16, float32" in splash.unsupported(q, jax.ShapeDtypeStruct(kv.shape, jnp.bfloat16), kv)
    half = draw(1, 130, 2, 1, 8, jnp.float16)[:3]
    assert "float16" in splash.unsupported(*half)
    with pytest.raises(ValueError, match="float16; it needs one type"):
        splash.splash_attend(*half, Scores(1.0))


def test_mesh_axes_go_to_rows_then_heads():
    """Rows 4 and heads 32 on kv heads 8: what rows do not fill splits heads further, kv heads being repeated."""
    mesh = jax.sharding.AbstractMesh((2, 2, 8), ("data", "fsdp", "tensor"))

    def axes(batch, heads, kv_heads):
        with nn.logical_axis_rules(RULES):
            return shares._axes(mesh, set(mesh.axis_names), batch, heads, kv_heads)

    assert axes(4, 32, 8) == (("data", "fsdp"), ("tensor",))
    assert axes(2, 32, 8) == (("data",), ("tensor", "fsdp"))
    assert axes(1, 32, 8) == ((), ("tensor", "data", "fsdp"))
    assert axes(1, 16, 8) == ((), ("tensor", "data"))
    assert axes(4, 12, 4) == (("data", "fsdp"), ())
    assert axes(3, 24, 8) == ((), ("tensor",))  # 24 heads in 16 shards would cut a group of three


@pytest.mark.slow
def test_split_over_a_mesh():
    """Rows over data and fsdp, heads over tensor and what the rows leave."""
    code = """
        import functools
        import flax.linen as nn, jax
        from retmask_jax.model.attention import Scores
        from retmask_jax.model.sharding import RULES, make_mesh
        from model.test_splash import draw, interpreted, out_and_gradients, plain

        scores, mesh = Scores(0.3, window=40), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        cases = {
            (4, 130, 4, 2, 8): (1, 130, 2, 8),
            (4, 130, 4, 1, 8): (1, 130, 2, 8),  # one kv head for two shards
            (4, 130, 3, 1, 8): (1, 130, 3, 8),  # three heads for two shards
            (3, 130, 4, 2, 8): (3, 130, 1, 8),  # three rows for four shards, four heads for eight
            (1, 130, 8, 2, 8): (1, 130, 1, 8),  # one row
        }
        for shape, share in cases.items():
            arrays = draw(*shape)
            exact = out_and_gradients(plain, scores, *arrays)
            with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
                ours = out_and_gradients(interpreted, scores, *arrays)
            assert ours[0].sharding.shard_shape(ours[0].shape) == share, (ours[0].sharding, share)
            for a, b in zip(ours, exact, strict=True):
                assert abs(a - b).max() < 1e-4 * abs(b).max(), shape

        # One long row, its queries over two devices, heads over the others.
        mesh, arrays = make_mesh({"fsdp": 2, "tensor": 2, "context": 2}), draw(1, 512, 4, 2, 8)
        exact = out_and_gradients(plain, scores, *arrays)
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            ours = out_and_gradients(interpreted, scores, *arrays)
        assert ours[0].sharding.shard_shape(ours[0].shape) == (1, 256, 1, 8), ours[0].sharding
        for a, b in zip(ours, exact, strict=True):
            assert abs(a - b).max() < 1e-4 * abs(b).max()
    """
    printed("-c", textwrap.dedent(code), env=environment(8))
