"""The README's experiment runs as printed, and the numbers of all pages are those of result files or of the bundled model."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest
from helpers_documents import PAGES, blocks, fences, inline, prose, read, sections, tables
from msgspec import convert

from retmask_jax.cli.main import main
from retmask_jax.heads import conditions
from retmask_jax.heads.detectors import DETECTORS
from retmask_jax.heads.gain.difference import Difference
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.hf.packaged_models import MODELS
from retmask_jax.hf.summary import describe
from retmask_jax.model.interventions import Interventions, mask_heads
from retmask_jax.reports.difference import groups
from retmask_jax.reports.panel.records import read_records
from retmask_jax.reports.panel.tables import every_table, markdown, masks, rotary, training
from retmask_jax.reports.panel.tables import gains as gain_rows
from retmask_jax.runs.context import Context
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.runs.workdir import Workdir

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "retmask_jax"
README = (ROOT / "README.md").read_text()
COLAB = (ROOT / "colab/README.md").read_text()
TRAINING = (PACKAGE / "training/README.md").read_text()
BENCHMARKS = (PACKAGE / "benchmarks/README.md").read_text()


def first_lines(model, capsys, n=24):
    """What the first lines of code of the README print on a model, on fewer cases where a number is given."""
    code, named = fences(README, "python")[0], '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert code.count(named) == 1 and code.count("n=24,") == 2 and len(code.strip().splitlines()) <= 12
    exec(code.replace(named, repr(str(model))).replace("n=24,", f"n={n},"), {})
    return capsys.readouterr().out


@pytest.mark.parametrize("n", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_the_first_lines_run_on_the_bundled_model(capsys, n):
    heads, *recalls = first_lines("bundled", capsys, n).splitlines()[1:]
    assert heads.startswith("4 of 32 heads retrieve, best first: [(1, 0), (1, 3), (1, 2), (1, 1)]")
    assert [line.split(": ")[1][:4] for line in recalls] == ["1.00", "0.00", "1.00"]


@pytest.mark.real
@pytest.mark.skipif("RETMASK_MODELS" not in os.environ, reason="RETMASK_MODELS names no folder of models")
def test_the_first_lines_print_what_the_readme_shows(capsys):
    file = Path(os.environ["RETMASK_MODELS"]) / MODELS["smollm2"].file
    assert first_lines(file, capsys) in README


def test_the_experiment_runs_as_printed_with_one_compile_per_use(caplog):
    import jax

    code = fences(README, "python")[1]
    printed = re.search(r"```\s+It prints\s+```\n(.*?)```", README, re.DOTALL).group(1)
    output, scope = io.StringIO(), {}
    with contextlib.redirect_stdout(output):
        exec(code, scope)
    assert numbers(output.getvalue()) == pytest.approx(numbers(printed), abs=0.02)

    compiled = jax.jit(jax.vmap(scope["logp"]))
    compiled(scope["masks"])
    compiled(jax.tree.map(lambda mask: ~mask, scope["masks"]))
    assert compiled._cache_size() == 1


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]


def test_the_shares_of_an_h100_are_those_of_its_reports():
    reports = json.loads((PACKAGE / "benchmarks/h100.json").read_text())
    rows = {row["name"].split(",")[0]: row for report in reports for row in report["rows"] if row["target"]}
    long, short = ([row["ratio"] for row in report["rows"] if "prefill" in row["name"]][0] for report in reports[:2])
    text = " ".join(BENCHMARKS.split())
    assert f"prefill reaches {long:.0%} of" in text and f"and {short:.0%} at 8 prompts" in text
    assert f"after 8K tokens reaches {rows['decoding']['ratio']:.0%} of" in text
    step, detection = (report["rows"][-1]["ratio"] for report in reports[2:])
    assert f"adapters {step:.0%} (2 pairs" in text and f"Detection is {detection:.0f} times as fast" in text


def test_the_table_of_topologies_is_what_was_compiled():
    rows = json.loads((PACKAGE / "aot/topologies.json").read_text())
    compiled = {
        (row["model"], row["topology"]): row for row in rows if row["what"] == "train" and row["length"] == 1024
    }
    assert {recipe for recipe, _ in compiled} == {"llama3_1_8b", "qwen3_8b", "olmo3_7b_instruct", "olmo3_7b_think"}
    lines = [line.strip("| \n").split(" | ") for line in TRAINING.splitlines() if line.startswith("| ")]
    topologies = next(cells[1:] for cells in lines if cells[0] == "recipe, 1,024 tokens")
    assert topologies == ["v5e:4x4", "v5e:8x8", "v5p:2x2x2", "v6e:4x4"]
    for recipe in {recipe for recipe, _ in compiled}:
        cells = next(cells[1:] for cells in lines if cells[0] == f"`{recipe}`" and "GiB" in cells[1])
        assert cells == [_cell(compiled[recipe, topology]) for topology in topologies]
        assert sum(compiled[recipe, topology]["fits"] for topology in topologies) >= 2
    (long,) = [row for row in rows if row["what"] == "train" and row["length"] == 8192]
    assert long["fits"] and f"{_cell(long)} a step" in TRAINING
    (prompt,) = [row for row in rows if row["what"] == "prefill"]
    assert f"takes {prompt['bytes_per_chip']['peak'] / 2**30:.1f} of 15.75 GiB per chip" in BENCHMARKS


def _cell(row):
    """Memory needed of the memory there is, and the time of a step, from all overlaps to nothing does."""
    seconds = row["seconds"].values()
    return f"{row['needed'] / 2**30:.1f} of {row['limit'] / 2**30:.1f} GiB, {max(seconds):.0f} to {sum(seconds):.0f} s"


# --- numbers and their commands ---

# An interval, or a number with a unit of measurement, or a share below 1; versions and papers have other forms.
MEASURED = re.compile(
    r"\d\.\d+ \[[^\]]+\]|(?<![\w.-])\d+(?:\.\d+)?(?:%| (?:s|ms|GB|GiB|MB|TFLOP/s|TB/s|seconds|minutes|times)\b)"
    r"|(?<![\w.-])[-+\N{MINUS SIGN}]?0\.\d+(?!\.?\d)"
)
COMMAND = re.compile(r"(?:^|[ /])(?:retmask [a-z]|make [a-z]|python -m \w|pytest )", re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_measured_numbers_stand_next_to_the_command_that_prints_them(path):
    assert [block for text in sections(read(path)).values() for block in unexplained(text)] == []


def unexplained(text):
    """Blocks of a section with measured numbers and no command in them, nor in the one before or after."""
    parts = blocks(text)
    near = [any(map(named, parts[max(i - 1, 0) : i + 2])) for i in range(len(parts))]
    return [part for part, explained in zip(parts, near, strict=True) if measured(part) and not explained]


def test_numbers_without_a_command_are_found():
    silent = "Recall is 0.91 [0.88, 0.95]."
    assert unexplained(f"It takes 12 s.\n\nOf three parts\n\n```\nretmask run\n```\n\n{silent}\n\n- one\n\n- 3%") == [
        "It takes 12 s.",
        "- 3%",
    ]
    assert unexplained(f"{silent}\n\n`make demo`") == [] and unexplained(silent) == [silent]
    assert not measured("jax 0.10.2, arXiv 2404.15574, Llama-3.1, 2 of 16, `--threshold=0.3`")
    assert named("`make demo`") and named("```\nenv/bin/retmask run\n```\n") and not named("make demo, `remake it`")


def measured(text):
    return MEASURED.findall(re.sub(r"`[^`]*`|arXiv \d+\.\d+", "", prose(text)))


def named(text):
    return any(COMMAND.search(code) for code in [*fences(text), *inline(text)])


# --- numbers that are in result files ---


def test_rows_of_the_panel_are_those_of_its_files():
    """Every interval of a row is one of its model's; heads, Gini and recalls are those of the panel's table of models."""
    panel = json.loads((ROOT / "colab/panel/panel.json").read_text())
    models = {model["model"]: model for model in panel["models"]}
    made = [row for rows in tables("\n\n".join(every_table(records()))) for row in rows]
    rows = [row for path in PAGES for table in tables(read(path)) for row in table if row[0] in models]
    rows = [row for row in rows if row not in made]
    assert {row[0] for row in rows} == set(models)
    for name, *cells in rows:
        known = _triples(json.loads((ROOT / f"colab/panel/{name}.json").read_text())) | _triples(
            [row for finding in panel["findings"] for row in finding["rows"] if row["model"] == name]
        )
        found = [
            tuple(map(float, triple)) for triple in re.findall(rf"{SIGNED} \[{SIGNED}, {SIGNED}\]", " ".join(cells))
        ]
        assert found and not [triple for triple in found if triple not in known]
        model = models[name]
        values = {
            round(x, n) for x in (model["gini"], *(model[key]["value"] for key in ("recall", "masked"))) for n in (2, 3)
        }
        single = re.findall(r"(?<![\d.+-])\d\.\d+(?! \[)(?![\d\]])", re.sub(r"\S+ \[[^\]]*\]", "", " ".join(cells)))
        assert (
            single and {float(x) for x in single} <= values and f"{model['heads']} of {model['of']}" in " ".join(cells)
        )


def records(folder=ROOT / "colab"):
    return read_records([path for name in ("panel", "real") if (path := folder / name).is_dir()])


def test_tables_of_records_are_in_the_page_line_by_line():
    """All of those of the real models, training with their other seeds too, and gain against sparsity of all models."""
    real, seeds = [record for record in records() if record.sha256], read_records([ROOT / "colab/real/seeds"])
    made = [gain_rows(records())[0], masks(real), rotary(real), *map(training, [*real, *seeds])]
    moved = convert(json.loads((ROOT / "colab/real/smollm2-135m-diff.json").read_text()), Difference)
    header, rows = groups(moved)
    made.append([header, *rows])
    lines = [line for rows in made for line in markdown(rows).splitlines() if not line.startswith("|---")]
    assert len(lines) > 6 and [line for line in lines if line not in COLAB.splitlines()] == []


def test_times_and_ratios_of_the_benchmarks_agree():
    """Each ratio is, within the rounding of all three, the peer's time over ours; of memory ours over the peer's."""
    found = [
        dict(zip(table[0], row, strict=True))
        for path in PAGES
        for table in tables(read(path))
        for row in table[1:]
        if {"ours", "peer", "times as fast"} <= set(table[0])
    ]
    assert found
    for row in found:
        (ours,), peers = _rounded(row["ours"]), _rounded(row["peer"])
        for (low, high), peer in zip(_rounded(row["times as fast"], unit=""), peers, strict=True):
            top, bottom = (ours, peer) if "GB" in row["ours"] else (peer, ours)
            assert low <= top[1] / bottom[0] and top[0] / bottom[1] <= high, row


SIGNED = r"([-+\N{MINUS SIGN}]?\d+\.\d+)"


def _rounded(text, unit=" (?:s|GB)"):
    """(least, most) that each number of a cell may have been before it was rounded."""
    numbers = re.findall(rf"(\d+(?:\.(\d+))?){unit}", text)
    return [(float(x) - 0.5 * 10 ** -len(digits), float(x) + 0.5 * 10 ** -len(digits)) for x, digits in numbers]


def _triples(node):
    """(value, low, high) of every number in a result, to three places, as it is and with the other sign."""
    if isinstance(node, list):
        return set().union(*map(_triples, node))
    if not isinstance(node, dict):
        return set()
    found = _triples(list(node.values()))
    if all(isinstance(node.get(key), float) for key in ("value", "low", "high")):
        ends = node["value"], node["low"], node["high"]
        found |= {tuple(round(x, 3) for x in ends), tuple(round(-x, 3) for x in (ends[0], ends[2], ends[1]))}
    return found


# --- numbers of the bundled model ---


def test_the_readme_has_the_numbers_that_the_quickstart_shows():
    """The notebook runs the stages of `make demo`; its kept outputs have each number by its name, or in the table of eval."""
    cells = json.loads((ROOT / "colab/1_quickstart.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    shown = ["".join(output.get("text", "")) for output in outputs]
    shown += ["".join(output.get("data", {}).get("text/plain", "")) for output in outputs]
    lines = [re.split(r" {2,}", line.strip()) for text in shown for line in text.splitlines()]
    lines = [[cell.replace("\N{NO-BREAK SPACE}", " ") for cell in line] for line in lines]
    kept = {name: " ".join(cells[:2]) for name, *cells in lines if name.startswith(("knockout/", "rope/"))}
    header = next(line for line in lines if line[:2] == ["task", "measure"])
    for task, *cells in (line for line in lines if len(line) == len(header)):
        row = dict(reversed([*zip(header[1:], cells, strict=True)]))  # of columns named alike, the first: retmask's
        kept |= {f"eval/{task}/start": row["start"], f"eval/{task}/retmask minus start": row["change"]}
    headlines = _headlines()
    assert len(headlines) == 10
    assert headlines == {name: kept[name] for name in headlines}


def _headlines():
    """{name in summary.json: value with its interval} of the README's table."""
    (table,) = (table for table in tables(README) if table[0][1:] == ["name in `summary.json`", "value"])
    return {name.strip("`"): value for _, name, value in table[1:]}


def counted_heads():
    """(n, of how many) heads of the small models, as their tables say; what is about real ones is left out."""
    bundled, small = README[README.index("## What it finds on the bundled model") :], COLAB.split("## Real models")[0]
    return re.findall(r"(\d+) of (\d+) heads", bundled + small)


def test_the_card_says_what_inspect_reads():
    facts, card = describe(BUNDLED), " ".join((BUNDLED / "README.md").read_text().split())
    assert (
        f"{round(facts['parameters'] / 1000)}K parameters: {facts['layers']} layers, width {facts['hidden_size']},"
        in card
    )
    assert f"{facts['query_heads']} query and {facts['kv_heads']} key/value heads of {facts['head_width']}" in card
    assert f"SwiGLU {facts['mlp_size']}, RoPE" in card
    assert f"theta {facts['rope']['full']['theta']:,.0f}, tied embeddings, context {facts['context']})" in card
    assert f"{facts['vocab_size']} words, one token each" in card
    totals = {int(total) for _, total in counted_heads()}
    assert totals == {facts["layers"] * facts["query_heads"]}


@pytest.mark.slow
def test_needle_recall_is_what_the_pages_say():
    """Untouched and without the heads that copy, on the recipe's own cases; heads by a detector that only reads."""
    context = Context(load_recipe("tiny", [("tasks.detect.lengths", "(128,)")]), Workdir(ROOT / "runs", {}))
    scores = DETECTORS["copy_position"](context.lm, context.cases("detect")[:20], batch_size=20).scores
    heads, cases = scores.heads(threshold=0.3), context.cases("needle short")
    masks = [Interventions(), mask_heads(context.lm.config, heads)]
    said = conditions.answers(context.lm, cases, masks, max_new_tokens=8, batch_size=32)
    table = next(table for table in tables(COLAB) if {"none", "retrieval"} <= {row[0] for row in table})
    column = next(i for i, cell in enumerate(table[0]) if "needle recall" in cell and "128" in cell)
    printed = {row[0]: float(row[column].split()[0]) for row in table[1:]}
    assert {len(heads)} == {int(n) for n, _ in counted_heads()}
    for name, texts in zip(("none", "retrieval"), said, strict=True):
        assert conditions.hits(texts, cases).mean() == pytest.approx(printed[name], abs=0.011), name  # one case of 96


@pytest.mark.slow
def test_the_tables_are_what_the_stages_write(tmp_path):
    found = {}
    for stage in ("detect", "knockout", "rope"):
        assert main([stage, "--config=tiny", f"--workdir={tmp_path}"]) == 0
        found |= json.loads((tmp_path / stage / "result.json").read_text())["numbers"]
    columns = {
        "needle recall, 128 tokens": "needle short",
        "follows the context, 128 tokens": "context short",
        "answers from memory instead": "context short: from memory",
        "closed-book": "closed-book",
        "text loss": "text loss",
    }
    masked, rotary = (
        next(table for table in tables(COLAB) if table[0][0].startswith(words))
        for words in ("masked heads", "rotary pairs ablated")
    )
    assert len(masked) == 7 and len(rotary) == 4
    for kind, *cells in masked[1:]:
        for column, cell in zip(masked[0][1:], cells, strict=True):
            assert cell == _interval(found[f"knockout/{columns[column]}/{kind}"]), (kind, column)
    for removed, *cells in rotary[1:]:
        for which, cell in zip(("lowest", "highest", "random", "control heads, lowest"), cells, strict=True):
            assert cell == _interval(found[f"rope/needle short/{which} {removed.split()[0]} pairs"]), (which, removed)
    assert f"Gini {found['detect/gini']['value']:.2f};" in COLAB
    assert f"{found['knockout/idle heads']['value']:.0f} heads are idle" in COLAB
    measured_here = {name: value for name, value in _headlines().items() if name in found}
    assert len(measured_here) == 6
    assert measured_here == {name: _interval(found[name]) for name in measured_here}


@pytest.mark.slow
def test_the_study_says_what_its_command_writes(tmp_path):
    assert main(["study", "--config=tiny_study", f"--workdir={tmp_path}"]) == 0
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")]
    text = sections(COLAB)["The causal study"].split("`retmask study --config=tiny_study` writes")[1]
    triples, values = _triples(results), _values(results)
    said = [tuple(map(float, triple)) for triple in re.findall(rf"{SIGNED} \[{SIGNED}, {SIGNED}\]", text)]
    assert len(said) >= 6 and [triple for triple in said if triple not in triples] == []
    assert [x for x in re.findall(r"(?<![\d.[])0\.\d{3}(?![\d\]])", text) if float(x) not in values] == []


def _interval(number):
    return f"{number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]"


def _values(node):
    """Every number in a result, to three places."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        return set().union(*map(_values, node))
    return {round(node, 3)} if isinstance(node, float) else set()


def test_messages_of_the_troubleshooting_table_are_those_of_the_code():
    section = sections((PACKAGE / "runs/README.md").read_text())["When something goes wrong"]
    messages = re.findall(r"^\| `([^`]*)`", section, re.MULTILINE)
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert len(messages) >= 10 and [message for message in messages if message not in code] == []
