"""Generation in a batch that is refilled: the results of the simple path, rows used again, programs, memory, meshes."""

import functools
import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers_processes import environment

from retmask_jax.generation import continuous
from retmask_jax.generation.continuous import Request, generate_stream
from retmask_jax.generation.continuous_programs import Shared
from retmask_jax.generation.decode import Generated, generate_many
from retmask_jax.model.config import ModelConfig, Rope
from retmask_jax.model.interventions import Interventions, stack
from retmask_jax.model.masking import normalise_each

BATCH, NEW, VOCAB = 3, 24, 31
STOPS = (3, 4, 5)
DRAWN = {"temperature": 1.3, "top_p": 0.95}
_SMALL = dict(
    vocab_size=VOCAB, hidden_size=16, mlp_size=20, n_heads=4, n_kv_heads=2, head_dim=4, max_length=90, kernel="plain"
)
MODELS = {
    # Rings that a prompt overruns; a tail; scales.
    "short window": ModelConfig(
        **_SMALL, n_layers=3, layer_pattern=("sliding", "full"), window=7, residual_scale=0.8, logit_scale=1.5
    ),
    # A ring that only an answer overruns, longer than what a prompt's own cache holds; all lengths share frequencies.
    "long window": ModelConfig(
        **_SMALL,
        n_layers=2,
        layer_pattern=("sliding",),
        window=66,
        rope=Rope(kind="dynamic", theta=100.0, factor=4.0, original_length=32),
    ),
}


@pytest.fixture(scope="module")
def plain(random_model):
    return random_model(MODELS["short window"])


@pytest.fixture(scope="module")
def single(random_model):
    """Of one layer: for tests that compile many sizes of a batch."""
    return random_model(ModelConfig(**_SMALL, n_layers=1))


def _masks(seed=0):
    rng = np.random.default_rng(seed)

    def draw(config):
        heads, pairs = rng.random((3, config.n_layers, 4)) < 0.4, rng.random((3, config.n_layers, 4, 2)) < 0.3
        return [Interventions(*parts) for parts in zip(heads, pairs, strict=True)]

    return draw


def _requests(seed=0):
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, 60, 9), 60, 60]
    return [Request(rng.integers(6, VOCAB, n).tolist(), i % 3, seed=70 + i // 2) for i, n in enumerate(lengths)]


def _stream(lm, requests, masks=None, **options):
    return generate_stream(
        lm.config,
        lm.params,
        requests,
        masks=masks,
        **{"batch_size": BATCH, "max_new_tokens": NEW, "stop_ids": STOPS} | options,
    )


def _simply(lm, requests, masks, **options):
    """All requests in one batch of the simple path."""
    return generate_many(
        lm.config,
        lm.params,
        [request.tokens for request in requests],
        batch_size=len(requests),
        max_new_tokens=NEW,
        interventions=stack([masks[request.mask] for request in requests]),
        seeds=[request.seed for request in requests],
        stop_ids=STOPS,
        **options,
    )


def _assert_same(results, expected):
    assert sorted(i for i, _ in results) == list(range(len(expected)))
    for i, result in results:
        np.testing.assert_array_equal(result.tokens, expected[i].tokens)
        assert result.lengths == len(result.tokens) == expected[i].lengths
        assert result.stops == expected[i].stops


@pytest.mark.parametrize(
    "model, options",
    [
        pytest.param("short window", {}, id="short window-greedy", marks=pytest.mark.slow),
        pytest.param("short window", DRAWN, id="short window-sampled"),
        pytest.param("long window", {}, id="long window-greedy"),
        pytest.param("long window", DRAWN, id="long window-sampled", marks=pytest.mark.slow),
    ],
)
def test_a_request_gets_what_the_simple_path_gives_for_its_prompt_mask_and_seed(random_model, model, options):
    lm = random_model(MODELS[model])
    requests, masks = _requests(), _masks()(lm.config)
    results = list(_stream(lm, requests, masks, **options))
    _assert_same(results, _simply(lm, requests, masks, **options))
    lengths = [len(result.tokens) for _, result in results]
    assert NEW in lengths and len(set(lengths)) > 3, "rows must end at different steps"


def test_results_come_as_rows_finish_and_prompts_begin_as_rows_are_free(plain, monkeypatch):
    admit, begun = continuous._admit, []

    def noted(job, state, indices, row_F):
        begun.extend(indices)
        return admit(job, state, indices, row_F)

    monkeypatch.setattr(continuous, "_admit", noted)
    first, _ = next(results := _stream(plain, _requests(), _masks()(plain.config), temperature=1.3))
    assert first in begun and len(begun) == BATCH
    finished = [first, *(i for i, _ in results)]
    assert finished != begun and sorted(finished) == sorted(begun)


def test_no_value_compiles_anything(plain, compiles):
    list(_stream(plain, _requests(), _masks()(plain.config)))
    compiles.clear()
    list(_stream(plain, _requests(3), _masks(5)(plain.config), temperature=0.7, top_p=0.5, stop_ids=(9,)))
    assert not compiles


def test_a_cache_is_changed_in_place(plain):
    job = continuous._Job(plain.config, NEW, _shared(plain), _requests())
    state = continuous.empty_state(plain.config, plain.params, np.zeros(BATCH, np.int32), slots=128, max_new_tokens=NEW)
    placed = continuous._admit(job, state, np.array([3]), np.array([1], np.int32))
    continuous.decode_rows(job.config, job.shared, np.int32(2), np.int32(BATCH), *placed)
    assert all(x.is_deleted() for x in jax.tree.leaves([state[1], placed[1]]))


def _shared(lm):
    draws = continuous.Draws.of(lm.config, STOPS, 0.0, 1.0)
    return Shared(lm.params, normalise_each(lm.config, _masks()(lm.config)), draws, np.int32(90))


# --- what runs when ---


@pytest.mark.parametrize(
    "lengths, cuts",
    [
        ([200] * 2 + [20] * 2, [4]),  # too few to wait for
        ([200] * 2 + [20] * 40, [2, 40]),
        ([200] * 40 + [190] * 40 + [20] * 40, [80, 40]),  # of one width are 200 and 190
        ([60] * 500, [500]),
    ],
)
def test_requests_are_cut_where_a_narrower_cache_saves_more_than_the_wait(plain, lengths, cuts):
    job = continuous._Job(plain.config, NEW, Shared({}, None, None, None), [Request([7] * n) for n in lengths])
    groups = continuous._groups(job, list(range(len(lengths))), 4, "sample")
    assert [len(group) for group in groups] == cuts and sum(groups, []) == list(range(len(lengths)))


def test_results_of_several_groups(plain, monkeypatch):
    monkeypatch.setattr(continuous, "_WORTH_WAITING", 0.5)
    requests, masks = _requests(), _masks()(plain.config)
    job = continuous._Job(plain.config, NEW, Shared({}, None, None, None), requests)
    longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    assert len(continuous._groups(job, longest_first, BATCH, "sample")) == 2
    _assert_same(list(_stream(plain, requests, masks, **DRAWN)), _simply(plain, requests, masks, **DRAWN))


def test_each_device_takes_prompts_into_its_own_free_rows():
    free = continuous._FREE
    waiting, owners = continuous.collections.deque([4, 5, 6, 7]), np.array([free, 0, 1, 2, 3, free, free, free])
    requests, rows = continuous._take(waiting, owners, at_once=4, shares=2)
    assert rows.tolist() == [0, 4, 1, 2]  # of the first device's four one is free
    assert requests.tolist() == [4, 4, 5, 6] and list(waiting) == [7]
    assert owners.tolist() == [4, 0, 1, 2, 3, 5, 6, free]
    assert continuous._take(waiting, owners, at_once=4, shares=2) is None
    assert list(waiting) == [7]


def test_where_memory_runs_out_the_batch_is_halved_and_nothing_is_lost(plain, monkeypatch, caplog):
    decode, sizes = continuous.decode_rows, []

    def exhausted(config, shared, steps, enough, rows, cache):
        sizes.append(len(rows.done_B))
        if len(sizes) > 3 and sizes[-1] > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes.")
        return decode(config, shared, steps, enough, rows, cache)

    requests, masks = _requests(), _masks()(plain.config)
    monkeypatch.setattr(continuous, "decode_rows", exhausted)
    results = list(_stream(plain, requests, masks, what="pairs", **DRAWN))
    assert set(sizes) == {BATCH, 1} and "pairs ran out of memory" in caplog.text
    _assert_same(results, _simply(plain, requests, masks, **DRAWN))


# --- errors ---


FILLED = []  # rows of each batch


def _rows_that_fill(monkeypatch, lm, free: int, requests):
    FILLED.clear()
    filling = continuous._filling
    monkeypatch.setattr(continuous.memory, "limit", lambda: free)
    monkeypatch.setattr(continuous, "_filling", lambda *args: FILLED.append(filling(*args)) or FILLED[-1])
    results = list(_stream(lm, requests, batch_size=None, masks=_masks()(lm.config)))
    monkeypatch.undo()
    return FILLED[:], results


@pytest.mark.slow
def test_without_a_batch_size_rows_fill_the_free_memory_by_the_compilers_report(single, monkeypatch):
    requests = _requests() * 4
    (few,), results = _rows_that_fill(monkeypatch, single, 250_000, requests)
    _assert_same(results, _simply(single, requests, _masks()(single.config)))

    masks = normalise_each(single.config, _masks()(single.config))
    shared = Shared(single.params, masks, continuous.Draws.of(single.config, STOPS, 0.0, 1.0), np.int32(84))
    longest, programs = max(len(request.tokens) for request in requests), continuous.programs
    needed = functools.cache(lambda rows: programs(single.config, shared, rows, longest, NEW).needed())
    monkeypatch.setattr(continuous, "programs", lambda _, shared, n, *__: SimpleNamespace(needed=lambda: needed(n)))
    more = continuous.rows_that_fill(single.config, shared, longest, NEW, 500_000, most=len(requests))
    assert few < more < len(requests)
    for rows, free in ((few, 250_000), (more, 500_000)):
        assert sum(needed(rows)) <= free < sum(needed(rows + rows // 2))


@pytest.mark.parametrize("refuses", [False, True], ids=["reports", "refuses"])
def test_rows_fill_the_free_memory_by_what_their_programs_need(single, monkeypatch, refuses):
    """As above, by programs that are not compiled; those of a TPU are refused where they need more than there is."""

    def needed(rows):
        return 100_000 + 20_000 * rows

    def report(rows, free):
        if refuses and needed(rows) > free:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")
        return needed(rows) - 1000, 1000

    masks = normalise_each(single.config, _masks()(single.config))
    shared = Shared(single.params, masks, continuous.Draws.of(single.config, STOPS, 0.0, 1.0), np.int32(84))
    found = []
    for free in (250_000, 500_000):
        programs = functools.partial(report, free=free)
        monkeypatch.setattr(
            continuous, "programs", lambda _, shared, n, *__, f=programs: SimpleNamespace(needed=lambda: f(n))
        )
        found.append(rows := continuous.rows_that_fill(single.config, shared, 60, NEW, free, most=44))
        assert needed(rows) <= free < needed(rows + rows // 2)
    assert 1 < found[0] < found[1] < 44


def test_rows_that_fill_the_memory_are_no_more_than_requests_and_at_least_one(single, monkeypatch):
    sizes = []

    def answered(job, group, rows):
        sizes.append(rows)
        yield from ((i, Generated([], 0, -1)) for i in group)

    monkeypatch.setattr(continuous, "_refilled", answered)
    for free, requests in ((10**9, _requests()), (1000, _requests()[:2])):
        monkeypatch.setattr(continuous.memory, "limit", lambda: free)
        list(_stream(single, requests, batch_size=None, masks=_masks()(single.config)))
    assert sizes == [11, 1]


def test_where_rows_that_were_to_fill_the_memory_do_not_fit_they_are_halved(single, monkeypatch):
    admit, failed = continuous._admit, []

    def scarce(job, state, *taken):
        if len(state[0].done_B) > 6:
            failed.append(len(state[0].done_B))
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")
        return admit(job, state, *taken)

    monkeypatch.setattr(continuous, "_admit", scarce)
    requests = _requests()
    results = list(_stream(single, requests, batch_size=None, masks=_masks()(single.config)))
    assert failed == [11]
    _assert_same(results, _simply(single, requests, _masks()(single.config)))


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"tokens": []}, {}, "request 1 has no tokens"),
        ({"tokens": [7] * 67}, {}, "67 prompt tokens and 24 new ones exceed .* 90"),
        ({"tokens": [7, VOCAB]}, {}, "tokens run from .* to 31"),
        ({"mask": 3}, {}, "request 1 has mask 3; the masks run from 0 to 2"),
        ({"mask": -1}, {}, "request 1 has mask -1"),
        ({}, {"temperature": -1.0}, "temperature -1.0"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({}, {"stop_ids": range(9)}, "9 stop ids are given"),
        ({}, {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_unfit_requests_raise_before_anything_runs(plain, change, options, message):
    requests = [Request([7]), Request(**{"tokens": [7]} | change)]
    with pytest.raises(ValueError, match=message):
        _stream(plain, requests, _masks()(plain.config), **options)


# --- meshes ---

_MESHES = textwrap.dedent("""
    import json, logging, sys
    import jax, numpy as np
    from retmask_jax.generation import continuous
    from retmask_jax.model import sharding
    from retmask_jax.generation.decode import generate_many
    from retmask_jax.hf.hub import BUNDLED
    from retmask_jax.generation.language_model import load

    sizes = dict(zip(sharding.AXES, map(int, sys.argv[1:])))
    lm = load(BUNDLED, mesh=sharding.make_mesh(sizes))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(16, 256, n).tolist() for n in (60, 3, 41, 7, 12, 50, 9, 33, 1)]
    options = dict(batch_size=4, max_new_tokens=40, temperature=2.0, stop_ids=(17, 18, 19, 20, 21, 30, 31))
    expected = generate_many(lm.config, lm.params, prompts, seeds=np.arange(9), **options)
    requests = [continuous.Request(prompt, seed=i) for i, prompt in enumerate(prompts)]
    found = dict(continuous.generate_stream(lm.config, lm.params, requests, **options))
    print(json.dumps({
        "same": all(np.array_equal(found[i].tokens, expected[i].tokens) for i in range(9)),
        "lengths": [len(result.tokens) for result in expected],
        "programs": [
            getattr(continuous, name)._cache_size()
            for name in ("empty_state", "start_rows", "replace_rows", "decode_rows")
        ],
    }))
""")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_on_a_mesh_results_and_the_number_of_programs_are_the_same(sizes):
    command = [sys.executable, "-c", _MESHES, *map(str, sizes)]
    done = subprocess.run(command, env=environment(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["same"] and len(set(found["lengths"])) > 3, found
    assert found["programs"] == [1, 1, 1, 1]
    assert "donated" not in done.stderr
