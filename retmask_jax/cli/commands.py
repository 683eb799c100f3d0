"""What the command's stages do around their work: open the work directory, run, show a table, write the summary."""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from retmask_jax.aot import decoding, step
from retmask_jax.cli import doctor, exporting
from retmask_jax.cli.head_files import export_heads, format_of
from retmask_jax.cli.plan import planned, say_how_long, say_how_long_diff
from retmask_jax.cli.printing import print_numbers, print_table, show_log
from retmask_jax.heads.gain import difference
from retmask_jax.heads.profile import profile_table
from retmask_jax.hf import hub
from retmask_jax.hf import summary as inspection
from retmask_jax.model.sharding import split_cpu
from retmask_jax.pipeline.registry import PAGES, RUN, STAGES, STUDIED, check_config, check_model, run_stage
from retmask_jax.reports import comparison, html, plotting
from retmask_jax.reports import difference as of_difference
from retmask_jax.reports.panel import findings, gains, page, profiles, records, sources
from retmask_jax.runs.context import Context
from retmask_jax.runs.lock import check_free, locked
from retmask_jax.runs.stage import Stage
from retmask_jax.runs.workdir import Example, Result, Workdir, differing, settings_of, versions
from retmask_jax.stages.eval import EVAL, EvalResult
from retmask_jax.training.pretrain import build
from retmask_jax.utils import compiled
from retmask_jax.utils.files import read_json, write_json
from retmask_jax.utils.fingerprints import fingerprint
from retmask_jax.utils.hosts import join, primary

_WIDE = 160  # characters of a text that is shown
_AT_MOST = 6  # models side by side in a table; of more the numbers are listed, pooled over seeds


def run(config: ConfigDict, root: Path, aside: bool = False) -> None:
    """The whole method in order; ends with the table of headline numbers, the report's path and summary.json.

    aside: as of `Workdir.open`.
    """
    context = _open(config, root, RUN, aside=aside)
    _in_order(context, RUN, root / "summary.json", root / "report.html")


def study(config: ConfigDict, root: Path, aside: bool = False) -> None:
    """The causal study in order; ends with the table of headline numbers, the page's path and study.json.

    aside: as of `Workdir.open`.
    """
    context = _open(config, root, STUDIED, aside=aside)
    _in_order(context, STUDIED, root / "study.json", root / "study.html")


def _in_order(context: Context, stages: Sequence[Stage], summary: Path, report: Path) -> None:
    """Run stages, each skipped where its inputs have not changed, and show their numbers."""
    numbers = {}
    for stage in stages:
        result, ran = run_stage(context, stage, functools.partial(say_how_long, context, stage))
        numbers |= result.numbers
        if not primary():
            continue
        state = f"done in {result.seconds:.0f} s" if ran else "unchanged"
        print(f"{stage.name:<9} {state}", flush=True)
        _say_where_time_went(context, result)
        if ran:
            _show(stage, result)
    if not primary():
        return
    write_json(summary, numbers)
    print()
    print_numbers({name: numbers[name] for name in context.config.headlines if name in numbers})
    if EVAL in stages:
        print("\nbefore and after training:")
        _show(EVAL, EVAL.of(context))
    print(f"every number: {summary}\nreport:       {report}")


def one_stage(config: ConfigDict, root: Path, name: str, aside: bool = False) -> Result:
    """Run one stage on the results of those before it; returns its result. aside: as of `Workdir.open`."""
    stage = STAGES[name]
    context = _open(config, root, (stage,), aside=aside, model=stage.needs_model)
    result, ran = run_stage(context, stage, functools.partial(say_how_long, context, stage))
    if primary():
        if not ran:
            print(f"{name}: unchanged since {result.provenance.created}")
        _say_where_time_went(context, result)
        _show(stage, result)
    if page := PAGES.get(name):
        run_stage(context, page)
        if primary():
            print(f"page: {root / page.of(context).path}")
    return result


def plan(config: ConfigDict, root: Path, name: str, aside: bool = False) -> None:
    """Check the config of a command and print about how long each of its stages takes here, without running any.

    name: "run", "study" or a stage. aside: as of `Workdir.open`.
    """
    stages = {"run": RUN, "study": STUDIED}.get(name) or (STAGES[name],)
    context = _open(config, root, stages, aside=aside, model=any(stage.needs_model for stage in stages))
    table, left = planned(context, stages)
    print_table(*table, justify="right")
    print(left)


def export(
    config: ConfigDict,
    root: Path,
    what: str,
    heads: Sequence[str] | None,
    form: str | None,
    out: Path,
    push: str | None = None,
    scores: Path | None = None,
) -> None:
    """The start model with heads masked in its weights, or a trained model, as an HF checkpoint; a run's pairs; or scores.

    heads: "layer-head" each; None: those that detection found. form, scores: as of `format_of`. push: the model's name on
    the hub, where it is then uploaded.
    """
    form = format_of(what, form, scores)
    exporting.check_target(what, out, push)
    if what == "scores":
        named = None if heads is None else exporting.named_heads(heads)
        return export_heads(_open(config, root, model=False), named, scores, form, out)
    if what.startswith("pairs-"):
        exporting.write_pairs(Workdir.open(root, config), what.removeprefix("pairs-"), out, form)
    elif what == "masked":
        exporting.write_masked(_open(config, root), heads, out, push)
    else:
        exporting.write_trained(_open(config, root, model=False), what, out, push)
    if primary():
        print(f"wrote {out}")
    if push is not None and primary():
        print(f"pushed to {hub.push(out, push)}")


def pretrain(config: ConfigDict, root: Path) -> None:
    """Train the tiny model and write it with its data files, in the layout of the package's assets."""
    if "pretrain" not in config:
        raise ValueError("this config has no section `pretrain`: use tiny, panel_llama, panel_qwen3 or panel_olmo3")
    show_log()
    workdir = Workdir.open(root, config)
    if (stored := root / "config.json").exists():
        ours, theirs = (settings_of(made, ("pretrain.*",)) for made in (workdir.config, read_json(stored)))
        if changed := differing(theirs, ours):
            raise ValueError(
                f"work directory {root} belongs to another config ({changed[0]}): choose another --workdir"
            )
    with locked(root):
        write_json(root / "config.json", workdir.config)
        build(config.pretrain, root)
    print(f"wrote {root}")


def ahead(config: ConfigDict, name: str, topology: str, stage: str) -> bool:
    """Compile what a stage runs for a topology that need not be here and print what it takes; whether it fits."""
    show_log()
    if stage == "train":
        row = step.check_training(config, topology)
        print(step.describe(row, name))
    else:
        row = decoding.check_decoding(config, topology, stage)
        print(decoding.describe(row, name))
    return row["fits"]


def inspect(model: str, as_json: bool, ignore: Sequence[str] = ()) -> None:
    """What a model (folder, .gguf file, hub id or "bundled") is, from its config: a table, or one JSON object.

    ignore: attributes of config.json, as of `rm.load`.
    """
    facts = inspection.describe(hub.config_folder(model, ignore=ignore), ignore)
    if as_json:
        print(json.dumps({"model": model} | facts, indent=1))
    else:
        print_table(("model", model), inspection.rows(facts))


def examine(root: Path, as_json: bool) -> bool:
    """Whether this machine can work, line by line, and what to do about what is not as it could be."""
    join(None)
    findings = doctor.examine(root)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print_table(("", "", "found", "to do"), doctor.rows(findings))
    for finding in doctor.failed(findings):
        print(f"retmask: {finding.name}: {finding.value}; {finding.todo}", file=sys.stderr)
    return not doctor.failed(findings)


def profile(
    paths: Sequence[Path], kv_heads: Sequence[int], threshold: float | None, gain: str | None, out: Path | None
) -> None:
    """Profiles of several models as one table, and a gain against their sparsity; into a folder with pictures if wanted.

    paths, kv_heads, threshold: of `sources.read_models`; gain: a number of `sources.read_gains`.
    """
    models = sources.read_models(paths, kv_heads, threshold)
    rows = profile_table(models)
    gained = gains.gain_against_sparsity(sources.read_gains(paths, gain)) if gain else None
    cells = [[row.model, *map(html.fixed, list(vars(row).values())[1:])] for row in rows]
    print_table(list(vars(rows[0])), cells, "right")
    if gained:
        print()
        print_numbers({f"{run.name}: {gain}": run.gain for run in gained.rows})
        print(gained.finding)
    if out:
        for path in _write_profile(out, paths, models, rows, gain, gained):
            print(f"wrote {path}")


def panel(paths: Sequence[Path], task: str, closed_book: str | None, gain: str | None, out: Path | None) -> None:
    """The findings of several finished studies as one table; as panel.json and panel.html in a folder, if wanted.

    paths: Of `sources.read_studies`. task, closed_book: of `findings.panel`. gain: a number of the evaluation.
    """
    read = sources.read_studies(paths)
    found = findings.panel(read, task, closed_book)
    gained = gains.gain_against_sparsity([records.gain_run(record, gain) for record in read]) if gain else None
    print_table(*page.summary(found))
    for text in (*map(page.sentence, found.findings), *page.left_out(found)):
        print(text)
    if gained:
        print(gained.finding)
    if out:
        scored = sources.read_models(sources.work_directories(paths))
        write_json(out / "panel.json", vars(found) | {"gain": gain, "sparsity": gained, "versions": versions()})
        page.write_panel(out / "panel.html", found, read, scored, profile_table(scored), gain, gained)
        print(f"wrote {out / 'panel.json'}\nwrote {out / 'panel.html'}")


def diff(start: str, trained: str, settings: dict, out: Path | None) -> None:
    """What differs between two checkpoints and which parts carry the gain, as tables; as diff.json and diff.html, if wanted.

    settings: of `difference.Settings`.
    """
    show_log()
    chosen = difference.Settings(**settings)
    found = difference.compare(start, trained, chosen, functools.partial(say_how_long_diff, chosen.dtype))
    for sentence in of_difference.sentences(found):
        print(sentence)
    print_table(*of_difference.groups(found), justify="right")
    if found.singly:
        print()
        print_table(*of_difference.best_heads(found), justify="right")
    if out:
        write_json(out / "diff.json", dataclasses.replace(found, versions=versions()))
        of_difference.write_difference(out / "diff.html", found)
        print(f"wrote {out / 'diff.json'}\nwrote {out / 'diff.html'}")


def bench(name: str, out: Path | None, options: dict) -> bool:
    """Run one benchmark, print its table, write its JSON; False if results that must agree do not.

    options: the benchmark's own flags.
    """
    # Both sides may share one GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from retmask_jax.benchmarks import detect, dpo, generate, harness, masks, memory

    split_cpu(harness.cores())
    benchmarks = {"detect": detect, "masks": masks, "generate": generate, "dpo": dpo, "memory": memory}
    for option, value in options.items():
        least = 0 if option in ("memory_length", "lora_rank") else 1
        if type(value) is int and value < least:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be at least {least}")
    report = benchmarks[name].run(**options)
    print_table(*harness.table_rows(report))
    if out is not None:
        harness.write_report(report, out)
    for line in report.violated:
        print(f"retmask: results disagree: {line}", file=sys.stderr)
    return not report.violated


def _write_profile(out: Path, paths, models, rows, gain, gained) -> list[Path]:
    """Writes profile.json, whose rows have the hash of their source's scores, and the pictures."""
    with plotting.style():
        pictures = profiles.write_both(profiles.profiles(models, rows), out / "profile")
        if gained:
            pictures += profiles.write_both(gains.sparsity(gained, gain), out / "sparsity")
    hashes = [fingerprint(source / "detect" / "scores.json" if source.is_dir() else source) for source in paths]
    hashed = [vars(row) | {"scores_hash": of_scores} for row, of_scores in zip(rows, hashes, strict=True)]
    write_json(out / "profile.json", {"models": hashed, "gain": gain, "sparsity": gained, "versions": versions()})
    return [out / "profile.json", *pictures]


def _open(
    config: ConfigDict, root: Path, stages: Sequence[Stage] = (), *, aside: bool = False, model: bool = True
) -> Context:
    """The context of a command, once all hosts have joined.

    Args:
        config: Of the recipe.
        root: The work directory; it must be free where stages are to run.
        stages: Those that the command runs.
        aside: As of `Workdir.open`.
        model: Whether the command needs the model, so that the config is checked against it.
    """
    show_log()
    split_cpu(config.cpu_devices)
    keep = config.programs
    compiled.keep_programs(keep.folder or None, compiled.Limits(keep.gib, keep.days))
    join(config.distributed)
    if stages and primary():
        check_free(root)
    check_config(config)
    for stage in stages:
        stage.check_run(config)
    context = Context(config, Workdir.open(root, config, aside))
    if model:
        check_model(context, stages)
    return context


def _say_where_time_went(context: Context, result: Result) -> None:
    """Print how long a stage compiled, ran and waited, where the config asks for it."""
    if context.config.timings:
        print(f"          {result.spent.in_words(result.seconds)}", flush=True)


def _show(stage: Stage, result: Result) -> None:
    """Print what a stage found: models side by side, or its numbers; its own tables, and examples of answers."""
    if isinstance(result, EvalResult) and len({row.model for row in result.rows}) <= _AT_MOST:
        print_table(*comparison.table(result.rows, result.metrics), justify="right")
        print(comparison.perplexities(result.rows) or "no text loss was measured")
    else:
        print_numbers(result.numbers)
    for header, rows in stage.tables(result):
        print()
        print_table(header, rows)
    for example in result.examples:
        _print_example(example)


def _print_example(example: Example) -> None:
    expected = "" if example.expected is None else f"  (expected: {example.expected})"
    print(f"\n{_on_one_line(example.question)}{expected}")
    width = max(map(len, example.replies))
    for who, reply in example.replies.items():
        print(f"  {who:<{width}}  {_on_one_line(reply)}")


def _on_one_line(text: str) -> str:
    """A text in one line, its middle left out where it is long."""
    words = " ".join(text.split())
    return words if len(words) <= _WIDE else f"{words[: _WIDE // 2]} ... {words[-_WIDE // 2 :]}"
