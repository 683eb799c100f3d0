"""Attention by cuDNN: what is asked of it where rows continue a cache, by a stand-in; and itself, where there is a GPU."""

import functools
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retmask_jax.model.attention import Keys, attend
from retmask_jax.model.kernels import cudnn
from retmask_jax.model.kernels.blocked import HIDDEN, Scores
from retmask_jax.model.kernels.choice import kernel_for

WIDTH = 8
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


def _fused(q_BTHD, k_BSKD, v_BSKD, scale, *, causal=False, window=None, seen_B=None):
    """What `cudnn.fused` promises, in one softmax."""
    einsum = functools.partial(jnp.einsum, precision="highest")
    (_, length, heads, _), n_keys = q_BTHD.shape, k_BSKD.shape[1]
    k_BSHD, v_BSHD = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BSKD, v_BSKD))
    row_T1, slot_S = jnp.arange(length)[:, None], jnp.arange(n_keys)
    seen_TS = (slot_S <= row_T1) if causal else jnp.ones((length, n_keys), bool)
    seen_TS &= True if window is None else slot_S > row_T1 - window
    seen_BTS = seen_TS[None] & (True if seen_B is None else slot_S < seen_B[:, None, None])
    raw_BHTS = jnp.where(seen_BTS[:, None], scale * einsum("bthd,bshd->bhts", q_BTHD, k_BSHD), HIDDEN)
    out_BTHD = einsum("bhts,bshd->bthd", jax.nn.softmax(raw_BHTS, axis=-1), v_BSHD)
    return out_BTHD, jax.nn.logsumexp(raw_BHTS, axis=-1).swapaxes(1, 2)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cudnn, "fused", _fused)


def _draw(rng, dtype, *shapes):
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _continued(seed, length, starts, n_keys, width=WIDTH, dtype="float32"):
    """(queries behind `starts` keys of each row, the keys in a cache of n_keys slots)."""
    rng, rows = np.random.default_rng(seed), len(starts)
    shapes = (rows, length, 4, width), (rows, 2, width, n_keys), (rows, 2, n_keys, width)
    q_BTHD, k_BKDS, v_BKSD = _draw(rng, dtype, *shapes)
    positions_BS = jnp.broadcast_to(jnp.arange(n_keys), (rows, n_keys))
    return q_BTHD, Keys(k_BKDS[None], v_BKSD[None], positions_BS), jnp.asarray(starts, jnp.int32)


def _ring(seed, length, starts, window):
    """As `_continued`, the last `window` keys before the queries and their own, as a ring gives them."""
    q_BTHD, keys, start_B = _continued(seed, length, starts, window + length)
    return q_BTHD, keys.replace(positions_BS=start_B[:, None] - window + jnp.arange(window + length)), start_B


def _behind(q_BTHD, keys, start_B, scores):
    return cudnn.after_cache(q_BTHD, keys.k_BKDS, keys.v_BKSD, start_B, keys.positions_BS[:, 0], scores)


# Quick are windows of one key, below, of and beyond the number of queries, and none.
QUICK = ((2, 2), (7, None), (7, 1), (7, 5), (7, 20))
BEHIND = [(length, window) for length in (2, 7) for window in (None, 1, 2, 5, 9, 20)]


@pytest.mark.parametrize(
    "length, window", [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in BEHIND]
)
def test_queries_behind_a_cache(stand_in, window, length):
    """Windows of any size, rows that begin anywhere, with keys before them or none; the cache has slots left or none."""
    scores, starts = Scores(0.4, window), [0, 1, 3, 11]
    calls = [_continued(length, length, starts, 20), _continued(length, length, [0, 0], length)]
    calls += [] if window is None else [_ring(length, length, starts, window)]

    @jax.jit
    def both(calls):
        return [
            (_behind(q_BTHD, keys, start_B, scores), attend(q_BTHD, keys, scores, start_B, "plain"))
            for q_BTHD, keys, start_B in calls
        ]

    for ours, expected in both(calls):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_gradient_behind_a_cache(stand_in, close, window):
    q_BTHD, keys, start_B = _continued(1, 7, [0, 11], 20)
    scores = Scores(0.4, window)

    def loss(function, q_BTHD, k_RBKDS, v_RBKSD):
        return jnp.sin(function(q_BTHD, keys.replace(k_RBKDS=k_RBKDS, v_RBKSD=v_RBKSD))).sum()

    given = q_BTHD, keys.k_RBKDS, keys.v_RBKSD
    functions = (lambda *x: _behind(*x, start_B, scores)), (lambda *x: attend(*x, scores, start_B, "plain"))
    ours, theirs = (jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(*given) for f in functions)
    jax.tree.map(close, ours, theirs)


def test_what_it_cannot_do_is_named():
    q_BTHD, keys, _ = _continued(0, 3, [0], 3)
    with pytest.raises(ValueError, match="cudnn kernel computes in bfloat16 or float16, not in float32: choose"):
        attend(q_BTHD, keys, Scores(1.0), kernel="cudnn")
    assert "no soft cap" in cudnn.unsupported("bfloat16", 64, Scores(1.0, cap=3.0))
    assert "not of 4" in cudnn.unsupported("float16", 4, Scores(1.0))
    assert cudnn.unsupported("float16", 96, Scores(1.0, window=3)) is None


# Devices as JAX describes them: kind, compute capability (of ROCm its own; TPUs have none), whether cuDNN's kernel is chosen.
DEVICES = {
    "T4": ("Tesla T4", "7.5", False),
    "V100": ("Tesla V100-SXM2-16GB", "7.0", False),
    "P100": ("Tesla P100-PCIE-16GB", "6.0", False),
    "A100": ("NVIDIA A100-SXM4-40GB", "8.0", True),
    "A10": ("NVIDIA A10G", "8.6", True),
    "L4": ("NVIDIA L4", "8.9", True),
    "H100": ("NVIDIA H100 80GB HBM3", "9.0", True),
    "B200": ("NVIDIA B200", "10.0", True),
    "RTX 5090": ("NVIDIA GeForce RTX 5090", "12.0", True),
    "ROCm": ("AMD Instinct MI300X", "gfx942", False),
    "older ROCm": ("AMD Instinct MI300X", None, False),
}


def _device(name):
    kind, capability, _ = DEVICES[name]
    has = {} if capability is None else {"compute_capability": capability}
    return SimpleNamespace(platform="gpu", device_kind=kind, **has)


def _kernel_of(devices, monkeypatch, kernel="auto"):
    """The kernel that a prompt of 3 tokens is traced with on these devices, in bfloat16."""
    monkeypatch.setattr(jax, "devices", lambda: devices)
    called = []
    monkeypatch.setattr(cudnn, "alone", lambda q_BTHD, *_: called.append("cudnn") or q_BTHD)
    q_BTHD, k_BTKD, v_BTKD = _draw(
        np.random.default_rng(0), "bfloat16", (1, 3, 4, WIDTH), (1, 3, 2, WIDTH), (1, 3, 2, WIDTH)
    )
    jax.jit(lambda *qkv: attend(qkv[0], Keys.of(*qkv[1:]), Scores(1.0), kernel=kernel)).trace(q_BTHD, k_BTKD, v_BTKD)
    return called[0] if called else "other"


@pytest.mark.parametrize("name", DEVICES)
def test_it_is_chosen_on_cuda_devices_of_capability_8_and_newer(name, monkeypatch):
    kind, capability, suits = DEVICES[name]
    devices = [_device(name)] * 2
    assert _kernel_of(devices, monkeypatch) == ("cudnn" if suits else "other")
    chosen, why = kernel_for("bfloat16", length=4096, width=128)
    if suits:
        assert (chosen, why) == ("cudnn", None) and _kernel_of(devices, monkeypatch, "cudnn") == "cudnn"
        return
    said = f"needs CUDA devices of compute capability 8.0 or newer, {kind} has {capability or 'none'}"
    assert (chosen, why) == ("blocked", said)
    with pytest.raises(ValueError, match=f"^the cudnn kernel {said}: choose another kernel"):
        _kernel_of(devices, monkeypatch, "cudnn")


def test_one_old_device_among_new_ones_decides(monkeypatch):
    assert _kernel_of([_device("A100"), _device("T4")], monkeypatch) == "other"


def test_a_cpu_is_named_where_it_is_forced():
    q_BTHD, keys, _ = _continued(0, 3, [0], 3, dtype="bfloat16")
    with pytest.raises(ValueError, match="capability 8.0 or newer, cpu has none: choose another kernel"):
        attend(q_BTHD, keys, Scores(1.0), kernel="cudnn")


@pytest.mark.parametrize("here, chosen", [("H100", "cudnn"), ("T4", "other")])
def test_the_devices_of_the_mesh_decide_where_one_is_set(here, chosen, monkeypatch):
    """Devices of another kind beside them do not count, nor does a topology that is not here count as one that is."""
    meant = jax.sharding.AbstractDevice(device_kind=DEVICES["H100"][0], num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=meant)
    with jax.sharding.use_abstract_mesh(mesh):
        assert _kernel_of([_device("T4"), _device(here)], monkeypatch) == chosen
    cpu = jax.sharding.AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=cpu)):
        assert _kernel_of([_device("H100")], monkeypatch) == "other"


def test_no_device_is_asked_for_by_an_import():
    code = (
        "import retmask_jax, retmask_jax.generation.language_model, retmask_jax.model.attention, retmask_jax.cli.doctor; "
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 37, 200])
@pytest.mark.parametrize("length", [64, 129, 300])
def test_itself_alone(dtype, window, length, close):
    """Forward and gradient against one softmax in float32."""
    q_BTHD, k_BTKD, v_BTKD, d_BTHD = _draw(
        np.random.default_rng(0), dtype, (2, length, 4, 64), (2, length, 2, 64), (2, length, 2, 64), (2, length, 4, 64)
    )
    scores = Scores(0.125, window)

    def run(kernel, *qkvd):
        out, pull = jax.vjp(lambda q, k, v: attend(q, Keys.of(k, v), scores, kernel=kernel), *qkvd[:3])
        return out, *pull(qkvd[3])

    found = run("cudnn", q_BTHD, k_BTKD, v_BTKD, d_BTHD)
    exact = run("plain", *(x.astype(jnp.float32) for x in (q_BTHD, k_BTKD, v_BTKD, d_BTHD)))
    assert all(x.dtype == dtype for x in found)
    jax.tree.map(lambda a, b: close(a, b, 2e-2 if dtype == "bfloat16" else 4e-3), found, exact)


@needs_gpu
@pytest.mark.parametrize("window", [None, 37, 200])
def test_itself_behind_a_cache(window, close):
    for starts, length in (([0, 5, 400], 100), ([300, 1], 33)):
        q_BTHD, keys, start_B = _continued(2, length, starts, 512, 64, "bfloat16")
        scores, in_float32 = (
            Scores(0.125, window),
            [x.astype(jnp.float32) for x in (q_BTHD, keys.k_RBKDS, keys.v_RBKSD)],
        )
        exact = in_float32[0], keys.replace(k_RBKDS=in_float32[1], v_RBKSD=in_float32[2])
        close(attend(q_BTHD, keys, scores, start_B, "cudnn"), attend(*exact, scores, start_B, "plain"), 2e-2)
