"""The sections on the preference pairs and on training, with their figures."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from retmask_jax.reports import plotting
from retmask_jax.reports.html import count, replies, section, table
from retmask_jax.reports.plotting import colour, drawn
from retmask_jax.stages.arms import ARMS
from retmask_jax.stages.pairs import PairsResult
from retmask_jax.stages.train import Run, Step, TrainResult
from retmask_jax.training.pairs import KEPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Objective -> what it is called on the page, and the unit of its loss.
_OBJECTIVES = {
    "dpo": ("preference", "nats"),
    "sft": ("supervised", "nats per token"),
    "contrast": ("contrast", "nats per token"),
}


def pairs_section(result: PairsResult) -> Markup:
    """What became of the prompts, from the result of `pairs`."""
    counts, prompts = result.counts, result.prompts
    if not counts:
        return section("Preference pairs", ["No arm is trained."])
    shares = [round(100 * parts[KEPT] / prompts) for parts in counts.values()]
    kept = f"{min(shares)}%" if min(shares) == max(shares) else f"{min(shares)} to {max(shares)}%"
    single = " and ".join(name for name, arm in ARMS.items() if arm.rejected is None)
    return section(
        "Preference pairs",
        [
            f"Each run answers {count(prompts, 'prompt')}; {kept} of them become training examples.",
            "A pair is dropped where both answers are the same or one is empty.",
            *_left_out(result.left_out),
        ],
        drawn(
            {"Pairs kept": _stacked_counts(f"Prompts by outcome (n = {prompts})", counts)},
            f"Runs are named arm-seed. {single} need one answer, so none can be identical.",
        ),
        table(
            ["answers of", "cut off at the largest number of tokens", "of"],
            [[name, n, prompts] for name, n in result.answers_cut.items()],
        ),
        replies(result.examples),
    )


def training_section(result: TrainResult) -> Markup:
    """Losses and rewards of every run, from the result of `train`."""
    runs, groups = result.runs, {}
    for run in runs.values():
        groups.setdefault(_objective(run), []).append(run)
    panels = {
        f"Loss, {name}": curves(f"Loss, {name}", groups[objective], _loss, unit, rate=True)
        for objective, (name, unit) in _OBJECTIVES.items()
        if objective in groups
    }
    preference = groups.get("dpo")
    if preference:
        panels["Margin"] = curves("Reward margin", preference, lambda step: step.margin, "chosen minus rejected")
        panels["Accuracy"] = curves("Accuracy", preference, lambda step: step.accuracy, "share ranked right")
    ends = {name: _ends([step.loss for step in run.steps]) for name, run in runs.items()}
    lower = sum(last < first for first, last in ends.values())
    return section(
        "Training",
        [
            f"The loss of {lower} of {count(len(runs), 'run')} is lower in the last tenth of the steps than in the first.",
            "Only runs on preferences have rewards; the others show a loss alone." if set(groups) - {"dpo"} else "",
        ],
        drawn(
            panels,
            "One line for each run, coloured by arm: a moving average over a twentieth of the steps, with the raw values "
            "in pale. The dashed grey line is the learning rate (right axis).",
        ),
        table(
            [
                *("run", "examples", "prompts cut", "answers cut", "parameters trained", "steps"),
                *("loss, first tenth", "loss, last tenth"),
            ],
            [
                [
                    name,
                    run.examples,
                    run.prompts_cut,
                    run.answers_cut,
                    "–" if run.trained_parameters is None else f"{run.trained_parameters:,}",
                    len(run.steps),
                    *(f"{x:.3f}" for x in ends[name]),
                ]
                for name, run in runs.items()
            ],
        ),
        table(["arm", "trained on"], [[arm, ARMS[arm].label] for arm in _arms(result) if arm in ARMS]),
        replies(result.examples),
    )


def curves(
    title: str, runs: Sequence[Run], value: Callable[[Step], float | None], label: str, rate: bool = False
) -> "Figure":
    """A number over the steps, a line for each run: lightly smoothed, over the raw values in pale.

    Args:
        title: Of the figure.
        runs: As in the result of `train`.
        value: Gives the number of a step.
        label: Of the number's axis.
        rate: Adds the learning rate, on the right axis.
    """
    figure, ax = plotting.panel(title, 2.3 + 0.2 * math.ceil((len({run.arm for run in runs}) + rate) / 2))
    seen = {}
    for run in runs:
        points = [(step.step, y) for step in run.steps if (y := value(step)) is not None]
        steps, values = [x for x, _ in points], [y for _, y in points]
        ax.plot(steps, values, color=colour(run.arm), alpha=0.22, linewidth=0.8)
        (seen[run.arm],) = ax.plot(steps, smooth(values), color=colour(run.arm))
    if rate:
        twin = ax.twinx()
        steps, rates = ([step.step for step in runs[0].steps], [step.learning_rate for step in runs[0].steps])
        (seen["learning rate"],) = twin.plot(steps, rates, color="#999999", linewidth=0.8, linestyle="--")
        top = max(rates) or 1.0
        twin.set_yticks([0, top / 2, top], ["0", f"{top / 2:.2g}", f"{top:.2g}"])
        twin.set(ylabel="learning rate", ylim=(0, 1.05 * top))
        twin.spines["right"].set_visible(True)
    ax.set(xlabel="step", ylabel=label)
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=2)
    return figure


def smooth(values: Sequence[float]) -> Float[np.ndarray, " steps"]:
    """Centred moving average over about a twentieth of the values; at the ends, over those that exist."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _left_out(reasons: Mapping[str, int]) -> list[str]:
    left = [f"{n} {why}" for why, n in reasons.items() if n]
    return [f"Of the prompts that were read, some were left out: {', '.join(left)}."] if left else []


def _arms(result: TrainResult) -> list[str]:
    return list(dict.fromkeys(run.arm for run in result.runs.values()))


def _objective(run: Run) -> str:
    """What a run minimised; only preferences have rewards."""
    return "dpo" if run.steps[0].margin is not None else ARMS[run.arm].objective


def _loss(step: Step) -> float:
    return step.loss


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and the last tenth."""
    n = math.ceil(len(values) / 10)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def _stacked_counts(title: str, counts: Mapping[str, Mapping[str, int]]) -> "Figure":
    """Prompts per run, split into kept, identical and empty."""
    looks = {"kept": ("#666666", None), "identical": ("#cccccc", None), "empty": ("white", "////")}
    figure, ax = plotting.panel(title, 1.2 + 0.26 * len(counts))
    for y, parts in enumerate(counts.values()):
        left = 0
        for name, (shade, hatch) in looks.items():
            n, label = parts.get(name, 0), name if y == 0 else None
            ax.barh(y, n, 0.62, left, color=shade, hatch=hatch, edgecolor="#444444", linewidth=0.6, label=label)
            left += n
        plotting.note(ax, y, str(parts[KEPT]))
    plotting.rows(ax, list(counts), "prompts (right: kept)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
