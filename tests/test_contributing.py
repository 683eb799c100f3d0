"""The worked examples of CONTRIBUTING.md do what the text says."""

import functools
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, STORED
from helpers_results import Page, detected
from helpers_samples import byte_pairs, said_by, text_of
from helpers_tiny import CONFIG, copying_lm, copying_params, in_float64, reference_logprob
from test_architecture import DATA, PACKAGES

from retmask_jax.cli import commands
from retmask_jax.cli.main import main
from retmask_jax.data import tiny_language
from retmask_jax.evals.suites import registry, ruler
from retmask_jax.generation.language_model import load, save
from retmask_jax.heads import detectors
from retmask_jax.heads.scores import HeadScores
from retmask_jax.hf import families
from retmask_jax.model.interventions import mask_heads
from retmask_jax.pipeline.registry import STAGES, check_config
from retmask_jax.runs import recipes
from retmask_jax.runs.context import Context
from retmask_jax.runs.workdir import Workdir
from retmask_jax.stages import arms
from retmask_jax.stages.pairs import pairs_stage
from retmask_jax.stages.study.detector_runs import run_detector
from retmask_jax.stages.train import train_settings
from retmask_jax.training import losses
from retmask_jax.training.objective import part_loss
from retmask_jax.utils.files import write_json, write_jsonl

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
SMALL = Path(__file__).with_name("tiny_small.py")
COPYING = [(1, 0), (1, 1), (1, 2), (1, 3)]  # of the bundled model


def section(heading):
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)[1]


def printed(heading):
    """The Python blocks of a section, in order."""
    return re.findall(r"```python\n(.*?)```", section(heading), re.DOTALL)


@pytest.fixture
def add():
    """add(code, module, table): runs a printed block as if it ended the module; gives what was entered in the table."""
    before = []

    def run(code, module, table):
        entries = getattr(module, table)
        before.append((entries, dict(entries)))
        exec(code, vars(module).copy())
        (name,) = entries.keys() - before[-1][1].keys()
        return name, entries[name]

    yield run
    for entries, old in before:
        entries.clear()
        entries.update(old)


def test_a_family_is_one_entry(add, close):
    folder = GOLDEN / "example"
    with pytest.raises(ValueError, match="model_type 'gemma' is not supported.*CONTRIBUTING.md"):
        load(folder)
    add(printed("Adding a model family")[0], families, "FAMILIES")
    with np.load(folder / "golden.npz") as golden:
        lm = load(folder)
        close(lm.logits(golden["tokens"])[:, STORED], golden["logits"])


def test_a_detector_is_one_entry(add, tmp_path):
    """On cases of two lengths its scores are the detector `mass` by the shares of the needle, and find the heads that copy."""
    changes = {"tasks.detect.lengths": (128, 256), "tasks.detect.per_length": 6, "detectors.names": ("copy", "lift")}
    overrides = [(key, str(value)) for key, value in changes.items()]
    with pytest.raises(ValueError, match="detectors.names has 'lift'"):
        check_config(recipes.load_recipe("tiny", overrides))
    name, _ = add(printed("Adding a detector")[0], detectors, "DETECTORS")
    context = Context(recipes.load_recipe("tiny", overrides), Workdir(tmp_path, {}))
    check_config(context.config)
    cases = context.cases("detect")
    run = run_detector(context, name, cases, tmp_path / "lift.json")
    mass = run_detector(context, "mass", cases, tmp_path / "mass.json")
    share = [5 / (len(case.tokens) + 2) for case in cases]  # an answer has 5 tokens, predicted from so many on the mean
    assert HeadScores.load(tmp_path / "lift.json") == run.scores and run.outcomes == ["counted"] * len(cases)
    assert run.scores.per_case.shape == (4, 8, len(cases))
    np.testing.assert_allclose(run.scores.per_case * share, mass.scores.per_case, rtol=0.03, atol=1e-3)
    assert sorted(run.scores.heads(top_k=4)) == COPYING and run.scores.mean.max() > 10


def test_a_loss_is_one_entry(add):
    """The equation in float64, its slope by differences, and the loss of whole rows that are trained on."""
    overrides = [("train.loss", "apo_zero"), ("train.beta", "0.3")]
    with pytest.raises(ValueError, match="kind of loss is 'apo_zero'; it must be one of sigmoid"):
        train_settings(recipes.load_recipe("tiny", overrides), "retmask", 0)
    name, _ = add(printed("Adding a loss")[0], losses, "LOSSES")

    def equation(chosen, rejected, ref_chosen, ref_rejected):
        return 1 - 1 / (1 + np.exp(-0.3 * (chosen - ref_chosen))) + 1 / (1 + np.exp(-0.3 * (rejected - ref_rejected)))

    logps, step = 4 * np.random.default_rng(0).standard_normal((4, 50)) - 10, 1e-5
    args = [jnp.asarray(x, jnp.float32) for x in logps]
    np.testing.assert_allclose(losses.dpo_loss(*args, beta=0.3, kind=name), equation(*logps), rtol=1e-5)
    slopes = jax.grad(lambda *xs: losses.dpo_loss(*xs, beta=0.3, kind=name).sum(), (0, 1, 2, 3))(*args)
    for i, slope in enumerate(slopes):
        ends = [equation(*(x + sign * step * (i == n) for n, x in enumerate(logps))) for sign in (1, -1)]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="gamma is 0.5, which only simpo has, not apo_zero"):
        losses.dpo_loss(*args, kind=name, gamma=0.5)

    settings = train_settings(recipes.load_recipe("tiny", overrides), "retmask", 0)
    assert settings.has_reference and not settings.averages
    rng, params, away_N2 = np.random.default_rng(1), copying_params(), np.float32([[1.0, 0.5], [-2.0, 3.0]])
    prompts, answers = (rng.integers(4, CONFIG.vocab_size, shape) for shape in ((2, 12), (2, 2, 8)))
    rows_N2T = np.concatenate([np.repeat(prompts[:, None], 2, axis=1), answers], axis=2)
    own = functools.partial(reference_logprob, in_float64(params))
    logps_N2 = np.array([[own(row, np.arange(20) >= 12) for row in rows_2T] for rows_2T in rows_N2T])
    reference_N2 = logps_N2.astype(np.float32) + away_N2
    batch = {"prompts": prompts, "lengths": np.full(2, 12), "answers": answers, "counted": np.ones(answers.shape, bool)}
    batch |= {"longest": np.full(2, 20), "reference": reference_N2, "weight": np.float32([0.5, 0.5])}
    found, _ = jax.jit(part_loss, static_argnums=(0, 1))(CONFIG, settings, params, batch)
    np.testing.assert_allclose(found, equation(*logps_N2.T, *reference_N2.T).mean(), rtol=1e-4)


def test_an_arm_is_one_entry(add, tmp_path):
    """Its answers are sampled with half of the heads masked, and it is trained on pairs."""
    overrides = [("train.arms", "('half',)"), ("pairs.max_new_tokens", "4"), ("train.batch_size", "8")]
    with pytest.raises(ValueError, match="train.arms has half; known arms are retmask"):
        check_config(recipes.load_recipe("tiny", overrides))
    streams = {arm.rejected.stream for arm in arms.ARMS.values() if arm.rejected}
    name, arm = add(printed("Adding an arm")[0], arms, "ARMS")
    assert arm.rejected.stream not in streams
    texts = [" ".join(tiny_language.VOCABULARY[i : i + 9]) for i in range(4, 16)]
    prompts = [{"id": i, "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    config = recipes.load_recipe("tiny", [*overrides, ("pairs.prompts", str(tmp_path / "prompts.jsonl"))])
    check_config(config)
    write_json(tmp_path / "work/detect/result.json", vars(detected([(1, 2), (1, 0), (0, 3)])))
    context = Context(config, Workdir(tmp_path / "work", {}))
    context.__dict__.update(lm=copying_lm(), model_fingerprint="of the small model")  # which was read from no folder
    result = pairs_stage(context, tmp_path / "work/pairs")
    assert result.heads == {"half-0": [(1, 2)]} and sum(result.counts["half-0"].values()) == result.prompts == 12
    assert set(result.answers_cut) == {"normal-0", "half-0"}
    assert train_settings(config, name, 0).objective == "dpo"


def test_a_stage_is_a_file_its_settings_and_a_line(tmp_path, monkeypatch):
    """It runs after detection, is kept while nothing changes, and the page shows its rows."""
    code, settings, page = printed("Adding a stage")
    stage = _module("retmask_jax.stages.shares", code, tmp_path, monkeypatch)
    monkeypatch.setitem(STAGES, "shares", stage.SHARES)
    config, scores = recipes.load_recipe(str(SMALL)), tmp_path / "scores.json"
    copies = np.zeros((4, 8), np.float32)
    copies[tuple(zip(*COPYING, strict=True))] = 1
    HeadScores.from_array(copies).save(scores)
    with config.unlocked():
        config.detect.scores = str(scores)
        exec(settings, {"config": config, "ConfigDict": type(config)})
    with pytest.raises(ValueError, match="stage detect has no result"):
        commands.one_stage(config, tmp_path / "work", "shares")
    commands.one_stage(config, tmp_path / "work", "detect")
    result = commands.one_stage(config, tmp_path / "work", "shares")
    assert [row.share for row in result.rows] == [0, 0.5, 1]
    assert (
        result.rows[0].value > 0.8 > 0.2 > result.rows[2].value
        and result.rows[0].n == config.tasks["needle short"].per_length
    )
    assert result.numbers["shares/needle short/100% masked"].value == result.rows[2].value
    again = commands.one_stage(config, tmp_path / "work", "shares")
    assert again.provenance.run_id == result.provenance.run_id
    shown = Page(_module("retmask_jax.reports.shares", page, tmp_path, monkeypatch).shares_section(result))
    assert shown.rows[1][0] == "0%" and len(shown.rows) == 4
    with config.unlocked():
        config.shares.shares = ()
    with pytest.raises(ValueError, match="shares.shares is empty"):
        check_config(config)


def _module(name, code, folder, monkeypatch):
    """A printed block as the module that the text says it is."""
    file = folder / f"{name}.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_a_suite_is_one_entry_and_its_settings(add, tmp_path, capsys):
    """`retmask eval` compares the bundled model with itself without the heads that copy: needles surprise it then."""
    code, settings = printed("Adding an evaluation")[:2]
    add(code, registry, "SUITES")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"import runpy\n\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    config = runpy.run_path({str(SMALL)!r})['get_config']()\n    suites = config.suites\n"
        + "".join(f"    {line}\n" for line in settings.splitlines())
        + "    config.eval.tasks, config.eval.grids, config.text.file = (), (), ''\n    return config\n"
    )
    lm = load("bundled")
    save(lm, tmp_path / "without", mask_heads(lm.config, COPYING))
    on = {
        "needles": "bundled/test_needles.jsonl",
        "haystack": "bundled/test_text.txt",
        "lengths": "(128,)",
        "per_cell": "2",
    }
    changes = [(f"suites.answer_loss.{key}", value) for key, value in on.items()]
    registry.check_suites(recipes.load_recipe(str(recipe), changes).suites)
    with pytest.raises(ValueError, match="suites.answer_loss needs 128 tokens, the model's context is 127"):
        registry.check_context(recipes.load_recipe(str(recipe), changes).suites, 127)
    command = [
        "eval",
        f"--config={recipe}",
        f"--workdir={tmp_path / 'work'}",
        f"--compare=without={tmp_path / 'without'}",
    ]
    assert main([*command, *(f"--config.{key}={value}" for key, value in changes)]) == 0
    assert "answer_loss/needle 128" in capsys.readouterr().out
    result = json.loads((tmp_path / "work/compare/result.json").read_text())
    assert result["metrics"] == {"answer_loss/needle 128": "nats per token"}
    start, without = result["rows"]
    assert start["n"] == 6 and start["value"] < 0.5 and without["change"]["low"] > 1


def test_a_task_of_ruler_is_one_entry(add):
    name, _ = add(printed("Adding an evaluation")[2], ruler, "TASKS")
    prompter = byte_pairs(900)
    samples = ruler.ruler_samples(name, prompter, 1200, 3)
    for sample in samples:
        text = text_of(prompter, sample)
        stated = dict(re.findall(r"secret numbers for (\S+) is: (\d{7})\.", text))
        assert len(stated) == 16 and 1200 - 128 - 60 < len(sample.tokens) <= 1200 - 128
        asked = re.search(r"What is the secret number for (\S+) stated", text)[1]
        assert sample.references == (stated[asked],) and stated[asked] in said_by(prompter, sample)[0]
    registry.check_suites(recipes.load_recipe("default", [("suites.ruler.tasks", f"({name!r},)")]).suites)


# --- the map ---


def test_the_map_has_every_package_in_the_order_of_imports():
    rows = re.findall(r"^\| `(\w+)/` \|", section("Where things are"), re.MULTILINE)
    assert rows == [*PACKAGES, DATA]


def test_where_a_head_is_masked_the_score_computed_and_the_loss():
    """The files and names of the three pointers exist, and each name stands in that file."""
    table = re.search(r"^\| where is \|.*?\n\n", TEXT, re.DOTALL | re.MULTILINE)[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in table.splitlines()[2:] if line]
    assert len(rows) == 3
    for names in rows:
        files = [name for name in names if name.endswith(".py")]
        modules = [importlib.import_module("retmask_jax." + file[:-3].replace("/", ".")) for file in files]
        for name in set(names) - {*files, "o"}:
            owner, _, attribute = name.partition(".")
            (found,) = [vars(m)[owner] for m in modules if getattr(vars(m).get(owner), "__module__", "") == m.__name__]
            assert not attribute or attribute in vars(found), name
