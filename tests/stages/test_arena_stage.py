"""The stage `arena` on a small model whose heads copy: what it measures against a slow reference, and what it keeps."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers_results import stored
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, in_float64, reference, reference_answer
from retmask_jax.configs import default

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.needles import Needle, build_cases, draw_specs
from retmask_jax.data.prompter import Prompter
from retmask_jax.evals.perplexity import losses_under, token_losses
from retmask_jax.heads.conditions import hits
from retmask_jax.heads.detectors import DETECTORS
from retmask_jax.heads.head_outputs import HeadStatistics, head_statistics
from retmask_jax.heads.knockout import ablate, activity, control_heads
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.model.masking import normalise
from retmask_jax.runs.context import Context
from retmask_jax.runs.workdir import Workdir
from retmask_jax.stages import outcomes
from retmask_jax.stages.study import arena, listed_heads
from retmask_jax.stages.study.arena import ARENA, arena_stage
from retmask_jax.stages.study.detector_runs import DetectorRun
from retmask_jax.utils import stats
from retmask_jax.utils.store import Store

LM = copying_lm()
WINDOWS = np.random.default_rng(7).integers(4, CONFIG.vocab_size, (3, 24)).astype(np.int32)
LIST = [[1, 3], [0, 0], [1, 1]]


def _cases(n=3):
    """Cases of which the model itself says the answer."""
    rng = np.random.default_rng(0)
    needles = [Needle(**record) for record in tl.needle_records(rng, n)]
    cases = build_cases(
        Prompter(LM.tokenizer), tl.haystack_text(rng, 30), needles, draw_specs(needles, [60], [0.2], per_length=n)
    )
    params = in_float64(LM.params)
    said = [_text(reference_answer(params, case.tokens, NEW, (tl.EOS,))[0]) for case in cases]
    return [
        dataclasses.replace(case, needle=dataclasses.replace(case.needle, answer=text or "nothing"))
        for case, text in zip(cases, said, strict=True)
    ]


def _text(tokens):
    return " ".join(tl.VOCABULARY[i] for i in tokens if i > tl.UNK)


CASES = _cases()


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """A context with the cases and windows above, and a file that lists three heads."""
    monkeypatch.setattr(Context, "cases", lambda self, task, **changes: CASES)
    monkeypatch.setattr(Context, "windows", lambda self: WINDOWS)
    monkeypatch.setattr(Context, "model_fingerprint", "of the small model")  # which was not read from a folder
    (tmp_path / "listed.json").write_text(json.dumps(LIST))

    def make(**settings):
        config = default.get_config()
        config.tasks.detect = default.task("n.jsonl", lengths=(60,), max_new_tokens=NEW)
        config.batch_size, config.detect.max_new_tokens, config.text.file = BATCH, NEW, "text.txt"
        config.knockout.tasks = ("detect",)
        given = {"files": ("listed.json",), "detectors": ("mass",), "heads": (2,), "modes": ("zero",)} | settings
        for name, value in given.items():
            files = tuple(str(tmp_path / file) for file in value) if name == "files" else value
            config.arena[name] = files
        context = Context(config.lock(), Workdir(tmp_path / "work", {}))
        context.__dict__["lm"] = LM
        return context

    return make


def test_activity_is_kept_head_by_head_and_then_needs_no_weights(prepare, monkeypatch):
    context, add, added = prepare(), Store.add, []
    rows = WINDOWS[: context.config.knockout.activity_windows].tolist()
    wanted = activity(LM, rows, batch_size=BATCH)

    def killed(store, key, value):
        if len(added) == 5:
            raise KeyboardInterrupt
        added.append(key)
        add(store, key, value)

    monkeypatch.setattr(Store, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        outcomes.head_activity(context)
    monkeypatch.setattr(Store, "add", lambda store, key, value: (added.append(key), add(store, key, value)))
    np.testing.assert_array_equal(outcomes.head_activity(context), wanted)
    assert len(set(added)) == len(added) == len(rows) * wanted.size
    context.__dict__["lm"] = LM.replace(params=None)
    np.testing.assert_array_equal(outcomes.head_activity(context), wanted)


# Without means one program serves all masks. That a mode gets its own means is held below.
@pytest.mark.parametrize(
    "modes", [("zero", "query"), pytest.param(("zero", "mean", "query", "query_mean"), marks=pytest.mark.slow)]
)
def test_every_list_is_measured_as_the_slow_model_says(prepare, tmp_path, modes):
    result = arena_stage(prepare(modes=modes, draws=2), tmp_path)
    assert stored({"arena": result})["arena"] == result
    best = DETECTORS["mass"](LM, CASES, batch_size=BATCH).scores
    active_LH = activity(LM, WINDOWS.tolist(), batch_size=BATCH)
    controls = control_heads(CONFIG, best.heads(top_k=2), active_LH, draws=2, scores_LH=best.mean)
    expected = [("mass", 0, best.heads(top_k=2)), ("listed", 0, [(1, 3), (0, 0)]), *controls]
    assert [(one.name, one.draw, one.heads) for one in result.sets] == expected
    assert (result.reference, result.sizes, result.modes) == ("mass", [2], list(modes))
    assert [(row.name, row.source, row.heads, row.counted) for row in result.lists] == [
        ("mass", "detector", 8, 3),
        ("listed", "file", 3, 0),
    ]
    measured = head_statistics(LM, WINDOWS) if {"mean", "query_mean"} & set(modes) else None
    names = [*dict.fromkeys(name for name, _, _ in expected)]
    assert [(row.mode, row.name) for row in result.rows] == [(mode, name) for mode in modes for name in names]
    untouched_N, loss_W = _slow(Interventions())
    assert result.recall == stats.proportion(untouched_N) and result.recall.value == 1

    @functools.cache
    def ablated(heads, mode):
        return _slow(ablate(CONFIG, heads, mode, measured and measured.mean_for(mode)))

    for row in result.rows:
        slow = [ablated(tuple(one.heads), row.mode) for one in result.sets if one.name == row.name]
        right_DN, loss_DW = (np.array(values) for values in zip(*slow, strict=True))
        assert row.recall.value == pytest.approx(right_DN.mean())
        assert row.change.value == pytest.approx(right_DN.mean() - 1)
        assert row.loss.value == pytest.approx(loss_DW.mean(), abs=1e-4)
        assert row.cost.value == pytest.approx((loss_DW - loss_W).mean(), abs=1e-4)
        assert row.recall.low <= row.recall.value <= row.recall.high and (row.recall.n, row.loss.n) == (3, 3)
    assert len({row.recall.value for row in result.rows}) > 2


def _slow(mask):
    """(right or wrong, the loss of each window) under a mask, by the reference."""
    dense, params = normalise(CONFIG, mask), in_float64(LM.params)
    masks = {"head_mask": dense.head_BLH[0], "rope_mask": dense.rope_BLHR[0]}
    masks |= {"query_mask": dense.query_BLH[0], "query_mean": dense.query_mean_BLHD[0]}
    masks |= {} if mask.head_mean is None else {"head_mean": dense.mean_BLHD[0]}
    texts = [_text(reference_answer(params, case.tokens, NEW, (tl.EOS,), **masks)[0]) for case in CASES]
    losses = []
    for window_T in WINDOWS:
        logits_TV = reference(params, window_T, **masks)[0][:-1]
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
        losses.append(-logp_TV[np.arange(len(logp_TV)), window_T[1:]].mean())
    return hits(texts, CASES), np.array(losses)


def test_heads_of_every_set_are_ablated_with_the_means_of_each_mode(prepare, monkeypatch):
    mean_LHD, query_LHD = np.random.default_rng(1).normal(size=(2, 2, 4, 32)).astype(np.float32)
    means, measured = {"mean": mean_LHD, "query_mean": query_LHD}, []

    def statistics(lm, windows):
        measured.append((lm, windows))
        return HeadStatistics(mean_LHD, np.zeros((2, 4, 17, 17), np.float32), query_LHD)

    monkeypatch.setattr(arena, "head_statistics", statistics)
    sets = [
        arena.HeadSet(name=name, source="file", size=2, draw=draw, heads=heads)
        for name, draw, heads in (("a", 0, [(1, 3), (0, 0)]), ("b", 1, [(0, 1), (1, 2)]))
    ]
    modes = ("query_mean", "zero", "mean")
    untouched, *conditions = arena._conditions(prepare(modes=modes), sets, WINDOWS)
    assert not untouched.heads and measured == [(LM, WINDOWS)]
    expected = [(mode, one) for mode in modes for one in sets]
    for condition, (mode, one) in zip(conditions, expected, strict=True):
        assert (condition.experiment, condition.kind, condition.draw) == (mode, one.name, one.draw)
        masks = (ablate(CONFIG, one.heads, mode, means.get(mode)), condition.interventions)
        jax.tree.map(np.testing.assert_array_equal, *(normalise(CONFIG, mask) for mask in masks))


def test_losses_under_many_masks_are_those_under_one():
    masks = [Interventions(), mask_heads(CONFIG, [(1, 0)]), mask_heads(CONFIG, [(0, 1), (1, 2)])]
    single = [token_losses(LM, WINDOWS, mask, batch_size=BATCH).mean(axis=1) for mask in masks]
    told = {}
    found = losses_under(LM, WINDOWS, masks, batch_size=BATCH, done=lambda place, loss: told.update({place: loss}))
    np.testing.assert_array_equal(found, single)
    assert told == dict(np.ndenumerate(found))
    known = {place: loss + 1 for place, loss in told.items() if place[0] != 1}
    new = {}
    again = losses_under(
        LM, WINDOWS, masks, batch_size=BATCH, known=known, done=lambda place, loss: new.update({place: loss})
    )
    np.testing.assert_array_equal(again, found + np.array([1, 0, 1])[:, None])
    assert {mask for mask, _ in new} == {1}


# --- what is kept ---


@pytest.fixture
def watched(monkeypatch):
    """How many answers were known and asked for, how many losses were computed, and which detectors ran, since .clear()."""
    seen, answers, losses = SimpleNamespace(known=[], asked=[], losses=0, detectors=[]), outcomes.answers, losses_under

    def counting(lm, cases, masks, **options):
        seen.known.append(len(options["known"]))
        seen.asked.append(len(cases) * len(masks))
        return answers(lm, cases, masks, **options)

    def losing(lm, windows, masks, **options):
        seen.losses += len(masks) * len(windows) - len(options["known"])
        return losses(lm, windows, masks, **options)

    def running(lm, cases, **options):
        seen.detectors.append("mass")
        return mass(lm, cases, **options)

    mass = DETECTORS["mass"]
    monkeypatch.setattr(outcomes, "answers", counting)
    monkeypatch.setattr(outcomes, "losses_under", losing)
    monkeypatch.setitem(DETECTORS, "mass", running)
    seen.clear = lambda: seen.__dict__.update(known=[], asked=[], losses=0, detectors=[])
    return seen


def test_a_stage_that_was_stopped_goes_on_and_a_list_that_is_added_is_all_that_is_computed(
    prepare, tmp_path, monkeypatch, watched
):
    add, written = Store.add, []

    def stopping(store, key, value):
        add(store, key, value)
        written.append(key)
        if key[0] == "answer" and sum(key[0] == "answer" for key in written) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "add", stopping)
        arena_stage(prepare(), tmp_path)
    whole = arena_stage(prepare(), tmp_path)
    masks = len({frozenset(one.heads) for one in whole.sets}) + 1  # each set of heads once, and the untouched model
    assert watched.known == [0, 5] and watched.asked == [3 * masks] * 2
    assert watched.detectors == ["mass"] and watched.losses == 3 * masks
    (tmp_path / "other.json").write_text("[[0, 2], [0, 3]]")
    (tmp_path / "same.json").write_text("[[0, 0], [1, 3], [0, 2]]")  # whose first two are those of listed.json
    watched.clear()
    more = arena_stage(prepare(files=("listed.json", "other.json", "same.json")), tmp_path)
    new = {frozenset(one.heads) for one in more.sets} - {frozenset(one.heads) for one in whole.sets}
    assert watched.known == [3 * masks] and watched.asked == [3 * (masks + len(new))] and len(new) <= 1
    assert not watched.detectors and watched.losses == 3 * len(new)
    by_name = {row.name: row for row in more.rows}
    assert all(by_name[row.name] == row for row in whole.rows)
    assert dataclasses.replace(by_name["same"], name="listed") == by_name["listed"]


def test_files_are_told_by_their_content_and_other_settings_by_their_values(prepare, tmp_path):
    before = ARENA.inputs(prepare())
    assert list(before) == [f"heads of {tmp_path / 'listed.json'}"]
    (tmp_path / "listed.json").write_text("[[1, 2], [0, 0]]")
    assert ARENA.inputs(prepare()) != before
    settings = {key for key in default.get_config().arena if key != "files"}
    assert {f"arena.{key}" for key in settings} <= set(ARENA.settings)


# --- how many heads, and of which lists ---


def test_lists_are_as_long_as_the_shortest_of_them_and_no_longer_than_leaves_controls(prepare, tmp_path):
    def sizes(threshold=0.0, **settings):
        context = prepare(heads=(), **settings)
        with context.config.unlocked():
            context.config.detect.threshold = threshold
        return listed_heads.sizes_of(context, listed_heads.all_lists(context)[1])

    scores = DETECTORS["mass"](LM, CASES, batch_size=BATCH).scores
    assert sizes() == [3]  # listed.json
    assert sizes(files=()) == [4]  # half of the heads
    assert sizes(float(scores.mean[scores.heads(top_k=2)[-1]])) == [2]
    assert sizes(detectors=()) == [3]
    with pytest.raises(ValueError, match="no head of mass reaches detect.threshold 9.0, so it is open how many"):
        sizes(9.0)


def test_overlaps_are_of_lists_and_not_of_controls(prepare, tmp_path):
    (tmp_path / "again.json").write_text("[[0, 0], [1, 2], [1, 3]]")
    result = arena_stage(prepare(detectors=(), files=("listed.json", "again.json"), heads=(2, 3)), tmp_path)
    first, second = result.overlaps
    assert (first.a, first.b, first.size, first.shared, first.jaccard) == ("listed", "again", 2, 1, 1 / 3)
    assert (second.size, second.shared, second.expected) == (3, 2, 9 / 8)
    assert {row.name for row in result.rows} == {"listed", "again", "any layer", "layer-matched", "activity-matched"}


def test_heads_that_score_alike_are_counted_where_a_list_is_cut(prepare, tmp_path):
    (tmp_path / "gates.tsv").write_text("0.5\t1.0\n1.0\t0.0\n")  # KV heads of two query heads each
    result = arena_stage(prepare(detectors=(), files=("gates.tsv", "listed.json"), heads=(1, 2)), tmp_path)
    cut = {(one.name, one.size): (one.heads, one.tied) for one in result.sets if one.source == "file"}
    assert cut["gates", 1] == ([(0, 2)], 3) and cut["gates", 2] == ([(0, 2), (0, 3)], 2)
    assert cut["listed", 1] == ([(1, 3)], 0) and [row.of_kv_heads for row in result.lists] == [True, False]


def test_a_detector_for_which_no_case_counts_is_left_out_and_said(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(
        listed_heads, "run_detector", lambda *arguments: DetectorRun(None, ["wrong answer"] * 3, 1.0, 3)
    )
    result = arena_stage(prepare(), tmp_path)
    assert [(row.name, row.heads, row.counted, row.cases) for row in result.lists][0] == ("mass", 0, 0, 3)
    assert "mass" not in {row.name for row in result.rows} and result.reference == "listed"
    with pytest.raises(ValueError, match="no case counts for mass, and no file is given: there is no list of heads"):
        arena_stage(prepare(files=()), tmp_path)


def test_lists_of_one_name_are_told_apart_by_their_paths(prepare, tmp_path):
    for name in ("a/heads.json", "b/heads.yaml", "mass.json", "any layer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[[0, 0], [0, 1]]")
    files = ("listed.json", "a/heads.json", "b/heads.yaml", "mass.json", "any layer.json")
    names = list(listed_heads.given_lists(prepare(files=files)))
    assert names == ["listed", *(str(tmp_path / name) for name in files[1:])]
    with pytest.raises(ValueError, match="listed.json is given twice: leave it out once"):
        listed_heads.given_lists(prepare(files=("listed.json", "listed.json")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": (4,)}, "arena.heads has 4, the list listed has 3 heads: equal numbers of all lists are compared"),
        ({"heads": (2, 5)}, "arena.heads has 5, the model has 8 heads: as many others are needed as controls"),
        ({"modes": ()}, r"arena.modes is \(\); it must have some of zero, mean, query, query_mean"),
        ({"modes": ("zero", "median")}, r"arena.modes is \('zero', 'median'\); it must have some of zero"),
        ({"detectors": ("mas",)}, "arena.detectors has 'mas'; known detectors are copy"),
        ({"detectors": (), "files": ()}, "arena.detectors and arena.files are empty: name a list of heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_runs(prepare, settings, message):
    def check(**settings):
        context = prepare(**settings)
        ARENA.check(context.config)
        ARENA.check_run(context.config)
        ARENA.check_fit(context)

    check()
    with pytest.raises(ValueError, match=message):
        check(**settings)


def test_without_a_task_or_a_text_nothing_can_be_measured(prepare):
    for section, key, message in (
        ("knockout", "tasks", "name a task that is answered"),
        ("text", "file", "plain text"),
    ):
        config = prepare().config
        with config.unlocked():
            config[section][key] = type(config[section][key])()
        with pytest.raises(ValueError, match=message):
            ARENA.check_run(config)
