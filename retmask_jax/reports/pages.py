"""Results of all stages -> one self-contained HTML page of words, figures and tables; never touches a model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retmask_jax.evals.compare import numbers_by_task
from retmask_jax.reports import figures, html
from retmask_jax.reports.causal_report import knockout_section, only_zero, rope_section
from retmask_jax.reports.evaluation import evaluation_section
from retmask_jax.reports.figures import drawn as _figure
from retmask_jax.reports.html import change, fixed, interval, table
from retmask_jax.reports.html import count as _n
from retmask_jax.reports.html import section as _section
from retmask_jax.reports.wording import measure, tree_of
from retmask_jax.utils.files import write_atomically

_PROFILE = {
    "n_heads": "heads at or above the threshold",
    "frac": "their share of all heads",
    "gini": "Gini coefficient of all scores",
    "zero_fraction": "share of heads that score exactly 0",
    "top5_share": "share of the summed score in the best five heads",
    "layer_com": "mean layer, weighted by score (0 first, 1 last)",
    "layer_com_count": "mean layer, unweighted",
    "early_frac": "share in the first third of the layers",
    "mid_frac": "share in the middle third",
    "late_frac": "share in the last third",
    "heads_per_active_group": "heads per KV group that has one",
    "full_group_fraction": "share of those groups that are complete",
}


def write_report(path: Path, results: Mapping[str, Mapping], model: str) -> None:
    """Write the page. results: stage -> what its function in `stages` returned, with or without "provenance"."""
    with figures.style():
        sections = [
            _header(results),
            heads_section(results["detect"]),
            knockout_section(results["knockout"], results["detect"]["heads"]),
            rope_section(results["rope"]),
            _pairs(results["pairs"]),
            _training(results["train"]["runs"]),
            evaluation_section(results["eval"]),
            all_numbers(results),
        ]
    write_atomically(path, html.document(f"Retrieval heads of {model}", sections))


def write_comparison(path: Path, results: Mapping[str, Mapping], model: str) -> None:
    """Write the page of `retmask eval --compare`. results: {"compare": what its stage returned}."""
    with figures.style():
        sections = [
            html.lines(*provenance(results)),
            evaluation_section(results["compare"], trained=False),
            all_numbers(results),
        ]
    write_atomically(path, html.document(f"{model} against other models", sections))


# --- sections ---


def _header(results) -> str:
    detect, knockout, rope = (results[stage]["numbers"] for stage in ("detect", "knockout", "rope"))
    rows = [
        (label, interval, detect[name])
        for label, name in (
            ("Detection cases counted", "detect/cases counted"),
            ("Retrieval heads", "detect/heads"),
            ("Gini coefficient of the head scores", "detect/gini"),
        )
        if name in detect
    ]
    for task, by_kind in list(tree_of(knockout).items())[:1]:
        by_kind = only_zero(by_kind, results["knockout"]["rows"])
        rows += [(f"Masked heads, {kind}: {measure(task)}", interval, number) for kind, number in by_kind.items()]
    for task, by_name in tree_of(rope).items():
        rows += [
            (f"Rotary pairs, {name}: {measure(task)}", change, number)
            for name, number in by_name.items()
            if name == "highest minus lowest quarter"
        ]
    _, by_arm = numbers_by_task(results["eval"])
    for arm, changes in list(by_arm.items())[:1]:
        rows += [(f"Training, {arm}: change of {measure(task)}", change, number) for task, number in changes.items()]
    return html.lines(*provenance(results)) + table(
        ["", "value [95% interval]", "n"],
        [[label, write(number), number["n"]] for label, write, number in rows],
        note="n: independent cases (heads and Gini: the cases behind the scores; text loss: windows of text). Every other "
        "number is at the end of the page.",
    )


def heads_section(result) -> str:
    """The detected heads, from the result of `detect`."""
    heads, mean_LH, outcomes, threshold = (
        result["heads"],
        np.array(result["mean"]),
        result["outcomes"],
        result["threshold"],
    )
    chosen = (
        f"their mean score is at least {threshold:g}"
        if threshold is not None
        else f"they have the highest scores, the last of them {min(result['scores']):.3f}"
    )
    counted, total = result["numbers"]["detect/heads"]["n"], sum(outcomes.values())
    source = (
        f"{counted} of {_n(total, 'case')} count, those that the model answers right."
        if outcomes
        else f"The scores were given, of {_n(counted, 'case')}; none was measured here."
    )
    panels = {
        "Head scores": figures.head_map("Head scores", mean_LH, heads, "mean score"),
        "Sorted head scores": figures.score_ranks("Scores, best first", mean_LH, len(heads), threshold),
        "Lorenz curve": figures.lorenz(f"Concentration: Gini {fixed(result['profile']['gini'])}", mean_LH),
        "Stability": figures.stability("Stability (size of each set below)", result["stability"]),
    }
    if outcomes:
        panels["Detection cases"] = figures.outcome_bars(f"Detection cases (n = {total})", outcomes)
    caption = (
        "A head's score in a case is the share of the needle's tokens that it looks at while the model writes them; shown "
        f"is the mean over {_n(counted, 'counted case')}. Retrieval heads are outlined. The Lorenz curve bends further "
        "from the dotted line the fewer heads hold the score (Gini 0: all equal, 1: one has all). Stability compares the "
        "set found on the first cases with the final one (Jaccard: shared over all members)."
    )
    return _section(
        "Retrieval heads",
        [
            f"{_n(len(heads), 'head')} of {mean_LH.size} ({mean_LH.shape[0]} layers of {mean_LH.shape[1]}) copy from the "
            f"needle: {chosen}.",
            source,
            _settled(result["stability"]),
        ],
        _figure(panels, caption),
        table(
            ["profile", "value"],
            [[_PROFILE.get(name, name), fixed(value)] for name, value in result["profile"].items()],
        ),
    )


def _pairs(result) -> str:
    counts, prompts = result["counts"], result["prompts"]
    if not counts:
        return _section("Preference pairs", ["No arm is trained."])
    shares = [round(100 * parts["kept"] / prompts) for parts in counts.values()]
    kept = f"{min(shares)}%" if min(shares) == max(shares) else f"{min(shares)} to {max(shares)}%"
    return _section(
        "Preference pairs",
        [
            f"Each run answers {_n(prompts, 'prompt')}; {kept} of them become training examples.",
            "A pair is dropped where both answers are the same or one is empty.",
            *_left_out(result),
        ],
        _figure(
            {"Pairs kept": figures.stacked_counts(f"Prompts by outcome (n = {prompts})", counts)},
            "Runs are named arm-seed. sft_unfiltered and contrast need one answer, so none can be identical.",
        ),
        table(
            ["answers of", "cut off at the largest number of tokens", "of"],
            [[name, n, prompts] for name, n in result["answers_cut"].items()],
        ),
    )


def _left_out(result) -> list[str]:
    """What was not asked at all, if anything."""
    left = [f"{n} {why}" for why, n in result["left_out"].items() if n]
    return [f"Of the prompts that were read, some were left out: {', '.join(left)}."] if left else []


def _training(runs: Mapping[str, Mapping]) -> str:
    preference = [run for run in runs.values() if "margin" in run["steps"][0]]
    contrast = [run for run in runs.values() if run["arm"] == "contrast"]
    supervised = [run for run in runs.values() if run["arm"].startswith("sft")]
    panels, rows, lower = {}, [], 0
    groups = (
        ("preference", preference, "nats"),
        ("supervised", supervised, "nats per token"),
        ("contrast", contrast, "nats per token"),
    )
    for what, group, unit in groups:
        if group:
            panels[f"Loss, {what}"] = figures.curves(f"Loss, {what}", group, "loss", unit, rate=True)
    if preference:
        panels["Margin"] = figures.curves("Reward margin", preference, "margin", "chosen minus rejected")
        panels["Accuracy"] = figures.curves("Accuracy", preference, "accuracy", "share ranked right")
    for name, run in runs.items():
        first, last = _ends([step["loss"] for step in run["steps"]])
        lower += last < first
        cut = run["prompts_cut"], run["answers_cut"]
        rows.append([name, run["examples"], *cut, len(run["steps"]), f"{first:.3f}", f"{last:.3f}"])
    return _section(
        "Training",
        [
            f"The loss of {lower} of {_n(len(runs), 'run')} is lower in the last tenth of the steps than in the first.",
            "Only runs on preferences have rewards; others show a loss alone." if supervised or contrast else "",
        ],
        _figure(
            panels,
            "One line a run, coloured by arm: a moving average over a twentieth of the steps, the raw values in "
            "pale. The dashed grey line is the learning rate (right axis).",
        ),
        table(
            ["run", "examples", "prompts cut", "answers cut", "steps", "loss, first tenth", "loss, last tenth"], rows
        ),
    )


def all_numbers(results) -> str:
    """A table of every number of every stage, folded."""
    rows = [
        [name, *(html.exact(number[key]) for key in ("value", "low", "high", "n"))]
        for result in results.values()
        for name, number in result["numbers"].items()
    ]
    return _section(
        "All numbers", [], html.folded(f"{len(rows)} of all stages", table(["name", "value", "low", "high", "n"], rows))
    )


# --- sentences and cells ---


def provenance(results) -> list[str]:
    """When, with which versions and on which weights the results were made."""
    known = [result["provenance"] for result in results.values() if result.get("provenance")]
    if not known:
        return []
    first, last = (choose(known, key=lambda entry: entry["created"]) for choose in (min, max))
    begin, end = (entry["created"][:16].replace("T", " ") for entry in (first, last))
    minutes = sum(result.get("seconds", 0) for result in results.values()) / 60
    return [
        f"Results of {begin} to {end} UTC, {minutes:.1f} minutes of work.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in last["versions"].items()) + ".",
        f"Config {last['config']}, weights {last['inputs']['weights']}, seed {last['seed']}.",
    ]


def _settled(rows: Sequence[Mapping]) -> str:
    """From how many cases on the head set stays the final one."""
    if len(rows) < 2:
        return f"With {_n(rows[-1]['cases'], 'counted case')} nothing tells how stable this set is."
    changed = [i for i, row in enumerate(rows) if row["jaccard"] < 1]
    if not changed:
        return f"The set is the same from {_n(rows[0]['cases'], 'case')} on."
    start, end = rows[changed[-1]], rows[changed[-1] + 1]
    return f"The set still changed between {start['cases']} and {end['cases']} cases (Jaccard {start['jaccard']:.2f})."


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and the last tenth."""
    n = math.ceil(len(values) / 10)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))
