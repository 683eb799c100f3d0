"""Benchmarks: all of them run, and the peers compute what we do. No time is asserted."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import retmask_jax as rm
from retmask_jax.aot import table
from retmask_jax.benchmarks import chip, detect, dpo, generate, harness, mask_peers, masks, memory, models, peers
from retmask_jax.benchmarks.harness import Bound, Report, Row
from retmask_jax.benchmarks.memory import Peak, growth_rows
from retmask_jax.benchmarks.peers import TrlPeer
from retmask_jax.benchmarks.programs import PROGRAMS, OurTrainer, dpo_settings, random_pairs
from retmask_jax.cli.main import main
from retmask_jax.generation.batching import pad_rows
from retmask_jax.generation.decode import generate_many
from retmask_jax.generation.sweep import sweep
from retmask_jax.heads.copy_score import detect as our_detect
from retmask_jax.heads.reading import read_answers
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.model.config import ModelConfig
from retmask_jax.training.optimizer import schedule

SMALL = ModelConfig(
    vocab_size=96, hidden_size=32, mlp_size=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, max_length=256
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a random model of two layers with four heads."""
    folder = tmp_path_factory.mktemp("small")
    models.write_random(SMALL, folder, "float32")
    return folder


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def uncollected(monkeypatch):
    """`alternate` collects no garbage; with torch imported each collection takes a large part of a second."""
    monkeypatch.setattr(harness, "gc", SimpleNamespace(collect=lambda: None))


# --- the command ---


@pytest.mark.parametrize("difference, status", [(1e-7, 0), (1e-5, 1)])
def test_results_that_disagree_end_in_status_1(monkeypatch, capsys, tmp_path, difference, status):
    row = Row("a row", "s", 1.0, 2.0, 2.0, bounds=(Bound("difference", difference, "<=", 1e-6),))
    monkeypatch.setattr(masks, "run", lambda **options: Report("masks", options, [row]))
    assert main(["bench", "masks", "--masks=3", f"--out={tmp_path / 'out.json'}"]) == status
    out, err = capsys.readouterr()
    assert "a row" in out and ("results disagree: a row: difference" in err) == bool(status)
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["setting"] == {
        "size": "bundled",
        "model": None,
        "length": None,
        "layers": None,
        "repeats": 5,
        "masks": 3,
        "prompts": None,
    }


@pytest.mark.parametrize("package, arguments", [("torch", ["generate"]), ("torch", ["detect"]), ("trl", ["dpo"])])
def test_missing_package_is_one_line(monkeypatch, capsys, package, arguments):
    if package != "torch":
        pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"retmask: {package} cannot be imported") and "install retmask_jax[bench]" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["memory", "--length=8192"], "leaves no doubling"),
        (["masks", "--repeats=0"], "--repeats is 0; it must be at least 1"),
        (["generate", "--layers=2"], "the bundled model is what it is"),
        (["detect", "--masks=2"], "unknown argument '--masks=2'"),
        (["dpo", "--size=bundled"], "invalid choice: 'bundled'"),
    ],
)
def test_mistakes(capsys, arguments, message):
    if arguments[0] == "generate":
        pytest.importorskip("torch")
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_growth():
    rows = growth_rows("prefill", [8, 16, 32], [100, 200, 450])
    assert [bound.value for row in rows for bound in row.bounds] == [2.0, 2.25]
    assert Report("memory", {}, rows).violated == ["prefill, 32: growth 2.25 VIOLATES <= 2.2"]


def test_peak_sees_memory_that_is_gone_again():
    with Peak() as peak:
        np.ones(2**27, np.uint8).sum()
    assert 0.9 * 2**27 < peak.bytes < 1.5 * 2**27


# --- what is compared ---


def test_fixed_cases_share_a_haystack():
    prompts, answers, spans = detect.fixed_cases(500, 200, depths=3, needles=2)
    assert {len(prompt) for prompt in prompts} == {200} and len(prompts) == 6
    assert [prompt[start:end] for prompt, (start, end) in zip(prompts, spans, strict=True)] == answers
    hay = [prompt[:start] + prompt[end:-16] for prompt, (start, end) in zip(prompts, spans, strict=True)]
    assert all(text == hay[0] for text in hay) and [start for start, _ in spans[:3]] == [0, 84, 168]


def test_agreement_names_the_weight_between_different_keys():
    theirs = [np.zeros((2, 1, 2), int), np.zeros((2, 1, 2), int)]
    ours = [theirs[0], theirs[1].copy()]
    ours[1][1, 0, 1] = 3
    weights = [[np.full((2, 4), 0.25)], [np.array([[0.25] * 4, [0.4, 0.1, 0.2, 0.3]])]]
    asked = []
    share, gap = detect.agreement(ours, theirs, lambda case: asked.append(case) or weights)
    assert share == 7 / 8 and np.isclose(gap, 0.1) and asked == [1]


def test_first_difference_of_continuations():
    ours, theirs = np.array([[5, 6, 7], [5, 6, 7]]), np.array([[5, 6, 7], [5, 1, 2]])
    seen = []
    logits = np.array([0, 2.0, 0, 0, 0, 0, 1.5, -4.0])
    found = generate.compare(ours, theirs, [[9], [9, 9]], lambda tokens: seen.append(tokens) or logits)
    assert seen == [[9, 9, 5]]
    assert (found.share, found.first, found.parted) == (4 / 6, 1, [(1, 1, 0.125)])


def test_masks_spread_over_layers():
    by_layer = masks.spread_masks(SMALL, 4)
    assert [list(mask) for mask in by_layer] == [[0], [0], [1], [1]]


# --- every benchmark runs ---

# What `retmask bench` is called with, at the smallest sizes at which no part is left out.
QUICK = {
    ("detect", "bundled"): {"length": 80, "repeats": 1, "depths": 1, "needles": 1, "max_new_tokens": 6},
    ("detect", "30m"): {"length": 48, "repeats": 1, "depths": 1, "needles": 1, "max_new_tokens": 6},
    ("masks", "bundled"): {"length": 16, "repeats": 1, "masks": 2, "prompts": 1},
    ("generate", "30m"): {"length": 16, "repeats": 1, "batch": 2, "new_tokens": 1},
}


@pytest.fixture
def quick(monkeypatch):
    """A random model of one layer in place of 30m, and small measurements of the machine."""
    tiny = dataclasses.replace(SMALL, n_layers=1, max_length=512)
    monkeypatch.setitem(models._SHAPES, "30m", tiny)
    monkeypatch.setitem(chip._PRODUCT, "cpu", 64)
    monkeypatch.setitem(chip._COPIED, "cpu", 2**16)


@pytest.fixture
def stand_ins(monkeypatch):
    """Our model in the peers' place, by programs that are compiled already: `run` needs no torch and little time then.

    That the peers themselves compute what we do is tested below.
    """
    for module in (detect, masks, generate, dpo):
        monkeypatch.setattr(module, "require", lambda name: None)
    for module in (detect, masks, generate):
        monkeypatch.setattr(
            module, "load_peer", lambda folder, dtype, attention="": rm.load(folder, dtype, models.mesh())
        )

    def hooked_sweep(lm, tokens, masks_by_layer, one_by_one=False):
        wanted = [masks.as_interventions(lm.config, by_layer) for by_layer in masks_by_layer]
        return np.asarray(sweep(lm, tokens, np.full(len(tokens), tokens.shape[1], np.int32), wanted))

    def peer_generate(lm, prompts, new_tokens, pad_id):
        tokens, lengths = pad_rows(prompts, pad_id)
        return np.asarray(lm.generate(tokens, lengths, max_new_tokens=new_tokens, stop_ids=()).tokens)

    def published_detection(
        lm, prompt, span, *, max_new_tokens, stop_ids=(), line_ends=(), fixed=None, keep_weights=False
    ):
        assert not set(line_ends) & set(prompt)  # no answer of the bundled model has one
        if fixed is None:
            options = {"batch_size": 1, "max_new_tokens": max_new_tokens, "stop_ids": (), "probe": True}
            (out,) = generate_many(lm.config, lm.params, [prompt], **options)
            end = next((i for i, token in enumerate(out.tokens) if token in stop_ids), len(out.tokens))
            tokens, argmax = out.tokens[:end], out.argmax[:end]
        else:
            tokens, argmax = np.array(fixed), read_answers(lm, [prompt], [fixed], batch_size=1)[0].argmax
        copied = [
            [
                [int(t) for t, key in zip(tokens, keys, strict=True) if span[0] <= key < span[1] and prompt[key] == t]
                for keys in layer.T
            ]
            for layer in argmax.swapaxes(0, 1)
        ]
        return peers.Detected(tokens, argmax, copied, [])

    class Recorded(OurTrainer):
        def step(self):
            done.append(super().step())
            return done[-1]

        def reference_pass(self):
            references.append(super().reference_pass())
            return references[-1]

    class Replayed:
        def __init__(self, folder, pairs, settings, work, *, precomputed):
            self.tokens = peers.token_rows(pairs)
            self.reference, self._steps = references[0], 0

        def step(self, learning_rate):
            self._steps += 1
            return done[self._steps - 1]

    done, references = [], []
    monkeypatch.setattr(dpo, "OurTrainer", Recorded)
    monkeypatch.setattr(masks, "hooked_sweep", hooked_sweep)
    monkeypatch.setattr(generate, "peer_generate", peer_generate)
    monkeypatch.setattr(detect, "published_detection", published_detection)
    monkeypatch.setattr(dpo, "TrlPeer", Replayed)


@pytest.mark.parametrize(
    "name, size", [pytest.param(*key, marks=pytest.mark.slow) if key == ("detect", "bundled") else key for key in QUICK]
)
def test_every_benchmark_against_a_peer_runs_and_agrees(quick, stand_ins, name, size):
    options = QUICK[name, size] | {"size": size, "layers": None}
    report = importlib.import_module(f"retmask_jax.benchmarks.{name}").run(**options)
    assert report.violated == [] and all(row.ours and row.peer for row in report.rows)
    assert any(row.bounds for row in report.rows) and harness.table_rows(report)


def test_a_model_that_is_named_is_asked_for_the_built_in_needles(quick, stand_ins):
    """Cases of three lengths, in the order of the text; the keys of both sides are compared."""
    options = {"length": 192, "repeats": 1, "depths": 1, "needles": 2, "max_new_tokens": 6}
    report = detect.run(size="bundled", layers=None, model="bundled", **options)
    (row,) = report.rows
    assert report.violated == [] and row.facts["equal keys"] == 1 and row.facts["outcomes"]["counted"] >= 4
    assert {bound.name for bound in row.bounds} == {"cases counted", "equal keys", "weight between keys"}
    assert row.name.startswith("bundled, 6 cases of 48 to 192 tokens") and row.target.limit == 3
    with pytest.raises(ValueError, match="bundled is what it is: --layers needs"):
        detect.run(size="bundled", layers=2, model="bundled", **options)


@pytest.mark.parametrize("lora_rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_benchmark_of_training_runs_with_and_without_adapters(quick, stand_ins, monkeypatch, lora_rank):
    taken = {"ours": {"whole": 30, "step": 20}, "trl": {"whole": 90, "step": 50}}
    monkeypatch.setattr(dpo, "measure", lambda what, **options: taken[what])
    monkeypatch.setattr(dpo, "_MEMORY_SHAPE", {"vocab_size": 128, "n_layers": 1})
    report = dpo.run(
        size="30m", length=8, layers=None, repeats=1, pairs=1, remat=True, memory_length=8, lora_rank=lora_rank
    )
    assert report.violated == [] and len(report.rows) == (3 if lora_rank else 7)
    assert lora_rank or [row.ratio for row in report.rows[-2:]] == [30 / 90, 20 / 50]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_benchmark_of_memory_reports_every_program(quick, monkeypatch, compiled):
    """Each is compiled once, or not at all, to save time: its memory at 128 tokens is then that at 64."""

    def once(make):
        reported = functools.cache(lambda config: make(config, 64).temporary_bytes() if compiled else 1000)
        return lambda config, length: SimpleNamespace(temporary_bytes=lambda: reported(config))

    monkeypatch.setattr(memory, "PROGRAMS", {name: once(make) for name, make in PROGRAMS.items()})
    monkeypatch.setattr(memory, "_LENGTHS", (64, 128))
    monkeypatch.setattr(memory, "measure", lambda what, name, size, layers, length: {"peak": length})
    report = memory.run(size="30m", length=128, layers=1, measured=True)
    for program in PROGRAMS:
        needed = [row.ours for row in report.rows if row.name.startswith(f"30m, {program}, compiler")]
        assert len(needed) == 2 and needed[0] == needed[1] > 0
        measured = [row.ours for row in report.rows if row.name.startswith(f"30m, {program}, measured")]
        assert measured[:2] == [4096, 8192] and len(measured) == 2 + (program == "prefill")


@pytest.mark.slow  # each runs in a new process
@pytest.mark.parametrize(
    "what, options",
    [
        *(("program", {"name": name, "size": "30m", "layers": 1, "length": 128}) for name in PROGRAMS),
        ("ours", {"length": 16, "pairs": 1}),
    ],
)
def test_peaks_are_measured_of_every_piece_of_work(small, what, options):
    found = memory.measure(what, **options | ({"folder": str(small)} if what == "ours" else {}))
    assert set(found) == ({"peak"} if what == "program" else {"whole", "step"}) and all(n > 0 for n in found.values())


def test_the_commands_benchmarks_are_all_here():
    from retmask_jax.cli.parser import BENCHMARKS

    assert set(BENCHMARKS) == {*(name for name, _ in QUICK), "dpo", "memory"}


def test_the_table_of_topologies_is_asked_for_in_words_that_are_checked(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(table, "fill", lambda *args, **options: seen.append((args, options)) or True)
    assert table.main(["recipes", "--recipes", "tiny", "--topologies", "v5e:2x2", f"--out={tmp_path / 'x.json'}"]) == 0
    assert seen == [
        ((tmp_path / "x.json",), {"recipes": ["tiny"], "topologies": ["v5e:2x2"], "long": False, "models": None})
    ]
    for wrong in (["prefill"], ["recipes", "--nothing"], ["prefill", "--length=8", "--topology=v9:1x1"]):
        assert table.main([*wrong]) == 2
        assert capsys.readouterr().err.startswith("aot: ")


def _private_uses(tree: ast.Module) -> list[str]:
    """Names with a leading underscore that code takes from other modules: by an import, or as attributes of modules."""
    found, of_modules = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        found += [
            name for name, _ in names if any(part.startswith("_") for part in name.split(".") if part != "__future__")
        ]
        of_modules |= {bound for name, bound in names if isinstance(node, ast.Import) or _is_module(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            whole = ast.unparse(node)
            if whole.split(".")[0] in of_modules:
                found.append(whole)
    return found


@functools.cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def test_benchmarks_call_no_private_function_of_another_module():
    """Such a function changes without notice: a benchmark called one with 9 of its 13 arguments, and could not run."""
    for path in sorted(Path(harness.__file__).parent.glob("*.py")):
        assert not _private_uses(ast.parse(path.read_text())), path.name
    for wrong in (
        "from retmask_jax.heads.copy_score import _read",
        "from retmask_jax.heads.copy_score import _read as read",
        "from retmask_jax.heads import copy_score\ncopy_score._read()",
        "from retmask_jax.heads import copy_score as c\nc._read()",
        "import retmask_jax.heads.copy_score\nretmask_jax.heads.copy_score._read()",
        "from jax._src import core",
        "def f():\n    import jax._src.core",
    ):
        assert _private_uses(ast.parse(wrong)), wrong
    for right in (
        "from retmask_jax.heads.copy_score import detect",
        "import jax\njax.jit()",
        "self._x()",
        "from __future__ import x",
    ):
        assert not _private_uses(ast.parse(right)), right


# --- peers compute what we do ---


@pytest.mark.parametrize("released", [True, False])
def test_published_detection_scores_as_ours(torch, released):
    lm = rm.load("bundled")
    cases = detect.bundled_cases(96, depths=2, needles=1)
    peer = peers.load_peer(BUNDLED, "float32", "eager")
    ours = our_detect(lm, cases, max_new_tokens=8, batch_size=2, released=released)
    assert ours.reasons == {"counted": 2} and ours.scores.mean.max() > 0.5
    theirs = detect.peer_scores(peer, lm.tokenizer, cases, 8, None if released else lm.config.eos_ids)
    np.testing.assert_allclose(theirs, ours.scores.mean, atol=1e-6)


def test_published_detection_looks_at_our_keys(torch, small):
    lm, peer = rm.load(small), peers.load_peer(small, "float32", "eager")
    prompts, answers, spans = detect.fixed_cases(SMALL.vocab_size, 64, depths=2, needles=1)
    found = [
        peers.published_detection(peer, prompt, span, max_new_tokens=0, fixed=answer, keep_weights=True)
        for prompt, answer, span in zip(prompts, answers, spans, strict=True)
    ]
    ours = [found.argmax for found in read_answers(lm, prompts, answers, batch_size=2)]
    share, gap = detect.agreement(ours, [one.argmax for one in found], lambda case: found[case].weights)
    assert share >= 0.99 and gap < 1e-5
    assert found[0].argmax.shape == (16, 2, 4) and len(np.unique(found[0].argmax)) > 8


def test_hooks_mask_what_we_mask(torch, small, close):
    lm, peer = rm.load(small), peers.load_peer(small, "float32")
    tokens = models.random_tokens(SMALL.vocab_size, 3, 20)
    by_layer = [{0: [1, 2]}, {1: [0]}, {}]
    ours = sweep(lm, tokens, np.full(3, 20, np.int32), [masks.as_interventions(lm.config, mask) for mask in by_layer])
    for one_by_one in (False, True):
        theirs = mask_peers.hooked_sweep(peer, tokens, by_layer, one_by_one)
        close(ours, theirs)
    assert all(np.abs(theirs[i] - theirs[2]).max() > 1e-3 * np.abs(theirs).max() for i in (0, 1))


def test_transformers_generates_what_we_do(torch):
    lm, peer = rm.load("bundled"), peers.load_peer(BUNDLED, "float32")
    prompts = [
        row[:n]
        for row, n in zip(
            models.text_or_random(models.Subject("bundled", "bundled", BUNDLED, "float32"), 3, 40).tolist(),
            (12, 29, 40),
            strict=True,
        )
    ]
    tokens, lengths = pad_rows(prompts, lm.config.pad_id)
    ours = lm.generate(tokens, lengths, max_new_tokens=6, stop_ids=())
    np.testing.assert_array_equal(peers.generate(peer, prompts, 6, lm.config.pad_id), ours.tokens)


@pytest.mark.slow  # TRL takes long to import
def test_trl_takes_our_step(torch, small, tmp_path):
    pytest.importorskip("trl")
    # Losses that move: in five steps at 1e-3 most of the way to zero.
    settings = dataclasses.replace(dpo_settings(2, "float32"), learning_rate=1e-3, final_learning_rate=1e-4, steps=5)
    pairs = random_pairs(SMALL.vocab_size, 24, 2)
    ours = OurTrainer(small, pairs, settings)
    peer = TrlPeer(small, pairs, settings, tmp_path, precomputed=True)
    np.testing.assert_array_equal(peer.tokens, peers.token_rows(pairs))
    np.testing.assert_allclose(peer.reference, ours.reference, rtol=1e-5)
    rate = schedule(settings)
    rows = [(ours.step(), peer.step(float(rate(i)))) for i in range(5)]
    for name in ("loss", "reward_chosen", "reward_rejected", "gradient_norm"):
        mine, theirs = (np.array([row[side][name] for row in rows]) for side in (0, 1))
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6, err_msg=name)
    assert rows[-1][0]["loss"] < rows[0][0]["loss"] - 0.01 and abs(rows[-1][0]["reward_chosen"]) > 1e-3
