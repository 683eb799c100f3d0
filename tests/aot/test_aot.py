"""Compiling ahead of time, without libtpu: what is read from HLO, what is estimated and advised, a user's mistakes."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import pytest
from helpers_processes import environment, printed

from retmask_jax.aot import decoding as aot_decoding
from retmask_jax.aot import program as aot_program
from retmask_jax.aot import step as aot
from retmask_jax.aot import table
from retmask_jax.aot.advice import Step, advise
from retmask_jax.aot.hlo import Work, read_work
from retmask_jax.aot.topology import ASSUMED, CHIPS, estimate
from retmask_jax.cli.main import main
from retmask_jax.model.config import Lora, ModelConfig
from retmask_jax.model.flops import executed_flops, forward_flops, training_flops
from retmask_jax.runs.recipes import load_recipe

GIB = 2**30
TPU = "{1,0:T(8,128)(2,1)}"  # a layout as TPUs have it


def module(body: str, *others: str, partitions: int = 8) -> str:
    entry = "ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {\n" + body + "\n}\n"
    return f"HloModule jit_f, is_scheduled=true, num_partitions={partitions}\n\n" + "\n".join([*others, entry])


def loop(condition: str, body: str, step: int = 1, name: str = "") -> list[str]:
    """Two computations, of a loop whose counter is element 0 and whose array is element 1."""
    return [
        f"%cond{name} (p: (s32[], bf16[64,128])) -> pred[] {{\n"
        f"  %p.c{name} = (s32[], bf16[64,128]{TPU}) parameter(0)\n"
        f"  %i.c{name} = s32[]{{:T(128)}} get-tuple-element(%p.c{name}), index=0\n"
        f"{condition}\n}}\n",
        f"%body{name} (q: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {{\n"
        f"  %q{name} = (s32[], bf16[64,128]{TPU}) parameter(0)\n"
        f"  %i{name} = s32[]{{:T(128)}} get-tuple-element(%q{name}), index=0\n"
        f"  %w{name} = bf16[64,128]{TPU} get-tuple-element(%q{name}), index=1\n"
        f"  %step{name} = s32[]{{:T(128)}} constant({step})\n"
        f"  %next{name} = s32[]{{:T(128)}} add(%i{name}, %step{name})\n"
        f"{body}\n"
        f"  ROOT %t{name} = (s32[], bf16[64,128]{TPU}) tuple(%next{name}, %w{name})\n}}\n",
    ]


def below(limit: int, name: str = "") -> str:
    return (
        f"  %limit{name} = s32[]{{:T(128)}} constant({limit})\n"
        f"  ROOT %lt{name} = pred[] compare(%i.c{name}, %limit{name}), direction=LT"
    )


RUN_LOOP = (
    f"  %x = bf16[64,128]{TPU} parameter(0)\n"
    "  %first = s32[]{:T(128)} constant(START)\n"
    f"  %init = (s32[], bf16[64,128]{TPU}) tuple(%first, %x)\n"
    f"  %loop = (s32[], bf16[64,128]{TPU}) while(%init), condition=%cond, body=%body, backend_config=CONFIG\n"
    f"  ROOT %out = bf16[64,128]{TPU} get-tuple-element(%loop), index=1"
)
SIZE = 64 * 128 * 2


@pytest.mark.parametrize(
    "op, sent",
    [
        ("all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}", 3 * SIZE),
        ("all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 2 * 3 * SIZE // 4),
        ("reduce-scatter(%x), channel_id=1, replica_groups={}, dimensions={0}, to_apply=%add", 7 * SIZE // 8),
        ("all-to-all(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}", SIZE // 2),
        ("all-to-all(%x), replica_groups=mesh['a'=4,'b'=2] {'a','b'}, dimensions={0}", 7 * SIZE // 8),
        ("collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}", SIZE),
    ],
)
def test_bytes_of_each_collective(op, sent):
    kind = op.partition("(")[0]
    work = read_work(module(f"  %x = bf16[64,128]{TPU} parameter(0)\n  ROOT %y = bf16[64,128]{TPU} {op}"))
    assert work.counts == {kind: 1} and work.sent == {kind: sent}


@pytest.mark.parametrize(
    "condition, step, start, config, turns",
    [
        (below(32), 1, 0, "{}", 32),
        (below(8), 2, 0, "{}", 4),  # unrolled
        (below(32), 1, 2, "{}", 30),
        ("  ROOT %any = pred[] custom-call(%i.c)", 1, 0, '{"known_trip_count":{"n":"6"},"other":1}', 6),
    ],
)
def test_loops_count_in_full(condition, step, start, config, turns):
    gather = f"  %g = bf16[512,128]{TPU} all-gather(%w), channel_id=1, replica_groups=[1,8]<=[8], dimensions={{0}}"
    text = module(RUN_LOOP.replace("START", str(start)).replace("CONFIG", config), *loop(condition, gather, step))
    work = read_work(text)
    assert work.counts == {"all-gather": turns} and work.sent == {"all-gather": turns * 7 * SIZE}
    assert work.memory >= turns * 9 * SIZE and work.unknown == 0  # each gather reads a part and writes the whole


def test_nested_loops_multiply_and_unknown_ones_count_once():
    inner = (
        f"  %again = (s32[], bf16[64,128]{TPU}) tuple(%step, %w)\n"
        f"  %nested = (s32[], bf16[64,128]{TPU}) while(%again), condition=%cond.2, body=%body.2"
    )
    permute = f"  %g = bf16[64,128]{TPU} collective-permute(%w.2), channel_id=1, source_target_pairs={{{{0,1}}}}"
    main_part = RUN_LOOP.replace("START", "0").replace("CONFIG", "{}")
    text = module(main_part, *loop(below(5, ".2"), permute, name=".2"), *loop(below(3), inner))
    assert read_work(text).counts == {"collective-permute": 3 * 4}  # the inner one starts at 1
    data = "  ROOT %any = pred[] custom-call(%i.c.2)"
    work = read_work(module(main_part, *loop(data, permute, name=".2"), *loop(below(3), inner)))
    assert work.counts == {"collective-permute": 3} and work.unknown == 1


def test_a_collective_in_several_instructions_counts_once():
    part = (
        "%part.{n} (p.{n}: bf16[64,128]) -> bf16[512,128] {{\n"
        "  %p.{n} = bf16[64,128]{{1,0}} parameter(0)\n"
        "  ROOT %g.{n} = bf16[512,128]{{1,0}} all-gather(%p.{n}), channel_id=7, replica_groups=[1,8]<=[8],"
        " dimensions={{0}}\n}}\n"
    )
    body = (
        f"  %x = bf16[64,128]{TPU} parameter(0)\n"
        f"  %s = (bf16[64,128]{TPU}, bf16[64,128]{TPU}) all-reduce-start(%x), channel_id=1, to_apply=%add\n"
        f"  %a = bf16[512,128]{TPU} fusion(%x), kind=kCustom, calls=%part.1\n"
        f"  %b = bf16[512,128]{TPU} fusion(%x), kind=kCustom, calls=%part.2\n"
        f"  ROOT %d = bf16[64,128]{TPU} all-reduce-done(%s)"
    )
    work = read_work(module(body, part.format(n=1), part.format(n=2)))
    assert work.counts == {"all-reduce": 1, "all-gather": 1}
    assert work.sent == {"all-reduce": 2 * 7 * SIZE // 8, "all-gather": 7 * SIZE}


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
    part = (
        "%all-reduce-scatter.1 (p: bf16[64,128]) -> bf16[8,128] {\n  %p = bf16[64,128]{1,0} parameter(0)\n"
        "  %r = bf16[64,128]{1,0} all-reduce(%p), channel_id=1, to_apply=%add\n"
        "  ROOT %s = bf16[8,128]{1,0} slice(%r), slice={[0:8],[0:128]}\n}\n"
    )
    body = (
        f"  %x = bf16[64,128]{TPU} parameter(0)\n"
        f"  ROOT %y = bf16[8,128]{TPU} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    )
    assert read_work(module(body, part)).sent == {"reduce-scatter": 7 * SIZE // 8}


def test_memory_is_of_slices_and_of_main_memory():
    stack = "bf16[32,64,128]{2,1,0:T(8,128)(2,1)}"
    sliced = (
        "%sliced (a: bf16[32,64,128], i: s32[]) -> bf16[64,128] {\n"
        f"  %a = {stack} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %d = bf16[1,64,128]{2,1,0} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,64,128}\n}\n"
    )
    updated = (
        "%updated (b: bf16[32,64,128], c: bf16[1,64,128], j: s32[]) -> bf16[32,64,128] {\n"
        f"  %b = {stack} parameter(0)\n  %c = bf16[1,64,128]{{2,1,0}} parameter(1)\n  %j = s32[] parameter(2)\n"
        f"  ROOT %u = {stack} dynamic-update-slice(%b, %c, %j, %j, %j)\n}}\n"
    )
    body = (
        f"  %x = {stack} parameter(0)\n  %k = s32[]{{:T(128)S(6)}} constant(0)\n"
        f"  %near = bf16[1,64,128]{{2,1,0:T(8,128)(2,1)S(1)}} fusion(%x, %k), kind=kLoop, calls=%sliced\n"
        f"  ROOT %y = {stack} fusion(%x, %near, %k), kind=kLoop, calls=%updated"
    )
    # A slice is read into on-chip memory; an update is read from the array (or for it) and written to it.
    assert read_work(module(body, sliced, updated)).memory == SIZE + 2 * SIZE


def test_work_adds_up():
    work = Work({"all-gather": 2}, {"all-gather": 10}, 5) + Work({"all-gather": 1}, {"all-gather": 1}, 2, 1).times(4)
    assert work == Work({"all-gather": 6}, {"all-gather": 14}, 13, 1)


def test_a_collective_over_one_device_counts_and_sends_nothing():
    """As where a mesh has an axis of one device: XLA keeps the sum, and the time of a step is still known."""
    alone = module(
        f"  %x = bf16[64,128]{TPU} parameter(0)\n"
        f"  ROOT %y = bf16[64,128]{TPU} all-reduce(%x), channel_id=1, replica_groups={{{{0}}}}, to_apply=%add",
        partitions=1,
    )
    compiled = aot_program.Compiled(None, None, read_work(alone), 1.0)
    facts = aot._time_facts(next(iter(CHIPS.values())), 1e12, {"gradients": compiled, "update": compiled})
    assert facts["collectives"] == {"all-reduce": {"count": 2, "sent": 0}} and facts["seconds"]


# Weights of 6 layers split over 8 devices are gathered in each turn of a scan, a sum over devices is taken after it; and
# one row of 256 tokens on a mesh that splits rows.
ON_EIGHT_DEVICES = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from retmask_jax.aot.table import prefill_program
from retmask_jax.aot.hlo import read_work
from retmask_jax.model.config import Lora, ModelConfig
from retmask_jax.model.sharding import make_mesh, using

def scanned():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    shape = lambda size, *axes: jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))
    def body(w, x):
        y = jax.lax.scan(lambda x, w: (jnp.tanh(x @ jax.lax.all_gather(w, "d", tiled=True)), None), x, w)[0]
        return jax.lax.psum(y, "d")
    f = jax.shard_map(body, mesh=mesh, in_specs=(P(None, "d"), P("d")), out_specs=P(), check_vma=False)
    return jax.jit(f).lower(shape((6, 64, 64), None, "d"), shape((16, 64), "d")).compile()

def one_row():
    config = ModelConfig(vocab_size=64, hidden_size=32, mlp_size=64, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=8,
                         max_length=256, kernel="plain")
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 4})
    program = prefill_program(config, mesh, 1, 256)
    with using(mesh):
        return program.function.lower(*program.arguments).compile()

for compiled in (scanned(), one_row()):
    work = read_work(compiled.as_text())
    print(json.dumps([work.counts, work.sent, work.unknown, work.memory, compiled.cost_analysis()["bytes accessed"]]))
"""


@pytest.fixture(scope="module")
def on_eight_devices():
    return [json.loads(line) for line in printed("-c", ON_EIGHT_DEVICES, env=environment(8)).splitlines()[-2:]]


def test_a_program_over_devices_of_a_cpu(on_eight_devices):
    counts, sent, unknown, memory, once = on_eight_devices[0]
    assert counts == {"all-gather": 6, "all-reduce": 1} and unknown == 0
    assert sent == {"all-gather": 6 * 7 * 8 * 64 * 4, "all-reduce": 2 * 2 * 64 * 4 * 7 // 8}
    assert once < memory < 8 * once  # XLA counts the turns of the loop once


def test_a_single_row_is_not_padded_to_be_split(on_eight_devices):
    counts = on_eight_devices[1][0]
    assert "all-gather" in counts and "all-to-all" not in counts  # which would move the padding


# --- estimates ---


def test_training_costs_three_or_four_forward_passes():
    config = ModelConfig(
        vocab_size=100, hidden_size=8, mlp_size=12, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, max_length=64
    )
    weights = 3 * (8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 12)
    attention, logits = 3 * 4 * 4 * 4 * (1 + 2 + 3 + 4 + 5), 2 * 3 * 8 * 100
    assert executed_flops(config, 2, [3], remat=False) == 6 * 5 * weights + 3 * attention + 4 * logits
    assert executed_flops(config, 2, [3], remat=True) == 8 * 5 * weights + 4 * attention + 4 * logits
    adapters = dataclasses.replace(config, lora=Lora(2, 4.0))
    assert executed_flops(adapters, 2, [3], remat=True) == 6 * 5 * weights + 3 * attention + 4 * logits
    assert training_flops(config, 2, [3]) == 6 * 5 * weights + 3 * attention + 3 * logits
    assert training_flops(adapters, 2, [3]) == 4 * 5 * weights + 2 * attention + 2 * logits
    # Of two answers to a prompt, the second one's own tokens, and the keys that it sees.
    second = 3 * 4 * 4 * 4 * (3 + 4 + 5)
    both = 6 * 8 * weights + 3 * (attention + second) + 3 * 2 * logits
    assert training_flops(config, 2, [3, 3]) == both
    sliding = dataclasses.replace(config, layer_pattern=("sliding",), window=2)
    seen = 3 * 4 * 4 * 4 * (1 + 2 + 2 + 2 + 2)
    assert training_flops(sliding, 2, [3]) == 6 * 5 * weights + 3 * seen + 3 * logits
    expert = {"expert_pattern": (True,), "n_experts": 6, "experts_per_token": 2, "expert_size": 12}
    router = 3 * 8 * 6
    routed = forward_flops(dataclasses.replace(config, **expert), 5, 0) - forward_flops(config, 5, 0)
    assert routed == 2 * 5 * (router + 3 * 3 * 8 * 12)  # two experts to a token instead of one MLP


def test_estimate_of_known_numbers():
    for name, share in (("arithmetic", 0.5), ("memory", 0.7), ("interconnect", 0.5)):
        assert ASSUMED[name] == share
    seconds = estimate(CHIPS["v5e"], flops=197e12, memory=819e9, sent=100e9)
    assert seconds == pytest.approx({"arithmetic": 2, "memory": 1 / 0.7, "interconnect": 1})


# --- advice ---

SHARDED = Step(
    batch=512,
    microbatch=32,
    remat=True,
    mesh={"data": 1, "fsdp": 16, "tensor": 1},
    needed=20 * GIB,
    fixed=8 * GIB,
    limit=16 * GIB,
)


@pytest.mark.parametrize(
    "changes, fits, expected",
    [
        ({"needed": 14 * GIB}, True, []),
        (
            {"needed": 9.5 * GIB},
            True,
            ["there is room for train.microbatch_size=128, with which weights are moved less often"],
        ),  # 0.8 x 8 / 1.5 x 32
        ({}, False, ["set train.microbatch_size=16"]),  # 12 GiB of activations for 32, 8 are free: 21, and 16 divides
        ({"remat": False}, False, ["set train.remat=True", "set train.microbatch_size=16"]),
        ({"needed": 60 * GIB}, False, ["set train.microbatch_size=16, the smallest, which may still be too much"]),
        ({"microbatch": 16}, False, ["set mesh.fsdp=8 and mesh.tensor=2, then train.microbatch_size=8"]),
        (
            {"fixed": 17 * GIB},
            False,
            [
                "weights, gradients and moments alone take 17.0 of 16.0 GiB per chip: use a topology of at least 32 such chips, "
                "with mesh.fsdp=-1",
                "train adapters, train.lora_rank=16",
            ],
        ),
        (
            {"fixed": 16.1 * GIB, "narrow_moment": False},
            False,
            [
                "weights, gradients and moments alone take 16.1 of 16.0 GiB per chip: use a topology of at least 32 such chips, "
                "with mesh.fsdp=-1",
                "set train.first_moment_dtype=bfloat16",
                "train adapters, train.lora_rank=16",
            ],
        ),
        (
            {"fixed": 17 * GIB, "lora": True},
            False,
            [
                "weights, gradients and moments alone take 17.0 of 16.0 GiB per chip: use a topology of at least 32 such chips, "
                "with mesh.fsdp=-1"
            ],
        ),
        (
            {"fixed": 17 * GIB, "mesh": {"data": 2, "fsdp": 8, "tensor": 1}},
            False,
            [
                "weights, gradients and moments alone take 17.0 of 16.0 GiB per chip: set mesh.data=1 and mesh.fsdp=-1, which "
                "splits them over all chips"
            ],
        ),
        (
            {"microbatch": 1, "mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
            False,
            ["lower train.max_tokens, or use more chips"],
        ),
    ],
)
def test_advice(changes, fits, expected):
    assert advise(dataclasses.replace(SHARDED, **changes), fits) == expected


# --- the command ---


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command on a model of which there is nothing but config.json, with one CPU in a chip's place."""
    shutil.copy(Path(__file__).parents[1] / "golden" / "mha" / "config.json", tmp_path)
    monkeypatch.setattr(aot, "devices_of", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(aot, "stamp", lambda compiled: {"compile_seconds": 1})
    settings = {
        "kernel": "plain",
        "train.batch_size": 4,
        "train.microbatch_size": 2,
        "train.max_tokens": 16,
        "train.max_prompt_tokens": 8,
        "model": tmp_path,
    }
    return ["train", "--aot=v5e:1x1", *(f"--config.{key}={value}" for key, value in settings.items())]


def test_a_training_step_that_fits(command, capsys):
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny on v5e:1x1 (1 chip): 4 pairs of up to 16 tokens a step, 2 at a time")
    assert lines[1].startswith("gradients, 2 times a step: arguments") and lines[2].startswith("update: arguments")
    assert "of 15.75 GiB per chip" in lines[3] and lines[4].endswith("bytes sent per chip: none")
    assert "an estimate, not measured" in lines[5] and lines[-1].startswith("fits")


def test_a_training_step_that_the_compiler_refuses(command, monkeypatch, capsys):
    refused = aot_program.Compiled(None, "Used 30.77G of 15.75G hbm", Work({}, {}, 0), 1.0)
    monkeypatch.setattr(aot, "compile_program", lambda program, mesh: refused)
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "gradients: refused by the compiler: Used 30.77G of 15.75G hbm"
    assert lines[3:] == [
        "memory: 30.77 of 15.75 GiB per chip",
        "does not fit: set train.remat=True; or set train.microbatch_size=1",
    ]


def test_arrays_that_a_program_does_not_use_count(command, monkeypatch, capsys):
    almost = {"peak": 15.75 * GIB - 10_000, "arguments": 0, "temporary": 0}
    compiled = aot_program.Compiled(almost, None, Work({}, {}, 0), 1.0)
    monkeypatch.setattr(aot, "compile_program", lambda program, mesh: compiled)
    assert main(command) == 1  # the moments have no room
    assert capsys.readouterr().out.splitlines()[-1].startswith("does not fit: set train.")


@pytest.mark.parametrize(
    "words, gib",
    [
        ("Ran out of memory in memory space hbm. Used 30.77G of 15.75G hbm. Exceeded hbm capacity by 15.02G.", 30.77),
        ("the total memory required for HLO temporaries (512.00M) exceeds available HBM (15.75G).", 0.5),
    ],
)
def test_a_refusal_of_the_compiler_says_what_was_needed(words, gib):
    refused = aot_program._refused(RuntimeError(f"RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. {words}"))
    assert aot_program.Compiled(None, refused, Work({}, {}, 0), 1.0).needed == gib * GIB


def test_other_errors_of_the_compiler_are_raised():
    with pytest.raises(RuntimeError, match="something else"):
        aot_program._refused(RuntimeError("something else"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--aot=v9x:4x4"],
            "topology is 'v9x:4x4'; it must be a generation of TPUs (v5e, v5p, v6e) and a grid of chips",
        ),
        (["--aot=v5e:16"], "topology is 'v5e:16'"),
        (["--aot=v5e:0x4"], "topology is 'v5e:0x4'"),
        (["--aot=gpu:8"], "GPUs are not supported"),
        (["--aot=v5e:4x4", "--config.model=no/such/model/folder"], "does not exist"),
        (["--aot=v5e:4x4"], "compiling for TPUs needs libtpu: pip install 'retmask_jax[tpu]'"),
    ],
)
def test_mistakes(capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # find_spec finds none, installed or not
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_a_mesh_that_does_not_fit_the_topology(capsys, monkeypatch):
    monkeypatch.setattr(aot, "devices_of", lambda topology: [None] * 16)
    assert main(["train", "--aot=v5e:4x4", "--config.mesh.fsdp=3"]) == 2
    assert "fsdp=3, tensor=1, context=1 does not fit 16 devices" in capsys.readouterr().err


# --- detection and sampling ---


@pytest.fixture
def decoding(command, monkeypatch):
    """The arguments after the name of the stage, for a few short answers."""
    monkeypatch.setattr(aot_decoding, "devices_of", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(aot_decoding, "stamp", lambda compiled: {"compile_seconds": 1})
    more = {
        "pairs.n_prompts": 100,
        "pairs.max_new_tokens": 8,
        "tasks.detect.lengths": "(32,)",
        "batch_size": 4,
        "detect.max_new_tokens": 4,
        "train.max_tokens": 16,
    }
    return [*command[1:], *(f"--config.{key}={value}" for key, value in more.items())]


def test_sampling_says_what_rows_take_and_how_long_all_answers_would(decoding, capsys):
    assert main(["pairs", *decoding, "--config.pairs.batch_size=4", "--config.train.arms=('retmask','any_layer')"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny, pairs on v5e:1x1 (1 chip): 4 rows of 8 tokens and 8 new ones")
    assert lines[1].startswith("memory: weights ") and "of 15.75 GiB per chip" in lines[1]
    assert lines[2:4] == ["prompts: a chip sends nothing", "token: a chip sends nothing"]
    assert "an estimate, not measured" in lines[4] and lines[5].startswith("300 answers, if each had 8 tokens")
    assert lines[6] == "fits"


def test_sampling_without_a_batch_size_fills_the_chips_memory(decoding, capsys, monkeypatch):
    small = dataclasses.replace(CHIPS["v5e"], memory=5_000_000)
    monkeypatch.setattr(aot_decoding, "chip_of", lambda topology: small)
    assert main(["pairs", *decoding]) == 0
    row = capsys.readouterr().out.splitlines()[0]
    rows = int(re.search(r"(\d+) rows", row)[1])
    assert 4 < rows < 200


def test_detection_says_what_a_batch_of_the_longest_cases_takes(decoding, capsys):
    assert main(["detect", *decoding]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny, detect on v5e:1x1 (1 chip): 4 rows of 64 tokens and 4 new ones")
    assert lines[2] == "prompts and tokens: a chip sends nothing" and lines[4].startswith(
        "40 answers, if each had 4 tokens"
    )


def test_other_stages_have_no_such_flag(capsys):
    assert main(["eval", "--aot=v5e:4x4"]) == 2
    assert "unknown argument '--aot=v5e:4x4'" in capsys.readouterr().err


# --- the table ---


def test_the_table_keeps_one_row_for_a_recipe_on_a_topology(tmp_path):
    path = tmp_path / "table.json"
    row = {"what": "train", "model": "a", "topology": "v5e:4x4", "length": 1024, "mesh": {"fsdp": 16}, "batch": 512}
    prompt = row | {"what": "prefill"}
    for one in (row | {"fits": False}, prompt, prompt | {"mesh": {"fsdp": 2}}, row | {"mesh": {}, "fits": True}):
        table.keep(one, path)
    rows = json.loads(path.read_text())
    assert len(rows) == 3 and [one["fits"] for one in rows if one["what"] == "train"] == [True]


def test_what_the_table_sets_are_keys_of_its_recipes():
    for recipe in table.RECIPES:
        for overrides in [*table.SETTINGS.values(), *table.LONG.values()]:
            load_recipe(recipe, list(overrides.items()))


def test_a_row_of_the_table_takes_models_from_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "check_training", lambda config, topology: {"settings": config, "topology": topology})
    row = table.train_row("llama3_1_8b", "v5e:8x8", tmp_path, table.SETTINGS["v5e:8x8"])
    assert row["settings"].model == str(tmp_path / "Llama-3.1-8B-Instruct")
    assert (row["model"], row["topology"]) == ("llama3_1_8b", "v5e:8x8")
    assert {"train.microbatch_size": str(row["settings"].train.microbatch_size)} == row["overrides"]
