"""Files of heads in others' forms: read as their own tools read them, written, and read again."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers_tiny import WIDE

from retmask_jax.heads.lists.formats import FORMATS, HeadList, read_heads, read_scores, write_heads, written_forms
from retmask_jax.heads.scores import HeadScores

PUBLISHED = os.environ.get("RETMASK_PUBLISHED")
needs_published = pytest.mark.skipif(not PUBLISHED, reason="RETMASK_PUBLISHED is not set")
SHAPE = (WIDE.n_layers, WIDE.n_heads)  # 3 layers of 12 heads on 3 KV heads
GROUP = WIDE.n_heads // WIDE.n_kv_heads
HEADS = [(2, 7), (0, 1), (2, 0), (2, 11)]
OF_CASES = ("retmask", "headkv", "locos")  # forms that hold a score for each case


def scores_of(seed=0, cases=5, shape=SHAPE):
    return HeadScores(np.random.default_rng(seed).random((*shape, cases)).astype(np.float32))


def for_model(n_layers, n_heads, n_kv_heads):
    return dataclasses.replace(WIDE, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads)


def expanded(mean_LH, config=WIDE):
    """The best score of each KV head, for each of its query heads."""
    best_LK = np.array(mean_LH).reshape(config.n_layers, config.n_kv_heads, -1).max(axis=2)
    return np.repeat(best_LK, config.n_heads // config.n_kv_heads, axis=1)


# --- there and back ---


def test_scores_that_are_written_come_back(tmp_path):
    scores, path = scores_of(), tmp_path / "heads"
    for form in written_forms():
        write_heads(path, scores, form, WIDE)
        found = read_heads(path, WIDE)
        assert found.form == ("retmask" if form == "headkv" else form)  # one cannot be told from the other
        if form in OF_CASES:
            assert found.scores == scores
        elif form == "qrhead-scores":
            np.testing.assert_array_equal(found.scores.mean, scores.mean)
        elif form == "duoattention":
            np.testing.assert_array_equal(found.scores.mean, expanded(scores.mean))
        if form != "duoattention":
            assert found.heads == scores.heads(top_k=36), form
        assert found.of_kv_heads == (form == "duoattention")
        before = path.read_bytes()
        write_heads(path, found, form, WIDE)
        assert path.read_bytes() == before and read_heads(path, WIDE) == found, form


def test_heads_that_are_written_come_back(tmp_path):
    path = tmp_path / "heads"
    for form in written_forms():
        write_heads(path, HEADS, form, WIDE)
        found = read_heads(path, WIDE)
        if form in ("list", "qrhead"):
            assert (found.heads, found.scores) == (HEADS, None)
            continue
        groups = {(layer, head // GROUP) for layer, head in HEADS}
        whole = {(layer, k * GROUP + g) for layer, k in groups for g in range(GROUP)}
        expected = whole if form == "duoattention" else set(HEADS)
        assert set(found.scores.heads(threshold=1)) == expected and set(found.scores.mean.ravel()) == {0, 1}, form


def test_a_case_that_counted_in_some_heads_alone_comes_back(tmp_path):
    ragged = HeadScores([[[0.5, 1.0], [0.25]], [[], [0.0]]])
    for form in ("retmask", "locos"):
        write_heads(tmp_path / "heads", ragged, form, for_model(2, 2, 1))
        assert read_scores(tmp_path / "heads", for_model(2, 2, 1)) == ragged


@needs_published
def test_published_scores_go_through_every_form(tmp_path):
    models = {
        "Llama-3.1-8B-Instruct": (32, 32, 8),
        "Llama-3.2-1B-Instruct": (16, 32, 8),
        "llama-2-7b-80k": (32, 32, 32),
    }
    for name, shape in models.items():
        config, path = for_model(*shape), tmp_path / "heads"
        published = read_heads(Path(PUBLISHED, "head_scores", f"{name}.json"), config)
        scores = published.scores
        assert published.form == "retmask" and scores.mean.shape == shape[:2] and scores.counts.min() > 300
        for form in written_forms():
            write_heads(path, published, form, config, model=name)
            found = read_heads(path, config)
            if form in OF_CASES:
                assert found.scores == scores
            elif form != "duoattention":
                assert found.heads == published.heads
            else:
                np.testing.assert_array_equal(found.scores.mean, expanded(scores.mean, config))
                write_heads(path, found, form, config)
                assert read_heads(path, config) == found


@needs_published
def test_published_profiles_are_read():
    for path in sorted(Path(PUBLISHED, "profiles").glob("*.json")):
        profile = json.loads(path.read_text())
        config = for_model(profile["n_layers"], profile["n_heads"], profile["n_kv_heads"])
        found = read_heads(path, config)
        assert found.form == "profile"
        detected = found.scores.heads(threshold=0.1)
        assert {tuple(head[:2]) for head in profile["argmax_heads"]} == set(detected)
        assert len(detected) == profile["profile"]["n_heads"]


# --- as others read and write them ---


def test_headkv_finds_a_score_for_every_head_in_the_first_line(tmp_path):
    scores = scores_of()
    write_heads(tmp_path / "heads.json", scores, "headkv", WIDE)
    with open(tmp_path / "heads.json") as file:
        of_heads = json.loads(file.readline())
    means = [np.mean(values) for values in of_heads.values()]
    np.testing.assert_allclose(np.reshape(means, SHAPE), scores.mean, rtol=1e-6)


@pytest.mark.parametrize(
    "scores", [[[-0.5, 1.0]], [[0.0, 0.0]], [[[0.5], []]]], ids=["negative", "all zero", "one without a case"]
)
def test_headkv_gets_no_scores_that_it_cannot_share_a_budget_by(tmp_path, scores):
    given = HeadScores(scores) if np.ndim(scores[0][0]) else HeadScores.from_array(scores)
    with pytest.raises(ValueError, match="HeadKV divides mean scores by their sum, and needs one of at least 0"):
        write_heads(tmp_path / "heads.json", given, "headkv", for_model(1, 2, 1))
    assert not (tmp_path / "heads.json").exists()


def test_duoattention_has_a_line_per_layer_and_a_gate_per_kv_head(tmp_path):
    scores, path = scores_of(), tmp_path / "full_attention_heads.tsv"
    write_heads(path, scores, "duoattention", WIDE)
    gates_LK = np.clip(np.loadtxt(path, dtype=float, delimiter="\t"), 0, 1)
    assert gates_LK.shape == (3, 3)
    np.testing.assert_array_equal(gates_LK.astype(np.float32), scores.mean.reshape(3, 3, 4).max(axis=2))
    np.savetxt(path, np.linspace(-0.25, 1.25, 9).reshape(3, 3), delimiter="\t")  # as DuoAttention writes it
    found = read_heads(path, WIDE)
    clipped = np.clip(np.linspace(-0.25, 1.25, 9), 0, 1).astype(np.float32)
    np.testing.assert_array_equal(found.scores.mean, np.repeat(clipped.reshape(3, 3), 4, axis=1))
    assert found.heads[:8] == [(2, head) for head in range(4, 12)]


def test_the_order_of_signed_scores_survives_the_range_of_duoattention(tmp_path):
    signed = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    write_heads(tmp_path / "heads.tsv", HeadScores.from_array(signed), "duoattention", WIDE)
    gates_LK = np.loadtxt(tmp_path / "heads.tsv", delimiter="\t")
    assert (gates_LK.min(), gates_LK.max()) == (0, 1)
    best_LK = signed.reshape(3, 3, 4).max(axis=2)
    np.testing.assert_array_equal(np.argsort(gates_LK, axis=None), np.argsort(best_LK, axis=None))


def test_qrheads_config_names_heads_and_the_model(tmp_path):
    write_heads(tmp_path / "qr.yaml", HEADS, "qrhead", WIDE, model="org/Some: model")
    config = yaml.safe_load((tmp_path / "qr.yaml").read_text())
    assert config == {
        "attn_head_set": "2-7,0-1,2-0,2-11",
        "model_base_class": "Some: model",
        "model_name_or_path": "org/Some: model",
    }
    published = '# Default configuration\n\nattn_head_set: "2-7,0-1" # top2\nmodel_base_class: "A"\n'
    (tmp_path / "qr.yaml").write_text(published)
    assert read_heads(tmp_path / "qr.yaml", WIDE) == HeadList("qrhead", [(2, 7), (0, 1)])


def test_qrheads_detection_ranks_heads_with_their_scores(tmp_path):
    mean_LH, path = scores_of().mean, tmp_path / "detected.json"
    ranked = [[f"{i}-{j}", float(mean_LH[i, j])] for i, j in np.ndindex(SHAPE)]
    path.write_text(json.dumps(sorted(ranked, key=lambda entry: -entry[1]), indent=4))
    found = read_heads(path, WIDE)
    assert found.form == "qrhead-scores"
    np.testing.assert_array_equal(found.scores.mean, mean_LH)


def test_locos_has_scores_between_what_describes_them(tmp_path):
    scores, path = scores_of(), tmp_path / "locos.json"
    of_heads = {f"{i}-{j}": scores.per_case[i, j].tolist() for i, j in np.ndindex(SHAPE)}
    intervals = {name: [0.0, 1.0] for name in of_heads}
    envelope = {"meta": {"method": "logit_contribution"}, "scores": of_heads, "confidence_intervals": intervals}
    path.write_text(json.dumps(envelope, indent=2))
    assert read_heads(path, WIDE) == HeadList("locos", scores.heads(top_k=36), scores)
    write_heads(path, scores, "locos", WIDE, model="a/b")
    written = json.loads(path.read_text())
    assert written == {"meta": {"model": "a/b", "num_trials_passed": 5}, "scores": of_heads}


# --- what is refused ---


def test_a_file_is_told_by_its_content_and_a_head_named_twice_counts_once(tmp_path):
    (tmp_path / "heads.tsv").write_text("[[2, 7], [0, 1], [2, 7]]")
    assert read_heads(tmp_path / "heads.tsv", WIDE) == HeadList("list", [(2, 7), (0, 1)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no heads in a form that is known here: locos, profile, retmask, headkv, qrhead-scores, list"),
        ("some words", "has no heads in a form that is known here"),
        ("0.5\tnan\t0.5\n", "has no heads in a form that is known here"),
        ("threshold: 0.1", "has no heads in a form that is known here"),
        ("key: [1, 2", "has no heads in a form that is known here"),
        ('{"0-0": [0.5', "not JSON"),
        ("[[1, 0]", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "names no head: add one, such as"),
        ([[1, 0, 0]], r"\[1, 0, 0\] is no head: write \[layer, head\]"),
        ([1, 2], "1 is no head"),
        ([[True, 0]], r"\[True, 0\] is no head"),
        ([[0, 12]], r"head \[0, 12\] is out of range: the model has 3 layers of 12 query heads"),
        ([[0, -1]], r"head \[0, -1\] is out of range"),
        ([["0-0", 0.5], ["0-0", 0.5]], "head '0-0' appears twice"),
        ([["0-0", 0.5], 3], "3 scores no head: write"),
        ([["0-0", "high"]], "head '0-0': put a finite number in place of 'high'"),
        ([["0-0", 0.5]], "scores 1 layers of 1 heads, the model has 3 of 12"),
        ({}, "no head scores"),
        (
            {"0-0": [1.0], "0-1": [0.0]},
            "scores 1 layers of 2 heads, the model has 3 of 12: give scores of this architecture",
        ),
        ('{"0-0": [1.0], "0-0": [0.0]}', "head '0-0' appears twice"),
        ({"meta": {}, "scores": {"0-0": [1.0]}}, "scores 1 layers of 1 heads, the model has 3 of 12"),
        ({"meta": {}, "scores": {}}, "no head scores"),
        ({"argmax_scores": [[0.5]]}, "scores 1 layers of 1 heads, the model has 3 of 12"),
        ({"argmax_scores": [[0.5], []]}, "argmax_scores are not numbers of layers by heads"),
        ({"argmax_scores": 3}, "argmax_scores are not numbers of layers by heads"),
        ("attn_head_set: full_heads", "attn_head_set is full_heads, all heads and no choice of them"),
        ("attn_head_set: ''", "names no head"),
        ("attn_head_set: 1-2,3", "'3' names no head: write 'layer-head'"),
        ("attn_head_set: 3-0", r"head \[3, 0\] is out of range"),
        ("0.5\t0.5\n" * 3, "scores 3 layers of 2 KV heads, the model has 3 of 3: give scores of this architecture"),
        ("0.5\t0.5\t1\n" * 2, "scores 2 layers of 3 KV heads, the model has 3 of 3"),
        ("0.5\t0.5\t1\n0.5\n1\t1\t1\n", "scores 3 layers of 1 to 3 KV heads, the model has 3 of 3"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "heads.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        read_heads(path, WIDE)
    assert "heads.json" in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_form_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "heads"
    with pytest.raises(ValueError, match="heads cannot be written as 'profile'; the forms are locos, retmask, headkv"):
        write_heads(path, HEADS, "profile", WIDE)
    with pytest.raises(ValueError, match="cannot be written as 'numpy'"):
        write_heads(path, HEADS, "numpy", WIDE)
    with pytest.raises(ValueError, match="what is to be written scores 3 layers of 11 heads, the model has 3 of 12"):
        write_heads(path, scores_of(shape=(3, 11)), "retmask", WIDE)
    with pytest.raises(ValueError, match=r"what is to be written: head \[3, 0\] is out of range"):
        write_heads(path, [(3, 0)], "retmask", WIDE)
    assert not path.exists() and set(written_forms()) == set(FORMATS) - {"profile"}


def test_scores_are_not_read_from_a_file_that_has_none(tmp_path):
    (tmp_path / "heads.json").write_text("[[2, 7], [0, 1]]")
    with pytest.raises(ValueError, match="heads.json names 2 heads and scores none: give a file that scores all heads"):
        read_scores(tmp_path / "heads.json", WIDE)
