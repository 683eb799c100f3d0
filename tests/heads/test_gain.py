"""Models between two checkpoints against weights spliced by hand; what parts carry of a gain; changes of weights."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import VARIANTS
from helpers_tiny import CONFIG, copying_params, in_float64, reference

from retmask_jax.generation.batching import pad_rows
from retmask_jax.generation.language_model import load
from retmask_jax.heads.builtin_cases import builtin_cases
from retmask_jax.heads.copy_score import words_of
from retmask_jax.heads.gain.grafting import Gates, logits
from retmask_jax.heads.gain.shares import answers_between, part_shares, parts_of
from retmask_jax.heads.gain.weights import check_pair, weight_changes
from retmask_jax.model.interventions import all_heads
from retmask_jax.model.sharding import plain_shapes

# Here XLA rounds one and the same model differently in two programs, by a last digit.
ROUNDED = ("gemma2_mqa", "gemma3", "gemma3_images", "gemma3_short")
TOKENS = np.random.default_rng(0).integers(4, 50, (2, 12)).astype(np.int32)
between = jax.jit(logits, static_argnums=0)


def trained_from(params, seed=1, size=0.3):
    """Parameters near others, every tensor of them changed."""
    rng = np.random.default_rng(seed)

    def changed(x):
        values = np.asarray(x, np.float32)
        values = values + size * values.std() * rng.standard_normal(x.shape)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(changed, params)


def random_gates(config, seed):
    rng = np.random.default_rng(seed)
    shapes = (config.n_layers, config.n_heads), config.n_layers, config.n_layers, ()
    return Gates(*(np.array(rng.random(shape) < 0.5) for shape in shapes))


def layers_of(config, params):
    """The blocks in absolute order, as NumPy arrays."""
    period = len(config.layer_pattern)
    blocks = [
        jax.tree.map(lambda x, r=i // period: np.array(np.asarray(x)[r]), params["blocks"][str(i % period)])
        for i in range(period * config.repeats)
    ]
    return blocks + [jax.tree.map(np.array, params["tail"][str(i)]) for i in range(len(config.tail))]


def grouped(config, layers):
    """The inverse of `layers_of`."""
    period = len(config.layer_pattern)
    scanned, rest = layers[: period * config.repeats], layers[period * config.repeats :]
    blocks = {str(i): jax.tree.map(lambda *x: np.stack(x), *scanned[i::period]) for i in range(period)}
    return {"blocks": blocks} | ({"tail": {str(i): block for i, block in enumerate(rest)}} if rest else {})


def spliced(config, start, trained, gates):
    """(config, parameters) of a model with a KV head for each query head, head by head from one model or the other."""
    width, group = config.head_dim, config.n_heads // config.n_kv_heads
    layers = []
    for i, pair in enumerate(zip(layers_of(config, start), layers_of(config, trained), strict=True)):
        block = {
            name: pair[int((gates.mlps_L if name in ("mlp", "experts") else gates.norms_L)[i])][name]
            for name in pair[0]
        }
        of_norms = pair[int(gates.norms_L[i])]["attn"]
        attn = {name: part for name, part in of_norms.items() if name not in "qkvo"}
        if config.qk_norm == "projection":
            scales = np.split(attn["k_norm"]["scale"], config.n_kv_heads)
            attn["k_norm"] = {"scale": np.concatenate([scales[h // group] for h in range(config.n_heads)])}
        for name in "qkvo":
            parts = []
            for h in range(config.n_heads):
                head = h // group if name in "kv" else h
                place = slice(head * width, (head + 1) * width)
                of_head = pair[int(gates.heads_LH[i, h])]["attn"][name]
                parts.append({key: x[place] if name == "o" else x[..., place] for key, x in of_head.items()})
            axis = 0 if name == "o" else -1
            attn[name] = {key: np.concatenate([part[key] for part in parts], axis=axis) for key in parts[0]}
        layers.append(block | {"attn": attn})
    ends = {name: part for name, part in (trained if gates.ends else start).items() if name not in ("blocks", "tail")}
    return dataclasses.replace(config, n_kv_heads=config.n_heads), ends | grouped(config, layers)


def pair_of(lm):
    return lm.params, trained_from(lm.params)


def check_exact(golden, close):
    """All gates give the trained model and none the start model, and the other model's weights are not even touched."""
    lm, (start, trained) = golden.lm, pair_of(golden.lm)
    unknown = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, np.nan, x.dtype), x.sharding), start)
    for gates, params, others in (
        (Gates.of(lm.config), start, (start, unknown)),
        (~Gates.of(lm.config), trained, (unknown, trained)),
    ):
        expected = np.asarray(lm.replace(params=params).logits(TOKENS))
        found = np.asarray(between(lm.config, start, trained, gates, TOKENS))
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(between(lm.config, *others, gates, TOKENS), found)
        if golden.name in ROUNDED:
            close(found, expected, 1e-5)
        else:
            np.testing.assert_array_equal(found, expected)


def check_spliced(golden, close, seeds):
    """Heads of one KV head from two models included: the same as weights that are put together by hand."""
    lm, (start, trained) = golden.lm, pair_of(golden.lm)
    config, tolerance = lm.config, 1e-5 if start["norm"]["scale"].dtype == jnp.float32 else 0.05
    for gates in [Gates.of(config, [(1, config.n_heads - 1)]), *(random_gates(config, seed) for seed in seeds)]:
        wide, params = spliced(config, start, trained, gates)
        expected = lm.replace(config=wide, params=params).logits(TOKENS)
        close(between(config, start, trained, gates, TOKENS), expected, tolerance)


def test_weights_are_chosen_exactly_and_as_spliced_by_hand(read_golden, close):
    """Of a model that norms whole projections, as OLMo 2, and has biases, as Qwen 2."""
    lm, rng = read_golden("olmo2_gqa").lm, np.random.default_rng(3)
    config = dataclasses.replace(lm.config, qkv_bias=True)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), plain_shapes(config))
    params = jax.device_put(params, jax.devices()[0])  # as parameters are that were loaded: the same program
    assert "bias" in params["blocks"]["0"]["attn"]["q"]
    model = SimpleNamespace(name="OLMo 2 with biases", lm=lm.replace(config=config, params=params))
    check_exact(model, close)
    check_spliced(model, close, [2])


@pytest.mark.slow
@pytest.mark.parametrize("family", VARIANTS)
def test_weights_are_chosen_exactly_in_all_families(family, read_golden, close):
    """Soft caps, windows and tails, a KV head for each head, experts and norms over each head are among them."""
    golden = read_golden(family)
    check_exact(golden, close)
    check_spliced(golden, close, range(4))


def test_one_head_alone_against_float64(close):
    """Llama with two query heads on a KV head, of which one is grafted."""
    start, trained = copying_params(0), copying_params(1)
    for head in ((0, 1), (1, 2)):
        gates = Gates.of(CONFIG, [head])
        wide, params = spliced(CONFIG, in_float64(start), in_float64(trained), gates)
        expected = np.stack([reference(params, row, config=wide)[0] for row in TOKENS])
        found = between(CONFIG, start, trained, gates, TOKENS)
        close(found, expected, 1e-4)
        others = between(CONFIG, start, trained, Gates.of(CONFIG, [(head[0], head[1] ^ 1)]), TOKENS)
        assert np.abs(found - others).max() > 1e-2  # its sibling is another graft


def test_gates_compile_once(compiles):
    start, trained = copying_params(0), copying_params(1)
    jax.block_until_ready(between(CONFIG, start, trained, random_gates(CONFIG, 0), TOKENS))
    compiles.clear()
    found = {
        np.asarray(between(CONFIG, start, trained, Gates.of(CONFIG, [head]), TOKENS)).tobytes()
        for head in all_heads(CONFIG)
    }
    assert not compiles and len(found) == len(all_heads(CONFIG))


@pytest.mark.slow
def test_gates_may_be_vmapped(close):
    """Many models between two in one call, of which some have KV heads that are read by both models' query heads."""
    start, trained = copying_params(0), copying_params(1)
    several = [Gates.of(CONFIG), ~Gates.of(CONFIG), *(random_gates(CONFIG, seed) for seed in range(4))]
    stacked = jax.tree.map(lambda *gates: np.stack(gates), *several)
    found = jax.jit(jax.vmap(lambda gates: logits(CONFIG, start, trained, gates, TOKENS)))(stacked)
    close(found, [between(CONFIG, start, trained, gates, TOKENS) for gates in several], 1e-5)


# --- measured on cases ---


@pytest.fixture(scope="module")
def bundled():
    return load("bundled")


@pytest.fixture(scope="module")
def cases(bundled):
    return builtin_cases(bundled, "test", 3, (96,), 0)


COPYING = [(1, 0), (1, 1), (1, 2), (1, 3)]


def without_heads(lm, heads):
    """Parameters in which these heads write nothing."""
    before = lm.params["blocks"]["0"]["attn"]["o"]["kernel"]
    kernel = np.array(before)
    for layer, head in heads:
        kernel[layer, head * lm.config.head_dim : (head + 1) * lm.config.head_dim] = 0
    block = lm.params["blocks"]["0"]
    attn = block["attn"] | {"o": {"kernel": jax.device_put(kernel, before.sharding)}}
    return lm.params | {"blocks": {"0": block | {"attn": attn}}}


def test_answers_are_those_of_whole_passes_and_no_gates_compile(bundled, cases, compiles):
    """Wherever a pass begins; with heads, MLPs, norms and embeddings put in and taken out."""
    config, start, trained = bundled.config, bundled.params, trained_from(bundled.params)
    some = [Gates.of(config, [(3, 1)]), Gates.of(config, mlps=[2]), Gates.of(config, others=True), Gates.of(config)]
    gates = [(base, ~one if base else one) for one in some for base in (False, True)]
    answers_between(config, start, trained, cases, gates[:1], batch_size=3)
    compiles.clear()
    found = answers_between(config, start, trained, cases, gates, batch_size=3)
    assert not compiles
    assert [int(one.first_group(config, base)) for base, one in gates] == [3, 3, 2, 2, 0, 0, 3, 3]
    words = [np.array(words_of(case)) for case in cases]
    tokens_NT, lengths_N = pad_rows([(*case.tokens, *words_of(case)) for case in cases], config.pad_id)
    for (_, one), logp_N, right_N in zip(gates, found.logp_GN, found.right_GN, strict=True):
        wide, params = spliced(config, start, trained, one)
        logits_NTV = bundled.replace(config=wide, params=params).logits(tokens_NT)
        for logits_TV, answer, length, logp, right in zip(logits_NTV, words, lengths_N, logp_N, right_N, strict=True):
            logits_PV = np.asarray(logits_TV, np.float64)[length - len(answer) - 1 : length - 1]
            each = logits_PV[np.arange(len(answer)), answer] - scipy.special.logsumexp(logits_PV, axis=1)
            assert logp == pytest.approx(each.sum(), rel=1e-4, abs=1e-5)
            assert right == (logits_PV.argmax(axis=1) == answer).all()


def test_what_some_heads_lost_is_carried_by_them_alone(bundled, cases):
    """Both ways; and what a part and all others carry is more or less than the whole by the interaction."""
    config, start = bundled.config, without_heads(bundled, COPYING)
    parts = parts_of(config, COPYING)
    groups = [part for part in parts if part.kind == "group"]
    controls = [f"{kind}, draw {i}" for kind in ("any layer", "layer-matched") for i in (1, 2, 3)]
    names = ["retrieval heads", "other heads", *controls, "all heads", "all MLPs", "norms and embeddings"]
    assert [part.name for part in groups] == names
    assert [(part.layer, part.head) for part in parts if part.kind == "head"] == all_heads(config)
    assert [part.layer for part in parts if part.kind == "MLP"] == list(range(config.n_layers))
    alone, sibling = (next(part for part in parts if part.name == f"head {name}") for name in ("1-0", "1-4"))
    rest = dataclasses.replace(alone, name="all but head 1-0", gates=~alone.gates)
    gains, rows = part_shares(config, start, bundled.params, cases, [*groups, alone, rest, sibling], batch_size=3)
    assert gains["logprob"].gain.low > 0 and gains["recall"].trained.value > gains["recall"].start.value == 0
    for row in rows[: len(groups)]:
        share = 1.0 if row.name in ("retrieval heads", "all heads") else 0.0
        for carried in (row.logprob, row.recall):
            assert carried.put_in.value == pytest.approx(share, abs=1e-5), row.name
            assert carried.taken_out.value == pytest.approx(share, abs=1e-5), row.name
            assert carried.interaction.value == pytest.approx(0, abs=1e-5), row.name
    assert [row.heads for row in rows[: len(groups)]] == [4, 28, *[4] * 6, 32, 0, 0]
    of_head, of_rest, of_sibling = (row.logprob for row in rows[len(groups) :])
    both = of_head.put_in.value + of_rest.put_in.value
    assert of_head.interaction.value == pytest.approx(both - 1, abs=1e-5) and abs(both - 1) > 1e-3
    assert of_sibling.put_in.value == pytest.approx(0, abs=1e-5)


def test_controls_are_as_many_other_heads_where_there_are_enough(bundled):
    parts = {part.name: part.gates.heads_LH for part in parts_of(bundled.config, COPYING, [], seed=3)}
    drawn = {name: heads_LH for name, heads_LH in parts.items() if "draw" in name}
    chosen_LH = parts["retrieval heads"]
    assert len(drawn) == 6 and not any((heads_LH & chosen_LH).any() for heads_LH in drawn.values())
    for name, heads_LH in drawn.items():
        alike = (heads_LH.sum(axis=1) == chosen_LH.sum(axis=1)).all()
        assert heads_LH.sum() == chosen_LH.sum() and (alike or name.startswith("any layer"))
    again = {part.name: part.gates.heads_LH for part in parts_of(bundled.config, COPYING, [], seed=4)}
    np.testing.assert_array_equal(again["any layer, draw 1"], drawn["any layer, draw 2"])  # a seed begins where it says
    for most in (all_heads(bundled.config)[:17], all_heads(bundled.config), []):
        assert not [part.name for part in parts_of(bundled.config, most, []) if "draw" in part.name]


# --- weights ---


def mlp_arrays(block):
    return [block["mlp"][name]["kernel"] for name in ("gate", "up", "down")]


def norm_arrays(block):
    return [part["scale"] for part in [*block.values(), *block["attn"].values()] if "scale" in part]


def test_changes_of_weights_are_those_of_each_slice(read_golden):
    for family in ("qwen2", "gemma2", "olmo2_gqa"):
        lm = read_golden(family).lm
        start, trained = pair_of(lm)
        found, config = weight_changes(lm.config, start, trained), lm.config
        pairs = zip(layers_of(config, start), layers_of(config, trained), strict=True)
        for layer, blocks in enumerate(pairs):
            for name, heads in (("q", config.n_heads), ("k", config.n_kv_heads), ("o", config.n_heads)):
                for head in range(heads):
                    place = slice(head * config.head_dim, (head + 1) * config.head_dim)
                    ours, theirs = (
                        np.concatenate([(x[place] if name == "o" else x[..., place]).ravel() for x in block])
                        for block in (jax.tree.leaves(block["attn"][name]) for block in blocks)
                    )
                    expected = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
                    assert getattr(found, name)[layer][head] == pytest.approx(expected, rel=1e-5), (family, name)
            for changes, arrays in ((found.mlps, mlp_arrays), (found.norms, norm_arrays)):
                ours, theirs = (np.concatenate([x.ravel() for x in arrays(block)]) for block in blocks)
                expected = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
                assert changes[layer] == pytest.approx(expected, rel=1e-5), family
        assert found.ends.keys() == {"embed", "norm", *(() if config.tied_embeddings else ("lm_head",))}


def test_a_change_from_nothing_has_no_size_and_no_change_is_refused(bundled):
    start = without_heads(bundled, COPYING)
    found = weight_changes(bundled.config, start, bundled.params)
    assert found.o[1] == [None] * 4 + [0.0] * 4 and found.q == [[0.0] * 8] * 4
    back = weight_changes(bundled.config, bundled.params, start)
    assert back.o[1] == [pytest.approx(1.0)] * 4 + [0.0] * 4
    with pytest.raises(ValueError, match="^START and TRAINED have the same weights: "):
        weight_changes(bundled.config, start, start)


def test_models_that_do_not_fit_are_refused_by_what_differs(bundled):
    check_pair(bundled, bundled.replace(config=dataclasses.replace(bundled.config, eos_ids=(1,))))
    larger = bundled.replace(config=dataclasses.replace(bundled.config, mlp_size=7, n_layers=5))
    with pytest.raises(ValueError, match=r"not of one architecture: mlp_size \d+ and 7, n_layers 4 and 5: name"):
        check_pair(bundled, larger)
    with pytest.raises(ValueError, match="^TRAINED has no tokenizer"):
        check_pair(bundled, bundled.replace(tokenizer=None))
    other = load("bundled")
    other.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="differ: 'zebra' is no token and token 354: both models must read"):
        check_pair(bundled, other)
