"""The sections of a page on heads and rotary pairs taken out, from the results of `knockout` and `rope`."""

from collections.abc import Mapping, Sequence

import numpy as np

from retmask_jax.reports import causal_figures, figures, html
from retmask_jax.reports.figures import drawn
from retmask_jax.reports.html import change, count, interval, p_value, section, signed, table
from retmask_jax.reports.wording import FROM_MEMORY, TEXT_LOSS, axis, direction, directions, tree_of
from retmask_jax.stages.outcomes import mask_name

_DOSES = ("lowest", "highest", "random", "control heads, lowest")
_CONTROLS = ("lowest", "matched", "low utility", "high utility")
_MODES = {
    "zero": "writes nothing",
    "mean": "writes its mean over text",
    "query": "has a query of zeros: the mean of all values",
}


def only_zero(by_kind: Mapping[str, Mapping], rows: Sequence[Mapping]) -> dict[str, Mapping]:
    """Of the numbers of a task by kind of mask, those of heads that write nothing; rows: of the result of `knockout`."""
    kinds = {row["kind"] for row in rows if row["experiment"] == "zero"}
    return {kind: number for kind, number in by_kind.items() if kind in kinds}


# --- heads ---


def knockout_section(result, heads) -> str:
    """The result of `knockout`; heads: those that were masked."""
    tasks = tree_of(result["numbers"])
    loss = tasks.pop(TEXT_LOSS)
    rows = {task: [row for row in result["rows"] if row["task"] == task] for task in tasks}
    zero = {task: only_zero(by_kind, rows[task]) for task, by_kind in tasks.items()}
    masked = {task: next(row["change"] for row in rows[task] if _named(row) == "retrieval") for task in tasks}
    tests = [
        _test(task, kind, rows[task], number)
        for task, by_kind in tasks.items()
        for kind, number in by_kind.items()
        if kind not in ("none", "smallest set")
    ]
    activity = figures.head_map("Activity of heads", result["activity"], heads, "change (nats)", log=True)
    return section(
        "Knock-out",
        [
            directions(f"Masking the {count(len(heads), 'retrieval head')}", masked),
            f"With them masked the text loss goes from {loss['none']['value']:.3f} to {loss['retrieval']['value']:.3f} nats "
            "per token.",
            _other_kinds(zero),
        ],
        drawn(
            _kinds(zero, rows, loss, result["text_loss"]),
            "Each kind of mask takes out as many heads as there are retrieval heads; the others are never "
            "retrieval heads. Dots: single draws; bar (text loss: point): their mean. 95% interval: Wilson for a single "
            "mask, bootstrap over cases for text loss and for a mean over draws, which are held fixed (no width where "
            "all cases agree). “From memory” is the share of answers that follow what the model remembers instead of "
            "the context.",
        ),
        _modes(tasks, rows),
        table(
            ["task", "masked", "value", "change against none", "McNemar p", "q"],
            tests,
            note="McNemar's exact test of the cases' outcomes against no mask; q: adjusted for the false discovery rate over "
            "the masks of a task (Benjamini-Hochberg). Several draws: mean change, and the median p and q.",
        ),
        html.lines(_idle(result)),
        drawn(
            {"Head activity": activity},
            "Mean change of the log-probability of a token of text when one head alone is "
            "masked, on a logarithmic scale. Retrieval heads are outlined.",
        ),
        _curve(result["curve"], len(heads)),
        _minimal(result["minimal"]),
    )


def _kinds(zero, rows, loss, text_loss) -> dict[str, object]:
    panels = {
        f"Knock-out: {task}": figures.kinds(
            task,
            [row for row in rows[task] if row["experiment"] == "zero"],
            by_kind,
            f"{axis(task)} (n = {by_kind['none']['n']})",
        )
        for task, by_kind in zero.items()
    }
    shown = only_zero(loss, text_loss)
    panels["Knock-out: text loss"] = figures.kinds(
        TEXT_LOSS,
        [row for row in text_loss if row["experiment"] == "zero"],
        shown,
        f"nats per token (n = {loss['none']['n']} windows)",
        share=False,
    )
    return panels


def _modes(tasks, rows) -> str:
    """Other ways to take the same heads out, beside zero."""
    modes = list(dict.fromkeys(row["experiment"] for of_task in rows.values() for row in of_task))
    panels = {}
    for task, of_task in rows.items() if len(modes) > 1 else ():
        named = [
            row | {"kind": _named(row)} for row in of_task if row["kind"] in ("none", "retrieval", "activity-matched")
        ]
        pooled = {kind: tasks[task][kind] for kind in dict.fromkeys(row["kind"] for row in named)}
        label = f"{axis(task)} (n = {pooled['none']['n']})"
        panels[f"Ways to take heads out: {task}"] = figures.kinds(f"{task}: ways to take out", named, pooled, label)
    told = "; ".join(f"{mode}: {_MODES[mode]}" for mode in modes)
    return drawn(
        panels,
        f"What a masked head does ({told}). Without a word: zero. Dots: single draws; bar: their mean; 95% "
        "interval as above.",
    )


def _curve(curve: Sequence[Mapping], n_retrieval: int) -> str:
    if not curve:
        return ""
    task = curve[0]["task"]
    panels = {
        f"Number of heads: {task}": causal_figures.head_curve(
            f"{task}: number of heads", [row for row in curve if row["task"] == task], n_retrieval
        )
    }
    return drawn(
        panels,
        "Heads are masked from the highest score down; random others are neither among those nor retrieval "
        "heads, and end where too few are left (dots: single draws). 95% interval: Wilson.",
    )


def _minimal(minimal: Mapping | None) -> str:
    if minimal is None:
        return ""
    recall, kept = minimal["recall"], ", ".join(f"{layer}-{head}" for layer, head in minimal["heads"])
    spared = ", ".join("-".join(map(str, step["head"])) for step in minimal["steps"])
    return html.lines(
        f"A greedy search on {minimal['searched']} cases of {minimal['task']}, sparing one head at a time while recall stays at "
        f"most {minimal['limit']:.3f}, ends with {count(len(minimal['heads']), 'head')}: {kept}."
        + (f" It spared {spared}." if spared else ""),
        f"On the other {recall['none']['n']} cases recall is {interval(recall['smallest set'])} with these masked, "
        f"{interval(recall['all retrieval heads'])} with all retrieval heads masked and {interval(recall['none'])} untouched. A "
        "smaller set may exist: the search is greedy.",
    )


# --- rotary pairs ---


def rope_section(result) -> str:
    """The result of `rope`."""
    ks, sentences = result["pairs"], []
    for task, by_name in tree_of(result["numbers"]).items():
        rows = [row for row in result["rows"] if row["task"] == task]
        pooled = _pooled(rows, by_name, _DOSES, "rotary")
        sentences += _doses(task, pooled, by_name, ks[len(ks) // 2], result["n_pairs"])
    waves = [[k, *(_wavelengths(result, kind, k) for kind in ("lowest", "highest"))] for k in ks]
    return section(
        "Rotary dose-response",
        sentences,
        drawn(
            dose_figures(result),
            "Pairs are taken out of the queries of the retrieval heads, lowest or highest frequency first, or at "
            "random; as a control the lowest out of other heads of the same layers. Pale dots: random draws; line: "
            "their mean. 95% interval: Wilson for a single choice, bootstrap over cases for a mean over draws."
            + _legend(result["rows"]),
        ),
        table(["pairs taken out", "wavelengths of the lowest (tokens)", "of the highest (tokens)"], waves),
        _spectra(result),
        _variance(result),
        _single_heads(result),
        _costs(result["costs"]),
    )


def dose_figures(result) -> dict[str, object]:
    """Recall by the number of rotary pairs taken out, from the result of `rope`: name -> Figure."""
    panels = {}
    for task, by_name in tree_of(result["numbers"]).items():
        rows = [row for row in result["rows"] if row["task"] == task]
        panels |= _dose_panels(task, rows, by_name, result["pairs"], result["n_pairs"])
    return panels


def spectrum_figures(result) -> dict[str, object]:
    """Recall without each part of the spectrum, from the result of `rope`: name -> Figure."""
    panels = {}
    for task, by_name in tree_of(result["numbers"]).items():
        shown = [row for row in result["rows"] if row["task"] == task and row["experiment"] == "windows"]
        if shown:
            panels[f"Parts of the spectrum: {task}"] = causal_figures.spectrum(
                f"{task}: a part of the spectrum out", shown, by_name["none"], result["wavelengths"], result["context"]
            )
    return panels


def _dose_panels(task, rows, by_name, ks, n_pairs) -> dict[str, object]:
    """The doses at each site, and what is held against the lowest pairs."""
    panels = {}
    for title, kinds, site in (
        (task, _DOSES, "rotary"),
        (f"{task}: controls", _CONTROLS, "rotary"),
        (f"{task}: zeroed in the projections", (*_DOSES, *_CONTROLS[2:]), "projection"),
    ):
        pooled = _pooled(rows, by_name, kinds, site)
        if len({kind for kind, _ in pooled}) > 1:
            shown = [row for row in rows if row["experiment"] in ("dose", "matched") and row["site"] == site]
            panels[f"Rotary pairs: {title}"] = figures.dose_response(title, shown, pooled, by_name["none"], ks, n_pairs)
    return panels


def _pooled(rows, by_name, kinds, site: str) -> dict[tuple[str, int], Mapping]:
    """{(kind, k): number} of doses at a site."""
    where = "" if site == "rotary" else f", {site} site"
    meant = [row for row in rows if row["experiment"] in ("dose", "matched") and row["site"] == site]
    there = dict.fromkeys((row["kind"], row["k"]) for row in meant if row["kind"] in kinds)
    return {(kind, k): by_name[f"{kind} {k} pairs{where}"] for kind, k in there}


def _legend(rows) -> str:
    kinds, sites = {row["kind"] for row in rows}, {row["site"] for row in rows}
    parts = {
        "matched": " Matched: other pairs, of any number, that carry nearest to the share of the variance of q.k that the lowest "
        "carry."
        if "matched" in kinds
        else "",
        "utility": " Utility: each head loses the pairs that its query projection writes least (low) or most (high)."
        if "low utility" in kinds
        else "",
        "projection": " In the projections: zeroed in the outputs of q_proj and k_proj before any norm, which reaches every "
        "query head of a group, as arXiv 2606.21249 did."
        if "projection" in sites
        else "",
    }
    return "".join(parts.values())


def _spectra(result) -> str:
    """Recall without each part of the spectrum."""
    swept = {row["task"] for row in result["rows"] if row["experiment"] == "windows"}
    sentences = [_centre(task, by_name) for task, by_name in tree_of(result["numbers"]).items() if task in swept]
    caption = (
        "The rotary pairs in windows of equal number, each taken out in turn; placed by the geometric mean of the "
        "wavelengths, 2 pi over the frequency after scaling. 95% interval: Wilson."
    )
    return html.lines(*sentences) + drawn(spectrum_figures(result), caption)


def _centre(task: str, by_name) -> str:
    found = by_name.get("centre of mass of the windows")
    if found is None:
        return f"No window lowers recall on {task}."
    return (
        f"The harm to recall on {task} centres at {interval(found)} of the spectrum (0: lowest frequency, 1: highest; "
        f"bootstrap over {found['n']} cases), with a width of {interval(by_name['width of the windows'])}."
    )


def _variance(result) -> str:
    panels, table_rows = {}, []
    for task, by_name in tree_of(result["numbers"]).items():
        found = [
            row
            for row in result["rows"]
            if row["task"] == task
            and row.get("variance") is not None
            and row["experiment"] in ("dose", "matched")
            and not row["kind"].startswith("control")
        ]
        if found:
            panels[f"Variance taken out: {task}"] = causal_figures.variance(
                f"{task}: harm by the variance taken out", found, by_name["none"]
            )
            table_rows += [
                [
                    task,
                    row["kind"],
                    row["k"],
                    len(row["pairs"]) or row["k"],
                    f"{row['variance']:.3f}",
                    interval(row),
                    p_value(row["q"]),
                ]
                for row in found
            ]
    if not panels:
        return ""
    caption = (
        "The share of the variance of q.k over the keys of a plain text that went with the pairs, mean over the heads; "
        "below 0 where the pairs had cancelled others. Pairs that matter only because they carry much lie on one "
        "falling curve, whatever their kind. 95% interval: Wilson."
    )
    head = ["task", "taken out", "for k", "pairs", "share of variance", "recall", "q"]
    return drawn(panels, caption) + html.folded(
        f"Share of variance of {len(table_rows)} conditions", table(head, table_rows)
    )


def _single_heads(result) -> str:
    panels = {}
    for task, by_name in tree_of(result["numbers"]).items():
        rows = [row for row in result["rows"] if row["task"] == task]
        covered, patched = ([row for row in rows if row["experiment"] == name] for name in ("coverage", "patches"))
        if covered:
            panels[f"Coverage: {task}"] = causal_figures.coverage(
                f"{task}: more and more heads", covered, by_name["none"]
            )
        if patched:
            panels[f"Single heads: {task}"] = causal_figures.patches(
                f"{task}: one head at a time", patched, by_name["none"]
            )
    return drawn(
        panels, f"{count(result['patch_pairs'], 'pair')} taken out of each head that is meant. 95% interval: Wilson."
    )


def _costs(costs: Sequence[Mapping]) -> str:
    if not costs:
        return ""
    rows = [
        [
            row["task"],
            row["kind"],
            row["k"],
            change(row["perplexity_increase"]),
            change(row["recall_drop"]),
            "–" if row["ratio"] is None else interval(row["ratio"]).replace("-", "−"),
        ]
        for row in costs
    ]
    return table(
        ["task", "pairs", "k", "perplexity, relative increase", "recall, relative drop", "ratio"],
        rows,
        note="What taking pairs out costs plain text, against what it costs recall; a ratio below 0.33 is called specific to "
        "retrieval in arXiv 2606.21249. 95% interval: bootstrap, texts and cases drawn apart.",
    )


# --- sentences and cells ---


def _named(row: Mapping) -> str:
    return mask_name(row["kind"], row["experiment"])


def _other_kinds(tasks: Mapping[str, Mapping]) -> str:
    """How far masks of other heads move recall, smallest to largest change over the tasks."""
    shifts: dict[str, list[float]] = {}
    for task, by_kind in tasks.items():
        for kind, number in by_kind.items():
            if kind not in ("none", "retrieval") and FROM_MEMORY not in task:
                shifts.setdefault(kind, []).append(number["value"] - by_kind["none"]["value"])
    parts = [f"{html.span(values)} ({kind})" for kind, values in shifts.items()]
    return f"As many other heads change recall by {', '.join(parts)} over the tasks, mean over draws." if parts else ""


def _idle(result) -> str:
    total = np.size(result["activity"])
    text = (
        f"{result['idle']} of {total} heads {'is' if result['idle'] == 1 else 'are'} idle: masking one of them alone moves "
        f"the text by less than {100 * result['idle_below']:g}% of what masking the most active head does."
    )
    warning = " With most heads idle, masks of any layer prove little; compare with activity-matched ones."
    return text + (warning if 2 * result["idle"] > total else "")


def _test(task: str, kind: str, rows: Sequence[Mapping], mean: Mapping) -> list[str]:
    draws = [row for row in rows if _named(row) == kind]
    p, q = (
        html.p_value(float(np.median(values)))
        for values in zip(*((row["mcnemar"]["p_value"], row["q"]) for row in draws), strict=True)
    )
    if len(draws) == 1:
        return [task, kind, interval(draws[0]), change(draws[0]["change"]), p, q]
    shift = float(np.mean([row["change"]["value"] for row in draws]))
    return [task, f"{kind} ({len(draws)} draws)", interval(mean), signed(shift), p, q]


def _doses(
    task: str, pooled: Mapping[tuple, Mapping], by_name: Mapping[str, Mapping], k: int, n_pairs: int
) -> list[str]:
    values = ", ".join(f"{number['value']:.3f} ({kind})" for (kind, at), number in pooled.items() if at == k)
    none, gap = by_name["none"]["value"], by_name.get("highest minus lowest quarter")
    sentences = [f"With {k} of {n_pairs} pairs taken out, recall on {task} is {values}; untouched it is {none:.3f}."]
    if gap:
        words = {"raises": "higher than", "lowers": "lower than", "": "not clearly different from that"}[direction(gap)]
        sentences.append(f"Without the highest quarter of the pairs it is {words} without the lowest: {change(gap)}.")
    return sentences


def _wavelengths(result, kind: str, k: int) -> str:
    """Shortest and longest wavelength of the pairs that a condition takes out."""
    doses = [row for row in result["rows"] if row["experiment"] == "dose"]
    pairs = next((row["pairs"] for row in doses if (row["kind"], row["k"]) == (kind, k)), [])
    waves = [result["wavelengths"][pair] for pair in pairs]
    ends = dict.fromkeys(f"{choose(waves):,.0f}" for choose in (min, max)) if waves else ["–"]
    return " to ".join(ends)
