"""The stages of the causal study on a small model whose heads copy, against the parts they are made of."""

import dataclasses

import numpy as np
import pytest
from helpers_results import detected as detected_heads
from helpers_results import stored
from helpers_tiny import BATCH, CONFIG, NEW, copying_lm, copying_params, in_float64, reference_answer
from retmask_jax.configs import default

from retmask_jax.cli.main import main
from retmask_jax.data import tiny_language as tl
from retmask_jax.data.needles import Needle, build_cases, draw_specs
from retmask_jax.data.prompter import Prompter
from retmask_jax.generation.language_model import from_params, save
from retmask_jax.heads import conditions
from retmask_jax.heads.detectors import DETECTORS
from retmask_jax.heads.patterns.steps import by_position, follow, most_active, persistence
from retmask_jax.heads.profile import profile
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.workdir import Workdir
from retmask_jax.stages.detect import detect_stage
from retmask_jax.stages.study.detector_runs import Concentration, reused_copy, run_detector, spread
from retmask_jax.stages.study.detectors import detectors_stage
from retmask_jax.stages.study.dynamics import checkpoint_prints, dynamics_stage
from retmask_jax.stages.study.per_step import PER_STEP, per_step_stage
from retmask_jax.stages.study.theta import theta_stage
from retmask_jax.stages.study.utility import utility_stage
from retmask_jax.utils import stats
from retmask_jax.utils.files import write_json

LM = copying_lm()


def _cases(n=4):
    """Cases of which the model itself says the answer."""
    rng = np.random.default_rng(0)
    needles = [Needle(**record) for record in tl.needle_records(rng, n)]
    cases = build_cases(
        Prompter(LM.tokenizer), tl.haystack_text(rng, 30), needles, draw_specs(needles, [60], [0.2, 0.8], per_length=n)
    )
    params, answered = in_float64(LM.params), []
    for case in cases:
        said, _ = reference_answer(params, case.tokens, NEW, (tl.EOS,))
        text = " ".join(tl.VOCABULARY[i] for i in said if i > tl.UNK)
        answered.append(dataclasses.replace(case, needle=dataclasses.replace(case.needle, answer=text or "nothing")))
    return answered


CASES = _cases()


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A context with the cases above for every task; the result of `detect` is made up unless it is asked for."""
    monkeypatch.setattr(Context, "cases", lambda self, task, **changes: CASES)
    monkeypatch.setattr(Context, "model_fingerprint", "of the small model")  # which was not read from a folder

    def make(detected=True, **settings):
        config = default.get_config()
        config.tasks.detect = default.task("n.jsonl", lengths=(60,), max_new_tokens=NEW)
        config.batch_size, config.detect.max_new_tokens = BATCH, NEW
        config.knockout.tasks = ("detect",)
        config.detectors.names = ("copy_position", "mass", "gradient")
        for key, value in settings.items():
            section = next(name for name in config if key.startswith(f"{name}_"))
            config[section][key.removeprefix(f"{section}_")] = value
        context = Context(config.lock(), Workdir(tmp_path, {}))
        context.__dict__["lm"] = LM
        if detected:
            write_json(tmp_path / "detect/result.json", detected_heads([(1, 0), (1, 2)], (0.4, 0.2)))
        return context

    return make


def test_a_spread_of_cases_is_even_and_in_order():
    assert spread(5, None) == spread(5, 9) == spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(9, 3) == [0, 4, 8] and spread(9, 1) == [0]
    assert len(set(spread(120, 24))) == 24


def test_copies_taken_from_detect_are_those_of_decoding_the_same_cases(study, tmp_path):
    context = study(detected=False)
    found = dataclasses.replace(detect_stage(context, tmp_path / "detect"), seconds=3.5)
    write_json(tmp_path / "detect/result.json", found)
    for places in ([0, 1, 2, 3], spread(4, 2)):
        taken = reused_copy(context, places)
        target = tmp_path / f"copy-{len(places)}.json"
        decoded = run_detector(context, "copy", [CASES[i] for i in places], target)
        assert taken.scores == decoded.scores == HeadScores.load(target)
        assert taken.outcomes == decoded.outcomes and len(taken.outcomes) == len(places)
        assert (taken.seconds, taken.timed, taken.reused) == (3.5, len(CASES), True)
    assert reused_copy(study(detect_released=True), [0]) is None


def test_detectors_are_kept_compared_and_their_heads_masked(study, tmp_path, capsys):
    context = study(detectors_seeds=(5,), detectors_seed_names=("mass",))
    folder = tmp_path / "detectors"
    result = detectors_stage(context, folder)
    scores = {name: HeadScores.load(folder / f"{name}.json") for name in context.config.detectors.names}
    assert scores["mass"] == DETECTORS["mass"](LM, CASES, batch_size=BATCH).scores
    assert scores["mass"].per_case.shape == (CONFIG.n_layers, CONFIG.n_heads, len(CASES))
    assert stored({"detectors": result})["detectors"] == result
    rows = {row.name: row for row in result.rows}
    assert result.top_k == 2 and result.cases == len(CASES)
    for name, found in scores.items():
        assert rows[name].heads == found.heads(top_k=2)
        assert rows[name].shared == stats.jaccard(found.heads(top_k=2), [(1, 0), (1, 2)])
        masked = next(row for row in result.masked if row.kind == name)
        (texts,) = conditions.answers(
            LM, CASES, [mask_heads(CONFIG, found.heads(top_k=2))], max_new_tokens=NEW, batch_size=BATCH
        )
        assert masked.value == conditions.hits(texts, CASES).mean()
        assert result.numbers[f"detectors/detect/{name} masked"].value == masked.value
    assert result.numbers["detectors/detect/none"].value == 1.0  # the answers are the model's own
    assert rows["mass"].gini == profile(scores["mass"], CONFIG.n_kv_heads)["gini"]
    assert scores["gradient"].mean.min() < 0 and rows["gradient"].profile == Concentration(None, None, None)
    (pair,) = [pair for pair in result.agreement if (pair.a, pair.b) == ("copy_position", "mass")]
    assert pair.jaccard == stats.jaccard(rows["copy_position"].heads, rows["mass"].heads)
    best = rows["mass"].best
    assert [(row.layer, row.head) for row in best] == scores["mass"].heads(top_k=2)
    assert best[0].number == stats.bootstrap_mean(scores["mass"].per_case[rows["mass"].heads[0]])
    assert [row.chosen for row in best] == [head in [(1, 0), (1, 2)] for head in scores["mass"].heads(top_k=2)]
    assert {name: steps[-1].jaccard for name, steps in result.stability.items()} == dict.fromkeys(scores, 1.0)
    # The same cases for every seed here: they agree wholly.
    assert result.over_seeds["mass"].n == 2 and result.over_seeds["mass"].spearman == pytest.approx(1)
    write_json(folder / "result.json", result)  # which refuses NaN
    assert main(["profile", str(folder / "mass.json"), f"--kv_heads={CONFIG.n_kv_heads}"]) == 0
    assert "mass" in capsys.readouterr().out
    # What was cut off goes on: nothing is run again.
    del context.__dict__["lm"]
    assert run_detector(context, "mass", CASES, folder / "mass.json").scores == scores["mass"]


def test_a_detector_that_counts_no_case_is_left_out(study, tmp_path, monkeypatch):
    wrong = [dataclasses.replace(case, needle=dataclasses.replace(case.needle, answer="zebra")) for case in CASES]
    monkeypatch.setattr(Context, "cases", lambda self, task, **changes: wrong)
    result = detectors_stage(study(detectors_names=("copy_forced", "mass")), tmp_path / "detectors")
    assert [(row.name, row.counted) for row in result.rows] == [("copy_forced", 0), ("mass", len(wrong))]
    assert {row.kind for row in result.masked} == {"none", "mass"} and result.agreement == []
    assert run_detector(None, "copy_forced", wrong, tmp_path / "detectors/copy_forced.json").scores is None


def test_pairs_of_query_norms_have_their_wavelengths(study, tmp_path):
    scores = HeadScores.from_array(np.array([[0.0, 0.1, 0.0, 0.0], [0.9, 0.0, 0.8, 0.1]]))
    scores.save(tmp_path / "detect/scores.json")
    result = utility_stage(study(utility_permutations=99, utility_resamples=99), tmp_path / "utility")
    assert stored({"utility": result})["utility"] == result
    waves = result.wavelengths["full"]
    np.testing.assert_allclose(waves, 2 * np.pi * 100.0 ** (np.arange(16) / 16), rtol=1e-5)
    assert len(result.comparison.pair_adjusted_p) == len(waves) == CONFIG.n_pairs
    assert np.shape(result.norms) == (CONFIG.n_layers, CONFIG.n_heads)
    assert result.numbers["utility/Cohen's d"].value == result.comparison.cohens_d


def test_one_retrieval_head_is_nothing_to_compare_and_no_error(study, tmp_path):
    context = study()
    HeadScores.from_array(np.eye(2, 4)).save(tmp_path / "detect/scores.json")
    write_json(tmp_path / "detect/result.json", detected_heads([(1, 0)]))
    result = utility_stage(context, tmp_path / "utility")
    assert result.comparison is None and "two values per side, got 1" in result.undefined


def test_factor_one_is_the_model_as_it_is_and_another_base_is_not(study, tmp_path):
    context = study(theta_factors=(1.0, 1e3), theta_detector="mass", theta_cases=3)
    result = theta_stage(context, tmp_path / "theta")
    untouched = DETECTORS["mass"](LM, [CASES[i] for i in spread(len(CASES), 3)], batch_size=BATCH).scores
    own, other = (HeadScores.load(tmp_path / f"theta/factor_{name}.json") for name in ("1", "1000"))
    assert own == untouched and other != untouched
    (texts,) = conditions.answers(LM, CASES, [Interventions()], max_new_tokens=NEW, batch_size=BATCH)
    assert stored({"theta": result})["theta"] == result
    first, second = result.rows
    assert first.value == conditions.hits(texts, CASES).mean() == 1.0
    assert (first.change.low, first.change.high, first.mcnemar.p_value) == (0, 0, 1.0)
    assert (second.theta, second.change.value) == (1e5, second.value - 1.0)
    assert [found.heads for found in result.heads] == [own.heads(threshold=0.1), other.heads(threshold=0.1)]
    assert result.heads[0].jaccard == 1.0
    assert result.numbers["theta/heads/factor 1000"].value == len(other.heads(threshold=0.1))


def test_heads_are_followed_on_cases_of_another_seed(study, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Context, "cases", lambda self, task, **changes: asked.append((task, changes)) or CASES)
    result = per_step_stage(study(per_step_cases=2, per_step_seed=7), tmp_path / "per_step")
    assert asked == [("detect", {"seed": 7})] and result.heads == [(1, 0), (1, 2)]
    assert stored({"per_step": result})["per_step"] == result
    followed = follow(LM, [CASES[i] for i in spread(len(CASES), 2)], max_new_tokens=NEW, batch_size=BATCH)
    assert result.outcomes == {"counted": 2} and len(result.examples) == 2
    for kind, answers in followed.active.items():
        assert [row for row in result.rows if row.kind == kind] == by_position(kind, answers, result.heads)
        assert [row for row in result.active if row.kind == kind] == most_active(kind, answers, result.heads)
        (found,) = [row for row in result.persistence if row.kind == kind]
        assert found == persistence(kind, answers, result.heads)
        assert result.numbers[f"per_step/{kind}/tokens in a row"] == found.run
    printed = PER_STEP.tables(result)[0].rows
    assert len(printed) == len(result.active) and printed[0][1] == f"{result.active[0].layer}-{result.active[0].head}"
    with pytest.raises(
        ValueError, match="per_step.seed is 0, the seed of task 'detect' on whose cases heads are found"
    ):
        PER_STEP.check(study(per_step_seed=0).config)


def test_no_answer_that_counts_follows_no_head(study, tmp_path, monkeypatch):
    wrong = [dataclasses.replace(case, needle=dataclasses.replace(case.needle, answer="zebra")) for case in CASES]
    monkeypatch.setattr(Context, "cases", lambda self, task, **changes: wrong)
    result = per_step_stage(study(), tmp_path / "per_step")
    assert (result.rows, result.persistence, result.active, result.numbers) == ([], [], [], {})
    assert sum(result.outcomes.values()) == len(wrong) and "counted" not in result.outcomes


def _save_checkpoints(root):
    """Steps 2 and 10 of two layers; step 1 is the first layer alone."""
    one = dataclasses.replace(CONFIG, n_layers=1)
    params = copying_params(1)
    first = {**params, "blocks": {"0": _first_layer(params["blocks"]["0"])}}
    for step, config, weights in ((1, one, first), (2, CONFIG, params), (10, CONFIG, copying_params(0))):
        save(from_params(config, weights, tl.build_tokenizer()), root / f"step_{step}")


def _first_layer(tree):
    return {key: _first_layer(value) if isinstance(value, dict) else value[:1] for key, value in tree.items()}


def test_checkpoints_are_compared_with_the_last_one_head_by_head(study, tmp_path):
    _save_checkpoints(tmp_path / "training")
    context = study(
        dynamics_checkpoints=(str(tmp_path / "training/step_*"),), dynamics_detector="mass", knockout_tasks=()
    )
    result = dynamics_stage(context, tmp_path / "dynamics")
    assert stored({"dynamics": result})["dynamics"] == result
    rows = result.rows
    assert [(row.step, row.layers) for row in rows] == [(1, 1), (2, 2), (10, 2)]
    scores = [HeadScores.load(tmp_path / f"dynamics/step_{step}.json") for step in (1, 2, 10)]
    assert scores[2] == DETECTORS["mass"](LM, CASES, batch_size=BATCH).scores
    final = scores[2].heads(threshold=0.1)
    assert result.final == rows[2].heads == final and {layer for layer, _ in final} == {0, 1}
    assert rows[2].jaccard == 1.0 and rows[0].jaccard < 1.0
    for row, found in zip(rows, scores, strict=True):
        there = [found.mean[head] if head[0] < len(found.mean) else 0.0 for head in final]
        assert row.emergence == pytest.approx(np.mean(there)) and row.top == found.mean.max()
        assert row.jaccard == stats.jaccard(found.heads(threshold=0.1), final)
        assert row.recall is row.text_loss is None
    prints = checkpoint_prints(context)
    assert len(prints) == len(set(prints.values())) == 3


@pytest.mark.slow
def test_recall_of_a_checkpoint_is_that_of_the_model_in_it(study, tmp_path):
    _save_checkpoints(tmp_path / "training")
    context = study(dynamics_checkpoints=(str(tmp_path / "training/step_*"),), dynamics_detector="copy")
    first, second, third = dynamics_stage(context, tmp_path / "dynamics").rows
    assert third.recall.none.value == 1.0  # the answers are its own
    n = third.recall.n_masked
    assert n == len(third.heads) > 0 and first.recall.n_masked in (0, n)
    best = HeadScores.load(tmp_path / "dynamics/step_10.json").heads(top_k=n)
    (texts,) = conditions.answers(LM, CASES, [mask_heads(CONFIG, best)], max_new_tokens=NEW, batch_size=BATCH)
    assert third.recall.masked.value == conditions.hits(texts, CASES).mean()
    assert (second.top is None) == (second.counted == 0)


def test_no_checkpoints_no_work(study, tmp_path):
    context = study(detected=False)
    del context.__dict__["lm"]
    result = dynamics_stage(context, tmp_path / "dynamics")
    assert result.rows == [] and result.numbers == {}
    assert checkpoint_prints(context) == {}
