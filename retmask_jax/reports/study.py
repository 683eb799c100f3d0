"""Results of the causal study -> one self-contained HTML page; never touches a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retmask_jax.reports import figures, html, study_figures
from retmask_jax.reports.figures import drawn
from retmask_jax.reports.heads import heads_section
from retmask_jax.reports.html import change, count, fixed, interval, p_value, signed, table
from retmask_jax.reports.knockout import knockout_section
from retmask_jax.reports.page import PageResult, write_page
from retmask_jax.reports.report import all_numbers, provenance
from retmask_jax.reports.rope import rope_section
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import Stage
from retmask_jax.stages.detect import DETECT
from retmask_jax.stages.detectors import DETECTORS_STAGE
from retmask_jax.stages.dynamics import DYNAMICS
from retmask_jax.stages.knockout import KNOCKOUT
from retmask_jax.stages.rope import ROPE
from retmask_jax.stages.theta import THETA
from retmask_jax.stages.utility import UTILITY
from retmask_jax.utils.files import write_atomically


def write_study(path: Path, results: Mapping[str, Mapping], model: str) -> None:
    """Write the page. results: stage -> what its function in `stages` returned, with or without "provenance"."""
    heads = results["detect"].heads
    with figures.style():
        sections = [
            _header(results),
            heads_section(results["detect"]),
            detectors_section(results["detectors"]),
            knockout_section(results["knockout"], heads),
            rope_section(results["rope"]),
            utility_section(results["utility"]),
            theta_section(results["theta"]),
            dynamics_section(results["dynamics"]),
            all_numbers(results),
        ]
    write_atomically(path, html.document(f"Causal study of the retrieval heads of {model}", sections))


def _header(results) -> str:
    """What was done on what, and the numbers to look at first."""
    numbers = {name: number for result in results.values() for name, number in result["numbers"].items()}
    task = next((row["task"] for row in results["detectors"]["masked"]), None)
    wanted = {
        "Retrieval heads": "detect/heads",
        "Gini coefficient of the head scores": "detect/gini",
        f"Recall on {task}, untouched": f"knockout/{task}/none",
        f"Recall on {task}, retrieval heads masked": f"knockout/{task}/retrieval",
        f"Recall on {task}, layer-matched heads masked": f"knockout/{task}/layer-matched",
        "Query norms of retrieval heads against others: Cohen's d": "utility/Cohen's d",
    }
    rows = [[label, interval(numbers[name]), numbers[name]["n"]] for label, name in wanted.items() if name in numbers]
    return html.lines(*provenance(results)) + table(
        ["", "value [95% interval]", "n"],
        rows,
        note="n: independent cases (heads and Gini: the cases behind the scores; Cohen's d: retrieval heads). Every other "
        "number is at the end of the page.",
    )


# --- detectors ---


def detectors_section(result) -> str:
    """The result of `detectors`."""
    rows, masked, top_k = result["rows"], result["masked"], result["top_k"]
    tasks = list(dict.fromkeys(row["task"] for row in masked))
    panels = {
        "Agreement of detectors": study_figures.agreement_matrix(
            f"Agreement (best {top_k} heads; all scores)",
            [row["name"] for row in rows if row["counted"]],
            result["agreement"],
        ),
        **{
            f"Heads of each detector masked: {task}": study_figures.masked_recall(
                f"Best {top_k} heads masked: {task}", [row for row in masked if row["task"] == task]
            )
            for task in tasks
        },
        "Time of detectors": study_figures.costs("Time, compiling included", rows),
        "Stability of detectors": study_figures.settling(f"Stability of the best {top_k} heads", result["stability"]),
    }
    caption = (
        f"Agreement: Jaccard (shared over all members) of the best {top_k} heads of two detectors above the diagonal, "
        "Spearman's rank correlation of their scores over all heads below. Recall: 95% Wilson interval over the task's cases; "
        "dotted: nothing masked. Time: wall clock of this run on its device, with compiling, which weighs less the more "
        "cases there are; hatched: taken from the stage detect, whose time is that of the whole stage. Stability: overlap "
        "of the best heads on the first cases with those on all."
    )
    return html.section(
        "Detectors",
        _detector_sentences(result, tasks),
        drawn(panels, caption),
        table(
            [
                "detector",
                "cases counted",
                "seconds",
                "cases per second",
                "Gini",
                "Jaccard with detect's heads",
                "Jaccard over seeds",
                *(f"{task}, its heads masked" for task in tasks),
                *(f"change, {task}" for task in tasks),
                "McNemar p",
            ],
            [_detector_cells(row, result, tasks) for row in rows],
            note="Gini: none where scores are signed. McNemar's exact test against nothing masked, not adjusted for the "
            "number of detectors; the first task's.",
        ),
    )


def _detector_sentences(result, tasks: Sequence[str]) -> list[str]:
    rows = result["rows"]
    said = [
        f"{count(len(rows), 'detector')} on {count(result['cases'], 'detection case')}; compared are the best "
        f"{result['top_k']} heads of each."
    ]
    said += [_lowest_and_highest(task, [row for row in result["masked"] if row["task"] == task]) for task in tasks]
    if empty := [row["name"] for row in rows if not row["counted"]]:
        said.append(f"No case counts for {', '.join(empty)}: left out of the comparisons.")
    if reused := [row["name"] for row in rows if row["reused"]]:
        said.append(f"The scores of {', '.join(reused)} are those of the stage detect; nothing was decoded again.")
    return said


def _lowest_and_highest(task: str, masked: Sequence[Mapping]) -> str:
    """Whose heads matter most and least for a task."""
    none, *others = sorted(masked, key=lambda row: row["kind"] != "none")
    ends = dict.fromkeys(choose(row["value"] for row in others) for choose in (min, max))
    named = [
        f"{word} for {', '.join(row['kind'] for row in others if row['value'] == end)} ({end:.3f})"
        for word, end in zip(("lowest", "highest"), ends, strict=False)
    ]
    said = f"Recall on {task} is {none['value']:.3f} untouched."
    return f"{said} With a detector's heads masked it is {' and '.join(named)}."


def _detector_cells(row, result, tasks: Sequence[str]) -> list:
    masked = [
        next((m for m in result["masked"] if (m["task"], m["kind"]) == (task, row["name"])), None) for task in tasks
    ]
    repeats = result["over_seeds"].get(row["name"])
    return [
        row["name"],
        f"{row['counted']} of {sum(row['outcomes'].values())}",
        f"{row['seconds']:.1f}",
        f"{row['cases_per_second']:.2f}",
        fixed(row["profile"] and row["profile"]["gini"]),
        fixed(row["shared"]),
        f"{repeats['jaccard']:.3f} ({repeats['n']} seeds)" if repeats else "–",
        *(interval(m) if m else "–" for m in masked),
        *(change(m["change"]) if m else "–" for m in masked),
        p_value(masked[0]["mcnemar"]["p_value"]) if masked and masked[0] else "–",
    ]


# --- query norms ---


def utility_section(result) -> str:
    """The result of `utility`."""
    found, (kind, waves) = result["comparison"], next(iter(result["wavelengths"].items()))
    panels = {"Query norms": study_figures.norms_by_layer("Query norms by layer", result["norms"], result["heads"])}
    if not found:
        return html.section(
            "Query norms",
            [f"Nothing is compared: {result['undefined']}."],
            drawn(panels, "A dot is a head: mean L1 norm of the rows of its query projection."),
        )
    panels["Query norms of rotary pairs"] = study_figures.pair_differences(
        f"Difference by rotary pair ({found['n']} against {found['n_other']} heads)",
        found["pair_cohens_d"],
        found["pair_adjusted_p"],
        waves,
        result["max_length"],
    )
    rows = [
        [pair, f"{wave:,.1f}", f"{ours:.3f}", f"{other:.3f}", "–" if d is None else signed(d), p_value(p), p_value(q)]
        for pair, (wave, ours, other, d, p, q) in enumerate(
            zip(
                waves,
                found["pair_retrieval"],
                found["pair_other"],
                found["pair_cohens_d"],
                found["pair_p_value"],
                found["pair_adjusted_p"],
                strict=True,
            )
        )
    ]
    more = f" Wavelengths are those of {kind} layers." if len(result["wavelengths"]) > 1 else ""
    return html.section(
        "Query norms",
        _utility_sentences(found),
        drawn(
            panels,
            "Left: a dot is a head, its height the mean L1 norm of the rows of its query projection. Right: the same "
            "for each rotary pair, retrieval against other heads, in pooled standard deviations (Cohen's d, no interval: "
            "these are all heads of the model); filled where the layer-clustered permutation test, adjusted over all pairs "
            "(Benjamini and Hochberg), is below 0.05; with few heads in few layers no p can be much smaller." + more,
        ),
        html.folded(
            "Every rotary pair",
            table(
                [
                    "pair",
                    "wavelength (tokens)",
                    "mean norm, retrieval",
                    "mean norm, other",
                    "Cohen's d",
                    "p",
                    "adjusted p",
                ],
                rows,
            ),
        ),
    )


def _utility_sentences(found) -> list[str]:
    test, rho, d = found["permutation"], found["partial_spearman"], found["cohens_d"]
    differ = sum(p < 0.05 for p in found["pair_adjusted_p"])
    said = [
        f"Mean query norms of the {found['n']} retrieval heads differ from the {found['n_other']} others' by "
        f"{signed(test['value'])}"
        + ("" if d is None else f" (Cohen's d {signed(d, 2)})")
        + f"; of that their layers alone explain {signed(test['expected'])}.",
        f"Labels permuted within layers: p = {p_value(test['p_value'])}.",
        f"After adjustment over all pairs p is below 0.05 for {differ} of "
        f"{count(len(found['pair_adjusted_p']), 'rotary pair')}.",
    ]
    if rho["value"] is not None:
        said.append(
            f"Within layers the norm's rank correlation with the score is {change(rho)} over {rho['n']} layers."
        )
    return said


# --- RoPE base ---


def theta_section(result) -> str:
    """The result of `theta`."""
    base, heads = result["theta"], result["heads"]
    tasks: dict[str, list] = {}
    for row in result["rows"]:
        tasks.setdefault(row["task"], []).append(row)
    panels = {
        f"RoPE base: {task}": study_figures.recall_by_base(f"Recall by RoPE base: {task}", rows, base)
        for task, rows in tasks.items()
    }
    panels["RoPE base: heads"] = study_figures.heads_by_base("Retrieval heads by RoPE base", heads, base)
    said = [f"The model's own base is {base:,.0f}; other bases are set at inference, the weights stay as they are."]
    for task, rows in tasks.items():
        clear = [
            f"{row['theta']:,.0f} ({change(row['change'])})"
            for row in rows
            if row["change"]["low"] > 0 or row["change"]["high"] < 0
        ]
        said.append(
            f"By its 95% interval alone recall on {task} changes at {', '.join(clear)}."
            if clear
            else f"Recall on {task} does not clearly change: every 95% interval contains 0."
        )
    cells = [
        [
            row["task"],
            f"{row['factor']:g}",
            f"{row['theta']:,.0f}",
            interval(row),
            change(row["change"]),
            p_value(row["mcnemar"]["p_value"]),
        ]
        for row in result["rows"]
    ]
    counts = [
        [
            f"{one['factor']:g}",
            len(one["heads"]),
            f"{one['counted']} of {one['cases']}",
            fixed(one["top"]),
            f"{one['jaccard']:.3f}",
        ]
        for one in heads
    ]
    return html.section(
        "RoPE base",
        said,
        drawn(
            panels,
            "Recall: 95% Wilson interval over cases. Heads: those whose score "
            f"({result['detector']}) is at least {result['threshold']:.3g} on {count(heads[0]['cases'], 'detection case')}, "
            "none where no case counts; no interval.",
        ),
        table(
            ["task", "factor", "base", "recall", "change against factor 1", "McNemar p"],
            cells,
            note="Changes: bootstrap over cases, paired; McNemar's exact test, not adjusted for the number of bases.",
        ),
        table(["factor", "heads", "cases counted", "best score", "Jaccard with factor 1"], counts),
    )


# --- training dynamics ---


def dynamics_section(result) -> str:
    """The result of `dynamics`; nothing where no checkpoint is named."""
    rows = result["rows"]
    if not rows:
        return ""
    panels = {
        "Dynamics: emergence": study_figures.emergence("Emergence of the heads", rows),
        "Dynamics: heads": study_figures.heads_by_step(f"Heads with a score of {result['threshold']:g} or more", rows),
    }
    if result["task"]:
        panels["Dynamics: recall"] = study_figures.recall_by_step(f"Recall on {result['task']}", rows)
    if windows := next((row["text_loss"]["n"] for row in rows if row["text_loss"]), None):
        panels["Dynamics: text loss"] = study_figures.loss_by_step(f"Loss on plain text (n = {windows} windows)", rows)
    cells = [
        [
            row["step"],
            f"{row['layers']} x {row['heads_per_layer']}",
            f"{row['counted']} of {row['cases']}",
            len(row["heads"]),
            *(fixed(row[key]) for key in ("top", "emergence", "gini", "jaccard")),
            *((interval(row["recall"][name]) for name in ("none", "masked")) if row["recall"] else ("–", "–")),
            interval(row["text_loss"]) if row["text_loss"] else "–",
        ]
        for row in rows
    ]
    return html.section(
        "Training dynamics",
        _dynamics_sentences(result),
        drawn(
            panels,
            f"Score: {result['detector']}, on the same cases at every checkpoint. Final heads: those of the last "
            "checkpoint; one in a layer that is not there yet scores 0. Recall: 95% Wilson interval over cases; masked are "
            "as many of a checkpoint's own best heads as the last one has retrieval heads. Text loss: 95% bootstrap interval "
            "over windows.",
        ),
        table(
            [
                "step",
                "layers x heads",
                "cases counted",
                "heads",
                "best score",
                "mean score of the final heads",
                "Gini",
                "Jaccard with the final heads",
                "recall",
                "recall, best heads masked",
                "text loss",
            ],
            cells,
        ),
    )


def _dynamics_sentences(result) -> list[str]:
    rows, final = result["rows"], result["final"]
    said = [
        f"{count(len(rows), 'checkpoint')}, from step {rows[0]['step']} to {rows[-1]['step']}; the last one has "
        f"{count(len(final), 'head')} with a score of {result['threshold']:g} or more."
    ]
    scores = [row["emergence"] for row in rows]
    if final and np.isfinite(half := scores[-1] / 2):
        first = next(row["step"] for row, score in zip(rows, scores, strict=True) if score >= half)
        said.append(f"Their mean score first reaches half of its final {scores[-1]:.3f} at step {first}.")
    return said


def _study_stage(context: Context, folder: Path) -> PageResult:
    return write_page(context, STUDY, write_study)


STUDY = Stage(
    name="study",
    work=_study_stage,
    result=PageResult,
    upstream=(DETECT, DETECTORS_STAGE, KNOCKOUT, ROPE, UTILITY, THETA, DYNAMICS),
    needs_model=False,
)
