"""The README's experiment runs as printed, and says what it prints."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "retmask_jax"
README = (ROOT / "README.md").read_text()


def test_the_experiment_runs_as_printed_with_one_compile_per_use(caplog):
    import jax

    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    printed = re.search(r"```python\n.*?```\s+It prints\s+```\n(.*?)```", README, re.DOTALL).group(1)
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


def test_commands_and_files_of_the_readme_exist():
    root = Path(__file__).parent.parent
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for name in re.findall(r"--config=(\w+)\b(?!\.)", README):
        assert (root / "configs" / f"{name}.py").exists(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / link).exists(), link


def test_the_shares_of_an_h100_are_those_of_its_reports():
    reports = json.loads((PACKAGE / "benchmarks/h100.json").read_text())
    rows = {row["name"].split(",")[0]: row for report in reports for row in report["rows"] if row["target"]}
    long, short = ([row["ratio"] for row in report["rows"] if "prefill" in row["name"]][0] for report in reports[:2])
    text = " ".join(README.split())
    assert f"prefill reaches {long:.0%} of" in text and f"and {short:.0%} at 8 prompts" in text
    assert f"behind 8K {rows['decoding']['ratio']:.0%} of" in text
    step, detection = (report["rows"][-1]["ratio"] for report in reports[2:])
    assert f"adapters {step:.0%} (2 pairs" in text and f"detection is {detection:.0f} times as fast" in text


def test_the_table_of_topologies_is_what_was_compiled():
    rows = json.loads((PACKAGE / "benchmarks/topologies.json").read_text())
    compiled = {(row["model"], row["topology"]): row for row in rows if row["what"] == "train" and row["length"] == 1024}
    assert {recipe for recipe, _ in compiled} == {"llama3_1_8b", "qwen3_8b", "olmo3_7b_instruct", "olmo3_7b_think"}
    lines = [line.strip("| \n").split(" | ") for line in README.splitlines() if line.startswith("| ")]
    topologies = next(cells[1:] for cells in lines if cells[0] == "recipe, 1,024 tokens")
    assert topologies == ["v5e:4x4", "v5e:8x8", "v5p:2x2x2", "v6e:4x4"]
    for recipe in {recipe for recipe, _ in compiled}:
        cells = next(cells[1:] for cells in lines if cells[0] == f"`{recipe}`" and "GiB" in cells[1])
        assert cells == [_cell(compiled[recipe, topology]) for topology in topologies]
        assert sum(compiled[recipe, topology]["fits"] for topology in topologies) >= 2
    (long,) = [row for row in rows if row["what"] == "train" and row["length"] == 8192]
    assert long["fits"] and f"{_cell(long)} a step" in README
    (prompt,) = [row for row in rows if row["what"] == "prefill"]
    assert f"takes {prompt['bytes_per_chip']['peak'] / 2**30:.1f} of 15.75 GiB per chip" in README


def _cell(row):
    """Memory needed of the memory there is, and the time of a step, from all overlaps to nothing does."""
    seconds = row["seconds"].values()
    return f"{row['needed'] / 2**30:.1f} of {row['limit'] / 2**30:.1f} GiB, {max(seconds):.0f} to {sum(seconds):.0f} s"
