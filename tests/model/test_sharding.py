"""Rows over the devices of a mesh: the same results, no word between devices, cores as devices."""

import json
import os
import textwrap
from itertools import product

import jax
import pytest
from helpers_processes import environment, printed

from retmask_jax.model import sharding

SPLIT = textwrap.dedent("""
    import functools, json, re, sys
    import jax, numpy as np
    from retmask_jax.model import sharding
    from retmask_jax.benchmarks.programs import dpo_settings, random_pairs
    from retmask_jax.heads.reading import read_answers
    from retmask_jax.generation.decode import generate, generate_batch
    from retmask_jax.generation.sampling import Draws
    from retmask_jax.hf.hub import BUNDLED
    from retmask_jax.generation.language_model import from_params, load
    from retmask_jax.model.config import ModelConfig
    from retmask_jax.model.interventions import mask_heads, stack
    from retmask_jax.model.masking import normalise
    from retmask_jax.generation.logprobs import token_logprobs
    from retmask_jax.generation.sweep import sweep
    from retmask_jax.training.step import make_programs

    sharding.split_cpu(3)
    assert jax.device_count() == 2, jax.devices()
    meshes = [sharding.make_mesh({"data": n, "fsdp": 1, "tensor": 1}, jax.devices()[:n]) for n in (1, 2)]
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(16, 256, (4, 70)).astype(np.int32), np.array([70, 3, 41, 70], np.int32)
    prompts, answers = [row.tolist() for row in tokens], [[20, 21, 22]] * 4

    def sampled(mesh, rows):
        lm = load(BUNDLED, mesh=mesh)
        per_row = stack([mask_heads(lm.config, [(0, i), (1, i)]) for i in range(rows)])
        found = generate(lm.config, lm.params, tokens[:rows], lengths[:rows], max_new_tokens=4, temperature=1.0,
                         seed=7, interventions=per_row)
        return {"sampled": found.tokens}

    def trained(mesh, rows):
        return gradients(mesh, load(BUNDLED, mesh=mesh), dpo_settings(rows, "float32"), rows, 64)

    def trained_small(mesh, rows):
        # A random model of one layer, whose blocks are not recomputed.
        config = ModelConfig(vocab_size=40, hidden_size=16, mlp_size=24, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=4,
                             max_length=64, kernel="plain")
        rng = np.random.default_rng(0)
        draw = lambda x, at: jax.device_put(rng.normal(0, 0.3, x.shape).astype(np.float32), at)
        params = jax.tree.map(draw, sharding.plain_shapes(config), sharding.param_shardings(config, mesh))
        return gradients(mesh, from_params(config, params), dpo_settings(rows, "float32", remat=False), rows, 16)

    def gradients(mesh, lm, settings, rows, length):
        pairs = random_pairs(min(256, lm.config.vocab_size), length, rows)
        programs = make_programs(lm.config, settings, mesh)
        pairs["reference"] = -np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
        pairs["weight"] = np.full(rows, 1 / rows, np.float32)
        with sharding.using(mesh):
            grads, metrics = programs.gradients(lm.params, {}, pairs, None)
        return {
            "loss": metrics["loss"],
            **{jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(grads)},
        }

    def others(mesh, rows):
        lm = load(BUNDLED, mesh=mesh)
        masks = [mask_heads(lm.config, [(0, i), (1, i)]) for i in range(4)]
        per_row = stack(masks[:rows])
        found = generate(lm.config, lm.params, tokens[:rows], lengths[:rows], max_new_tokens=4, stop_ids=(),
                         interventions=per_row, probe=True)
        read = read_answers(lm, prompts[:rows], answers[:rows], interventions=masks[0])
        return {
            "tokens": found.tokens, "argmax": found.argmax, "read": np.stack([one.argmax for one in read]),
            "logprobs": token_logprobs(lm.config, lm.params, tokens[:rows], per_row),
            "sweep": sweep(lm, tokens[:rows], lengths[:rows], masks),
        }

    def difference(what, rows):
        one, two = ({name: np.asarray(x, np.float64) for name, x in what(mesh, rows).items()} for mesh in meshes)
        return {name: float(np.abs(one[name] - two[name]).max() / max(np.abs(one[name]).max(), 1e-9)) for name in one}

    def program(mesh):
        lm = load(BUNDLED, mesh=mesh)
        four = np.zeros(4, np.uint32)
        with sharding.using(mesh):
            lowered = generate_batch.lower(lm.config, lm.params, tokens, lengths, normalise(lm.config),
                                      Draws.of(lm.config, (), 0, 1), four, four,
                                      max_new_tokens=4, probe=False)
        return lowered.compile().as_text()

    what, rows = globals()[sys.argv[1]], int(sys.argv[2])
    found = {"difference": difference(what, rows)}
    if what is sampled and rows == 4:
        found["talks"] = re.findall("all-gather|all-reduce|all-to-all|collective-permute", program(meshes[1]))
    print(json.dumps(found))
""")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core makes one device")
@pytest.mark.parametrize(
    "what, rows",
    [  # 4 rows divide by 2 devices, 3 rows do not
        ("trained_small", 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in product(("sampled", "trained", "others"), (4, 3))),
    ],
)
def test_rows_over_two_devices_give_what_one_gives_without_a_word_between_them(what, rows):
    found = json.loads(printed("-c", SPLIT, what, rows, env=environment(None, kept=False)))
    worst = max(found["difference"], key=found["difference"].get)
    assert found["difference"][worst] < 1e-4, (worst, found["difference"])
    assert found.get("talks", []) == []


@pytest.mark.parametrize(
    "chosen", [{"JAX_NUM_CPU_DEVICES": "3"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}]
)
def test_a_number_of_devices_that_the_user_chose_stays(chosen):
    script = "import jax; from retmask_jax.model import sharding; sharding.split_cpu(8); print(jax.device_count())"
    assert printed("-c", script, env=environment(None, kept=False, **chosen)) == "3\n"


def test_splitting_a_cpu_that_is_in_use_changes_nothing():
    devices = jax.devices()
    sharding.split_cpu(8)
    assert jax.devices() == devices
