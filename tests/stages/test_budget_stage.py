"""The stage `budget` on a small model, against a slow reference of it: recall, loss, shares of keys, and who is compared."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from helpers_results import stored
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, in_float64, reference, reference_answer
from retmask_jax.configs import default

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.needles import Needle, build_cases, draw_specs
from retmask_jax.data.prompter import Prompter
from retmask_jax.heads.conditions import hits
from retmask_jax.heads.detectors import DETECTORS
from retmask_jax.heads.lists.keys_kept import kv_heads_of, random_kv_heads, stream_all_but
from retmask_jax.model.interventions import all_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.workdir import Workdir
from retmask_jax.stages import outcomes
from retmask_jax.stages.study.budget import BUDGET, budget_stage
from retmask_jax.stages.study.budget_rows import TEXT
from retmask_jax.utils import stats

LM, PARAMS = copying_lm(), in_float64(copying_lm().params)
WINDOWS = np.random.default_rng(7).integers(4, CONFIG.vocab_size, (3, 24)).astype(np.int32)
LIST = [[1, 3], [1, 2], [0, 0], [1, 1]]  # query heads of KV heads 1-1, 0-0 and 1-0
SINK, WINDOW, TOTAL = 2, 6, 4


def _cases(n=3):
    """Cases of which the model itself says the answer."""
    rng = np.random.default_rng(0)
    needles = [Needle(**record) for record in tl.needle_records(rng, n)]
    specs = draw_specs(needles, [60], [0.2], per_length=n)
    cases = build_cases(Prompter(LM.tokenizer), tl.haystack_text(rng, 30), needles, specs)
    said = [_text(reference_answer(PARAMS, case.tokens, NEW, (tl.EOS,))[0]) for case in cases]
    return [
        dataclasses.replace(case, needle=dataclasses.replace(case.needle, answer=text or "nothing"))
        for case, text in zip(cases, said, strict=True)
    ]


def _text(tokens):
    return " ".join(tl.VOCABULARY[i] for i in tokens if i > tl.UNK)


CASES = _cases()


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """A context with the cases and windows above, and a file that lists four heads."""
    monkeypatch.setattr(Context, "cases", lambda self, task, **changes: CASES)
    monkeypatch.setattr(Context, "windows", lambda self, length=None: WINDOWS)
    monkeypatch.setattr(Context, "model_fingerprint", "of the small model")  # which was not read from a folder
    (tmp_path / "listed.json").write_text(json.dumps(LIST))

    def make(**settings):
        config = default.get_config()
        config.tasks.detect = default.task("n.jsonl", lengths=(60,), max_new_tokens=NEW)
        config.tasks["closed"] = default.task("n.jsonl", max_new_tokens=NEW)
        config.batch_size, config.detect.max_new_tokens, config.text.file = BATCH, NEW, "text.txt"
        config.knockout.tasks = ("detect",)
        given = {"files": ("listed.json",), "detectors": ("mass",), "kept": (0.0, 1, 2, 1.0), "draws": 2}
        given |= {"sink": SINK, "window": WINDOW, "length": 24} | settings
        for name, value in given.items():
            config.budget[name] = tuple(str(tmp_path / file) for file in value) if name == "files" else value
        context = Context(config.lock(), Workdir(tmp_path / "work", {}))
        context.__dict__["lm"] = LM
        return context

    return make


def _slow(kept):
    """(right or wrong, the loss of each window) where all but these KV heads stream, by the reference."""
    return _slow_of(frozenset(kept))


@functools.cache
def _slow_of(kept):
    mask_LH = np.asarray(stream_all_but(CONFIG, kept, SINK, WINDOW).stream_mask)
    streams = {"streams": (mask_LH, SINK, WINDOW)}
    texts = [_text(reference_answer(PARAMS, case.tokens, NEW, (tl.EOS,), **streams)[0]) for case in CASES]
    losses = []
    for window_T in WINDOWS:
        logits_TV = reference(PARAMS, window_T, **streams)[0][:-1]
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
        losses.append(-logp_TV[np.arange(len(logp_TV)), window_T[1:]].mean())
    return hits(texts, CASES).astype(float), np.array(losses)


def test_every_budget_is_measured_as_the_slow_model_says(prepare, tmp_path):
    result = budget_stage(prepare(), tmp_path)
    assert stored({"budget": result})["budget"] == result
    mass = kv_heads_of(CONFIG, DETECTORS["mass"](LM, CASES, batch_size=BATCH).scores.heads(top_k=8))
    listed, drawn = [(1, 1), (0, 0), (1, 0)], [random_kv_heads(CONFIG, seed) for seed in (0, 1)]
    expected = [("mass", 0, mass[:n]) for n in (0, 1, 2, 4)] + [("listed", 0, listed[:n]) for n in (0, 1, 2)]
    expected += [("random", draw, order[:n]) for draw, order in enumerate(drawn) for n in (0, 1, 2, 4)]
    assert [(one.name, one.draw, one.kv_heads) for one in result.sets] == expected
    assert [one.k for one in result.sets if one.name == "listed"] == [0, 2, 3]
    assert (result.sizes, result.total, result.names) == ([0, 1, 2, 4], TOTAL, ["mass", "listed", "random"])
    untouched = _slow(random_kv_heads(CONFIG, 0))
    assert result.untouched["detect"] == stats.proportion(untouched[0] == 1) and result.untouched["detect"].value == 1
    assert result.untouched[TEXT].value == pytest.approx(untouched[1].mean(), abs=1e-4)
    measured = {(name, draw, len(kept)): _slow(kept) for name, draw, kept in expected}
    for row in result.rows:
        which = ("detect", TEXT).index(row.measure)
        values = np.array([x[which] for (name, _, kept), x in measured.items() if (name, kept) == (row.name, row.kept)])
        assert row.value == pytest.approx(values.mean(), abs=1e-4)
        assert row.change.value == pytest.approx((values - untouched[which]).mean(), abs=1e-4)
        lengths = [24] if row.measure == TEXT else [len(case.tokens) for case in CASES]
        whole = row.kept / TOTAL
        assert row.share == pytest.approx(np.mean([whole + (1 - whole) * (SINK + WINDOW) / n for n in lengths]))
        assert row.low <= row.value <= row.high and (row.n, row.change.n) == (3, 3)
    assert {row.kept for row in result.rows if row.name == "listed"} == {0, 1, 2}
    assert len({row.value for row in result.rows if row.measure == "detect"}) > 1
    _margins_are_those_of(result, measured)
    assert [example.replies.keys() for example in result.examples][0] == {"untouched", "all heads stream"}


def _margins_are_those_of(result, measured):
    """With as many random KV heads, over the budgets between nothing and everything."""
    assert [(one.measure, one.name) for one in result.margins] == [
        (measure, name) for measure in ("detect", TEXT) for name in ("mass", "listed")
    ]
    for one in result.margins:
        which, by_list = ("detect", TEXT).index(one.measure), {"random": [], one.name: []}
        for (name, _, kept), values in measured.items():
            if name in by_list and kept in (1, 2):
                by_list[name].append(values[which].mean())
        assert one.value == pytest.approx(np.mean(by_list[one.name]) - np.mean(by_list["random"]), abs=1e-4)
        assert result.numbers[f"budget/{one.measure}/{one.name} less random"] == one.number


def test_recall_is_enough_from_the_budget_on_above_which_it_always_is(prepare, tmp_path, monkeypatch):
    recall = {0: 0.0, 1: 1.0, 2: 0.3, 3: 1.0, 4: 1.0}  # at one KV head by luck

    def answered(context, tasks, conditions):
        kept = [TOTAL - len({(layer, h // 2) for layer, h in np.argwhere(_mask(c))}) for c in conditions]
        right = np.array([np.arange(10) < 10 * recall[n] for n in kept])
        return outcomes.Answered({"detect": right}, {"detect": CASES}, {"detect": [[""] * 3] * len(kept)})

    monkeypatch.setattr("retmask_jax.stages.study.budget.task_outcomes", answered)
    context = prepare(kept=(0, 1, 2, 3, 4), detectors=(), draws=1)
    result = budget_stage(context, tmp_path)
    found = {one.name: (one.kept, one.share) for one in result.enough}
    share = {(row.name, row.kept): row.share for row in result.rows if row.measure == "detect"}
    assert found == {"listed": (3, share["listed", 3]), "random": (3, share["random", 3])}
    recall[3] = 0.5
    found = {one.name: (one.kept, one.share) for one in budget_stage(context, tmp_path).enough}
    assert found == {"listed": (None, None), "random": (4, 1.0)}


def _mask(condition):
    mask = condition.interventions.stream_mask
    return np.zeros((CONFIG.n_layers, CONFIG.n_heads), bool) if mask is None else np.asarray(mask)


def test_what_was_measured_is_kept_and_a_choice_of_two_lists_is_measured_once(prepare, tmp_path, monkeypatch):
    asked, answers = [], outcomes.answers

    def counting(lm, cases, masks, **options):
        asked.append((len(cases) * len(masks), len(options["known"])))
        return answers(lm, cases, masks, **options)

    monkeypatch.setattr(outcomes, "answers", counting)
    first = budget_stage(prepare(detectors=()), tmp_path)
    masks = len({frozenset(one.kv_heads) for one in first.sets})  # with that of all, which is the untouched model
    (tmp_path / "same.json").write_text(json.dumps([[1, 2], [0, 1]]))
    again = budget_stage(prepare(detectors=(), files=("listed.json", "same.json")), tmp_path)
    assert asked == [(3 * masks, 0), (3 * masks, 3 * masks)]
    same = [dataclasses.replace(row, name="listed") for row in again.rows if row.name == "same"]
    assert same == [row for row in first.rows if row.name == "listed"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kept": ()}, "budget.kept is empty: name shares or numbers of KV heads"),
        ({"kept": (0, 5)}, "a budget of 5 KV heads: the model has 4, so its numbers lie in 0 to 4"),
        ({"detectors": (), "files": ()}, "budget.detectors and budget.files are empty: name a list of heads"),
        ({"detectors": ("mas",)}, "budget.detectors has 'mas'; known detectors are copy"),
        (
            {"window": 58},
            "streaming heads see 60 tokens, and those of detect are at most 60: lower budget.window, or .*tasks",
        ),
        ({"length": 8}, "streaming heads see 8 tokens, and those of text loss are at most 8: lower .*budget.length"),
        ({"tasks": ("closed",)}, "those of closed are at most 0"),
        ({"length": 600}, "texts of 600 tokens exceed the model's context of 512: lower budget.length"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_runs(prepare, settings, message):
    def check(**settings):
        context = prepare(**settings)
        BUDGET.check(context.config)
        BUDGET.check_run(context.config)
        BUDGET.check_fit(context)

    check()
    with pytest.raises(ValueError, match=message):
        check(**settings)


def test_a_model_whose_own_window_is_shorter_loses_nothing_and_says_so(prepare):
    context = prepare()
    windowed = dataclasses.replace(CONFIG, layer_pattern=("sliding",), window=5)
    context.__dict__["lm"] = LM.replace(config=windowed)
    with pytest.raises(ValueError, match="every layer of the model has a window of 5, so nothing is lost"):
        BUDGET.check_fit(context)


def test_every_setting_but_the_files_which_are_told_by_their_content_decides_the_result(prepare, tmp_path):
    settings = {key for key in default.get_config().budget if key != "files"}
    assert {f"budget.{key}" for key in settings} <= set(BUDGET.settings)
    before = BUDGET.inputs(prepare())
    (tmp_path / "listed.json").write_text("[[1, 2]]")
    assert BUDGET.inputs(prepare()).keys() == before.keys() and BUDGET.inputs(prepare()) != before
    assert BUDGET.tasks(prepare().config) == ["detect", "detect"] and len(all_heads(CONFIG)) == 2 * TOTAL
