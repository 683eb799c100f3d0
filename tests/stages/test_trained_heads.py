"""Which heads an arm trains: the words and files of `train.heads`, and what the table of arms says."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers_results import detected
from helpers_tiny import copying_lm
from retmask_jax.configs import default
from safetensors.numpy import load_file

from retmask_jax.cli.main import main
from retmask_jax.heads.scores import HeadScores
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.model.interventions import layer_matched
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import settings_read
from retmask_jax.runs.workdir import Basis, Workdir
from retmask_jax.stages.arms import ARMS
from retmask_jax.stages.train import TRAIN, _reference, train_settings
from retmask_jax.stages.trained_heads import check_choice, trained_heads
from retmask_jax.utils.files import write_json

SMALL = Path(__file__).parents[1] / "tiny_small.py"
FOUND = [(1, 2), (1, 0), (0, 3)]
OTHERS = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 3)]
MATCHED = layer_matched(copying_lm().config, FOUND, seed=3)  # as many of them, of the same layers


@pytest.fixture
def prepare(tmp_path):
    """A context where detection has found these of 2 layers of 4 heads; section: settings of `train`."""

    def make(found=FOUND, **section):
        config = default.get_config()
        config.detect.threshold, config.detect.top_k = 0.5, None
        config.train.update(section)
        write_json(tmp_path / "work/detect/result.json", vars(detected(found)))
        context = Context(config.lock(), Workdir(tmp_path / "work", json.loads(config.to_json())))
        context.__dict__["lm"] = copying_lm()
        return context

    return make


def _file(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("word", "heads"), [("all", None), ("retrieval", FOUND), ("others", OTHERS), ("matched", MATCHED)]
)
def test_words_name_the_heads_that_were_found_and_those_that_were_not(prepare, word, heads):
    context = prepare(heads=word)
    assert trained_heads(context, "retmask", 3) == heads
    assert train_settings(context.config, "retmask", 3).heads is None
    chosen = train_settings(context.config, "retmask", 3, heads).heads
    assert chosen == (None if heads is None else tuple(sorted(heads)))


def test_arms_that_train_some_heads_differ_from_retmask_in_nothing_else(prepare):
    plain = ARMS["retmask"]
    for word, heads in (("retrieval", FOUND), ("others", OTHERS), ("matched", MATCHED)):
        arm = ARMS[f"retmask_{word}"]
        assert (arm.rejected, arm.objective, arm.heads) == (plain.rejected, plain.objective, word)
        assert trained_heads(prepare(heads="all"), f"retmask_{word}", 3) == heads
    assert trained_heads(prepare(heads="others"), "retmask_retrieval", 0) == FOUND  # an arm's own choice comes first
    assert [name for name, arm in ARMS.items() if arm.heads] == [
        f"retmask_{word}" for word in ("retrieval", "others", "matched")
    ]
    assert len({arm.colour for arm in ARMS.values()}) == len(ARMS) - 1  # random and any_layer share one


def test_the_reference_is_shared_by_what_it_depends_on_unless_a_run_began_with_its_own(prepare, tmp_path):
    context, target = prepare(), tmp_path / "work/train/retmask-0"
    place = _reference(context, target, {"data": "f", "model": "m"})
    assert place.parent == tmp_path / "work/measured" and place.name.startswith("reference-")
    assert _reference(context, tmp_path / "rates/0.1/retmask-0", {"model": "m", "data": "f"}) == place
    assert _reference(context, target, {"data": "g", "model": "m"}) != place
    (target / "reference").mkdir(parents=True)
    assert _reference(context, target, {"data": "f", "model": "m"}) == target / "reference"


def test_a_file_lists_heads_or_scores_them(prepare, tmp_path):
    listed = _file(tmp_path / "heads.json", [[1, 3], [0, 0]])
    context = prepare(heads=listed)
    TRAIN.check_model(context)
    assert trained_heads(context, "retmask", 3) == [(1, 3), (0, 0)]
    scores = tmp_path / "scores.json"
    HeadScores.from_array([[0.1, 0.5, 0.0, 0.0], [0.9, 0.0, 0.4, 0.0]]).save(scores)
    assert trained_heads(prepare(heads=str(scores)), "retmask", 0) == [(1, 0), (0, 1)]  # as detect.threshold says


def test_what_is_trained_is_a_part_of_what_a_run_is_made_from(prepare, tmp_path):
    def made(**section):
        context = prepare(**section)
        return Basis(settings_read(context, TRAIN), TRAIN.inputs(context))

    listed, plain = _file(tmp_path / "heads.json", [[1, 3]]), made()
    assert plain.changes(made()) == [] and plain.inputs == {}
    assert plain.changes(made(heads="others")) == ["train.heads: 'all' there, 'others' here"]
    assert made(heads="others").changes(made(heads="others", mlp=True)) == ["train.mlp: False there, True here"]
    before = made(heads=listed)
    _file(tmp_path / "heads.json", [[1, 2]])
    (change,) = before.changes(made(heads=listed))
    assert change.startswith(f"heads of {listed}")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"heads": "retreival"},
            "train.heads is 'retreival'; it must be all, retrieval, others, matched or a file of heads",
        ),
        ({"mlp": True}, "train.mlp is True, which only goes with some heads"),
        (
            {"arms": ("retmask", "retmask_others"), "lora_rank": 2, "lora_targets": ("up", "down")},
            r"an arm trains the heads 'others', and train.lora_targets \('up', 'down'\) has no layer of heads: add one of q, k",
        ),
    ],
)
def test_choices_that_do_not_fit_raise(prepare, section, message):
    config = prepare(**section).config
    with pytest.raises(ValueError, match=message):
        TRAIN.check(config)


def test_choices_that_fit_do_not(prepare):
    check_choice(prepare(arms=("retmask", "retmask_others"), mlp=True).config)
    check_choice(prepare(heads="others", lora_rank=2, lora_targets=("q", "up")).config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "heads.json names no head: add one, such as"),
        ([[1, 0], [2, 0]], r"heads.json: head \[2, 0\] is out of range: the model has 2 layers of 4 query heads"),
        ([[0, -1]], r"heads.json: head \[0, -1\] is out of range"),
        ([[1, 0, 0]], r"heads.json: \[1, 0, 0\] is no head: write \[layer, head\], such as"),
        (["1-0"], "heads.json: '1-0' is no head"),
        ([[True, 0]], r"heads.json: \[True, 0\] is no head"),
        ("[[1, 0]", "heads.json: not JSON"),
        ({"0-0": [1.0], "0-1": [0.0]}, "heads.json scores 1 layers of 2 heads, the model has 2 of 4"),
        (
            {f"{layer}-{head}": [0.25] for layer, head in np.ndindex(2, 4)},
            "no head reaches detect.threshold 0.5: the best score is 0.250",
        ),
    ],
)
def test_files_that_do_not_fit_raise(prepare, tmp_path, content, message):
    context = prepare(heads=_file(tmp_path / "heads.json", content))
    with pytest.raises(ValueError, match=message) as raised:
        TRAIN.check_model(context)
    assert "\n" not in str(raised.value)


def test_matched_heads_are_other_ones_in_each_training(prepare):
    context = prepare(heads="matched")
    drawn = [trained_heads(context, "retmask", seed) for seed in range(8)]
    assert all(sorted(layer for layer, _ in heads) == [0, 1, 1] and set(heads) <= set(OTHERS) for heads in drawn)
    assert len(set(map(tuple, drawn))) > 1
    with pytest.raises(ValueError, match="5 other heads are wanted, the model has 3 left"):
        trained_heads(prepare(found=OTHERS, heads="matched"), "retmask", 0)


def test_no_others_are_left_where_every_head_retrieves(prepare):
    context = prepare(found=[*FOUND, *OTHERS], heads="others")
    message = "all 8 heads of the model are retrieval heads, so no others can be trained: raise detect.threshold"
    with pytest.raises(ValueError, match=message):
        trained_heads(context, "retmask", 3)


def _bits(array):
    return array.view(f"u{array.itemsize}")


@pytest.mark.slow
def test_the_stage_writes_models_that_differ_from_the_start_in_the_heads_alone(tmp_path):
    """Tensor by tensor of the files; another choice sets aside what was trained."""
    start, work = load_file(BUNDLED / "model.safetensors"), tmp_path / "work"
    options = [f"--config={SMALL}", f"--workdir={work}", "--config.detect.threshold=0.1"]
    arms = "--config.train.arms=('retmask_retrieval', 'retmask_others')"
    for stage in ("detect", "knockout", "pairs", "train"):
        assert main([stage, *options, arms]) == 0
    config = json.loads((BUNDLED / "config.json").read_text())
    layers, heads, group = (config[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads"))
    group, width = heads // group, config["head_dim"]
    found = [tuple(head) for head in json.loads((work / "detect/result.json").read_text())["heads"]]
    others = [head for head in np.ndindex(layers, heads) if head not in found]
    trained = json.loads((work / "train/result.json").read_text())["runs"]
    for arm, chosen in (("retmask_retrieval", found), ("retmask_others", others)):
        model, parameters = load_file(work / f"train/{arm}-0/model/model.safetensors"), 0
        for name, before in start.items():
            inside = np.zeros(before.shape, bool)
            for layer, head in chosen:
                if name.startswith(f"model.layers.{layer}.self_attn.") and "_proj" in name:
                    index = head // group if name.split(".")[4] in ("k_proj", "v_proj") else head
                    part = slice(index * width, (index + 1) * width)
                    inside[(slice(None), part) if ".o_proj." in name else part] = True
            changed = _bits(model[name]) != _bits(before)
            assert not changed[~inside].any() and (not inside.any() or changed[inside].mean() > 0.9), (arm, name)
            parameters += int(inside.sum())
        assert trained[f"{arm}-0"]["trained_parameters"] == parameters > 0
    assert main(["train", *options, arms, "--config.train.mlp=True"]) == 2
    assert main(["train", *options, arms, "--config.train.mlp=True", "--set-aside"]) == 0
    aside = work / "set-aside/train-1/retmask_others-0/model/model.safetensors"
    assert load_file(aside).keys() == start.keys() and (work / "train/retmask_others-0/model").is_dir()
