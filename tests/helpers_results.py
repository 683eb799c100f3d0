"""Results of every stage, made up: what pages and panels are tried on."""

import html.parser
import json

import msgspec
import numpy as np

from retmask_jax.evals.compare import ArmRow, ModelRow, headlines
from retmask_jax.heads.conditions import ConditionRow
from retmask_jax.heads.detection import Settled
from retmask_jax.stages.detect import DetectResult, HeadNumber
from retmask_jax.stages.eval import Cell, EvalResult
from retmask_jax.stages.knockout import KindNumber, KnockoutResult, LossRow, TaskMean
from retmask_jax.stages.pairs import PairsResult
from retmask_jax.stages.rope import DoseContrast, DoseMean, RopeResult, RopeRow
from retmask_jax.stages.train import Run, Step, TrainResult
from retmask_jax.utils.numbers import McNemar, Number

UP, DOWN, ACROSS = (0.1, 0.05, 0.15), (-0.1, -0.15, -0.05), (0.02, -0.03, 0.07)


KINDS = {"none": 1, "retrieval": 1, "any layer": 3, "layer-matched": 3, "activity-matched": 3}


ALL_ARMS = ("retmask", "any_layer", "layer_matched", "activity_matched", "no_fact", "sft_filtered", "sft_unfiltered")


def number(value, low=None, high=None, n=40):
    return Number(value, low, high, n)


def around(value, n=40):
    return number(value, value - 0.041, value + 0.043, n)


def detected(heads, scores=(), threshold=0.1, **changes):
    """A result of `detect` with these heads."""
    fields = {
        "heads": [tuple(head) for head in heads],
        "scores": list(scores),
        "mean": [[0.0]],
        "threshold": threshold,
        "outcomes": {},
        "profile": {},
        "stability": [],
        "mask_hash": "",
        "numbers": {},
    }
    return DetectResult(**fields | changes)


def detect_result(shape, counted, threshold):
    mean_LH = np.random.default_rng(0).beta(0.1, 2, shape)
    mean_LH[1, :3] = 0.9, 0.8, 0.7
    cases = sorted({max(1, counted // 2), counted})
    return detected(
        [(1, 0), (1, 1), (1, 2)],
        [0.9, 0.8, 0.7],
        threshold,
        mean=mean_LH.tolist(),
        outcomes={"counted": counted, "wrong answer, cut at the token limit": 3, "empty answer": 1},
        profile={"n_heads": 3, "gini": 0.871, "layer_com": None},
        stability=[Settled(n, 3, 1.0 if n == counted else 0.75) for n in cases],
        best=[HeadNumber.of(around(0.9, counted), layer=1, head=0, chosen=True)],
        numbers={
            "detect/cases counted": around(0.9123),
            "detect/heads": number(3.0, n=counted),
            "detect/gini": number(0.871, n=counted),
        },
    )


def knocked_out(**changes):
    """A result of `knockout` in which nothing was measured but what is given."""
    fields = dict.fromkeys(("rows", "means", "text_loss", "text_loss_means", "activity", "curve", "contrasts"), [])
    return KnockoutResult(**fields | {"idle": 0, "idle_below": 0.1, "minimal": None, "numbers": {}} | changes)


def condition_row(value, kind, row=ConditionRow, **changes):
    """A row of a condition against an untouched model of 0.9."""
    fields = {"task": "needle", "experiment": "zero", "draw": 0, "k": 0, "site": "rotary", "heads": [], "pairs": []}
    fields |= {"change": around(value - 0.9), "mcnemar": McNemar(3, 1, 4, 0.5), "q": 0.5}
    return row.of(around(value), kind=kind, **fields | changes)


def knockout_result(shape, tasks, idle):
    rows, means = [], []
    for task in tasks:
        for kind, draws in KINDS.items():
            value = 0.2 if kind == "retrieval" else 0.9
            for draw in range(draws):
                tests = {"mcnemar": McNemar(3, 1, 4, 0.5**draw), "q": 0.5 ** (draw + 1), "change": around(value - 0.9)}
                rows.append(condition_row(value - 0.02 * draw, kind, task=task, draw=draw, **tests))
            means.append(TaskMean.of(around(value - 0.01), task=task, kind=kind, experiment="zero"))
    losses = [KindNumber.of(around(2.1 + 0.1 * i), kind=kind, experiment="zero") for i, kind in enumerate(KINDS)]
    activity = np.random.default_rng(1).exponential(size=shape)
    activity[0, 0] = 0.0
    return knocked_out(
        rows=rows,
        means=means,
        activity=activity.tolist(),
        idle=idle,
        text_loss=[
            LossRow.of(around(2.1), kind=kind, draw=draw, experiment="zero")
            for kind, draws in KINDS.items()
            for draw in range(draws)
        ],
        text_loss_means=losses,
        numbers={f"knockout/{mean.task}/{mean.kind}": mean.number for mean in means}
        | {f"knockout/text loss/{loss.kind}": loss.number for loss in losses}
        | {"knockout/idle heads": number(float(idle))},
    )


def rope_row(value, kind, **changes):
    return condition_row(value, kind, RopeRow, **{"experiment": "dose", "variance": None} | changes)


def rope_result(tasks, gap):
    kinds = {"lowest": 1, "highest": 1, "control heads, lowest": 1, "random": 2}
    rows, means, contrasts, numbers = [], [], [], {}
    for task in tasks:
        rows.append(rope_row(0.9, "none", task=task, experiment=""))
        means.append(DoseMean.of(around(0.9), task=task, experiment="", kind="none", k=0, site="rotary"))
        for k in (1, 2, 4):
            for kind, draws in kinds.items():
                pairs = list(range(8 - k, 8) if "lowest" in kind else range(k))
                mean = around(0.9 - 0.1 * k)
                means.append(DoseMean.of(mean, task=task, experiment="dose", kind=kind, k=k, site="rotary"))
                numbers[f"rope/{task}/{kind} {k} pairs"] = mean
                rows += [rope_row(0.8, kind, task=task, draw=draw, k=k, pairs=pairs) for draw in range(draws)]
        contrasts.append(DoseContrast(task=task, site="rotary", k=2, kind="highest", change=number(*gap), p_value=0.5))
        numbers[f"rope/{task}/none"] = around(0.9)
        numbers[f"rope/{task}/highest minus lowest quarter"] = number(*gap)
    return RopeResult(
        rows=rows,
        means=means,
        contrasts=contrasts,
        spectra=[],
        costs=[],
        pairs=[1, 2, 4],
        n_pairs=8,
        patch_pairs=1,
        wavelengths=[10.0**i for i in range(8)],
        context=512,
        numbers=numbers,
    )


def train_results(arms, seeds, n_steps):
    counts, runs = {}, {}
    for arm in arms:
        for seed in seeds:
            loss = np.linspace(0.7, 0.3, n_steps) + np.random.default_rng(seed).normal(0, 0.01, n_steps)
            rewards = {} if arm.startswith("sft") else {"margin": 0.1, "accuracy": 0.75}
            counts[f"{arm}-{seed}"] = {"kept": 30, "empty": 4, "identical": 6}
            if arm == "sft_unfiltered":
                counts[f"{arm}-{seed}"] = {"kept": 38, "empty": 2}
            steps = [training_step(i + 1, float(loss[i]), **rewards) for i in range(n_steps)]
            runs[f"{arm}-{seed}"] = Run(arm=arm, seed=seed, examples=30, answers_cut=2, prompts_cut=0, steps=steps)
    pairs = PairsResult(
        counts=counts,
        heads={},
        prompts=40,
        left_out={"redacted": 3, "too long": 0},
        answers_cut={"normal-0": 7},
        numbers={f"pairs/{name}/kept": around(0.75) for name in counts},
    )
    return pairs, TrainResult(runs=runs, numbers={f"train/{name}/final loss": number(0.31) for name in runs})


def training_step(step, loss, **rewards):
    return Step(step=step, loss=loss, gradient_norm=1.0, parameter_norm=9.0, learning_rate=1e-5, **rewards)


def eval_result(arms, seeds, changes):
    """changes: task -> (value, low, high) of every arm's change against start."""
    models = [("start", "start", 0), *((f"{arm}-{seed}", arm, seed) for arm in arms for seed in seeds)]
    rows = [
        ModelRow(model=model, arm=arm, seed=seed, task=task, change=number(*change), **vars(around(0.5)))
        for task, change in changes.items()
        for model, arm, seed in models
    ]
    pooled = [
        ArmRow(arm="start", task=task, mean=around(0.5), change=None)
        if arm == "start"
        else ArmRow(arm=arm, task=task, mean=around(0.5 + change[0]), change=number(*change))
        for arm in ("start", *arms)
        for task, change in changes.items()
    ]
    grids = [
        Cell(
            model=model,
            arm=arm,
            seed=seed,
            task="niah",
            length=length,
            depth=depth,
            **vars(number(0.2 if seed else 0.7, 0, 1, 8)),
        )
        for model, arm, seed in models
        for length in (128, 256)
        for depth in (0.0, 0.5, 1.0)
    ]
    return evaluated(rows, pooled, grids=grids)


def evaluated(rows, arms, **changes):
    """A result of `eval` with these rows."""
    fields = {"grids": [], "metrics": {}, "series": {}, "missing": {}, "helmet": {}}
    return EvalResult(rows=rows, arms=arms, numbers=headlines(arms), **fields | changes)


def make_results(
    shape=(4, 8),
    tasks=("needle", "facts: from memory"),
    arms=("retmask",),
    seeds=(0,),
    counted=20,
    threshold=0.1,
    idle=3,
    gap=UP,
    n_steps=12,
    changes=None,
):
    pairs, train = train_results(arms, seeds, n_steps)
    return {
        "detect": detect_result(shape, counted, threshold),
        "knockout": knockout_result(shape, tasks, idle),
        "rope": rope_result(tasks[:1], gap),
        "pairs": pairs,
        "train": train,
        "eval": eval_result(arms, seeds, changes or {"needle": UP, "facts: from memory": DOWN, "text loss": ACROSS}),
    }


def stored(results):
    """The results as they are read back from their files."""
    files = {stage: json.dumps(result, default=msgspec.to_builtins) for stage, result in results.items()}
    return {stage: msgspec.convert(json.loads(file), type(results[stage])) for stage, file in files.items()}


class Page(html.parser.HTMLParser):
    """Headings, table rows, text outside of figures, and the names of the drawings."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.rows, self.drawings, self.text, self.tags, self._open = [], [], [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag in ("svg", "img"):
            self.drawings.append(attributes.get("aria-label") or attributes["alt"])
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if "svg" not in self._open and "style" not in self._open:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")
