"""Mask sweeps equal one pass per mask, in one program; and what happens when memory runs out."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from retmask_jax.generation.decode import generate_many
from retmask_jax.generation.sweep import sweep
from retmask_jax.model.interventions import Interventions, mask_heads, mask_rope
from retmask_jax.utils import memory

TOKENS = np.random.default_rng(0).integers(0, 31, (5, 20)).astype(np.int32)
LENGTHS = np.array([20, 3, 11, 1, 19])


def _masks(config):
    """None, one in each layer, one of several layers, a float gate, rotary masks at the last and first layer."""
    gate = np.zeros((config.n_layers, config.n_heads), np.float32)
    gate[1] = 0.4
    return {
        "heads": [
            Interventions(),
            *(mask_heads(config, [(layer, 1)]) for layer in range(config.n_layers)),
            mask_heads(config, [(1, 0), (3, 2)]),
        ],
        "gates": [Interventions(gate), Interventions(gate[::-1])],
        "rotary": [mask_rope(config, [(4, 0)], [1]), mask_rope(config, [(0, 3)], [0, 1])],
        "projection": [mask_rope(config, [(2, 0)], [1], site="projection")],
    }


@pytest.mark.parametrize(
    "kind, which",
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("heads", 0), ("projection", 1))),
        *(("heads", 1), ("gates", 0), ("rotary", 1), ("projection", 0)),
    ],
)
def test_a_sweep_is_one_pass_per_mask_in_one_program(five_layers, kind, which, compiles, close):
    lm = five_layers[which]
    masks = _masks(lm.config)[kind]
    expected = [lm.logits(TOKENS, LENGTHS, mask, positions=LENGTHS[:, None] - 1)[:, 0] for mask in masks]
    compiles.clear()  # by now also what puts arrays of these shapes on the device
    swept = sweep(lm, TOKENS, LENGTHS, masks)
    assert len(compiles) == 1
    close(swept, expected, 1e-5)
    assert len({logits.tobytes() for logits in swept}) == len(masks)


def test_batches_of_prompts_and_wanted_tokens(five_layers, close):
    lm = five_layers[0]
    masks = _masks(lm.config)["heads"]
    wanted = np.random.default_rng(1).integers(0, 31, (5, 3))
    full = np.asarray(jax.nn.log_softmax(sweep(lm, TOKENS, LENGTHS, masks)))
    logps = sweep(lm, TOKENS, LENGTHS, masks, wanted=wanted, batch_size=2)
    close(logps, np.take_along_axis(full, wanted[None], axis=2), 1e-5)


def test_what_a_sweep_refuses(five_layers):
    lm = five_layers[0]
    per_row = Interventions(np.zeros((5, 5, 4), bool))
    for masks, lengths, message in (
        ([], LENGTHS, "at least one mask"),
        ([per_row], LENGTHS, r"\[L, H\]"),
        ([Interventions()], LENGTHS * 0, "empty"),
        ([Interventions()], LENGTHS[:2], "lengths has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(lm, TOKENS, lengths, masks)


# --- memory ---


class _Program:
    def __init__(self, size):
        self.size = size

    def memory_analysis(self):
        return self

    @property
    def temp_size_in_bytes(self):
        return 100 * self.size

    output_size_in_bytes = 50


@pytest.mark.skipif(
    not Path("/proc/meminfo").exists() or jax.default_backend() != "cpu", reason="Linux, and a CPU, only"
)
def test_free_memory_counts_what_the_page_cache_would_give_back():
    available = int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    assert memory.limit() * jax.local_device_count() == pytest.approx(available, rel=0.1)


def test_the_largest_batch_that_fits(monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: 900)
    assert memory.largest_batch(_Program, 32, "sweep")[0] == 8
    monkeypatch.setattr(memory, "limit", lambda: 100)
    with pytest.raises(memory.OutOfMemory, match="sweep: one row needs"):
        memory.largest_batch(_Program, 32, "sweep")


def _exhausted(size):
    raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Out of memory allocating {size} bytes.")


def test_work_goes_on_in_smaller_batches():
    tried = []

    def run(size):
        tried.append(size)
        return size if size <= 4 else _exhausted(2**30)

    assert memory.in_smaller_batches(run, 16, "knockout") == 4 and tried == [16, 8, 4]
    with pytest.raises(memory.OutOfMemory, match="knockout ran out of memory when 5.00 GiB more were wanted: one row"):
        memory.in_smaller_batches(lambda size: _exhausted(5 * 2**30), 4, "knockout")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory.in_smaller_batches(lambda size: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL")), 4, "x")


def test_prompts_that_do_not_fit_together_are_answered_in_halves(tiny, monkeypatch):
    """The same answers, none of them lost or counted wrong."""
    from retmask_jax.generation import decode as module

    prompts = [TOKENS[0, :n].tolist() for n in (20, 7, 15, 11)]
    options = {"max_new_tokens": 5, "stop_ids": ()}
    expected = generate_many(tiny.config, tiny.params, prompts, batch_size=2, **options)
    real, sizes = module.generate_batch, []

    def limited(config, params, tokens_BT, *args, **kwargs):
        sizes.append(len(tokens_BT))
        return _exhausted(10**9) if len(tokens_BT) > 2 else real(config, params, tokens_BT, *args, **kwargs)

    monkeypatch.setattr(module, "generate_batch", limited)
    results = generate_many(tiny.config, tiny.params, prompts, batch_size=4, **options)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result.tokens, wanted.tokens)
    assert sizes == [4, 2, 2]


def test_a_real_allocation_that_fails_is_told_in_one_line():
    """A process whose address space is limited asks XLA for more than that."""
    program = """
import resource, jax, jax.numpy as jnp
from retmask_jax.utils import memory
jnp.zeros(1).block_until_ready()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
try:
    memory.in_smaller_batches(lambda n: jnp.zeros((n, 2**31)).block_until_ready(), 2, "train")
except memory.OutOfMemory as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "train ran out of memory" in done.stdout and "GiB more were wanted" in done.stdout, done.stderr


def test_a_stage_that_runs_out_of_memory_says_what_to_lower(tmp_path):
    from retmask_jax.configs import tiny

    from retmask_jax.pipeline import registry
    from retmask_jax.runs.context import Context
    from retmask_jax.runs.workdir import Workdir

    exhausted = dataclasses.replace(registry.DETECT, work=lambda context, folder: _exhausted(3 * 2**30))
    config = tiny.get_config()
    context = Context(config, Workdir.open(tmp_path / "work", config))
    with pytest.raises(memory.OutOfMemory, match="^detect ran out of memory when 3.00 GiB .*: lower batch_size"):
        registry.run_stage(context, exhausted)
