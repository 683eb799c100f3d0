"""The section on training dynamics: the heads, recall and text loss at the checkpoints of a training run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from retmask_jax.reports import html, plotting
from retmask_jax.reports.html import count, fixed, interval, table
from retmask_jax.stages.study.dynamics import CheckpointRow, DynamicsResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_FROM = 30  # ratio of the last to the first step from which a logarithmic axis shows more


def dynamics_section(result: DynamicsResult) -> Markup:
    """Detection over checkpoints, from the result of `dynamics`; nothing where no checkpoint is named."""
    rows = result.rows
    if not rows:
        return Markup()
    panels = {
        "Dynamics: emergence": _emergence("Emergence of the heads", rows),
        "Dynamics: heads": _heads_by_step(f"Heads with a score of {result.threshold:g} or more", rows),
    }
    if result.task:
        panels["Dynamics: recall"] = _recall_by_step(f"Recall on {result.task}", rows)
    if windows := next((row.text_loss.n for row in rows if row.text_loss), None):
        panels["Dynamics: text loss"] = _loss_by_step(f"Loss on plain text (n = {windows} windows)", rows)
    head = ["step", "layers x heads", "cases counted", "heads", "best score", "mean score of the final heads", "Gini"]
    head += ["Jaccard with the final heads", "recall", "recall, best heads masked", "text loss"]
    return html.section(
        "Training dynamics",
        _sentences(result),
        plotting.drawn(
            panels,
            f"Score: {result.detector}, on the same cases at every checkpoint. Final heads: those of the last "
            "checkpoint; a head in a layer that a checkpoint lacks scores 0. Recall: 95% Wilson interval over cases; as many "
            "of a checkpoint's best heads are masked as the last checkpoint has retrieval heads. Text loss: 95% bootstrap "
            "interval over windows.",
        ),
        table(head, [_cells(row) for row in rows]),
    )


def _sentences(result: DynamicsResult) -> list[str]:
    rows, final = result.rows, result.final
    said = [
        f"{count(len(rows), 'checkpoint')}, from step {rows[0].step} to {rows[-1].step}; the last one has "
        f"{count(len(final), 'head')} with a score of {result.threshold:g} or more."
    ]
    scores = {row.step: row.emergence for row in rows if row.emergence is not None}
    if final and (end := scores.get(rows[-1].step)) is not None:
        first = next(step for step, score in scores.items() if score >= end / 2)
        said.append(f"Their mean score first reaches half of its final {end:.3f} at step {first}.")
    return said


def _cells(row: CheckpointRow) -> list[str]:
    recall = (row.recall.none, row.recall.masked) if row.recall else (None, None)
    return [
        str(row.step),
        f"{row.layers} x {row.heads_per_layer}",
        f"{row.counted} of {row.cases}",
        str(len(row.heads)),
        *map(fixed, (row.top, row.emergence, row.gini, row.jaccard)),
        *("–" if number is None else interval(number) for number in (*recall, row.text_loss)),
    ]


# --- figures ---


def _emergence(title: str, rows: Sequence[CheckpointRow]) -> "Figure":
    """Best score, mean score of the final heads, Gini and overlap with the final heads, by training step."""
    lines = {
        "best head's score": [row.top for row in rows],
        "mean score of the final heads": [row.emergence for row in rows],
        "Gini of all scores": [row.gini for row in rows],
        "Jaccard with the final heads": [row.jaccard for row in rows],
    }
    figure, ax = plotting.panel(title, 3.3)
    for i, (label, values) in enumerate(lines.items()):
        points = [(row.step, value) for row, value in zip(rows, values, strict=True) if value is not None]
        look = {"marker": plotting.MARKERS[i], "linestyle": plotting.DASHES[i], "color": plotting.SHADES[i]}
        ax.plot([step for step, _ in points], [value for _, value in points], label=label, **look)
    ax.set(ylim=(-0.04, 1.06), ylabel="score or share")
    _steps(ax, rows)
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def _heads_by_step(title: str, rows: Sequence[CheckpointRow]) -> "Figure":
    """Heads at the threshold by training step."""
    figure, ax = plotting.panel(title)
    ax.plot([row.step for row in rows], [len(row.heads) for row in rows], "o-", color=plotting.colour("retrieval"))
    ax.set(ylabel="heads")
    ax.set_ylim(bottom=0)
    plotting.whole_numbers(ax.yaxis)
    _steps(ax, rows)
    return figure


def _recall_by_step(title: str, rows: Sequence[CheckpointRow]) -> "Figure":
    """Recall by training step, untouched and with the checkpoint's best heads masked."""
    measured = [(row.step, row.recall) for row in rows if row.recall is not None]
    lines = (
        ("untouched", "layer matched", "o", "-", [(step, recall.none) for step, recall in measured]),
        ("best heads masked", "retrieval", "s", "--", [(step, recall.masked) for step, recall in measured]),
    )
    figure, ax = plotting.panel(title, 2.9)
    for label, name, mark, dash, points in lines:
        shade = plotting.colour(name)
        for step, number in points:
            plotting.interval(ax, number, step, shade, marker=mark, vertical=True)
        steps, values = [step for step, _ in points], [number.estimate for _, number in points]
        ax.plot(steps, values, color=shade, linestyle=dash, marker=mark, label=label)
    ax.set(ylabel=f"recall (n = {measured[-1][1].none.n})", ylim=(-0.03, 1.03))
    _steps(ax, rows)
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def _loss_by_step(title: str, rows: Sequence[CheckpointRow]) -> "Figure":
    """Loss on plain text by training step."""
    figure, ax = plotting.panel(title)
    points = [(row.step, row.text_loss) for row in rows if row.text_loss is not None]
    shade = plotting.colour("layer matched")
    for step, loss in points:
        plotting.interval(ax, loss, step, shade, vertical=True)
    ax.plot([step for step, _ in points], [loss.estimate for _, loss in points], color=shade)
    ax.set(ylabel="nats per token")
    _steps(ax, rows)
    return figure


def _steps(ax: "Axes", rows: Sequence[CheckpointRow]) -> None:
    """Draw the axis of training steps."""
    steps = [row.step for row in rows]
    if min(steps) > 0 and max(steps) > _LOG_FROM * min(steps):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:,g}")
    else:
        plotting.whole_numbers(ax.xaxis)
    ax.set_xlabel("step of the checkpoint")
