"""`retmask profile`: several models in one table and pictures, and gains against sparsity."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats
from helpers_results import detected, number

from retmask_jax.cli.main import main
from retmask_jax.heads.profile import Scored, profile, profile_table
from retmask_jax.heads.scores import HeadScores
from retmask_jax.reports import plotting
from retmask_jax.reports.panel.gains import GainRun, gain_against_sparsity, sparsity
from retmask_jax.reports.panel.profiles import profiles
from retmask_jax.runs.workdir import Provenance
from retmask_jax.utils.files import write_json

GAIN = "eval/needle long/retmask minus start"


def scores_of(seed, n_layers=6, n_heads=8, cases=5):
    rng = np.random.default_rng(seed)
    mean_LH1 = rng.beta(0.1, 1, (n_layers, n_heads, 1))
    mean_LH1[0, 0] = 0.9
    return HeadScores(np.clip(mean_LH1 + rng.normal(scale=0.01, size=(n_layers, n_heads, cases)), 0, 1))


def run_of(root, seed, weights=None, threshold=0.1, gain=0.02):
    """What `retmask profile` reads of a work directory."""
    scores = scores_of(seed)
    heads = scores.heads(**({"top_k": 5} if threshold is None else {"threshold": threshold}))
    result = detected(
        heads,
        [float(scores.mean[head]) for head in heads],
        threshold,
        n_kv_heads=4,
        numbers={"detect/gini": number(profile(scores, 4)["gini"], n=5)},
        provenance=Provenance(inputs={"weights": weights or str(seed)}),
    )
    gained = number(gain, gain - 0.05, gain + 0.04, 120)
    write_json(root / "detect" / "result.json", result)
    write_json(root / "eval" / "result.json", {"numbers": {GAIN: gained, "eval/needle long/start": gained}})
    scores.save(root / "detect" / "scores.json")
    return scores


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        assert main(["profile", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("retmask: ") and error.count("\n") == 1
        return error

    return run


def test_a_table_holds_each_model_with_its_profile_and_none_for_what_is_undefined():
    low = HeadScores.from_array(np.full((2, 4), 0.01))
    first, second = profile_table([Scored("a", scores_of(0), 4, 0.3), Scored("b", low, 2)])
    assert vars(first) == {
        "model": "a",
        "cases": 5,
        "n_layers": 6,
        "heads_per_layer": 8,
        "n_kv_heads": 4,
        "threshold": 0.3,
    } | profile(scores_of(0), 4, 0.3)
    assert (second.n_heads, second.threshold, second.layer_com) == (0, 0.1, None)
    with pytest.raises(ValueError, match="b: n_kv_heads=3 does not divide"):
        profile_table([Scored("b", low, 3)])


def test_the_command_reads_files_and_work_directories_and_writes_what_it_prints(tmp_path, capsys):
    scores = {"one": scores_of(1), "two": scores_of(2, n_heads=4)}
    for name, of_model in scores.items():
        of_model.save(tmp_path / f"{name}.json")
    scores["run"] = run_of(tmp_path / "run", 3, threshold=0.2)
    scores["top"] = run_of(tmp_path / "top", 4, threshold=None)
    sources = [str(tmp_path / name) for name in ("one.json", "two.json", "run", "top")]
    assert main(["profile", *sources, "--kv_heads=8,2", f"--out={tmp_path / 'out'}"]) == 0
    rows = json.loads((tmp_path / "out" / "profile.json").read_text())["models"]
    fifth = float(np.sort(scores["top"].mean, axis=None)[-5])
    expected = [("one", 8, 0.1), ("two", 2, 0.1), ("run", 4, 0.2), ("top", 4, fifth)]
    assert [(row["model"], row["n_kv_heads"], row["threshold"]) for row in rows] == expected
    for row, (name, n_kv_heads, threshold) in zip(rows, expected, strict=True):
        assert {key: row[key] for key in profile(scores[name], n_kv_heads, threshold)} == pytest.approx(
            profile(scores[name], n_kv_heads, threshold)
        )
    assert rows[3]["n_heads"] == 5
    output = capsys.readouterr().out
    assert all(f"{row['gini']:.3f}" in output and row["model"] in output for row in rows)
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "profile.svg").read_text()
    assert main(["profile", *sources, "--kv_heads=8,2", "--threshold=0.5", f"--out={tmp_path / 'out'}"]) == 0
    again = json.loads((tmp_path / "out" / "profile.json").read_text())["models"]
    assert [row["scores_hash"] for row in again] == [row["scores_hash"] for row in rows]
    assert len({row["scores_hash"] for row in rows}) == 4
    assert [row["threshold"] for row in again] == [0.5] * 4
    assert again[2]["n_heads"] == len(scores["run"].heads(threshold=0.5)) < rows[2]["n_heads"]
    assert main(["profile", *sources, "--kv_heads=8,2", "--threshold=0", f"--out={tmp_path / 'out'}"]) == 0
    every = json.loads((tmp_path / "out" / "profile.json").read_text())["models"]
    assert [row["frac"] for row in every] == [1.0] * 4


def test_models_whose_folders_share_a_name_are_told_apart(tmp_path, capsys):
    a, b, c = (tmp_path / parent / name for parent, name in (("a", "tiny"), ("b", "tiny"), ("c", "other")))
    for root in (a, b, c):
        run_of(root, 1)
    assert main(["profile", str(a), str(b)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["a", "b"]
    assert main(["profile", str(a), str(b), str(c)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]] == [str(a), str(b), "other"]


def test_mistakes_are_one_line(refused, tmp_path):
    scores_of(0).save(tmp_path / "scores.json")
    run_of(tmp_path / "run", 1)
    file, run = tmp_path / "scores.json", tmp_path / "run"
    assert "0 numbers for 1 files" in refused(file)
    assert "3 numbers for 2 files" in refused(file, file, "--kv_heads=1,2,3")
    assert "scores: n_kv_heads=3 does not divide the 8 query heads" in refused(file, "--kv_heads=3")
    assert "--kv_heads: 'many' must be whole numbers" in refused(file, "--kv_heads=many")
    assert "does not apply" in refused(run, "--kv_heads=4")
    assert "nowhere.json: no head scores" in refused(tmp_path / "nowhere.json", "--kv_heads=1")
    assert "stage detect has no result" in refused(tmp_path)
    assert "profile reads no config" in refused(run, "--config.seed=1")
    assert "is no work directory" in refused(file, "--kv_heads=4", f"--gain={GAIN}")
    assert f"the most similar names are {GAIN}, eval/" in refused(run, f"--gain={GAIN[5:]}")
    (run / "eval" / "result.json").unlink()
    assert "stage eval has no result" in refused(run, f"--gain={GAIN}")


def test_a_run_that_does_not_know_its_key_value_heads_names_the_way_out(refused, tmp_path):
    run_of(tmp_path / "run", 1)
    path = tmp_path / "run" / "detect" / "result.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "n_kv_heads"}))
    assert f"give {tmp_path / 'run' / 'detect' / 'scores.json'} and --kv_heads" in refused(tmp_path / "run")


def test_the_command_puts_gains_beside_sparsity_and_claims_nothing_of_few_models(tmp_path, capsys):
    for i in range(3):
        run_of(tmp_path / f"run{i}", i, gain=0.01 * i)
    roots = [str(tmp_path / f"run{i}") for i in range(3)]
    assert main(["profile", *roots, f"--gain={GAIN}", f"--out={tmp_path / 'out'}"]) == 0
    kept = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [row["gain"]["value"] for row in kept["sparsity"]["rows"]] == [0.0, 0.01, 0.02]
    assert [row["gini"] for row in kept["sparsity"]["rows"]] == [row["gini"] for row in kept["models"]]
    assert kept["sparsity"]["spearman"] is None and kept["gain"] == GAIN
    assert "Descriptive only: 3 models" in capsys.readouterr().out
    assert (tmp_path / "out" / "sparsity.png").exists()
    words = (tmp_path / "out" / "sparsity.svg").read_text()
    assert "Descriptive only: 3 models" in words and "run2 (n = 120)" in words and "rho" not in words


def made_runs(n, repeats=1):
    rng = np.random.default_rng(5)
    ginis = rng.uniform(0.5, 1, n)
    return [
        GainRun(
            name=f"{i}-{j}",
            weights=str(i),
            gini=float(gini),
            share=float(1 - gini),
            gain=number(float(gini + rng.normal(0, 0.1)), 0.0, 1.0, 9),
        )
        for i, gini in enumerate(ginis)
        for j in range(repeats)
    ]


def test_a_correlation_is_given_from_ten_models_on():
    assert gain_against_sparsity(made_runs(9)).spearman is None
    runs = made_runs(10)
    result = gain_against_sparsity(runs)
    reference = scipy.stats.spearmanr([run.gini for run in runs], [run.gain.value for run in runs])
    assert result.spearman.value == pytest.approx(reference.statistic)
    assert result.spearman.low < result.spearman.value < result.spearman.high
    assert f"over 10 models: {reference.statistic:.2f}, 95% interval [" in result.finding


def test_runs_of_one_model_are_not_more_models():
    few, runs = made_runs(5, repeats=4), made_runs(10, repeats=3)
    assert gain_against_sparsity(few).spearman is None and "5 models" in gain_against_sparsity(few).finding
    result = gain_against_sparsity(runs)
    assert (result.n_models, result.spearman.n, len(result.rows)) == (10, 10, 30)
    means = [np.mean([run.gain.value for run in runs if run.weights == str(i)]) for i in range(10)]
    assert result.spearman.value == pytest.approx(
        scipy.stats.spearmanr([runs[3 * i].gini for i in range(10)], means).statistic
    )


def test_gains_that_are_all_alike_have_no_correlation():
    runs = [dataclasses.replace(run, gain=number(0.5, 0.4, 0.6, 9)) for run in made_runs(12)]
    result = gain_against_sparsity(runs)
    assert result.spearman is None and "no correlation" in result.finding


def test_pictures_show_the_heads_of_each_model_where_they_are():
    models = [Scored("first", scores_of(1), 4), Scored("none", HeadScores.from_array(np.zeros((3, 2)) + 0.01), 1)]
    with plotting.style():
        curves, *layers = profiles(models, profile_table(models)).axes
    ranked = np.sort(models[0].scores.mean, axis=None)[::-1]
    np.testing.assert_allclose(curves.lines[0].get_ydata(), ranked)
    assert curves.lines[0].get_xdata()[[0, -1]] == pytest.approx([1 / 48, 1])
    counts = [sum(layer == i for layer, _ in models[0].scores.heads(threshold=0.1)) for i in range(6)]
    assert [bar.get_height() for bar in layers[0].patches] == counts
    assert [bar.get_x() + bar.get_width() / 2 for bar in layers[0].patches] == pytest.approx(np.linspace(0, 1, 6))
    assert layers[0].lines[0].get_xdata()[0] == pytest.approx(profile(models[0].scores, 4)["layer_com"])
    assert [bar.get_height() for bar in layers[1].patches] == [0, 0, 0] and not layers[1].lines
    assert layers[1].get_title(loc="left").startswith("none: 0 of 6 heads at 0.1 or above")


def test_every_run_has_its_own_mark_and_whisker():
    gains = gain_against_sparsity(made_runs(12))
    with plotting.style():
        axes = sparsity(gains, GAIN).axes
    for ax, side in zip(axes, ("gini", "share"), strict=True):
        points, whiskers = ax.lines[1:25:2], ax.lines[2:25:2]
        for row, whisker, point in zip(gains.rows, whiskers, points, strict=True):
            assert (point.get_xdata()[0], point.get_ydata()[0]) == (getattr(row, side), row.gain.value)
            assert list(whisker.get_ydata()) == [row.gain.low, row.gain.high]
        assert len({(point.get_color(), point.get_marker()) for point in points}) == 12
    assert ax.figure.get_suptitle().endswith(GAIN) and math.isclose(ax.lines[0].get_ydata()[0], 0)
