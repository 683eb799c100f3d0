"""The recipes of published models, and the published shapes of these models read from their config.json."""

import ast
import fnmatch
import json
import math
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from hub_configs import ACTIVE, CONFIGS, PARAMETERS

from retmask_jax.cli import main, parser
from retmask_jax.data.builtin_files import path_of
from retmask_jax.data.needles import read_needles
from retmask_jax.data.prompts import read_prompts
from retmask_jax.hf.families import from_hf
from retmask_jax.hf.packaged_models import MODELS
from retmask_jax.hf.summary import count_parameters
from retmask_jax.model.rope import inverse_frequencies
from retmask_jax.model.sharding import param_shapes
from retmask_jax.pipeline.registry import check_config
from retmask_jax.runs import limits
from retmask_jax.runs.recipes import find_recipe, flat, load_recipe

# Recipe -> (model, context, threshold).
METHOD = {
    "llama3_1_8b": ("meta-llama/Llama-3.1-8B-Instruct", 131072, 0.1),
    "qwen3_8b": ("Qwen/Qwen3-8B", 40960, 0.05),
    "olmo3_7b_instruct": ("allenai/Olmo-3-7B-Instruct", 65536, 0.05),
    "olmo3_7b_think": ("allenai/Olmo-3-7B-Think", 65536, 0.05),
    "qwen3_0_6b": ("Qwen/Qwen3-0.6B", 40960, 0.05),
    "llama3_2_1b": ("meta-llama/Llama-3.2-1B-Instruct", 131072, 0.1),
}
STUDY = {
    "llama2_7b": ("meta-llama/Llama-2-7b-hf", 4096, 0.1),
    "qwen2_5_7b": ("Qwen/Qwen2.5-7B", 131072, 0.1),
    "qwen2_5_14b": ("Qwen/Qwen2.5-14B", 131072, 0.1),
    "olmo2_7b": ("allenai/OLMo-2-1124-7B", 4096, 0.1),
    "gemma2_9b": ("google/gemma-2-9b", 8192, 0.1),
    "mistral_7b": ("mistralai/Mistral-7B-v0.3", 32768, 0.1),
}
RECIPES = METHOD | STUDY
SMALL = ("qwen3_0_6b", "llama3_2_1b")


# --- recipes ---


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_locked_valid_and_fits_its_model(name):
    model, context, threshold = RECIPES[name]
    recipe, config = load_recipe(name), from_hf(CONFIGS[model])
    check_config(recipe)
    with pytest.raises(AttributeError):
        recipe.train.stpes = 3
    assert (recipe.model, recipe.detect.threshold, recipe.dtype) == (model, threshold, "bfloat16")
    assert config.max_length == context
    assert all(max(task.lengths) + task.max_new_tokens <= context for task in recipe.tasks.values())
    assert all(0 < k <= config.n_pairs for k in recipe.rope.pairs)


@pytest.mark.parametrize("name", ["smollm2_study", "gemma3_study", "qwen2_5_coder_study"])
def test_studies_of_real_models_have_enough_cases_and_choose_the_rate_on_others(name):
    recipe = load_recipe(name)
    check_config(recipe)
    assert Path(recipe.model).name in {model.file for model in MODELS.values()}
    studied = [recipe.tasks[task] for task in recipe.knockout.tasks]
    assert all(task.per_length >= 96 for task in studied if task.lengths)
    assert recipe.rates.tasks and not set(recipe.rates.tasks) & set(recipe.eval.tasks)
    reported = {(recipe.tasks[task].needles, recipe.tasks[task].seed) for task in recipe.eval.tasks}
    assert len(reported) == len(recipe.eval.tasks)  # no two tasks have the same cases
    assert not {recipe.tasks[task].needles for task in recipe.rates.tasks} & {needles for needles, _ in reported}
    assert recipe.train.learning_rate in recipe.rates.learning_rates
    prompts = read_prompts(
        recipe.pairs.prompts, n=recipe.pairs.n_prompts, having=("messages_without",), resolve=path_of
    )
    assert len(prompts.records) == recipe.pairs.n_prompts
    assert recipe.train.steps * recipe.train.batch_size == 2 * recipe.pairs.n_prompts
    known = {
        needle.answer.lower()
        for task in recipe.eval.tasks
        for needle in read_needles(path_of(recipe.tasks[task].needles))
    }
    codes = {answer for answer in known if answer.isdigit()}
    texts = " ".join(turn["content"] for record in prompts.records for turn in record["messages"])
    assert codes and not codes & set(re.findall(r"\d+", texts))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_its_command_and_says_what_to_expect(name):
    text = find_recipe(name).read_text()
    page = ast.get_docstring(ast.parse(text))
    assert all(words in " ".join(page.split()) for words in ("Data:", "Hardware:", "Not run by us yet"))
    assert "Published:" in page or "Expected:" in page
    commands = re.findall(r"retmask [^;`\n]*", page)
    assert commands
    for command in commands:
        arguments, overrides = parser.parse(shlex.split(command.replace("$stage", "rope"))[1:])
        assert arguments.config == name and not overrides
    for option in re.findall(r"`(--config\.[^`]*)`", page):  # FILE stands for a name
        load_recipe(name, parser.parse(["run", *shlex.split(option)])[1])
    assert len(text.split("def get_config")[1].splitlines()) < 30


@pytest.mark.parametrize("name", [name for name in METHOD if name not in SMALL])
def test_the_method_has_the_papers_settings(name):
    recipe = load_recipe(name)
    detect = recipe.tasks.detect
    assert len(detect.lengths) == 20 and len(detect.depths) == 10 and detect.per_length is None
    assert (detect.lengths[1], detect.lengths[-1], detect.depths[0], detect.depths[-1]) == (263, 5000, 0, 1)
    np.testing.assert_allclose(np.diff(detect.lengths[1:]), 5000 / 19, atol=1)
    assert (recipe.prompt.chat, recipe.pairs.temperature, recipe.pairs.top_p) == (True, 0.6, 1.0)
    assert recipe.pairs.max_new_tokens == (4096 if name == "qwen3_8b" else 2048)
    train = recipe.train
    assert (train.beta, train.learning_rate, train.final_learning_rate, train.warmup) == (0.1, 5e-7, 5e-8, 0.1)
    assert (train.b1, train.b2, train.eps, train.weight_decay, train.clip) == (0.9, 0.95, 1e-8, 0.1, 1.0)
    assert (train.batch_size, train.steps) == (512, math.floor(2 * 294_000 / 512))
    assert (train.max_tokens, train.max_prompt_tokens, train.compute_dtype) == (1024, 512, "bfloat16")
    thinking = recipe.prompt.template_kwargs.to_dict()
    assert thinking == ({"enable_thinking": False} if name.startswith("qwen3") else {})
    assert recipe.pairs.template_kwargs.to_dict() == ({"enable_thinking": True} if name == "qwen3_8b" else {})


@pytest.mark.parametrize("name", STUDY)
def test_the_study_has_the_papers_settings(name):
    recipe, config = load_recipe(name), from_hf(CONFIGS[STUDY[name][0]])
    detect, test = recipe.tasks.detect, recipe.tasks.needle
    assert not recipe.prompt.chat and recipe.detect.max_new_tokens == test.max_new_tokens == 20
    assert detect.seed != test.seed and detect.lengths == test.lengths
    assert detect.depths == test.depths == (0.1, 0.25, 0.5, 0.75, 0.9)
    longest = min(8192, config.max_length)
    assert [2 ** round(math.log2(length)) for length in test.lengths] == [
        n for n in (1024, 2048, 4096, 8192) if n <= longest
    ]
    assert config.head_dim // 16 in recipe.rope.pairs  # an eighth of the dimensions, two to a pair
    assert recipe.knockout.tasks == recipe.rope.tasks == ("needle",)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_trains_two_epochs(name):
    recipe = load_recipe(name)
    assert recipe.train.steps * recipe.train.batch_size == 2 * recipe.pairs.n_prompts
    assert recipe.train.batch_size % recipe.train.microbatch_size == 0


@pytest.mark.parametrize("stage", ["run", "pairs"])
def test_a_recipe_without_prompts_stops_before_pairs(stage, tmp_path, capsys):
    assert main.main([stage, "--config=olmo2_7b", f"--workdir={tmp_path / 'work'}"]) == 2
    assert "pairs.prompts names no file" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_recipe_without_prompts_runs_up_to_there(tmp_path):
    """The study's recipe on the bundled model and its data; every headline is the name of a number."""
    small = {
        "model": "bundled",
        "dtype": "float32",
        "text.file": "bundled/test_text.txt",
        "text.length": 64,
        "text.windows": 16,
        "knockout.draws": 1,
        "rope.draws": 1,
        "detect.threshold": 0.3,
    }
    for task in ("detect", "needle"):
        cases = {"needles": "bundled/test_needles.jsonl", "haystack": "bundled/test_text.txt", "lengths": (128,)}
        small |= {f"tasks.{task}.{key}": value for key, value in cases.items()} | {f"tasks.{task}.per_length": 8}
    arguments = ["--config=llama2_7b", f"--workdir={tmp_path}", *(f"--config.{k}={v}" for k, v in small.items())]
    numbers = {}
    for stage in ("detect", "knockout", "rope"):
        assert main.main([stage, *arguments]) == 0
        numbers |= json.loads((tmp_path / stage / "result.json").read_text())["numbers"]
    headlines = load_recipe("llama2_7b").headlines
    assert set(headlines) <= numbers.keys() and "rope/needle/lowest 8 pairs" in headlines


@pytest.mark.parametrize(
    "body, wanted",
    [
        ("def get_config(:", "line 2: SyntaxError: invalid syntax"),
        ("import nothing_of_this_name", "line 2: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def get_config():\n    config = tiny.get_config()\n    config.tran.steps = 3", "line 4: AttributeError"),
        ("def get_config():\n    config = tiny.get_config()\n    config.train.steps = 'ten'", "line 4: TypeError"),
        ("x = 1", "has no function get_config() that returns a config"),
        ("def get_config():\n    tiny.get_config()", "has no function get_config() that returns a config"),
        ("def get_config():\n    return {}", "gives a dict, not an ml_collections.ConfigDict"),
        ("def get_config():\n    return tiny.ConfigDict({'model': 'bundled'})", "makes no 'arena.cases': begin with"),
        (
            "def get_config():\n    config = tiny.get_config()\n    config.train.stepz = 3\n    return config",
            "sets 'train.stepz', which nothing reads (did you mean 'train.steps'?)",
        ),
        (
            "def get_config():\n    config = tiny.get_config()\n    config.tasks.niah.lenths = ()\n    return config",
            "sets 'tasks.niah.lenths', which nothing reads (did you mean 'tasks.niah.lengths'?)",
        ),
    ],
)
def test_a_file_that_makes_no_config_is_one_line(body, wanted, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"from retmask_jax.configs import tiny\n{body}\n")
    assert main.main(["detect", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'work'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and wanted in error and "mine.py" in error
    assert not (tmp_path / "work").exists()


UNLIMITED = {  # checked where they are used, against what there is
    "headlines",
    "knockout.modes",
    "rope.sites",
    "suites.helmet.categories",
    "suites.lm_eval.tasks",
    "suites.ruler.tasks",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.context",
    "train.label_smoothing",
}


def test_every_number_of_a_config_has_its_limits():
    values = flat(load_recipe("tiny"))
    patterns = [pattern for several in limits._LIMITS.values() for pattern in several.split()]
    assert all(fnmatch.filter(values, pattern) for pattern in [*patterns, *limits._OR_NONE])
    numbers = {
        key for key, value in values.items() if isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
    }
    limited = {key for pattern in patterns for key in fnmatch.filter(values, pattern)}
    assert {key for key in numbers - limited if not key.startswith("pretrain.")} == UNLIMITED
    assert {key for key, value in values.items() if value is None} - limited <= {"distributed", "suites.helmet.chat"}


@pytest.mark.parametrize("name", sorted(path.stem for path in find_recipe("tiny").parent.glob("[!_]*.py")))
def test_shipped_recipes_keep_to_the_limits(name):
    limits.check_limits(flat(load_recipe(name)))


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("batch_size", "-1", "batch_size is -1; it must be a whole number of at least 1"),
        ("batch_size", "None", "batch_size is None; it must be a whole number of at least 1"),
        ("train.learning_rate", "-1", "train.learning_rate is -1.0; it must be a number above 0"),
        ("train.b2", "1", "train.b2 is 1.0; it must be a number of at least 0 and below 1"),
        ("train.clip", "nan", "train.clip is "),
        ("detect.scores", "-1", "detect.scores is -1; it must be text, or None"),
        ("detectors.cases", "'all'", "detectors.cases is 'all'; it must be a whole number of at least 1, or None"),
        ("detectors.seeds", "('a',)", "detectors.seeds has 'a'; it must be a whole number of at least 0"),
        ("rope.coverage", "(0.5, 2.0)", "rope.coverage has 2.0; it must be a number above 0 and at most 1"),
        ("knockout.minimal", "1.5", "knockout.minimal is 1.5; it must be a number above 0 and below 1, or None"),
        ("knockout.curve", "(0,)", "knockout.curve has 0; it must be a number of heads"),
        ("tasks.detect.lengths", "('long',)", "tasks.detect.lengths has 'long'; it must be a whole number"),
        ("tasks.detect.depths", "(50,)", "tasks.detect.depths has 50; it must be a number from 0 to 1"),
        ("tasks.detect.depths", "()", "tasks.detect.depths is empty: name at least one"),
        ("tasks.detect.needles", "", "tasks.detect.needles is empty: name a JSONL file"),
        ("dynamics.cases", "()", "dynamics.cases is (); it must be a whole number of at least 1, or None"),
        ("train.keep", "0", "train.keep is 0; it must be a whole number of at least 1"),
        ("train.profile", "(-1, 3)", "train.profile has -1; it must be a whole number of at least 0"),
        ("suites.ruler.n", "0", "suites.ruler.n is 0; it must be a whole number of at least 1"),
        ("suites.json_kv.lengths", "(0,)", "suites.json_kv.lengths has 0; it must be a whole number of at least 1"),
        ("suites.perplexity.length", "2", "suites.perplexity.length is 2; it must be a whole number of at least 3"),
        ("suites.perplexity.windows", "0", "suites.perplexity.windows is 0; it must be a whole number of at least 1"),
        ("suites.rerank.length", "0", "suites.rerank.length is 0; it must be a whole number of at least 1, or None"),
        ("eval.models", "None", "eval.models is None; it must be set"),
        ("eval.masked", "None", "eval.masked is None; it must be set"),
        ("eval.contrast", "0", 'eval.contrast is 0; it must be a number above 0, or "entropy", or None'),
        ("eval.contrast", "'much'", "eval.contrast is 'much'; it must be a number above 0"),
        ("eval.contrast_threshold", "1.5", "eval.contrast_threshold is 1.5; it must be a number from 0 to 1"),
        ("eval.models", "{1: 'bundled'}", "eval.models has the key 1: names are text"),
        ("eval.models", "{'other': 1}", "eval.models has 'other': 1; give each folder"),
    ],
)
def test_a_number_out_of_its_limits_is_one_line_before_anything_runs(key, value, wanted, tmp_path, capsys):
    arguments = ["detect", "--config=tiny", f"--config.{key}={value}", f"--workdir={tmp_path / 'work'}"]
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and wanted in error
    assert not (tmp_path / "work").exists()


# --- models ---


@pytest.mark.parametrize("model", CONFIGS)
def test_parameters_are_as_published(model):
    config = from_hf(CONFIGS[model])
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config))) == PARAMETERS[model]
    assert count_parameters(config) == (PARAMETERS[model], ACTIVE.get(model, PARAMETERS[model]))


@pytest.mark.parametrize(
    "model, pattern, repeats, tail, window",
    [
        ("meta-llama/Llama-3.1-8B-Instruct", ("full",), 32, (), None),
        ("Qwen/Qwen2.5-7B", ("full",), 28, (), None),  # its sliding_window is not in use
        ("Qwen/Qwen3-30B-A3B", ("full",), 48, (), None),
        ("mistralai/Mixtral-8x7B-v0.1", ("full",), 32, (), None),
        ("microsoft/Phi-3-mini-4k-instruct", ("sliding",), 32, (), 2047),
        ("google/gemma-2-9b", ("sliding", "full"), 21, (), 4096),
        ("allenai/Olmo-3-7B-Think", ("sliding",) * 3 + ("full",), 8, (), 4096),
        ("google/gemma-3-1b-it", ("sliding",) * 5 + ("full",), 4, ("sliding",) * 2, 512),
    ],
)
def test_layers(model, pattern, repeats, tail, window):
    config = from_hf(CONFIGS[model])
    assert (config.layer_pattern, config.repeats, config.tail, config.window) == (pattern, repeats, tail, window)


@pytest.mark.parametrize(
    "model, kinds",
    [
        ("meta-llama/Llama-2-7b-hf", {"full": ("default", 1e4)}),
        ("mistralai/Mistral-7B-v0.3", {"full": ("default", 1e6)}),
        ("meta-llama/Llama-3.2-1B-Instruct", {"full": ("llama3", 5e5)}),
        ("allenai/OLMo-2-1124-7B", {"full": ("default", 5e5)}),
        ("allenai/Olmo-3-7B-Instruct", {"full": ("yarn", 5e5), "sliding": ("default", 5e5)}),
        ("google/gemma-2-9b", {"full": ("default", 1e4), "sliding": ("default", 1e4)}),
        ("google/gemma-3-1b-it", {"full": ("default", 1e6), "sliding": ("default", 1e4)}),
        ("microsoft/Phi-3.5-mini-instruct", {"sliding": ("longrope", 1e4)}),
    ],
)
def test_rope_of_each_layer_kind(model, kinds):
    config = from_hf(CONFIGS[model])
    assert {kind: (rope.kind, rope.theta) for kind, rope in config.ropes.items()} == kinds


def test_other_fields_are_read():
    config = {model.split("/")[1]: from_hf(hf) for model, hf in CONFIGS.items()}
    assert config["Llama-3.2-1B-Instruct"].head_dim == 64 and config["Llama-3.2-1B-Instruct"].tied_embeddings
    assert config["Llama-3.1-8B-Instruct"].eos_ids == (128001, 128008, 128009)
    assert config["Qwen2.5-7B"].qkv_bias and not config["Qwen3-8B"].qkv_bias
    assert (config["Qwen3-0.6B"].qk_norm, config["OLMo-2-1124-7B"].qk_norm) == ("head", "projection")
    assert (config["OLMo-2-1124-7B"].norm_placement, config["gemma-2-9b"].norm_placement) == ("post", "both")
    gemma = config["gemma-2-9b"]
    assert (gemma.attention_softcap, gemma.logit_softcap, gemma.query_scale) == (50.0, 30.0, 1 / 16)
    assert (gemma.head_dim, gemma.embed_scale, gemma.norm_offset) == (256, 3584**0.5, 1.0)
    assert (config["Phi-3-mini-4k-instruct"].n_pairs, config["Phi-3-mini-4k-instruct"].max_length) == (48, 4096)
    for name, experts in (("Mixtral-8x7B-v0.1", (8, 2, 14336)), ("Qwen3-30B-A3B", (128, 8, 768))):
        found = config[name]
        assert (found.n_experts, found.experts_per_token, found.expert_size) == experts and found.normalise_router


# Pairs that turn quickly keep their wavelength, those that turn less than once in the original context are stretched.
@pytest.mark.parametrize(
    "model, kind, theta, factor",
    [
        ("meta-llama/Llama-2-7b-hf", "full", 1e4, 1),
        ("meta-llama/Llama-3.1-8B-Instruct", "full", 5e5, 8),
        ("meta-llama/Llama-3.2-1B-Instruct", "full", 5e5, 32),
        ("allenai/Olmo-3-7B-Instruct", "full", 5e5, 8),
        ("allenai/Olmo-3-7B-Instruct", "sliding", 5e5, 1),
        ("google/gemma-3-1b-it", "sliding", 1e4, 1),
    ],
)
def test_wavelengths(model, kind, theta, factor):
    config = from_hf(CONFIGS[model])
    pairs = config.head_dim // 2
    plain = np.array([2 * math.pi * theta ** (r / pairs) for r in range(pairs)])
    ratio = 2 * math.pi / inverse_frequencies(config, kind).astype(np.float64) / plain
    np.testing.assert_allclose(ratio[plain < 200], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[plain > 1.3 * 8192], factor, rtol=1e-5)
    assert (np.diff(ratio) > -1e-5).all() and (plain > 1.3 * 8192).sum() > 10


def test_longrope_has_a_set_of_factors_for_short_and_one_for_long_texts():
    config = from_hf(CONFIGS["microsoft/Phi-3.5-mini-instruct"])
    plain = np.array([1e4 ** (-r / 48) for r in range(48)])
    scaling = CONFIGS["microsoft/Phi-3.5-mini-instruct"]["rope_scaling"]
    for length, name in ((4096, "short_factor"), (4097, "long_factor")):
        found = inverse_frequencies(config, "sliding", length)
        np.testing.assert_allclose(found, plain / np.array(scaling[name]), rtol=1e-5)
    assert config.rope.attention_scale == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@pytest.mark.parametrize("model", CONFIGS)
def test_the_form_that_transformers_writes_now_is_the_same_model(model):
    transformers = pytest.importorskip("transformers")
    hf = CONFIGS[model]
    written = transformers.CONFIG_MAPPING[hf["model_type"]](**hf).to_diff_dict()
    assert "rope_parameters" in written and "rope_theta" not in written
    assert from_hf(written) == from_hf(hf)
