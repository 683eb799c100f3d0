"""`retmask diff`: two checkpoints in, tables, JSON and a page out; a user's mistakes in one line."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from helpers_results import Page

import retmask_jax as rm
from retmask_jax.cli.main import main
from retmask_jax.data.builtin_files import DATA
from retmask_jax.heads.builtin_cases import builtin_cases
from retmask_jax.heads.gain.difference import Difference
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.reports import plotting
from retmask_jax.reports.difference import best_heads, groups, groups_figure, sentences
from retmask_jax.reports.html import change
from retmask_jax.runs.costs import Speed

QUICK = ("--n=2", "--lengths=96")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """The bundled model with noise on its weights, which answers less surely."""
    lm, rng = rm.load("bundled"), np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("models") / "noisy"
    noise = jax.tree.map(lambda x: x + 0.4 * jnp.std(x) * rng.standard_normal(x.shape).astype(np.float32), lm.params)
    rm.save(lm.replace(params=noise), folder)
    return folder


@pytest.fixture
def refused(capsys, compiles):
    def run(*arguments):
        compiles.clear()
        assert main(["diff", *map(str, arguments)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("retmask: ") and not compiles
        return error

    return run


def read(folder):
    return msgspec.convert(json.loads((folder / "diff.json").read_text()), Difference)


def test_the_command_prints_and_writes_what_it_finds(noisy, tmp_path, capsys):
    scores = np.zeros((4, 8))
    scores[1, :4] = 0.5
    rm.HeadScores.from_array(scores).save(tmp_path / "scores.json")
    flags = (*QUICK, "--no_copy", f"--scores={tmp_path / 'scores.json'}", f"--out={tmp_path / 'out'}")
    assert main(["diff", str(noisy), "bundled", *flags]) == 0
    found, printed = read(tmp_path / "out"), capsys.readouterr().out
    assert (found.start, found.trained, found.copy_scores) == (str(noisy), "bundled", None)
    assert found.versions["jax"] == jax.__version__
    assert found.retrieval == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert [sum(part.kind == kind for part in found.parts) for kind in ("group", "head", "MLP")] == [11, 32, 4]
    assert found.gains["logprob"].gain.value > 0 and found.gains["logprob"].gain.n == 2
    assert 0.35 < np.mean(found.changes.q) < 0.45 and np.shape(found.changes.q) == (4, 8)
    assert all(sentence in printed for sentence in [*sentences(found), "4 heads score at least 0.1."])
    for header, rows in (groups(found), best_heads(found)):
        assert all(cell in printed for row in [header, *rows] for cell in row)
    page = Page((tmp_path / "out" / "diff.html").read_text())
    assert page.headings == ["The gain", "Which heads carry it", "Which weights changed"]
    assert [name for name in page.drawings if name.startswith("Change of")] == [f"Change of {name}" for name in "qkvo"]
    maps = [attributes for _, attributes in page.tags if "data-tips" in attributes]
    tips = {tags["aria-label"].removesuffix(", head by head with the arrow keys"): tags["data-tips"] for tags in maps}
    across = {"Change of k": "KV head", "Change of v": "KV head"}  # which these are shared by
    carried = [f"What carries the gain in {name}" for name in ("log-probability", "recall")]
    assert page.drawings == [*carried, *tips]
    assert [tags["data-across"] for tags in maps] == [across.get(name, "head") for name in tips]
    (axes,) = groups_figure(found, "", "logprob").axes
    marked = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in "os" and len(line.get_xdata())]
    of_groups = [part.logprob for part in found.parts if part.kind == "group"]
    assert marked == [shares.put_in.value for shares in of_groups] + [shares.taken_out.value for shares in of_groups]
    shares = tips["Gain in log-probability, head put into the start model"].split("|")
    heads = [part for part in found.parts if part.kind == "head"]
    assert shares == [f"share {change(part.logprob.put_in)}" for part in heads]
    assert tips["Change of o"].split("|")[9] == f"relative change {found.changes.o[1][1]:.2g}"
    assert not [value for _, attributes in page.tags for value in attributes.values() if "http" in str(value)[:5]]
    for part in found.parts:
        assert any(row and row[0].startswith(part.name) for row in page.rows), part.name


def test_a_file_says_what_is_asked(undrawn, noisy, tmp_path, capsys):
    """The gain is that of a plain forward pass over the prompts of these needles and their answers."""
    flags = (*QUICK, "--no_copy", "--heads=0", "--needles=bundled/test_facts.jsonl", f"--out={tmp_path}")
    assert main(["diff", str(noisy), "bundled", *flags]) == 0
    for said in (capsys.readouterr().out, Page((tmp_path / "diff.html").read_text()).text):
        assert "The questions are those of bundled/test_facts.jsonl." in said and "best 0 heads" not in said
    lm = rm.load("bundled")
    cases = builtin_cases(lm, "test", 2, (96,), 1, "bundled/test_facts.jsonl")
    facts = {json.loads(line)["answer"] for line in (DATA / "test_facts.jsonl").read_text().splitlines()}
    assert {case.needle.answer for case in cases} <= facts
    for model, side in ((rm.load(noisy), "start"), (lm, "trained")):
        logps = []
        for case in cases:
            answer = case.tokens[slice(*case.span)]
            logits = rm.forward(lm.config, model.params, jnp.array([[*case.tokens, *answer]]))[0]
            logp = jax.nn.log_softmax(logits[len(case.tokens) - 1 : -1])
            logps.append(sum(float(logp[i, token]) for i, token in enumerate(answer)))
        assert getattr(read(tmp_path).gains["logprob"], side).value == pytest.approx(np.mean(logps), abs=2e-4)


@pytest.mark.parametrize(
    "names",
    [("scores.json", "2"), pytest.param(("all", "scores.json", "2", "heads.json", "0"), marks=pytest.mark.slow)],
    ids=["two", "every"],
)
def test_heads_are_chosen_by_score_or_by_a_file_and_the_groups_stay(
    undrawn, noisy, tmp_path, capsys, monkeypatch, names
):
    """Their shares are those that they have among more heads; the output says how many were measured."""
    monkeypatch.setattr("retmask_jax.cli.plan.measured_speed", lambda dtype: Speed(1e8, 1e8))
    scores_LH = np.zeros((4, 8))
    scores_LH[1, :4] = 0.5, 0.2, 0.4, 0.3
    rm.HeadScores.from_array(scores_LH).save(tmp_path / "scores.json")
    (tmp_path / "heads.json").write_text("[[3, 1], [0, 7], [3, 1]]")
    flags = (*QUICK, "--no_copy", f"--scores={tmp_path / 'scores.json'}")
    found, said = {}, {}
    for name in names:
        chosen = () if name == "all" else (f"--heads={name if name.isdecimal() else tmp_path / name}",)
        assert main(["diff", str(noisy), "bundled", *flags, *chosen, f"--out={tmp_path / name}.out"]) == 0
        found[name], printed = read(tmp_path / f"{name}.out"), capsys.readouterr()
        said[name] = int(re.search(r"^diff +about (\d+) min$", printed.err, re.MULTILINE)[1])
        sentence = f"{found[name].singly} of 32 heads were measured one by one."
        assert sentence in printed.out and sentence in Page((tmp_path / f"{name}.out/diff.html").read_text()).text
    heads = {name: [(p.layer, p.head) for p in one.parts if p.kind == "head"] for name, one in found.items()}
    everything = [(layer, head) for layer in range(4) for head in range(8)]
    expected = {"all": everything, "scores.json": [(1, 0), (1, 2), (1, 3), (1, 1)], "2": [(1, 0), (1, 2)]}
    expected |= {"heads.json": [(3, 1), (0, 7)], "0": []}
    assert heads == {name: expected[name] for name in names}
    whole = {part.name: part for part in found[names[0]].parts}
    for one in found.values():
        assert [p.name for p in one.parts if p.kind != "head"] == [p.name for p in whole.values() if p.kind != "head"]
        for part in one.parts:
            assert part.logprob.put_in.value == pytest.approx(whole[part.name].logprob.put_in.value, abs=1e-4)
    assert [said[name] for name in names] == sorted(said.values(), reverse=True) and said[names[0]] > said[names[1]]


def test_mistakes_are_one_line_before_any_weight_is_read(refused, noisy, tmp_path, monkeypatch):
    monkeypatch.setattr("retmask_jax.heads.gain.difference.load", None)
    assert "START and TRAINED are both bundled: name a model and" in refused("bundled", "bundled")
    assert f"START and TRAINED are both {noisy}:" in refused(noisy, noisy / ".." / "noisy")
    assert "no/such/folder/x does not exist" in refused("bundled", "./no/such/folder/x")
    shutil.copytree(BUNDLED, tmp_path / "other")
    config = json.loads((BUNDLED / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0, "num_hidden_layers": 3}))
    assert "not of one architecture: n_layers 4 and 3, rope Rope(" in refused("bundled", tmp_path / "other")
    shutil.copy(BUNDLED / "config.json", tmp_path / "other")
    words = (BUNDLED / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(words.replace('"rome"', '"zebra"'))
    assert "the tokenizers of START and TRAINED differ: 'rome' is token " in refused("bundled", tmp_path / "other")
    assert "--n is 0; it must be at least 1" in refused(noisy, "bundled", "--n=0")
    assert "leaves no room in the model's 1024" in refused(noisy, "bundled", "--lengths=1024")
    rm.HeadScores.from_array(np.ones((2, 3))).save(tmp_path / "scores.json")
    line = refused(noisy, "bundled", f"--scores={tmp_path / 'scores.json'}")
    assert "scores 2 layers of 3 heads, the model has 4 of 8" in line
    line = refused(noisy, "bundled", "--heads=33")
    assert "--heads is 33, the models have 32 heads: leave it out for all" in line
    assert "--heads=3 takes the best heads by score: add" in refused(noisy, "bundled", "--heads=3", "--no_copy")
    (tmp_path / "heads.json").write_text("[[4, 0]]")
    assert "head [4, 0] is out of range: the model" in refused(noisy, "bundled", f"--heads={tmp_path / 'heads.json'}")
    assert "file of heads nowhere.json does not exist" in refused(noisy, "bundled", "--heads=nowhere.json")
    assert "there is no built-in text 'builtin:fact'; there are" in refused(noisy, "bundled", "--needles=builtin:fact")
    line = refused(noisy, "bundled", "--needles=builtin:facts")
    assert "the model's tokenizer cannot write 'builtin:facts', such as 'What is the capital of" in line
    closed_book = f"--needles={DATA / 'closed_book.jsonl'}"
    assert " has no needle, the statement that a text is to hold: give it one" in refused(noisy, "bundled", closed_book)
    assert "nowhere.jsonl" in refused(noisy, "bundled", "--needles=nowhere.jsonl")
    assert "diff reads no config" in refused(noisy, "bundled", "--config.seed=1")


def test_the_same_weights_in_two_folders_are_refused(refused, tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "copy")
    assert "START and TRAINED have the same weights" in refused("bundled", tmp_path / "copy")


def test_a_map_of_signed_numbers_is_white_at_nothing_and_where_nothing_is_known():
    values = np.array([[-0.5, 0.1], [np.nan, 0.0]])
    with plotting.style():
        image = plotting.head_map("share", values, [(0, 1)], "share", signed=True).axes[0].images[0]
    assert image.get_clim() == (-0.5, 0.5)
    nothing, unknown = (image.cmap(image.norm(np.ma.masked_invalid(values)))[1, i] for i in (1, 0))
    np.testing.assert_allclose(nothing, unknown, atol=0.02)
    assert nothing[:3].min() > 0.9


@pytest.mark.slow
def test_the_gain_of_a_model_trained_by_the_recipe_is_shared_out(tmp_path):
    """With the copy scores of both; a group and all others together carry the whole, but for their interaction."""
    recipe = Path(__file__).parent.parent / "tiny_small.py"
    work = tmp_path / "work"
    for stage in ("detect", "knockout", "pairs", "train"):
        assert main([stage, f"--config={recipe}", f"--workdir={work}", "--config.train.learning_rate=3e-4"]) == 0
    trained = work / "train" / "retmask-0" / "model"
    assert main(["diff", "bundled", str(trained), "--n=8", "--lengths=128", f"--out={tmp_path / 'out'}"]) == 0
    found = read(tmp_path / "out")
    scores = rm.find_heads(rm.load("bundled"), n=8, lengths=(128,), seed=1)
    np.testing.assert_allclose(found.copy_scores.start, scores.mean)
    assert found.retrieval == scores.heads(threshold=0.1) and found.copy_scores.counted[0] == 8
    assert found.gains["logprob"].gain.value != 0 and max(map(max, found.changes.q)) > 0
    by_name = {part.name: part.logprob for part in found.parts}
    for part in found.parts:
        shares = part.logprob
        assert shares.interaction.value == pytest.approx(shares.put_in.value - shares.taken_out.value)
        assert shares.put_in.low <= shares.put_in.value <= shares.put_in.high
    assert {"retrieval heads", "other heads", "all heads", "all MLPs", "norms and embeddings"} <= by_name.keys()
    page = Page((tmp_path / "out" / "diff.html").read_text())
    assert page.headings[-1] == "Copy scores" and "8 and 8 of 8 cases count." in page.text
