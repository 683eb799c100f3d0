"""Head scores: means, order of heads, RetMask's file format, and the published file."""

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from retmask_jax.heads.scores import HeadScores
from retmask_jax.utils import files
from retmask_jax.utils.stats import gini

PUBLISHED = os.environ.get("RETMASK_PUBLISHED")
needs_published = pytest.mark.skipif(not PUBLISHED, reason="RETMASK_PUBLISHED is not set")
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
scores_f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture
def write(tmp_path):
    def write_text(content):
        path = tmp_path / "scores.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_text


def test_load_places_every_head_by_its_name(write):
    path = write({"1-0": [0.5, 1], "0-1": [0, 0.25], "0-0": [0, 0], "1-1": [1, 1]})
    scores = HeadScores.load(path)
    np.testing.assert_array_equal(scores.mean, [[0, 0.125], [0.75, 1]])
    np.testing.assert_array_equal(scores.counts, [[2, 2], [2, 2]])
    np.testing.assert_array_equal(scores.per_case, [[[0, 0], [0, 0.25]], [[0.5, 1], [1, 1]]])
    assert [a.dtype for a in (scores.mean, scores.counts, scores.per_case)] == ["f4", "i4", "f4"]


def test_load_sorts_layers_as_numbers(write):
    scores = HeadScores.load(write({f"{layer}-0": [layer / 16] for layer in reversed(range(12))}))
    np.testing.assert_array_equal(scores.mean, np.arange(12)[:, None] / 16)


def test_heads_may_have_counted_different_numbers_of_cases(write):
    scores = HeadScores.load(write({"0-0": [1, 0.5, 0], "0-1": [], "0-2": [0.25]}))
    np.testing.assert_array_equal(scores.mean, [[0.5, 0, 0.25]])
    np.testing.assert_array_equal(scores.counts, [[3, 0, 1]])
    assert scores.mean.dtype == "f4"
    assert scores.counts.dtype == "i4"
    np.testing.assert_array_equal(scores.per_case[0, 0], np.float32([1, 0.5, 0]))
    assert scores.per_case[0, 1].size == 0


def test_no_counted_case_at_all_gives_zeros(write):
    scores = HeadScores.load(write({"0-0": [], "0-1": []}))
    assert scores.per_case.shape == (1, 2, 0)
    np.testing.assert_array_equal(scores.mean, [[0, 0]])
    np.testing.assert_array_equal(scores.counts, [[0, 0]])


@quick
@given(arrays(np.float32, array_shapes(min_dims=3, max_dims=3, max_side=5), elements=scores_f32))
def test_a_saved_file_loads_equal(tmp_path_factory, per_case):
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    scores = HeadScores(per_case)
    scores.save(path)
    loaded = HeadScores.load(path)
    assert loaded == scores
    np.testing.assert_array_equal(loaded.mean, scores.mean)
    np.testing.assert_array_equal(loaded.per_case, per_case)


def test_a_saved_file_with_different_counts_loads_equal(tmp_path):
    scores = HeadScores([[[0.1, 0.2], []], [[0.3], [1 / 3] * 3]])
    scores.save(tmp_path / "new" / "scores.json")
    loaded = HeadScores.load(tmp_path / "new" / "scores.json")
    assert loaded == scores
    np.testing.assert_array_equal(loaded.mean, scores.mean)


def test_a_saved_array_is_a_pure_json_object_with_one_value_per_head(tmp_path):
    HeadScores.from_array([[0.5, 0], [1, 0.25]]).save(tmp_path / "scores.json")
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved == {"0-0": [0.5], "0-1": [0], "1-0": [1], "1-1": [0.25]}


def test_saving_leaves_no_other_file_and_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    HeadScores.from_array([[0.5]]).save(path)
    before = path.read_bytes()

    class FullDisk(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            raise OSError("disk full")

    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="disk full"):
        HeadScores.from_array([[0.75]]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_equality_looks_at_every_case():
    scores = HeadScores([[[0.0, 1.0], [0.5, 0.5]]])
    assert scores == HeadScores([[[0.0, 1.0], [0.5, 0.5]]])
    assert scores != HeadScores([[[1.0, 0.0], [0.5, 0.5]]])
    assert scores != HeadScores.from_array(scores.mean)
    assert scores != HeadScores([[[0.0, 1.0]], [[0.5, 0.5]]])
    assert scores != "scores"


@pytest.mark.parametrize("per_case", [[[[0.5, 1]]], [[[0.5], [1, 0]]]], ids=["full", "ragged"])
def test_scores_cannot_be_changed_in_place_nor_through_the_input(per_case):
    given_scores = [[np.float32(cases) for cases in row] for row in per_case]
    scores = HeadScores(given_scores)
    given_scores[0][0][:] = 9
    assert scores.per_case[0, 0][0] == 0.5
    for array in (scores.per_case[0, 0], scores.mean, scores.counts):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 9


def test_the_mean_of_many_cases_does_not_drift():
    # 2**24 is where adding 1 in f32 stops counting.
    cases = np.ones(1000, dtype=np.float32)
    cases[0] = 2**24
    scores = HeadScores(cases[None, None])
    assert scores.mean[0, 0] == np.float32((2**24 + 999) / 1000)


def test_heads_come_best_first_and_ties_by_layer_and_head():
    scores = HeadScores.from_array([[0.2, 0.9, 0], [0.9, 0.2, 0.05]])
    order = [(0, 1), (1, 0), (0, 0), (1, 1), (1, 2), (0, 2)]
    assert scores.heads(top_k=6) == order
    assert scores.heads(top_k=3) == order[:3]
    assert scores.heads(top_k=0) == []
    assert scores.heads(threshold=0.2) == order[:4]
    assert scores.heads(threshold=0.95) == []
    assert {type(number) for head in scores.heads(top_k=2) for number in head} == {int}


@quick
@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=scores_f32), scores_f32)
def test_heads_by_threshold_are_a_sorted_prefix_of_all(mean_LH, threshold):
    scores = HeadScores.from_array(mean_LH)
    brute_force = sorted(np.ndindex(mean_LH.shape), key=lambda i: (-mean_LH[i], i))
    assert scores.heads(top_k=mean_LH.size) == brute_force
    reached = [i for i in brute_force if mean_LH[i] >= threshold]
    assert scores.heads(threshold=threshold) == reached


@pytest.mark.parametrize("threshold", [0.1, 0.05, 0.3, 0.7])
def test_a_mean_of_exactly_the_threshold_reaches_it(threshold):
    scores = HeadScores([[[threshold] * 3, [threshold - 1e-6] * 3]])
    assert scores.heads(threshold=threshold) == [(0, 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either threshold or top_k"),
        ({"threshold": 0.1, "top_k": 1}, "either threshold or top_k"),
        ({"top_k": 7}, "top_k=7 .* 6 heads"),
        ({"top_k": -1}, "top_k=-1 .* 6 heads"),
        ({"top_k": 1.5}, "top_k=1.5 .* whole number"),
        ({"threshold": math.nan}, "finite number, got nan"),
    ],
)
def test_heads_refuses_what_names_no_set(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeadScores.from_array(np.zeros((2, 3))).heads(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HeadScores.from_array(np.zeros(3)), r"\[L, H\], got shape \(3,\)"),
        (lambda: HeadScores.from_array([[0.5, math.nan]]), "head 0-1 needs finite"),
        (lambda: HeadScores.from_array([[1e39]]), "head 0-0 needs finite"),
        (lambda: HeadScores(np.zeros((2, 3))), r"\[L, H, cases\], got shape \(2, 3\)"),
        (lambda: HeadScores(np.zeros((0, 3, 1))), "layers"),
        (lambda: HeadScores([[], []]), r"widths \[0\]"),
        (lambda: HeadScores([[[0.5]], [[0.5], [0.5]]]), r"widths \[1, 2\]"),
        (lambda: HeadScores([[0.5]]), "head 0-0 needs finite scores"),
    ],
)
def test_scores_that_are_no_layers_by_heads_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("content", "key", "remedy"),
    [
        ("", "Expecting value", "export"),
        ('{"0-0": [0.5', "line 1", "export"),
        ({}, "no head scores", "layer-head"),
        ([0.5], "no head scores", "layer-head"),
        ({"0-0": [1], "1-1": [1], "1-0": [1]}, "'0-1'", "2 layers x 2 heads: add it"),
        ({"0-0": [1], "999999999-999999999": [1]}, "'0-1'", "add it"),
        ('{"0-0": [1], "0-0": [2]}', "'0-0'", "twice: keep one"),
        ({"0_0": [1]}, "'0_0'", "write 'layer-head'"),
        ({"00-0": [1]}, "'00-0'", "write 'layer-head'"),
        ({"0--1": [1]}, "'0--1'", "write 'layer-head'"),
        ({"0-0\n": [1]}, r"'0-0\n'", "write 'layer-head'"),
        ({"0-0": 0.5}, "'0-0'", "a list, a score per case, not 0.5"),
        ({"0-0": {"0-0": 1}}, "'0-0'", "a list, a score per case"),
        ({"0-0": [1, "0.5"]}, "'0-0'", "finite number in place of '0.5'"),
        ({"0-0": [True]}, "'0-0'", "finite number in place of True"),
        ({"0-0": [None]}, "'0-0'", "finite number in place of None"),
        ({"0-0": [[1]]}, "'0-0'", "finite number in place of [1]"),
        ({"0-0": [math.nan]}, "'0-0'", "finite number in place of nan"),
        ({"0-0": [-math.inf]}, "'0-0'", "finite number in place of -inf"),
        ({"0-0": [10**400]}, "'0-0'", "finite number in place of 1000"),
        ({"0-0": [1e39]}, "'0-0'", "finite number in place of 1e+39"),
    ],
)
def test_a_broken_file_is_named_with_its_key_and_a_remedy_in_one_line(write, content, key, remedy):
    path = write(content)
    with pytest.raises(ValueError, match="scores.json") as caught:
        HeadScores.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert key in message
    assert remedy in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.json: .*No such file.*check the path"):
        HeadScores.load(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.json: not JSON"):
        HeadScores.load(tmp_path / "binary.json")


@needs_published
def test_published_llama_scores_give_the_published_heads(tmp_path):
    scores = HeadScores.load(Path(PUBLISHED, "head_scores", "Llama-3.1-8B-Instruct.json"))
    assert scores.mean.shape == (32, 32)
    np.testing.assert_array_equal(scores.counts, 342)
    assert len(scores.heads(threshold=0.1)) == 33
    assert len(scores.heads(threshold=0.05)) == 64
    assert scores.heads(top_k=1) == [(15, 30)]
    assert scores.mean[15, 30] == pytest.approx(0.923, abs=5e-4)
    assert (scores.mean == 0).mean() == pytest.approx(0.76, abs=5e-3)
    assert gini(scores.mean) == pytest.approx(0.935, abs=5e-4)
    scores.save(tmp_path / "again.json")
    assert HeadScores.load(tmp_path / "again.json") == scores
