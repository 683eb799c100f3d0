"""Training some heads alone: what lies outside them keeps its bits, what lies inside is trained as if it were all."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from heads_training import ALONE, CONFIG, HEADS, MIXED, start_params, trained_params
from helpers_processes import environment, printed
from helpers_training import one_device

from retmask_jax.model import lora as adapters
from retmask_jax.model.sharding import plain_shapes
from retmask_jax.training.optimizer import count_trained, make_optimizer, schedule, trained_parts
from retmask_jax.training.step import make_programs

TESTS = Path(__file__).parents[1]
ADAPTED = dataclasses.replace(ALONE, lora_rank=2, lora_alpha=8.0)


def pieces(params, mlp=False):
    """Views of all that HEADS may change, by name; params: nested dicts of NumPy arrays, of CONFIG or MIXED."""
    width, group, found = CONFIG.head_dim, CONFIG.n_heads // CONFIG.n_kv_heads, {}
    for layer in range(CONFIG.n_layers):
        block = _block(params, layer)
        for head in (head for at, head in HEADS if at == layer):
            columns = {"q": head, "k": head // group, "v": head // group}
            for name, index in columns.items():
                part = slice(index * width, (index + 1) * width)
                found[f"{layer} {name} {index}"] = block["attn"][name]["kernel"][:, part]
                found[f"{layer} {name} {index} bias"] = block["attn"][name]["bias"][part]
            found[f"{layer} o {head}"] = block["attn"]["o"]["kernel"][head * width : (head + 1) * width]
        if mlp:
            names = {**block.get("mlp", {}), **block.get("experts", {})}
            found |= {f"{layer} {name}": x["kernel"] if isinstance(x, dict) else x for name, x in names.items()}
    return found


def _block(params, layer):
    """Views of the parameters of a layer in absolute order: in MIXED two repeats of two layers, and a tail of one."""
    if "tail" in params and layer == 4:
        return params["tail"]["0"]
    repeat, place = divmod(layer, len(params["blocks"]))
    return jax.tree.map(lambda x: x[repeat], params["blocks"][str(place)])


def _copy(params):
    return jax.tree.map(lambda x: np.array(x), params)


def _bits(params):
    return {path: np.asarray(x, np.float32).view(np.uint32) for path, x in flatten_dict(params).items()}


def assert_trained(params, mlp=False, dense=True, config=CONFIG):
    """With the pieces put back, `params` are the start parameters to the bit; most of every piece has changed."""
    start, params = _copy(start_params(config)), _copy(params)
    before, after = pieces(start, mlp), pieces(params, mlp)
    for name, piece in after.items():
        if dense or not name.endswith("bias"):  # adapters are of kernels
            assert (piece != before[name]).mean() > 0.9, name
        piece[...] = before[name]
    restored, wanted = _bits(params), _bits(start)
    assert restored.keys() == wanted.keys()
    assert not [path for path in wanted if not np.array_equal(restored[path], wanted[path])]


def test_twenty_updates_leave_the_bits_of_all_but_the_heads(tmp_path):
    """With decay of weights, moments and clipping; every gradient but the chosen ones is dropped."""
    assert_trained(trained_params(tmp_path, one_device()))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and rows[-1]["loss"] < 0.98 * rows[0]["loss"]


@pytest.mark.slow
def test_adapters_of_some_heads_change_no_other_weight(tmp_path):
    """Merged on the device, and on the host, as `save` does."""
    params = trained_params(tmp_path, one_device(), ADAPTED)
    assert_trained(adapters.merged(params, ADAPTED.lora), dense=False)
    low_rank, plain = (flatten_dict(_copy(part)) for part in adapters.split(params))
    for (*path, name), a in low_rank.items():
        if name == "kernel_lora_a":
            path = (*path, "kernel")
            plain[path] = adapters.add(plain[path], a, low_rank[*path[:-1], "kernel_lora_b"], ADAPTED.lora)
    assert_trained(unflatten_dict(plain), dense=False)


def test_adapters_that_add_nothing_keep_the_sign_of_zero():
    kernel, a, b = np.float32([[-0.0, 1.0], [0.0, -0.0]]), np.float32([[0.0], [0.0]]), np.float32([[3.0, 4.0]])
    lora = ADAPTED.lora
    merged = adapters.merged({"kernel": kernel, "kernel_lora_a": a, "kernel_lora_b": b}, lora)["kernel"]
    for found in (adapters.add(kernel, a, b, lora), np.asarray(merged)):
        np.testing.assert_array_equal(found.view(np.uint32), kernel.view(np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ({"data": 2, "tensor": 2}, {}),
        ({"fsdp": 2, "tensor": 2}, {"mlp": True}),
        ({"data": 2, "tensor": 2}, {"lora_rank": 2}),
        ({"data": 2, "fsdp": 2}, {"lora_rank": 2}),
    ],
    ids=str,
)
def test_on_four_devices_too(tmp_path, mesh, changes):
    options = json.dumps({"mesh": mesh} | changes)
    printed(TESTS / "heads_training.py", tmp_path, options, env=environment(4))
    params = unflatten_dict({tuple(name.split("/")): x for name, x in np.load(tmp_path / "params.npz").items()})
    lora = dataclasses.replace(ALONE, **changes).lora
    params = params if lora is None else adapters.merged(params, lora)
    assert_trained(params, mlp="mlp" in changes, dense=lora is None)


# --- one update ---


def _programs(settings=ALONE):
    """Those that `train` makes."""
    return make_programs(MIXED, dataclasses.replace(settings, heads=None), one_device())


def _gradients(seed, scale):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(scale * rng.standard_normal(x.shape)), plain_shapes(MIXED))


def _in_a_row(pieces):
    """One array of all pieces, which AdamW and clipping treat as they treat many."""
    return np.concatenate([piece.ravel() for piece in pieces.values()])


@pytest.mark.parametrize("mlp", [False, True])
def test_updates_equal_those_of_optax_on_the_chosen_slices_alone(mlp):
    """Clipped by the norm of the slices, for gradients above and below it; others may be large, or not even numbers."""
    settings = dataclasses.replace(ALONE, mlp=mlp)
    programs = _programs().within(trained_parts(MIXED, settings))
    state = programs.begin(start_params(MIXED), 0)
    alone = _in_a_row(pieces(_copy(start_params(MIXED)), mlp))
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(schedule(settings), 0.9, 0.95, 1e-5, weight_decay=0.1)
    )
    kept, update = optimizer.init(alone), jax.jit(optimizer.update)
    for step, scale in enumerate((1e-4, 2.0, 0.3, 1e-5)):
        grads = _copy(_gradients(step, scale))
        own = _in_a_row(pieces(grads, mlp))
        grads["embed"]["embedding"][:] = np.nan
        updates, kept = update(own, kept, alone)
        alone = alone + np.asarray(updates)
        state, metrics = programs.apply(state, (grads, {"loss": np.float32(0)}))
        assert metrics["gradient_norm"] == pytest.approx(np.linalg.norm(own), rel=1e-5)
    ours = _copy(state.params)
    found = pieces(ours, mlp)
    ends = np.cumsum([piece.size for piece in found.values()])
    for (name, piece), expected in zip(found.items(), np.split(alone, ends[:-1]), strict=True):
        np.testing.assert_allclose(piece.ravel(), expected, rtol=1e-6, atol=1e-7, err_msg=name)
    assert_trained(ours, mlp, config=MIXED)
    assert len(alone) == count_trained(MIXED, settings)


def test_without_a_choice_the_update_is_the_one_it_was():
    """Its program takes no mask, and its bits are those of AdamW by hand."""
    settings = dataclasses.replace(ALONE, heads=None)
    programs = _programs()
    assert trained_parts(MIXED, settings) is None and programs.within(None) is programs
    state, optimizer = programs.begin(start_params(MIXED), 0), make_optimizer(settings)

    @jax.jit
    def by_hand(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = start_params(MIXED)
    opt_state = jax.jit(optimizer.init)(params)
    for step in range(3):
        grads = _gradients(step, 0.3)
        params, opt_state = by_hand(params, opt_state, grads)
        state, _ = programs.apply(state, (grads, {}))
    wanted = _bits(params)
    assert not [path for path, bits in _bits(state.params).items() if not np.array_equal(bits, wanted[path])]
    assert _taken(programs.apply, state) == {np.dtype("float32"), np.dtype("int32")}
    restricted = programs.within(trained_parts(MIXED, ALONE)).apply
    assert np.dtype("bool") in _taken(restricted.func, state, **restricted.keywords)
    assert count_trained(MIXED, settings) == sum(x.size for x in jax.tree.leaves(start_params(MIXED)))


def _taken(apply, state, **options):
    """Types of the arrays that a program takes."""
    return {array.dtype for array in apply.trace(state, (_gradients(0, 1), {}), **options).jaxpr.in_avals}


def test_new_adapters_are_zero_where_they_are_not_trained():
    parts = trained_parts(MIXED, ADAPTED)
    start = flatten_dict(_copy(_programs(ADAPTED).within(parts).begin(start_params(MIXED), 3).params))
    for path, part in flatten_dict(parts).items():
        wanted = part if path[-1] == "kernel_lora_a" else np.zeros(())
        np.testing.assert_array_equal(start[path] != 0, np.broadcast_to(wanted, start[path].shape))
    rows = start["tail", "0", "attn", "o", "kernel_lora_a"].any(axis=1)
    assert rows.nonzero()[0].tolist() == list(range(16, 24))  # of head 2, the only one of layer 4
    assert not start["blocks", "0", "mlp", "up", "kernel_lora_a"].any()


@pytest.mark.parametrize(
    ("heads", "message"),
    [((), "no heads are left to train"), (((5, 0),), r"head \(5, 0\) is out of range: the model has 5 layers of 4")],
)
def test_heads_that_do_not_fit_raise(heads, message):
    with pytest.raises(ValueError, match=message):
        trained_parts(MIXED, dataclasses.replace(ALONE, heads=heads))
