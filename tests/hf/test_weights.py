"""Checkpoints: bit-exact round trips, exports that torch loads, baked masks, and errors by name."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import STORED, WITH_IMAGES
from safetensors.numpy import load_file, save_file

from retmask_jax.data import tiny_language
from retmask_jax.generation.language_model import from_params, load, save
from retmask_jax.model.config import Rope
from retmask_jax.model.interventions import Interventions, mask_heads, mask_rope

OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def _stored(folder):
    """All tensors of a folder, by name."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def _read_config(folder):
    return json.loads((folder / "config.json").read_text())


def _assert_same_bits(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].tobytes() == tensor.tobytes(), name


def _text_alone(tensors):
    """The tensors of the language model under the names they have in a checkpoint of their own."""
    heads = ("language_model.lm_head.weight", OUTPUT)
    return {
        OUTPUT if name in heads else f"model.{name.split('language_model.')[1].removeprefix('model.')}": tensor
        for name, tensor in tensors.items()
        if "vision_tower" not in name and "projector" not in name
    }


@pytest.fixture
def copy(read_golden, tmp_path):
    """A folder to damage: a copy of one golden checkpoint."""

    def copy_of(name):
        folder = tmp_path / "copy"
        shutil.copytree(read_golden(name).folder, folder)
        return folder

    return copy_of


def _edit(folder, change):
    """Rewrite the single weights file after `change` has worked on its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- round trips ---


def test_an_untouched_load_saves_back_bit_for_bit(golden, tmp_path):
    assert {leaf.dtype for leaf in jax.tree.leaves(golden.lm.params)} == {jnp.dtype("float32")}
    new = tmp_path / "deep" / "folder"
    save(golden.lm, new)
    alone = _text_alone if golden.name in WITH_IMAGES else dict
    _assert_same_bits(_stored(new), alone(_stored(golden.folder)))
    if golden.name not in WITH_IMAGES:
        assert _read_config(new) == _read_config(golden.folder)
    again = load(new)
    assert again.config == golden.lm.config
    jax.tree.map(np.testing.assert_array_equal, again.params, golden.lm.params)
    assert not list(new.glob("*.part"))


def test_the_stored_forms_are_what_their_names_say(read_golden):
    assert len(list(read_golden("sharded").folder.glob("*.safetensors"))) == 2
    stored = _stored(read_golden("bf16").folder)
    assert {tensor.dtype.name for tensor in stored.values()} == {"bfloat16"}
    assert OUTPUT not in stored and OUTPUT in _stored(read_golden("sharded").folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["bf16", "fp16", "gqa_tied", "sharded", "phi3", "gemma3", "qwen3_moe"])
def test_a_model_read_in_any_dtype_saves_back_bit_for_bit(read_golden, tmp_path, variant, dtype):
    """Also where the parameters are narrower than what is stored."""
    folder = read_golden(variant).folder
    lm = load(folder, dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {dtype}
    save(lm, tmp_path)
    _assert_same_bits(_stored(tmp_path), _stored(folder))


@pytest.mark.parametrize("variant", ["fp16", "gqa_tied", "phi3"])
def test_a_baked_mask_leaves_all_other_stored_bits_alone(read_golden, tmp_path, variant):
    golden = read_golden(variant)
    lm = load(golden.folder, dtype="bfloat16")
    heads = [(0, 1), (1, 0), (1, 3)]
    save(lm, tmp_path, mask_heads(lm.config, heads))
    expected = _stored(golden.folder)
    for layer, head in heads:
        columns = slice(head * lm.config.head_dim, (head + 1) * lm.config.head_dim)
        expected[f"model.layers.{layer}.self_attn.o_proj.weight"][:, columns] = 0
    _assert_same_bits(_stored(tmp_path), expected)


def test_what_was_changed_is_written_as_it_is_and_the_rest_as_stored(read_golden, tmp_path):
    folder = read_golden("gqa_tied").folder
    lm = load(folder, dtype="bfloat16")
    kernel = lm.params["blocks"]["0"]["mlp"]["up"]["kernel"]
    attn, mlp = lm.params["blocks"]["0"]["attn"], lm.params["blocks"]["0"]["mlp"]
    block = lm.params["blocks"]["0"] | {"attn": attn, "mlp": mlp | {"up": {"kernel": kernel.at[1, 2].set(-0.5)}}}
    save(lm.replace(params=lm.params | {"blocks": {"0": block}}), tmp_path)
    expected = _stored(folder)
    expected["model.layers.1.mlp.up_proj.weight"][:, 2] = -0.5
    _assert_same_bits(_stored(tmp_path), expected)


def test_a_wider_dtype_on_export_is_of_the_stored_weights(read_golden, tmp_path):
    folder = read_golden("fp16").folder
    save(load(folder, dtype="bfloat16"), tmp_path, dtype="float32")
    _assert_same_bits(_stored(tmp_path), {name: x.astype(np.float32) for name, x in _stored(folder).items()})


def _remove(folder):
    shutil.rmtree(folder)


def _negate(folder):
    _edit(folder, lambda tensors: tensors.update({name: -x for name, x in tensors.items()}))


def _widen(folder):
    _edit(folder, lambda tensors: tensors.update({name: np.stack([x, x]) for name, x in tensors.items()}))


@pytest.mark.parametrize("change", [_remove, _negate, _widen])
def test_a_source_that_is_no_longer_what_was_read_is_not_mixed_in(copy, read_golden, tmp_path, change, caplog):
    folder = copy("gqa_tied")
    lm = load(folder, dtype="bfloat16")
    change(folder)
    save(lm, tmp_path / "new")
    rounded = {
        name: x.astype(jnp.bfloat16).astype(x.dtype) for name, x in _stored(read_golden("gqa_tied").folder).items()
    }
    _assert_same_bits(_stored(tmp_path / "new"), rounded)
    assert ("the weights are written as they were read, rounded to bfloat16" in caplog.text) == (change is not _negate)


def test_a_model_may_be_saved_over_itself(copy, read_golden):
    folder = copy("sharded")
    save(load(folder, dtype="bfloat16"), folder)
    _assert_same_bits(_stored(folder), _stored(read_golden("sharded").folder))


def test_bfloat16_computes_nearly_the_same_in_float32_logits(read_golden, close):
    golden = read_golden("bf16")
    logits = load(golden.folder, dtype="bfloat16").logits(golden.tokens)[:, STORED]
    assert logits.dtype == jnp.float32
    close(logits, golden.logits, 0.1)
    assert np.abs(logits - golden.logits).max() > 1e-3


def test_save_casts_to_the_dtype_asked_for_and_says_so(read_golden, tmp_path):
    golden = read_golden("gqa_tied")
    save(golden.lm, tmp_path, dtype="bfloat16")
    rounded = {name: tensor.astype(jnp.bfloat16) for name, tensor in _stored(golden.folder).items()}
    _assert_same_bits(_stored(tmp_path), rounded)
    assert _read_config(tmp_path)["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "call", [lambda lm, folder: load(folder, dtype="int8"), lambda lm, folder: save(lm, folder / "new", dtype="int8")]
)
def test_another_dtype_raises_with_those_there_are(golden, call):
    with pytest.raises(ValueError, match="'int8'; it must be one of float32, bfloat16, float16"):
        call(golden.lm, golden.folder)
    assert not (golden.folder / "new").exists()


def test_other_files_of_the_folder_are_copied_and_weights_are_not(copy, tmp_path):
    folder = copy("sharded")
    lm = load(folder)
    texts = {"special_tokens_map.json": "{}", "chat_template.jinja": "{{ x }}", "merges.txt": "a b"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    new = tmp_path / "new"
    save(lm, new)
    assert {name: (new / name).read_text() for name in texts} == texts
    assert (new / "tokenizer.model").read_bytes() == b"\x00\x01"
    assert sorted(path.name for path in new.glob("*.safetensors*")) == ["model.safetensors"]


def test_the_tokenizer_comes_along(copy, tmp_path, tiny):
    folder = copy("mha")
    assert load(folder).tokenizer is None
    tokenizer = tiny_language.build_tokenizer()
    tokenizer.save_pretrained(folder)
    save(load(folder), tmp_path / "loaded")
    save(from_params(tiny.config, tiny.params, tokenizer), tmp_path / "made")
    text = "the home of anna : oslo ."
    for name in ("loaded", "made"):
        read = load(tmp_path / name).tokenizer
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert len(set(read(text)["input_ids"])) > 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_a_model_made_here_is_saved_in_hf_names_and_read_back(tiny, tmp_path, kind, tied):
    llama3 = Rope("llama3", 1e4, 8.0, low_freq_factor=2.0, high_freq_factor=3.0, original_length=64)
    rope = {"linear": Rope("linear", 500.0, 2.0), "llama3": llama3}[kind]
    config = dataclasses.replace(tiny.config, rope=rope, tied_embeddings=tied)
    params = {name: part for name, part in tiny.params.items() if not tied or name != "lm_head"}
    save(from_params(config, params).with_kernel("plain"), tmp_path)  # a kernel is no part of what is saved
    again = load(tmp_path)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    assert (OUTPUT in _stored(tmp_path)) != tied


# --- torch ---


@pytest.mark.parametrize(
    "masks, expected",
    [
        # The same files as those that torch has read for `logits`: see an_untouched_load_saves_back_bit_for_bit.
        pytest.param((), "logits", marks=pytest.mark.slow),
        (("head_mask",), "logits_heads"),
    ],
)
def test_transformers_loads_what_is_saved_and_agrees(golden, tmp_path, close, masks, expected):
    pytest.importorskip("torch")
    import make_golden

    save(golden.lm, tmp_path, interventions=Interventions(**{name: getattr(golden, name) for name in masks}))
    # torch itself made what is expected: only the checkpoint stands between the two.
    model = make_golden.load(tmp_path)
    close(make_golden.torch_logits(model, golden.tokens)[:, STORED], getattr(golden, expected), 1e-5)


def test_transformers_loads_a_model_made_here(tiny, tmp_path, close):
    pytest.importorskip("torch")
    import make_golden

    save(tiny, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 61, (2, 24)).astype(np.int32)
    close(tiny.logits(tokens), make_golden.torch_logits(make_golden.load(tmp_path), tokens))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["granite", "granite_mqa", "smollm3", "smollm3_window", "mistral_window"])
def test_transformers_loads_a_model_made_here_with_scales_or_layers_without_rope(read_golden, tmp_path, close, name):
    pytest.importorskip("torch")
    import make_golden

    golden = read_golden(name)
    save(from_params(golden.lm.config, golden.lm.params), tmp_path)
    close(make_golden.torch_logits(make_golden.load(tmp_path), golden.tokens)[:, STORED], golden.logits)


# --- baked masks ---


@pytest.mark.parametrize("variant", ["gqa_tied", "llama3_mqa"])
def test_a_baked_head_mask_is_the_traced_one(read_golden, tmp_path, variant, close):
    golden = read_golden(variant)
    iv = Interventions(head_mask=golden.head_mask)
    save(golden.lm, tmp_path, interventions=iv)
    baked = load(tmp_path)
    close(baked.logits(golden.tokens), golden.lm.logits(golden.tokens, interventions=iv), 1e-6)

    before, after = _stored(golden.folder), _stored(tmp_path)
    changed = {name for name, tensor in after.items() if not np.array_equal(tensor, before[name])}
    layers = np.flatnonzero(golden.head_mask.any(axis=1))
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in layers}
    assert len(changed) > 0
    width = golden.lm.config.head_dim
    for layer, heads in enumerate(golden.head_mask):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        expected = np.where(np.repeat(heads, width), 0, before[name])
        np.testing.assert_array_equal(after[name], expected)


@pytest.mark.parametrize(
    "iv, message",
    [
        (Interventions(np.full((3, 4), 0.5, np.float32)), r"only a shared bool .* float32\(3, 4\)"),
        (Interventions(np.ones((2, 3, 4), bool)), r"only a shared bool head_mask .* bool\(2, 3, 4\)"),
        (Interventions(np.ones((3, 5), bool)), r"head_mask has shape \(3, 5\)"),
        (Interventions(rope_mask=np.ones((3, 4, 4), bool)), "a rotary mask cannot be baked"),
        (Interventions(rope_mask=np.ones((3, 4, 4), bool), rope_site="projection"), "a rotary mask"),
    ],
)
def test_what_weights_cannot_express_is_refused_and_nothing_written(tiny, tmp_path, iv, message):
    with pytest.raises(ValueError, match=message):
        save(tiny, tmp_path / "new", interventions=iv)
    assert not (tmp_path / "new").exists()


def test_an_empty_rotary_mask_is_no_obstacle(tiny, tmp_path):
    cfg = tiny.config
    save(tiny, tmp_path, interventions=mask_heads(cfg, [(0, 0)]) | mask_rope(cfg, [], [0]))
    kernel = load(tmp_path).params["blocks"]["0"]["attn"]["o"]["kernel"]
    np.testing.assert_array_equal(kernel[0, : cfg.head_dim], 0)
    np.testing.assert_array_equal(kernel[1:], tiny.params["blocks"]["0"]["attn"]["o"]["kernel"][1:])


# --- known extras ---


def test_an_output_matrix_beside_tied_embeddings_must_equal_them(copy, tmp_path):
    folder = copy("gqa_tied")
    _edit(folder, lambda tensors: tensors.update({OUTPUT: tensors[EMBEDDING]}))
    lm = load(folder)
    assert "lm_head" not in lm.params
    save(lm, tmp_path / "new")
    _assert_same_bits(_stored(tmp_path / "new"), _stored(folder))

    def change_one_number(tensors):
        tensors[OUTPUT] = tensors[OUTPUT].copy()
        tensors[OUTPUT][3, 2] += 1e-3

    _edit(folder, change_one_number)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embeddings"):
        load(folder)


def test_stored_rotary_frequencies_are_dropped_and_named(copy, tmp_path, read_golden, caplog):
    folder = copy("mha")
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    _edit(folder, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    with caplog.at_level("INFO", logger="retmask_jax"):
        lm = load(folder)
    assert name in caplog.text
    save(lm, tmp_path / "new")
    _assert_same_bits(_stored(tmp_path / "new"), _stored(read_golden("mha").folder))


# --- damage ---

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def _drop(folder):
    _edit(folder, lambda tensors: tensors.pop(Q_PROJ))


def _add(folder):
    bias = np.zeros(2, np.float32)
    _edit(folder, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.bias": bias}))


def _misshape(folder):
    _edit(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:-1].copy()}))


def _quantise(folder):
    _edit(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(np.int8)}))


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _no_config(folder):
    (folder / "config.json").unlink()


def _broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def _listed_config(folder):
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    "damage, message",
    [
        (_drop, f"lacks 1 tensors: {Q_PROJ}"),
        (_add, r"has unknown 1 tensors: model\.layers\.9\.mlp\.up_proj\.bias"),
        (_misshape, rf"{Q_PROJ} has shape \(23, 24\); config.json asks for \(24, 24\)"),
        (_quantise, f"{Q_PROJ} has type I8: quantised"),
        (_truncate, r"model\.safetensors is not a readable safetensors file"),
        (_empty, r"model\.safetensors is not a readable safetensors file"),
        (_pickle_only, r"pickled weights \(\.bin\)"),
        (_no_weights, r"copy holds no model\.safetensors"),
        (_no_config, r"config\.json does not exist"),
        (_broken_config, r"config\.json is not valid JSON"),
        (_listed_config, r"config\.json holds a list"),
    ],
)
def test_a_damaged_folder_raises_by_name(copy, damage, message):
    folder = copy("mha")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_missing_folder_raises_by_name_without_asking_the_hub(tmp_path):
    for path in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", "nothing"):
        with pytest.raises(ValueError, match=r"nothing does not exist"):
            load(path)


def test_a_shard_that_is_not_there_raises_by_name(copy):
    folder = copy("sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{INDEX} names model-00002-of-00002\.safetensors"):
        load(folder)


def test_a_tensor_in_two_shards_raises_by_name(copy):
    folder = copy("sharded")
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(first)
    twice = sorted(tensors)[0]
    save_file(load_file(second) | {twice: tensors[twice]}, second)
    with pytest.raises(ValueError, match=f"{twice} is stored twice"):
        load(folder)
