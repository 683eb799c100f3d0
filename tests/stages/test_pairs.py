"""The pairs stage: answers survive kills, arms share them, and servers can give them."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers_results import detected
from helpers_servers import plan
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm
from ml_collections import ConfigDict
from retmask_jax.configs import default

from retmask_jax.data import tiny_language as tl
from retmask_jax.runs.context import Context
from retmask_jax.runs.workdir import Workdir
from retmask_jax.stages import pairs as stage
from retmask_jax.stages.arms import ARMS
from retmask_jax.stages.pairs import pairs_stage, prompt_prints
from retmask_jax.utils import files
from retmask_jax.utils.files import read_jsonl, write_json, write_jsonl
from retmask_jax.utils.store import Store

HEADS = [[1, 0], [1, 2]]
SEEDS = (0, 1)
VARIANTS = ("normal", "retmask", "any_layer", "layer_matched", "activity_matched", "no_fact", "random")
N = 9


def _prompts():
    rng = random.Random(3)
    texts = [" ".join(rng.choices(tl.VOCABULARY[4:], k=12 + i)) for i in range(N)]
    shorter = [" ".join(text.split()[:5]) for text in texts]
    both = [[[{"role": "user", "content": text}] for text in pair] for pair in zip(texts, shorter, strict=True)]
    return [{"id": f"p{9 - i}", "messages": a, "messages_without": b} for i, (a, b) in enumerate(both)]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """A context with detected heads, whose activity is made up, and the folder of the pairs stage."""
    monkeypatch.setattr(stage, "head_activity", lambda context: np.array([[1.0, 2.0, 3.0, 4.0]] * 2))
    monkeypatch.setattr(Context, "model_fingerprint", "of the small model")  # which was not read from a folder

    def make(name="work", prompts=None, arms=tuple(ARMS), seeds=SEEDS, **section):
        write_jsonl(tmp_path / "prompts.jsonl", _prompts() if prompts is None else prompts)
        config = default.get_config()
        config.batch_size, config.train.batch_size = BATCH, 2
        config.train.arms, config.train.seeds = arms, seeds
        config.pairs.update({"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": NEW, "temperature": 1.5})
        config.pairs.update(section)
        root = tmp_path / name
        write_json(root / "detect/result.json", vars(detected(HEADS)))
        context = Context(config.lock(), Workdir(root, json.loads(config.to_json())))
        context.__dict__["lm"] = copying_lm()
        return context, root / "pairs"

    return make


def _answers_of(folder):
    """Where the answers of the only run of a work directory are."""
    (found,) = folder.parent.glob("measured/sampled-*")
    return found


def _files(folder):
    return {path.name: gzip.decompress(path.read_bytes()) for path in folder.glob("*.jsonl.gz")}


def _killed_once(context, folder, monkeypatch, after):
    """Run until so many answers were added."""
    left, add = [after], Store.add

    def count(answers, key, answer):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        add(answers, key, answer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "add", count)
        pairs_stage(context, folder)
    assert not _files(folder)


def test_killed_three_times_the_files_are_those_of_an_undisturbed_run(prepare, monkeypatch, caplog):
    context, folder = prepare("whole")
    wanted = pairs_stage(context, folder)
    assert set(_files(folder)) == {f"{arm}-{seed}.jsonl.gz" for arm in ARMS for seed in SEEDS}
    context, killed = prepare("killed")
    for after in random.Random(1).sample(range(2, 30), 3):
        _killed_once(context, killed, monkeypatch, after)
    caplog.set_level("INFO", "retmask_jax")
    assert pairs_stage(context, killed) == wanted
    assert f"{len(SEEDS) * len(VARIANTS) * N} answers are stored; asking for the others" in caplog.text
    assert _files(killed) == _files(folder)
    # Every answer was sampled once, those of "normal" for all arms.
    shards = list(_answers_of(killed).iterdir())
    lines = [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
    keys = [tuple(line["key"]) for line in lines]
    assert sorted(keys) == sorted((seed, name, f"p{9 - i}") for seed in SEEDS for name in VARIANTS for i in range(N))


def test_an_arms_answers_do_not_depend_on_the_other_arms(prepare):
    every, alone = prepare("all"), prepare("alone", arms=("any_layer",))
    results = [pairs_stage(*run) for run in (every, alone)]
    name = "any_layer-1"
    assert _files(every[1])[f"{name}.jsonl.gz"] == _files(alone[1])[f"{name}.jsonl.gz"]
    assert results[0].counts[name] == results[1].counts[name]
    assert set(results[0].heads[name]).isdisjoint(map(tuple, HEADS))


def test_files_follow_the_prompts_and_counts_add_up(prepare):
    prompts = _prompts()
    prompts[2]["redacted"] = True
    prompts[5]["messages"] = [{"role": "user", "content": "bell " * CONFIG.max_length}]
    context, folder = prepare(prompts=prompts)
    result = pairs_stage(context, folder)
    asked = [prompt["id"] for i, prompt in enumerate(prompts) if i not in (2, 5)]
    assert result.prompts == 7 and result.left_out == {"redacted": 1, "empty": 0, "duplicate": 0, "too long": 1}
    answers = Store(_answers_of(folder))
    for arm, rejected in (("retmask", "retmask"), ("no_fact", "no_fact"), ("sft_filtered", "retmask")):
        for seed in SEEDS:
            records = read_jsonl(folder / f"{arm}-{seed}.jsonl.gz")
            ids = [record["id"] for record in records]
            assert ids == [i for i in asked if i in ids] and len(ids) == result.counts[f"{arm}-{seed}"]["kept"] > 3
            assert sum(result.counts[f"{arm}-{seed}"].values()) == 7
            for record in records:
                sides = answers[seed, "normal", record["id"]], answers[seed, rejected, record["id"]]
                assert (record["chosen"], record["rejected"]) == tuple(side["text"] for side in sides)
                assert record["rejected_finished"] == sides[1]["finished"]
    for name in VARIANTS:
        cut = sum(not answers[1, name, i]["finished"] for i in asked)
        assert result.answers_cut[f"{name}-1"] == cut
        assert result.numbers[f"pairs/{name}-1/answers cut"].value == pytest.approx(cut / 7)


def test_examples_are_the_first_pairs_also_where_another_host_has_written_the_file(prepare, monkeypatch):
    context, folder = prepare(arms=("retmask",))
    shown = pairs_stage(context, folder).examples
    first = read_jsonl(folder / "retmask-0.jsonl.gz")[: len(shown)]
    assert [(e.question, *e.replies.values()) for e in shown] == [
        (pair["messages"][-1]["content"], pair["chosen"], pair["rejected"]) for pair in first
    ]
    assert len(shown) == 3
    (folder / "retmask-0.jsonl.gz").unlink()
    monkeypatch.setattr(files, "primary", lambda: False)
    assert pairs_stage(context, folder).examples == shown and not (folder / "retmask-0.jsonl.gz").exists()


def test_without_arms_there_are_no_pairs_and_no_examples(prepare):
    result = pairs_stage(*prepare(arms=(), seeds=(0, 1, 2, 3)))  # as many masks as one arm of two seeds has
    assert (result.counts, result.examples) == ({}, [])


def test_pairs_may_have_other_template_arguments_than_detection(prepare, monkeypatch):
    context, folder = prepare(template_kwargs=ConfigDict({"word": "oslo"}), arms=("retmask",))
    tokenizer = tl.build_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }} {{ word or 'rome' }}"
    context.__dict__["lm"] = copying_lm().replace(tokenizer=tokenizer)
    message = [{"role": "user", "content": "bell"}]
    assert context.prompter.render_messages(message) == "bell rome"
    assert context.pairs_prompter.render_messages(message) == "bell oslo"
    asked = []
    monkeypatch.setattr(
        "retmask_jax.training.pairs.sample", lambda lm, questions, *_, **__: asked.extend(questions) or iter(())
    )
    with pytest.raises(KeyError):  # nothing was answered
        pairs_stage(context, folder)
    assert {question.tokens[-1] for question in asked} == {tl.VOCABULARY.index("oslo")}


# --- endpoints ---


def _servers(serve, shares=0.0):  # noqa: F811
    names = ("normal", "retmask", "any_layer-0", "any_layer-1")
    return {name: serve(name, plan(300, shares, seed)) for seed, name in enumerate(names)}


def _endpoints(servers, **options):
    urls = ConfigDict({name: server.url for name, server in servers.items()})
    settings = {"endpoints": urls, "concurrency": 6, "timeout": 0.5, "arms": ("retmask", "any_layer", "no_fact")}
    return settings | options


def test_servers_that_fail_give_the_files_of_servers_that_do_not(prepare, serve):  # noqa: F811
    healthy = _servers(serve)
    context, folder = prepare("healthy", **_endpoints(healthy))
    wanted = pairs_stage(context, folder)
    assert [len(server.seen) for server in healthy.values()] == [4 * N, 2 * N, N, N]  # no_fact asks "normal"
    context, failing = prepare("failing", **_endpoints(_servers(serve, 0.3), retries=0))
    runs = 0
    while True:
        runs += 1
        try:
            found = pairs_stage(context, failing)
            break
        except ValueError as error:
            assert "run the same command again" in str(error) and not _files(failing)
    assert runs > 1
    assert found == wanted
    assert _files(failing) == _files(folder)


def test_pairs_from_servers_and_pairs_that_are_there_load_no_weights(prepare, serve, monkeypatch):  # noqa: F811
    context, folder = prepare("sampled", arms=("retmask",))
    pairs_stage(context, folder)
    monkeypatch.setattr("retmask_jax.runs.context.load", lambda *_, **__: pytest.fail("weights were loaded"))
    for other, there in ((context, folder), prepare("asked", **_endpoints(_servers(serve)))):
        other.__dict__["_outline"] = other.__dict__.pop("lm").replace(params=None)
        pairs_stage(other, there)


def test_a_server_that_is_not_named_is_asked_for_with_its_heads(prepare, serve):  # noqa: F811
    servers = _servers(serve)
    del servers["any_layer-1"]
    with pytest.raises(ValueError, match=r"lacks any_layer-1: `retmask export --heads \d-\d \d-\d` writes its model"):
        pairs_stage(*prepare(**_endpoints(servers)))
    del servers["normal"]
    with pytest.raises(ValueError, match="lacks normal: it serves the model as it is"):
        pairs_stage(*prepare("other", **_endpoints(servers)))
    assert not any(server.seen for server in servers.values())


# --- the command ---


@pytest.mark.slow
def test_the_command_killed_three_times_gives_the_same_files(tmp_path):
    config = Path(__file__).parents[1] / "tiny_small.py"
    base = [sys.executable, "-m", "retmask_jax.cli.main"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*base, "detect", f"--config={config}", f"--workdir={whole}"], check=True, capture_output=True)
    shutil.copytree(whole, killed)
    # Of two rows at a time, so that answers are written often enough to be killed between.
    base, rng = [*base, "pairs", f"--config={config}", "--config.pairs.batch_size=2"], random.Random(0)
    subprocess.run([*base, f"--workdir={whole}"], check=True, capture_output=True)
    command = [*base, f"--workdir={killed}"]
    for _ in range(3):
        before = sum(path.stat().st_size for path in killed.glob("measured/sampled-*/*"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.time() + 120
        while sum(path.stat().st_size for path in killed.glob("measured/sampled-*/*")) == before:
            assert process.poll() is None and time.time() < end, "it ended before it could be killed"
            time.sleep(0.002)
        time.sleep(0.01 * rng.random())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "pairs/result.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert _files(killed / "pairs") == _files(whole / "pairs") != {}
    counts = [json.loads((root / "pairs/result.json").read_text())["counts"] for root in (whole, killed)]
    assert counts[0] == counts[1]


def test_more_arms_ask_for_their_own_answers_alone_and_other_settings_for_all(prepare, monkeypatch):
    asked, sample = [], stage.pairs.sample

    def asking(lm, questions, *given, **options):
        asked.append(sorted({question.variant for question in questions}))
        return sample(lm, questions, *given, **options)

    monkeypatch.setattr(stage.pairs, "sample", asking)
    context, folder = prepare(arms=("retmask",), seeds=(0,))
    pairs_stage(context, folder)
    first = _files(folder)
    found = pairs_stage(*prepare(arms=("retmask", "any_layer"), seeds=(0,)))
    assert asked == [[(0, "normal"), (0, "retmask")], [(0, "any_layer")]]
    assert first.items() < _files(folder).items() and set(found.answers_cut) == {"normal-0", "retmask-0", "any_layer-0"}
    assert set(pairs_stage(*prepare(arms=("retmask",), seeds=(0,))).answers_cut) == {"normal-0", "retmask-0"}
    pairs_stage(*prepare(arms=("retmask",), seeds=(0,), temperature=1.0))
    assert asked[2:] == [[(0, "normal"), (0, "retmask")]]


def test_answers_that_lie_with_the_pairs_stay_there(prepare):
    context, folder = prepare(arms=("retmask",))
    wanted = pairs_stage(context, folder)
    place = _answers_of(folder)
    place.rename(folder / "answers")
    assert pairs_stage(context, folder) == wanted and not place.exists()


def test_only_an_arm_of_heads_of_similar_activity_has_it_measured(prepare, monkeypatch):
    measured = []

    def measure(context):
        measured.append(context)
        return np.array([[1.0, 2.0, 3.0, 4.0]] * 2)

    runs = [prepare("every"), prepare("few", arms=("retmask", "layer_matched"))]
    monkeypatch.setattr(stage, "head_activity", measure)
    for run in runs:
        pairs_stage(*run)
    assert measured == [runs[0][0]]


def test_prompts_are_known_by_what_they_hold_wherever_they_lie(prepare, tmp_path):
    """An installation in another folder asks nobody anew."""
    there, _ = prepare()
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(tmp_path / "prompts.jsonl", tmp_path / "elsewhere")
    here, _ = prepare("other")
    with here.config.unlocked():
        here.config.pairs.prompts = str(moved)
    assert prompt_prints(here) == prompt_prints(there)
    write_jsonl(moved, _prompts()[:-1])
    assert prompt_prints(here) != prompt_prints(there)
