"""What is said beforehand of a stage's time: it grows with the work, and the work is counted as the stage does it."""

import dataclasses

import numpy as np
import pytest

from retmask_jax.heads import knockout
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.pipeline.registry import STAGES
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost, Speed, in_words, measured_speed, seconds, task_cost
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.runs.workdir import Workdir

SPEED = Speed(flops=1e9, bandwidth=1e9)


@pytest.fixture
def context(tmp_path):
    def make(*overrides):
        config = load_recipe("tiny", [("model", str(BUNDLED)), *overrides])
        return Context(config, Workdir.open(tmp_path / "work", config))

    return make


def test_time_grows_with_every_part_of_the_work(context):
    model = context().outline.config
    base = Cost(read=10_000, written=100, trained=1000, rows=4)
    times = [
        seconds(dataclasses.replace(base, **{part: 10 * getattr(base, part)}), model, "float32", SPEED)
        for part in ("read", "written", "trained")
    ]
    assert min(times) > seconds(base, model, "float32", SPEED)
    faster = Speed(flops=1e12, bandwidth=1e12)
    assert seconds(base, model, "float32", faster) < seconds(base, model, "float32", SPEED)


def test_the_speed_of_this_machine_is_measured():
    speed = measured_speed("float32")
    assert 1e8 < speed.flops < 1e16 and 1e7 < speed.bandwidth < 1e14


def test_a_task_costs_its_cases(context):
    made = context(("tasks.niah.per_length", "4"))
    cost, cases = task_cost(made.config, "niah"), made.cases("niah")
    assert cost.read == sum(case.spec.length for case in cases)
    assert cost.written == len(cases) * made.config.tasks["niah"].max_new_tokens // 2


@pytest.mark.parametrize("draws", [1, 3])
def test_knockout_costs_each_of_its_conditions(context, draws):
    made = context(("knockout.tasks", "('needle short',)"), ("knockout.draws", str(draws)))
    model, text = made.outline.config, made.config.text
    scores_LH = np.arange(model.n_layers * model.n_heads, dtype=float).reshape(model.n_layers, model.n_heads)
    conditions = knockout.knockout_conditions(model, [(1, 0), (1, 1)], scores_LH + 1, draws=draws, scores_LH=scores_LH)
    activity = model.n_layers * model.n_heads * made.config.knockout.activity_windows * text.length // 2
    each = task_cost(made.config, "needle short").read + text.windows * text.length
    assert STAGES["knockout"].cost(made).read == len(conditions) * each + activity


def test_every_stage_that_asks_the_model_says_what_it_costs(context):
    made = context()
    costs = {name: STAGES[name].cost(made) for name in ("detect", "knockout", "rope", "pairs", "train", "eval")}
    assert all(cost != Cost() for cost in costs.values())
    assert STAGES["detect"].cost(context(("detect.scores", "scores.json"))) == Cost()


def test_a_duration_is_said_in_round_words():
    assert [in_words(x) for x in (3, 59, 61, 5399, 5400)] == [
        "about 10 s",
        "about 60 s",
        "about 1 min",
        "about 90 min",
        "about 1.5 h",
    ]
