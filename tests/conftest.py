"""Fixtures used by several test files."""

import dataclasses
import functools
import gc
import os
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_servers import serve, upload_hub  # noqa: F401  (fixtures)
from markupsafe import Markup

from retmask_jax.generation.language_model import from_params, load
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.layers import split_layers
from retmask_jax.model.sharding import param_shapes

GOLDEN = Path(__file__).parent / "golden"

# Most time goes into compiling programs that run once on little data: compile those quickly. XLA ends the process on a
# flag that it does not know, so the one about fused loops, which halves the time, and the one that keeps a program in one
# piece, which saves a tenth, are given only to releases that were tried.
QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
    QUICK_FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
with pytest.MonkeyPatch.context() as quick:
    quick.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FLAGS}")
    jax.devices()  # reads them, once

VARIANTS = tuple(sorted(path.name for path in GOLDEN.iterdir() if path.name != "example"))
PART_ROTATE = ("smollm3", "smollm3_window")  # of which some layers have no RoPE, and no rotary mask is stored
WITH_IMAGES = ("gemma3_images", "mistral3_images")  # of which the text model is a part
STORED = slice(2, None, 3)  # positions whose logits are stored, POSITIONS of make_golden.py


def pytest_sessionfinish():
    """What is left goes with the process; to search it for garbage takes seconds."""
    gc.freeze()


def pytest_collection_finish():
    """Garbage is looked for less often, and not among what was imported: a tenth of the time went into it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def shared_programs(request, tmp_path_factory):
    """Processes started by the tests of any worker share what they compile; this one has read its settings already.

    Where only quick tests run, processes compile quickly as well; among slow tests, as users have it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(base / "programs"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        patch.setenv("RETMASK_PROGRAMS", "off")  # nothing is written into the cache of who runs the tests
        if not any(item.get_closest_marker("slow") for item in request.session.items):
            patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FLAGS}")
        yield


@pytest.fixture(scope="session")
def read_golden():
    """A checkpoint of make_golden.py by name: .folder, .lm and the arrays of its golden.npz.

    .compute(**masks): our logits for its tokens at the positions that are stored.
    """

    @functools.cache
    def read(name: str):
        with np.load(GOLDEN / name / "golden.npz") as arrays:
            lm = load(GOLDEN / name)
            logits = functools.partial(_stored_logits, lm, arrays["tokens"])
            return SimpleNamespace(name=name, folder=GOLDEN / name, lm=lm, compute=logits, **arrays)

    return read


def _stored_logits(lm, tokens, **masks):
    return lm.logits(tokens, interventions=Interventions(**masks))[:, STORED]


@pytest.fixture(params=VARIANTS)
def golden(request, read_golden):
    """Each of the checkpoints in turn."""
    return read_golden(request.param)


@pytest.fixture(scope="session")
def random_model():
    """A LanguageModel of random parameters for a config; norms differ, attention is not uniform."""

    def make(config: ModelConfig, seed: int = 0):
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            if path[-1].key == "scale":
                return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32))
            return jnp.asarray(rng.normal(0, 0.3, leaf.shape).astype(np.float32))

        return from_params(config, jax.tree.map_with_path(draw, nn.unbox(param_shapes(config))))

    return make


@pytest.fixture(scope="session")
def tiny(random_model):
    """A random model of 3 layers with 4 query heads on 2 KV heads."""
    return random_model(
        ModelConfig(
            vocab_size=61,
            hidden_size=32,
            mlp_size=40,
            n_layers=3,
            n_heads=4,
            n_kv_heads=2,
            head_dim=8,
            max_length=300,
            bos_id=1,
            eos_ids=(2,),
            pad_id=0,
        )
    )


@pytest.fixture(scope="session")
def five_layers(random_model):
    """Five layers in a row, and the same model as two repeats of two layers and a tail of one."""
    config = ModelConfig(
        vocab_size=31, hidden_size=16, mlp_size=20, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=4, max_length=80
    )
    lm = random_model(config)
    paired = dataclasses.replace(config, layer_pattern=("full", "full"))
    regrouped = {**lm.params, **split_layers(paired, lm.params["blocks"]["0"])}
    return lm, lm.replace(config=paired, params=regrouped)


@pytest.fixture(scope="session")
def close():
    """Assert equal shapes and differences below `tolerance` of the expected scale; NaN fails."""

    def check(actual, expected, tolerance=1e-4):
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape
        error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
        assert error <= tolerance, f"differs by {error:.2e} of the scale"

    return check


@pytest.fixture
def undrawn(monkeypatch):
    """Figures of pages are made, and their names stand in the page; they are not drawn, which takes most of the time."""
    named = Markup('<svg role="img" aria-label="{}"></svg>')
    monkeypatch.setattr("retmask_jax.reports.plotting.inline", lambda figure, alt: named.format(alt))


@pytest.fixture
def compiles():
    """A list of the XLA compilations since the test began (or since .clear())."""
    events = []

    def record(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(record)
    yield events
    jax.monitoring.unregister_event_duration_listener(record)
