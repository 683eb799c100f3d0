"""Where work without gradients runs under a mesh made for training: a decoding step moves no weight between devices, and
answers are those of one device."""

import json
import textwrap

import numpy as np
import pytest
from helpers_processes import environment, printed
from helpers_tiny import in_float64, reference

from retmask_jax.generation.language_model import load
from retmask_jax.model.interventions import mask_heads

# The recipes' mesh on eight devices, each of which is said to have so many bytes; None: what the machine says.
_DECODE = textwrap.dedent("""
    import json, sys, tempfile
    from pathlib import Path
    import jax
    from retmask_jax.generation import continuous as stream
    from retmask_jax.utils import memory
    from retmask_jax.configs import _papers
    from retmask_jax.runs.context import Context
    from retmask_jax.aot.hlo import read_work
    from retmask_jax.model.interventions import mask_heads
    from retmask_jax.model.kernels.blocked import compiled_for
    from retmask_jax.runs.workdir import Workdir

    config = _papers.retmask_method("bundled", threshold=0.1)
    config.dtype, config.kernel = "float32", "plain"
    prompts, heads, said = json.loads(sys.argv[1])
    compiled, run = [], stream.decode_rows

    def decode(config, *arguments):
        if not compiled:
            compiled.append(run.lower(config, *arguments).compile())
        return compiled[0](*arguments)

    stream.decode_rows = decode

    def answers(lm):
        masks = [mask_heads(lm.config, map(tuple, some)) for some in heads]
        requests = [stream.Request(prompt, mask=i % 2) for i, prompt in enumerate(prompts)]
        found = dict(stream.generate_stream(lm.config, lm.params, requests, batch_size=config.batch_size,
                                            max_new_tokens=6, masks=masks, stop_ids=()))
        return [found[i].tokens.tolist() for i in range(len(prompts))]

    if said is not None:
        memory.capacity = lambda: said
    context = Context(config, Workdir.open(Path(tempfile.mkdtemp()), config))
    # A TPU's attention has no loop over rows; a CPU's, which the compiler cannot split, has one.
    with compiled_for("tpu"):
        found = answers(context.lm)
    leaves = jax.tree.leaves(context.lm.params)
    begun = context.start_params(context.config.dtype)
    print(json.dumps({
        "answers": found, "sent": read_work(compiled[0].as_text()).sent, "weights": sum(x.nbytes for x in leaves),
        "held": sum(x.addressable_shards[0].data.nbytes for x in leaves), "rows": config.batch_size,
        "mesh": dict(leaves[0].sharding.mesh.shape),
        "trained": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(begun)),
    }))
""")


LITTLE = 3_000_000  # of 2.8 MB of weights


PROMPTS = [np.random.default_rng(n).integers(16, 256, n).tolist() for n in (60, 3, 41, 7, 12, 50, 9, 33, 1, 20)]
MASKED = [[], [(1, 0), (1, 3)]]  # heads, of every other prompt


def _decoded(memory):
    """What decoding is where each device has so many bytes, in a process of its own. same: whether answers are as defined."""
    out = printed("-c", _DECODE, json.dumps([PROMPTS, MASKED, memory]), env=environment(8, kept=False))
    found = json.loads(out.splitlines()[-1])
    return found | {"same": _is_greedy(found["answers"])}


def _is_greedy(answers):
    """Whether each of six tokens after each prompt is the best next one by a reference in float64."""
    lm = load("bundled")
    params = in_float64(lm.params)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        mask = np.asarray(mask_heads(lm.config, MASKED[i % 2]).head_mask)
        logits_TV, _ = reference(params, np.array(prompt + answer), config=lm.config, head_mask=mask)
        if len(answer) != 6 or logits_TV[len(prompt) - 1 : -1].argmax(axis=-1).tolist() != answer:
            return False
    return True


def test_under_the_recipes_mesh_a_decoding_step_moves_nothing_where_a_copy_fits_each_device():
    found = _decoded(None)
    assert sum(found["sent"].values()) == 0, found
    assert found["same"] and found["held"] == found["weights"] and found["mesh"]["data"] == 8
    assert found["trained"] < found["weights"] / 7  # training gets them over all devices, as its mesh says


@pytest.mark.slow
def test_under_the_recipes_mesh_a_decoding_step_moves_activations_alone_where_no_copy_fits():
    found = _decoded(LITTLE)
    assert found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 4, "context": 1} and found["same"], found
    assert found["held"] < found["weights"] / 3
    layers, width, vocabulary = 4, 128, 354
    activations = found["rows"] * (3 * layers * width + vocabulary) * 4
    assert 0 < sum(found["sent"].values()) < 2 * activations < found["weights"] / 10, found
