"""`retmask inspect`: its numbers against independent arithmetic, what it needs, and a user's mistakes."""

import json
import math
import shutil

import pytest
from hub_configs import ACTIVE, CONFIGS, PARAMETERS

from retmask_jax.cli import commands
from retmask_jax.cli.main import main
from retmask_jax.hf import summary
from retmask_jax.hf.hub import BUNDLED


@pytest.fixture
def folder_of(tmp_path):
    """A folder that holds a config.json and nothing else, by the model's name or for a given config."""

    def make(config, **changes):
        config = CONFIGS[config] if isinstance(config, str) else config
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


@pytest.fixture
def shown(capsys):
    """What the command prints, as the facts of its JSON and as the lines of its table, {name: text}."""

    def run(model):
        assert main(["inspect", str(model), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert main(["inspect", str(model)]) == 0
        lines = [line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()]
        assert all(len(line) == 2 for line in lines), lines
        return facts, {name: text.strip() for name, text in lines}

    return run


def test_a_dense_model(folder_of, shown):
    facts, table = shown(folder_of("meta-llama/Llama-3.1-8B-Instruct"))
    attention, mlp = 4096 * 128 * (32 + 8 + 8 + 32), 3 * 4096 * 14336
    parameters = 2 * 128256 * 4096 + 32 * (attention + mlp + 2 * 4096) + 4096
    assert facts["parameters"] == facts["active_parameters"] == parameters == 8_030_261_248
    assert facts["parameter_bytes"] == {"float32": 4 * parameters, "bfloat16": 2 * parameters}
    token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, KV heads, width, bytes
    assert facts["kv_cache_bytes"] == {"1024": 1024 * token, "131072": 131072 * token}
    assert (facts["query_heads"], facts["kv_heads"], facts["head_width"], facts["rotary_pairs"]) == (32, 8, 128, 64)
    assert (facts["layers"], facts["layer_pattern"], facts["repeats"], facts["tail"]) == (32, ["full"], 32, [])
    (waves,) = facts["rope"]["full"]["wavelengths"]
    assert waves["shortest"] == pytest.approx(2 * math.pi)
    assert waves["longest"] == pytest.approx(8 * 2 * math.pi * 5e5 ** (126 / 128))
    assert table["family"] == "llama" and table["layers"] == "32 full" and table["window"] == "none"
    assert table["in float32"] == "29.92 GiB" and table["in bfloat16"] == "14.96 GiB"
    assert table["1,024 tokens"] == "128 MiB" and table["131,072 tokens"] == "16 GiB"
    assert table["KV heads"] == "8 per layer, each for 4 query heads"
    assert table["RoPE"] == "llama3, theta 500,000, factor 8"
    assert table["wavelengths"] == "6.28 to 20,473,565 tokens"
    assert table["context"] == "131,072 tokens"


def test_a_sliding_layer_counts_at_most_its_window(folder_of, shown):
    facts, table = shown(folder_of("google/gemma-3-1b-it"))
    row = 2 * 1 * 256 * 2  # keys and values of one KV head of width 256
    assert facts["kv_cache_bytes"]["1024"] == (22 * 512 + 4 * 1024) * row
    assert facts["kv_cache_bytes"]["32768"] == (22 * 512 + 4 * 32768) * row
    assert table["layers"] == "26: (5 sliding, 1 full) x 4 + 2 sliding"
    assert table["window"] == "512 tokens in sliding layers"
    assert table["RoPE, full layers"] == "default, theta 1,000,000"
    assert table["RoPE, sliding layers"] == "default, theta 10,000"
    waves = {kind: facts["rope"][kind]["wavelengths"][0]["longest"] for kind in ("full", "sliding")}
    assert waves == pytest.approx({k: 2 * math.pi * t ** (254 / 256) for k, t in (("full", 1e6), ("sliding", 1e4))})
    assert table["q/k norm"] == "RMS, over each head" and table["norms"].startswith("RMS, before and after")


@pytest.mark.parametrize(
    "model, one_expert, used, experts",
    [("mistralai/Mixtral-8x7B-v0.1", 3 * 4096 * 14336, 2, 8), ("Qwen/Qwen3-30B-A3B", 3 * 2048 * 768, 8, 128)],
)
def test_experts(folder_of, shown, model, one_expert, used, experts):
    facts, table = shown(folder_of(model))
    assert facts["parameters"] == PARAMETERS[model]
    assert facts["active_parameters"] == ACTIVE[model]
    assert facts["parameters"] - facts["active_parameters"] == facts["layers"] * (experts - used) * one_expert
    assert table["experts"] == f"{experts} of width {facts['expert_size']:,}, {used} per token"
    assert table["active per token"] == f"{ACTIVE[model]:,}" and "MLP width" not in table


def test_experts_in_some_layers(folder_of, shown):
    facts, table = shown(folder_of("Qwen/Qwen3-30B-A3B", decoder_sparse_step=2))
    assert facts["expert_layers"] == 24
    assert table["experts"].endswith("in 24 of 48 layers") and table["MLP width"] == "6,144"


def test_soft_caps_and_one_rope_for_all_layers(folder_of, shown):
    _, table = shown(folder_of("google/gemma-2-9b"))
    assert table["soft caps"] == "scores at 50, logits at 30"
    assert table["layers"] == "42: (1 sliding, 1 full) x 21"
    assert table["RoPE"] == "default, theta 10,000" and "RoPE, full layers" not in table


def test_wavelengths_that_depend_on_the_text(folder_of, shown):
    facts, table = shown(folder_of("microsoft/Phi-3.5-mini-instruct"))
    short, long = facts["rope"]["sliding"]["wavelengths"]
    scaling = CONFIGS["microsoft/Phi-3.5-mini-instruct"]["rope_scaling"]
    plain = 2 * math.pi * 1e4 ** (94 / 96)
    assert (short["text"], short["longest"]) == (4096, pytest.approx(plain * scaling["short_factor"][-1]))
    assert (long["text"], long["longest"]) == (131072, pytest.approx(plain * scaling["long_factor"][-1]))
    assert {"wavelengths, 4,096 tokens", "wavelengths, 131,072 tokens"} <= table.keys()


def test_heads_that_rotate_in_part(folder_of, shown):
    facts, table = shown(folder_of("microsoft/Phi-3-mini-4k-instruct", partial_rotary_factor=0.5))
    assert facts["rotary_pairs"] == 24 and table["head width"] == "96, of which 48 rotate"
    assert table["KV heads"] == "32 per layer, one for each query head"


def test_the_bundled_model_has_as_many_parameters_as_its_file(shown):
    data = (BUNDLED / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts, table = shown("bundled")
    assert facts["parameters"] == sum(math.prod(t["shape"]) for n, t in header.items() if n != "__metadata__")
    assert facts["tied_embeddings"] and "model.embed_tokens.weight" in header and "lm_head.weight" not in header
    assert table["tokenizer"] == table["chat template"] == "present"
    assert list(facts["kv_cache_bytes"]) == ["1024"]  # which is its whole context


def test_a_long_path_breaks_no_line(tmp_path, shown):
    folder = tmp_path / ("long" * 40) / "model"
    shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert shown(folder)[1]["model"] == str(folder)


def test_weights_are_not_read_and_a_tokenizer_is_not_needed(tmp_path, shown):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    (folder / "chat_template.jinja").rename(folder / "kept")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert shown(folder)[1]["chat template"].startswith("absent")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    assert shown(folder)[1]["chat template"] == "present"
    (folder / "tokenizer.json").unlink()
    assert shown(folder)[1]["tokenizer"].startswith("absent")


def test_a_hub_id_is_looked_up_without_its_weights(folder_of, shown, monkeypatch):
    folder = folder_of("Qwen/Qwen3-0.6B")
    monkeypatch.setattr(commands.hub, "config_folder", lambda model, **options: {"Qwen/Qwen3-0.6B": folder}[model])
    facts, table = shown("Qwen/Qwen3-0.6B")
    assert facts["model"] == table["model"] == "Qwen/Qwen3-0.6B"
    assert facts["parameters"] == 596_049_920 and table["width"].endswith("output tied to the embeddings")


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1 KiB"),
        (1024**2 - 1, "1,024 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (10 * 2**30, "10 GiB"),
        (5 * 2**40, "5,120 GiB"),
    ],
)
def test_memory_in_binary_units(n, text):
    assert summary._memory(n) == text


# --- mistakes ---


@pytest.fixture
def refused(capsys):
    """Run the command; it must fail with one line, which is returned."""

    def run(*arguments):
        assert main(["inspect", *map(str, arguments)]) == 2
        out, error = capsys.readouterr()
        assert error.startswith("retmask: ") and error.count("\n") == 1 and not out
        return error

    return run


def test_mistakes_in_naming_the_model(refused, tmp_path):
    assert "./nowhere does not exist" in refused("./nowhere")
    assert "config.json" in refused(tmp_path)
    assert "MODEL" in refused()
    assert "--config.seed does not apply" in refused("bundled", "--config.seed=1")
    assert "unknown argument '--workdir=w'" in refused("bundled", "--workdir=w")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": None}, "'num_hidden_layers'"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "'spiral' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
    ],
)
def test_mistakes_in_the_config(refused, folder_of, changes, message):
    assert message in refused(folder_of("meta-llama/Llama-2-7b-hf", **changes))


def test_damaged_files(refused, folder_of):
    folder = folder_of("meta-llama/Llama-2-7b-hf")
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json is not valid JSON" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(folder)
