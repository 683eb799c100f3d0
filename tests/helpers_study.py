"""Results of the stages of the causal study, made up: what its page and panels of studies are tried on."""

import numpy as np
from helpers_results import DOWN, around, make_results, number

from retmask_jax.heads.conditions import ConditionRow
from retmask_jax.heads.detection import Settled
from retmask_jax.heads.detectors import DETECTORS, Agreement, Repeats
from retmask_jax.heads.patterns.steps import KINDS, MEASURES, HeadSteps, Persistence, StepRow
from retmask_jax.heads.query_norms import NormComparison
from retmask_jax.stages.detect import HeadNumber
from retmask_jax.stages.study.detector_runs import Concentration
from retmask_jax.stages.study.detectors import DetectorRow, DetectorsResult
from retmask_jax.stages.study.dynamics import CheckpointRecall, CheckpointRow, DynamicsResult
from retmask_jax.stages.study.per_step import PerStepResult
from retmask_jax.stages.study.theta import BaseHeads, BaseRow, ThetaResult
from retmask_jax.stages.study.utility import UtilityResult
from retmask_jax.utils.numbers import McNemar, Permutation

TEST = McNemar(b=3, c=1, n_discordant=4, p_value=0.03)


def masked_row(task, kind, value, change):
    condition = {"experiment": "", "draw": 0, "k": 0, "site": "rotary", "heads": [(1, 0)], "pairs": [], "q": 0.06}
    recall, change = around(value), number(*change)
    return ConditionRow.of(recall, task=task, kind=kind, change=change, mcnemar=TEST, **condition)


def detectors_result(names, task, empty=()):
    counted = [name for name in names if name not in empty]
    values = {name: 0.1 * i for i, name in enumerate(counted)}
    cost = {"timed": 20, "seconds": 4.0, "cases_per_second": 5.0, "heads": [(1, 0)]}
    rows = [
        DetectorRow(name=name, reused=name == "copy", outcomes={"wrong answer": 20}, **cost)
        if name in empty
        else DetectorRow(
            name=name,
            reused=name == "copy",
            outcomes={"counted": 20},
            counted=20,
            top=0.9,
            best=[HeadNumber.of(around(0.9, 20), layer=1, head=0, chosen=True)],
            shared=0.5,
            profile=Concentration(None if name == "gradient" else 0.8, 0.1, 0.7),
            **cost,
        )
        for name in names
    ]
    masked = [masked_row(task, "none", 0.9, (0, 0, 0))]
    masked += [masked_row(task, name, value, DOWN) for name, value in values.items()]
    pairs = [
        Agreement(a, b, 0.25, None if a == "argmax" else -0.125)
        for i, a in enumerate(counted)
        for b in counted[i + 1 :]
    ]
    return DetectorsResult(
        top_k=3,
        cases=20,
        rows=rows,
        masked=masked,
        agreement=pairs,
        stability=dict.fromkeys(counted, [Settled(n, 3, n / 20) for n in (5, 10, 20)]),
        over_seeds={counted[0]: Repeats(2, 0.75, 0.9, [(1, 0)])},
        numbers={f"detectors/{task}/{name} masked": around(value) for name, value in values.items()},
    )


def utility_result(shape, n_pairs=8):
    comparison = NormComparison(
        n=3,
        n_other=29,
        cohens_d=1.25,
        permutation=Permutation(0.5, 0.125, 0.004, 3),
        partial_spearman=around(0.3, 4),
        pair_cohens_d=[None, *np.linspace(-1, 2, n_pairs - 1).tolist()],
        pair_p_value=[0.01] * n_pairs,
        pair_adjusted_p=[0.02] * 3 + [0.2] * (n_pairs - 3),
        pair_retrieval=[1.0] * n_pairs,
        pair_other=[0.5] * n_pairs,
    )
    return UtilityResult(
        heads=[(1, 0), (1, 1), (1, 2)],
        norms=np.random.default_rng(0).normal(5, 1, shape).tolist(),
        max_length=4096,
        wavelengths={"full": [6.28 * 10.0**i for i in range(n_pairs)]},
        comparison=comparison,
        numbers={"utility/Cohen's d": number(1.25, n=3)},
    )


def theta_result(task, change):
    factors, base, counted = (0.25, 1.0, 4.0), 5e5, {"cases": 20, "counted": 20, "outcomes": {"counted": 20}}
    changes = {f: number(*(change if f == 4 else (0, 0, 0))) for f in factors}
    return ThetaResult(
        theta=base,
        factors=list(factors),
        detector="copy",
        threshold=0.1,
        rows=[
            BaseRow.of(around(0.8), task=task, factor=f, theta=base * f, mcnemar=TEST, change=changes[f])
            for f in factors
        ],
        heads=[BaseHeads(factor=f, theta=base * f, heads=[(1, 0)], top=0.9, jaccard=1.0, **counted) for f in factors],
        numbers={f"theta/{task}/factor {f:g}": around(0.8) for f in factors},
    )


def dynamics_result(task, steps, loss=True):
    rows = [
        CheckpointRow(
            name=f"step_{step}",
            step=step,
            layers=4,
            heads_per_layer=8,
            cases=20,
            counted=20,
            outcomes={"counted": 20},
            heads=[(1, 0)] * i,
            top=None if i == 0 else 0.2 * i,
            gini=0.5,
            jaccard=0.2 * i,
            emergence=0.2 * i,
            recall=CheckpointRecall(none=around(0.2 * i), masked=around(0.0), n_masked=3, mcnemar=TEST)
            if task
            else None,
            text_loss=around(3 - 0.2 * i) if loss else None,
        )
        for i, step in enumerate(steps)
    ]
    return DynamicsResult(
        detector="copy_position",
        threshold=0.1,
        task=task,
        final=[(1, 0)] * (len(steps) - 1),
        rows=rows,
        numbers={f"dynamics/step {step}/heads": number(float(i)) for i, step in enumerate(steps)},
    )


def per_step_result(n=5):
    """Heads at n tokens of answers, in both senses."""
    at = [around(0.9 - 0.1 * i, n=20 - i) for i in range(n)]
    rows = [
        StepRow(kind=kind, position=i, heads=at[i], following=at[i] if i + 1 < n else None, listed=at[i], active=at[i])
        for kind in KINDS
        for i in range(n)
    ]
    means = dict.fromkeys(MEASURES, around(0.6))
    active = [
        HeadSteps.of(
            around(0.8 - 0.1 * head), kind=kind, layer=1, head=head, listed=head == 0, run=2.5, by_position=[0.5] * n
        )
        for kind in KINDS
        for head in range(3)
    ]
    return PerStepResult(
        heads=[(1, 0)],
        outcomes={"counted": 20, "empty answer": 1},
        rows=rows,
        persistence=[Persistence(kind=kind, **means) for kind in KINDS],
        active=active,
        numbers={f"per_step/{kind}/{words}": around(0.6) for kind in KINDS for words in MEASURES.values()},
    )


def study_results(shape=(4, 8), task="needle", names=tuple(DETECTORS), empty=(), steps=(100, 200, 400, 800)):
    made = make_results(shape=shape, tasks=(task,))
    dynamics = dynamics_result(task, steps) if steps else DynamicsResult(rows=[], numbers={})
    return {name: made[name] for name in ("detect", "knockout", "rope")} | {
        "detectors": detectors_result(names, task, empty),
        "utility": utility_result(shape),
        "theta": theta_result(task, DOWN),
        "per_step": per_step_result(),
        "dynamics": dynamics,
    }
