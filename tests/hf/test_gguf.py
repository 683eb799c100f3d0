"""GGUF files: made here from golden checkpoints as llama.cpp makes them, they hold the same models; others are refused."""

import dataclasses
import json
import re
import shutil
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from helpers_gguf import finish, llama3_factors, quantised, read_tensors, token_ids, write_gguf
from safetensors.numpy import save_file

import retmask_jax as rm
from retmask_jax.cli.main import main
from retmask_jax.hf.checkpoint_files import open_tensors, read_config
from retmask_jax.hf.gguf.file import open_file
from retmask_jax.hf.gguf.tensors import GgufTensor
from retmask_jax.hf.tokenizer import load_tokenizer
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.rope import inverse_frequencies
from retmask_jax.runs.context import checkpoint_fingerprint

GOLDEN = Path(__file__).parent.parent / "golden"
_EMBEDDINGS = "model.embed_tokens.weight"
_FULL = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
_YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
# Golden checkpoint: (what its config has instead, since the format cannot say it otherwise; how its file is written).
CASES = {
    "mha": ({}, {}),
    "gqa_tied": ({}, {}),
    "linear": ({}, {}),
    "bf16": ({}, {"kind": "BF16"}),
    "fp16": ({}, {"kind": "F16"}),
    "qwen2": ({}, {}),
    "qwen2_window_yarn": (_FULL, {}),
    "qwen3": ({}, {}),
    "qwen3_mqa_yarn": (
        {"rope_parameters": _YARN | {"beta_fast": 8.0, "beta_slow": 2.0}},
        {"keys": {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0}},
    ),
    "olmo2": ({}, {}),
    "olmo2_gqa": ({}, {}),
    "gemma2": ({"query_pre_attn_scalar": 12}, {}),
    "gemma3": ({"query_pre_attn_scalar": 10}, {"keys": {"rope.freq_base_swa": 300.0}}),
    "gemma3_short": ({}, {"keys": {"attention.sliding_window_pattern": [False, True, False]}}),
    "phi3": ({}, {}),
    "phi3_longrope": ({}, {}),
    "phi3_shortrope": ({}, {}),
}


@pytest.fixture
def folder_of(tmp_path):
    """A golden checkpoint with another config; norms of Gemma lose what is lost when one is added to them in float32."""

    def make(name, changes):
        hf, folder = json.loads((GOLDEN / name / "config.json").read_text()) | changes, tmp_path / name
        tensors = read_tensors(GOLDEN / name)
        if name.startswith("gemma"):
            tensors = {n: (t + 1) - 1 if n.endswith("norm.weight") else t for n, t in tensors.items()}
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(hf))
        return folder

    return make


@pytest.fixture
def golden_file(tmp_path):
    """A golden checkpoint as a GGUF file, see `write_gguf`."""
    return lambda name, **options: write_gguf(GOLDEN / name, tmp_path / "model.gguf", **options)


def _same_params(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


@pytest.mark.parametrize("name", CASES)
def test_a_file_holds_the_model_of_the_folder(name, folder_of, tmp_path):
    changes, written = CASES[name]
    folder = folder_of(name, changes)
    lm, expected = rm.load(write_gguf(folder, tmp_path / "model.GGUF", **written)), rm.load(folder)
    assert lm.config == expected.config
    _same_params(lm, expected)
    assert lm.tokenizer is None and lm.config.eos_ids == (2,)


@pytest.mark.parametrize("name", ["gqa_tied", "llama3_mqa", "phi3_longrope"])
def test_logits_and_masked_logits_agree_with_torch(name, golden_file, read_golden, close):
    golden, lm = read_golden(name), rm.load(golden_file(name))
    for masks in ({}, {"head_mask": golden.head_mask}, {"rope_mask": golden.rope_mask}):
        found = lm.logits(golden.tokens, interventions=rm.Interventions(**masks))[:, 2::3]
        close(
            found,
            getattr(
                golden, {0: "logits", "head_mask": "logits_heads", "rope_mask": "logits_rotary"}[next(iter(masks), 0)]
            ),
        )


@pytest.mark.parametrize(
    "factor, low, high, original, theta, width", [(8, 1, 4, 8192, 5e5, 128), (32, 1, 4, 8192, 5e5, 64)]
)
def test_the_rope_of_llama3_is_found_from_its_factors(golden_file, factor, low, high, original, theta, width):
    rope = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, "rope_theta": theta}
    factors = llama3_factors(rope | {"original_max_position_embeddings": original}, width)
    keys = {"attention.key_length": width, "attention.value_length": width, "rope.dimension_count": width}
    path = golden_file("mha", keys=keys | {"rope.freq_base": theta}, extra={"rope_freqs.weight": factors})
    assert read_config(path)["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def test_the_rope_of_a_small_llama3_has_the_same_frequencies(golden_file, read_golden, close):
    lm, golden = rm.load(golden_file("llama3_mqa")), read_golden("llama3_mqa").lm
    close(*(inverse_frequencies(model.config, "full", 24) for model in (lm, golden)), tolerance=1e-6)


def test_the_attention_scale_of_longrope_is_that_of_the_file(golden_file, read_golden):
    assert (
        "attention_factor" not in read_config(golden_file("phi3_longrope"))["rope_scaling"]
    )  # it follows from the lengths
    lm = rm.load(golden_file("phi3_longrope", keys={"rope.scaling.attn_factor": 1.25}))
    assert lm.config.rope.attention_scale == 1.25 != read_golden("phi3_longrope").lm.config.rope.attention_scale


@pytest.mark.parametrize("name, layers, scalar", [("gemma2", 46, 6), ("gemma3", 62, 6), ("gemma3", 26, 10)])
def test_the_largest_gemmas_scale_queries_by_their_share_of_the_width(golden_file, name, layers, scalar):
    config = read_config(golden_file(name, keys={"block_count": layers, "final_logit_softcapping": 7.0}))
    assert config["query_pre_attn_scalar"] == scalar and config["final_logit_softcapping"] == 7.0
    assert config.get("attn_logit_softcapping") == (3.0 if name == "gemma2" else None)


def test_what_a_gemma_does_not_say_is_as_llama_cpp_has_it(golden_file):
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    config = read_config(golden_file("gemma2", without=(*caps, "attention.sliding_window")))
    assert [config[cap] for cap in caps] == [50.0, 30.0] and config["sliding_window"] == 4096
    config = read_config(golden_file("gemma3", without=("attention.sliding_window",)))
    assert set(config["layer_types"]) == {"full_attention"} and config["rope_local_base_freq"] == 1e4
    config = read_config(golden_file("gemma3", keys={"attention.sliding_window_pattern": 4}))
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [3, 7]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mha", "gqa_tied", "fp16", "qwen2", "phi3"])
def test_transformers_reads_the_same_model_from_the_file(name, folder_of, tmp_path, close):
    torch = pytest.importorskip("torch")
    from make_golden import EAGER, torch_logits
    from transformers import AutoModelForCausalLM

    # transformers does not read the window of Phi-3
    folder = folder_of(name, {"sliding_window": None} if name == "phi3" else {})
    path = write_gguf(folder, tmp_path / "model.gguf", **CASES[name][1], keys={"vocab_size": 61})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32, **EAGER).eval()
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20))
    close(rm.load(path).logits(tokens), torch_logits(model, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "llama3_mqa"])
def test_transformers_reads_a_saved_folder(name, folder_of, tmp_path, close):
    torch = pytest.importorskip("torch")
    from make_golden import EAGER, torch_logits
    from transformers import AutoModelForCausalLM

    changes, written = CASES.get(name, ({}, {}))
    lm = rm.load(write_gguf(folder_of(name, changes), tmp_path / "model.gguf", **written))
    rm.save(lm, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == lm.source.dtypes[_EMBEDDINGS]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, **EAGER).eval()
    tokens = np.random.default_rng(0).integers(0, 61, (2, 24))
    close(lm.logits(tokens), torch_logits(model, tokens))


# --- quantised tensors ---

_WIDE = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    mlp_size=96,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    max_length=64,
    bos_id=1,
    eos_ids=(2,),
    pad_id=0,
)


@pytest.fixture(scope="module")
def wide(random_model, tmp_path_factory):
    """A folder with a Llama whose rows are whole blocks of 32."""
    folder = tmp_path_factory.mktemp("wide")
    rm.save(random_model(_WIDE), folder)
    return folder


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_those_that_quantisation_left(wide, tmp_path, kind):
    lm = rm.load(write_gguf(wide, tmp_path / "model.gguf", kind))
    left = {n: quantised(t, kind) if t.ndim == 2 else t for n, t in read_tensors(wide).items()}
    folder = shutil.copytree(wide, tmp_path / "left")
    save_file(left, folder / "model.safetensors")
    expected = rm.load(folder)
    _same_params(lm, expected)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 20))
    np.testing.assert_array_equal(lm.logits(tokens), expected.logits(tokens))
    assert np.abs(lm.logits(tokens) - rm.load(wide).logits(tokens)).max() > 1e-3


def test_weights_are_read_stripe_by_stripe(random_model, tmp_path, monkeypatch):
    rm.save(random_model(dataclasses.replace(_WIDE, vocab_size=300)), tmp_path / "folder")
    path, rows, read = write_gguf(tmp_path / "folder", tmp_path / "model.gguf", "Q8_0"), [], GgufTensor.read

    def counted(tensor, *bounds):
        rows.append(bounds[0][1] - bounds[0][0])
        return read(tensor, *bounds)

    monkeypatch.setattr(GgufTensor, "read", counted)
    rm.load(path)
    assert max(rows) == 128 and sum(rows) == sum(len(tensor) for tensor in read_tensors(tmp_path / "folder").values())


def _dequantises(kind):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_each_type_is_read_in_parts_or_refused_by_name(tmp_path, kind):
    rng, path = np.random.default_rng(kind), tmp_path / "model.gguf"
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 256, (16, 512 // block * size)).astype(np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("head_count", "head_count_kv"):
        writer.add_uint32(f"llama.attention.{key}", 2)
    for name in ("q", "v"):
        writer.add_tensor(f"blk.0.attn_{name}.weight", stored, raw_dtype=kind)
    finish(writer, path)
    if not _dequantises(kind):
        with pytest.raises(ValueError, match=f"blk.0.attn_.* has type {kind.name}, which the package gguf cannot"):
            open_tensors(path)
        return
    tensors = open_tensors(path)
    with np.errstate(all="ignore"):
        whole = gguf.quants.dequantize(stored, kind)
        turned = whole.reshape(2, 4, 2, 512).swapaxes(1, 2).reshape(16, 512)  # neighbours back to halves
        for name, expected in (("q", turned), ("v", whole)):
            tensor = tensors[f"model.layers.0.self_attn.{name}_proj.weight"]
            assert tensor.shape == (16, 512)
            assert tensor.dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind.name, "float32")
            for rows, columns in (((0, 16), (0, 512)), ((3, 11), (100, 333)), ((15, 16), (0, 1))):
                part = tensor.read(rows, columns)
                assert str(part.dtype) == tensor.dtype
                np.testing.assert_array_equal(part.astype(np.float32), expected[slice(*rows), slice(*columns)])


# --- saving, and what else takes a model ---


def test_a_saved_folder_holds_the_same_model(wide, tmp_path):
    path = write_gguf(wide, tmp_path / "model.gguf", "Q8_0", tokenizer=_tokenizer())
    lm = rm.load(path, dtype="bfloat16")  # what is saved is float32 all the same
    rm.save(lm, tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    again, exact = rm.load(tmp_path / "saved"), rm.load(path)
    assert again.config == exact.config == lm.config and again.config.eos_ids == (2, 3)
    _same_params(again, exact)
    text = "the then  heth\n<end>eth"
    assert (
        again.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"] and 3 in lm.tokenizer(text)["input_ids"]
    )
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.model_type == "llama" and config.num_key_value_heads == 2 and config.head_dim == 16
    path.unlink()  # the weights are then written as they were loaded
    rm.save(exact, tmp_path / "again")
    _same_params(rm.load(tmp_path / "again"), exact)


def _tokenizer():
    tokens = ["<pad>", "<bos>", "<eos>", "<end>", *"abcdefghijklmnopqrstuvwxyz", "\u0120", "\u010a", "th", "the"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 3] + [1] * (len(tokens) - 4),
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}",
        **token_ids({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    }


def test_inspect_says_the_quantisation(wide, tmp_path, capsys):
    path = write_gguf(wide, tmp_path / "model.gguf", "Q8_0", tokenizer=_tokenizer())
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    matrices = [tensor.size for tensor in read_tensors(wide).values() if tensor.ndim == 2]
    vectors = [tensor.size for tensor in read_tensors(wide).values() if tensor.ndim == 1]
    assert facts["gguf"] == {
        "name": f"Golden {wide.name}",
        "types": [
            {"type": "Q8_0", "tensors": len(matrices), "bytes": sum(matrices) // 32 * 34},
            {"type": "F32", "tensors": len(vectors), "bytes": 4 * sum(vectors)},
        ],
    }
    assert facts["tokenizer"] and facts["chat_template"]
    assert [(stop["id"], stop["from"]) for stop in facts["stop_ids"]] == [
        (2, ["model.gguf", "tokenizer"]),
        (3, ["model.gguf", "chat template"]),
    ]
    assert main(["inspect", str(path)]) == 0
    assert re.search(rf"^  Q8_0 +{len(matrices)} tensors, .* KiB", capsys.readouterr().out, re.MULTILINE)


def test_the_fingerprint_is_that_of_the_file(wide, tmp_path):
    path = write_gguf(wide, tmp_path / "model.gguf")
    before = checkpoint_fingerprint(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert checkpoint_fingerprint(path) != before


def test_the_header_is_that_of_the_reader_of_the_package(tmp_path):
    path, writer = tmp_path / "model.gguf", gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    values = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**32 - 1, "int32": -(2**31)}
    values |= {
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.1,
        "float64": 0.1,
        "bool": True,
        "string": "naïve 日本",
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(f"llama.{name}", value)
    for name, array in {
        "texts": ["a", "", "é"],
        "numbers": [1, -2, 3],
        "reals": [0.5, 1.5],
        "flags": [True, False],
    }.items():
        writer.add_array(f"llama.{name}", array)
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    for name, shape in (("token_embd.weight", (5, 7)), ("output_norm.weight", (7,)), ("output.weight", (5, 7))):
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    finish(writer, path)
    ours, theirs = open_file(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    found = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in ours.metadata.items()}
    assert found == fields
    assert {name: (block.kind, block.shape, block.offset, block.n_bytes) for name, block in ours.blocks.items()} == {
        t.name: (t.tensor_type.name, tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes) for t in theirs.tensors
    }


# --- files that are refused ---


def _altered(path: Path, at: bytes, shift: int, value: bytes) -> Path:
    """The file with bytes put in, so far behind the place where some others are found."""
    data = bytearray(path.read_bytes())
    start = (data.index(at) + len(at) if at else 0) + shift
    data[start : start + len(value)] = value
    path.write_bytes(data)
    return path


_TYPE = 4 + 2 * 8  # bytes from the name of a matrix to its type
BAD = {
    "no magic": (lambda path: _altered(path, b"", 0, b"GGML"), r"is not a GGUF file: it begins with b'GGML'"),
    "version": (lambda path: _altered(path, b"", 4, struct.pack("<I", 1)), "has version 1 of GGUF; versions 2 and 3"),
    "type": (
        lambda path: _altered(path, b"token_embd.weight", _TYPE, struct.pack("<I", 99)),
        "tensor token_embd.weight has type 99, which the package gguf does not know",
    ),
    "empty": (lambda path: path.write_bytes(b""), "is not a GGUF file: it has 0 bytes"),
    "header cut": (lambda path: path.write_bytes(path.read_bytes()[:300]), "is cut short: its header .* its 300 bytes"),
    "data cut": (
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        r"is cut short: tensor \S+ ends at byte [\d,]+ and",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_damaged_files_are_refused_in_one_line(golden_file, what, capsys):
    damage, message = BAD[what]
    path = golden_file("mha")
    damage(path)
    _refused(path, message)
    assert main(["inspect", str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


UNSUITABLE = {
    "split": ({"tokenizer": {"split.count": 2}}, "is one of 2 parts: join them"),
    "adapter": ({"tokenizer": {"general.type": "adapter"}}, r"holds no model but 'adapter' \(general.type\)"),
    "no tensor": ({"without": ("blk.1.ffn_up.weight",)}, r"lacks 1 tensors: model.layers.1.mlp.up_proj.weight"),
    "no embeddings": ({"without": ("token_embd.weight",)}, "has no tensor token_embd.weight"),
    "other tensor": (
        {"extra": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}},
        "not understood, .*: blk.0.attn_sinks",
    ),
    "bias": ({"extra": {"blk.0.attn_q.bias": np.zeros(24, np.float32)}}, "has unknown 1 tensors: .*q_proj.bias"),
    "integers": (
        {"extra": {"blk.0.attn_q.bias": np.zeros(24, np.int32)}},
        "attn_q.bias has type I32, which the package",
    ),
    "other key": ({"keys": {"attention.scale": 0.5}}, "keys that are not understood, .*: llama.attention.scale=0.5"),
    "experts": ({"keys": {"expert_count": 8}}, "llama.expert_count=8; only 0 is supported"),
    "two widths": ({"keys": {"attention.value_length": 12}}, "llama.attention.value_length=12; only 6 is supported"),
    "per layer": ({"keys": {"attention.head_count_kv": [4, 4, 2]}}, "head_count_kv=.* whole number of at least 1"),
    "text": ({"keys": {"rope.freq_base": "many"}}, "llama.rope.freq_base='many'; it must be a number"),
    "no length": ({"without": ("context_length",)}, "has no llama.context_length"),
    "shape": ({"keys": {"feed_forward_length": 99}}, r"has shape \(28, 24\); model.gguf asks for \(99, 24\)"),
    "vocabulary": ({"keys": {"vocab_size": 7}}, "llama.vocab_size=7; only 61 is supported"),
    "partial": ({"keys": {"rope.dimension_count": 4}}, "llama.rope.dimension_count=4; only 6 is supported"),
    "scaling": ({"keys": {"rope.scaling.type": "su"}}, "RoPE scaling of type 'su', which is not supported"),
    "yarn": (
        {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}},
        "no llama.rope.scaling.original_context_length",
    ),
    "attention": ({"keys": {"rope.scaling.attn_factor": 1.2}}, "attn_factor=1.2; only 1.0 is supported"),
    "factors": (
        {"extra": {"rope_freqs.weight": np.float32([1, 5, 2])}},
        "rope_freqs.weight that are not those of Llama-3",
    ),
    "half": (
        {"extra": {"rope_factors_long.weight": np.ones(3, np.float32)}},
        "with the tensors rope_factors_long.weight",
    ),
    "eos": ({"tokenizer": {"tokenizer.ggml.eos_token_id": "two"}}, "eos_token_id='two'; it must be a whole number"),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_unsuitable_files_are_refused_in_one_line(golden_file, what):
    options, message = UNSUITABLE[what]
    _refused(golden_file("mha", **options), message)


def test_other_architectures_and_vocabularies_alone_are_refused(tmp_path):
    for name, message in (
        ("mamba", "has the architecture 'mamba'; supported"),
        ("llama", "a vocabulary and no tensors"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", name)
        writer.add_token_list(["a"])
        if name == "mamba":
            writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
        _refused(finish(writer, tmp_path / "model.gguf"), message)


@pytest.mark.parametrize("name", ["models/none.gguf", "none.GGUF", "~/none.gguf"])
def test_a_file_that_is_not_there_is_no_hub_id(name):
    _refused(name, "model file .*none.(gguf|GGUF) does not exist")


def test_a_file_has_no_revision(golden_file):
    with pytest.raises(ValueError, match="is a local file and has no revision 'main'"):
        rm.load(golden_file("mha"), revision="main")


def test_damage_anywhere_gives_an_error_of_one_line_or_none(wide, tmp_path):
    """Bytes of the header changed at random: what is read is read without another kind of error."""
    whole = write_gguf(wide, tmp_path / "model.gguf", "Q8_0", tokenizer=_tokenizer()).read_bytes()
    header = whole.index(b"blk.0") + 200
    rng, refused, path = np.random.default_rng(5), 0, tmp_path / "damaged.gguf"
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, header, 3):
            data[place] = rng.choice([0, 1, 255, data[place] ^ 16])
        path.write_bytes(data)
        try:
            read_config(path), open_tensors(path), load_tokenizer(path)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50


def _refused(path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        rm.load(path)
    assert "\n" not in str(caught.value) and Path(path).name in str(caught.value)


def test_a_header_is_read_once_until_its_file_changes(tmp_path):
    path = write_gguf(GOLDEN / "mha", tmp_path / "x.gguf")
    before = open_file(path)
    assert open_file(path) is before
    write_gguf(GOLDEN / "qwen3", path)
    assert (before.architecture, open_file(path).architecture) == ("llama", "qwen3")
