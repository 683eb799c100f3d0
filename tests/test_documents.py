"""What the documents name exists: links, files, commands, flags, config keys, recipes."""

import ast
import contextlib
import functools
import io
import re
import shutil

import pytest
from helpers_documents import (
    FOLDERS,
    NOTEBOOKS,
    PAGES,
    ROOT,
    anchors,
    blocks,
    broken_links,
    commands,
    fences,
    inline,
    prose,
    read,
    tables,
)

import retmask_jax as rm
from retmask_jax.aot import table as aot
from retmask_jax.cli import parser
from retmask_jax.runs.recipes import load_recipe

README = ROOT / "README.md"
RECIPES_PAGE = ROOT / "configs/README.md"
GUIDES = [path for path in PAGES if path.stem != "CHANGELOG"]  # which tells what was, not what is
RECIPES = [
    path.stem for path in sorted((ROOT / "configs").glob("*.py")) if path.stem != "default" and path.stem[0] != "_"
]


def by_name(path):
    return str(path.relative_to(ROOT))


# --- pages ---


def test_the_readme_is_short_and_links_to_every_page():
    assert len(read(README).splitlines()) <= 200
    linked = {(ROOT / name).resolve() for name in re.findall(r"\]\(([\w./]+\.md)", prose(read(README)))}
    assert linked == {*PAGES} - {README}


def test_the_pages_of_the_folders_are_there():
    folders = {by_name(path.parent) for path in PAGES if path.name == "README.md"}
    packages = {f"retmask_jax/{name}" for name in ("benchmarks", "evals", "heads", "runs", "training")}
    assert folders >= {".", "colab", "configs", "retmask_jax/assets/tiny"} | packages


@pytest.mark.parametrize("path", [path for path in GUIDES if path.parent != ROOT], ids=by_name)
def test_a_page_starts_with_a_sentence_of_what_it_is_for(path):
    heading, first = blocks(re.sub(r"\A---\n.*?\n---\n", "", read(path), flags=re.DOTALL))[:2]
    assert re.fullmatch(r"# .+", heading) and re.match(r"[A-Z][^|#]{40,}\.", first)


# --- links ---


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=by_name)
def test_links_anchors_and_images_are_there(path):
    assert broken_links(path, read(path)) == []


def test_links_of_pages_in_the_wheel_are_there(tmp_path):
    """Laid out as the wheel is, with the recipes within the package, and without the files that it has not."""
    (call,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "package_data"
    )
    data, homes = ast.literal_eval(call.value), {"retmask_jax": "retmask_jax", "retmask_jax.configs": "configs"}
    for package, home in homes.items():
        patterns = [*data[package], "**/*.py" if package == "retmask_jax" else "*.py"]
        for path in (path for pattern in patterns for path in (ROOT / home).glob(pattern) if path.is_file()):
            place = tmp_path / package.replace(".", "/") / path.relative_to(ROOT / home)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place) if path.suffix == ".md" else place.touch()
    pages = sorted(tmp_path.rglob("*.md"))
    assert len(pages) == len([path for path in PAGES if by_name(path).split("/")[0] in homes.values()]) >= 7
    assert {path: broken_links(path, read(path)) for path in pages} == {path: [] for path in pages}


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# Set-up\n\n## It's `one`, two\n\n## Set-up\n\n```\n# no heading\n```\n")
    assert anchors((tmp_path / "other.md").read_text()) == {"set-up", "its-one-two", "set-up-1"}
    (tmp_path / "a.png").touch()
    page = (
        '# Top\n[a](other.md) [b](other.md#its-one-two) ![c](a.png) [d](#top) [e](https://x.org/#y) <img src="a.png">\n'
        "[f](gone.md) [g](other.md#no-heading) ![h](b.png) [i](#two) <img src='a.png'> [j][k]\n\n[k]: gone.txt\n"
        "```\n[l](code.md)\n```\n"
    )
    (tmp_path / "page.md").write_text(page)
    assert broken_links(tmp_path / "page.md", page) == ["gone.md", "other.md#no-heading", "b.png", "#two", "gone.txt"]


# --- files and names ---


@pytest.mark.parametrize("path", GUIDES, ids=by_name)
def test_files_that_are_named_exist(path):
    """Every path in code that begins in a folder of ours, and every .py file, from the root, the package or the page."""
    code = [*inline(read(path)), *fences(read(path))]
    names = {
        name for text in code for name in re.findall(r"(?<![\w/.{$-])[\w.-]+(?:/[\w.*-]+)*(?:/|\.\w+)(?![\w/*])", text)
    }
    ours = {name for name in names if name.split("/")[0] in FOLDERS or re.search(r"\w\.py$", name)}
    places = (ROOT, ROOT / "retmask_jax", path.parent)
    missing = {name for name in ours if not any((place / name).exists() for place in places)}
    assert ours and missing <= {"test_X.py"}


@pytest.mark.parametrize("path", GUIDES, ids=by_name)
def test_functions_of_the_package_that_are_named_exist(path):
    for name in re.findall(r"\brm\.(\w+(?:\.\w+)*)", read(path)):
        found = rm
        for part in name.split("."):
            found = getattr(found, part)


@pytest.mark.parametrize("path", GUIDES, ids=by_name)
def test_make_has_every_target_that_is_named(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    calls = [call for code in fences(read(path)) for call in commands(code, "make")]
    calls += [code.split()[1:] for code in inline(read(path)) if code.startswith("make ")]
    assert {call[0] for call in calls} - targets == set()


# --- commands ---


@pytest.mark.parametrize("path", GUIDES, ids=by_name)
def test_commands_between_fences_parse_as_they_stand(path):
    for code in fences(read(path)):
        for call in commands(code, "retmask"):
            arguments, overrides = parser.parse(call)
            if hasattr(arguments, "config"):
                load_recipe(*parser.recipe_of(arguments, overrides))
    for code in [*fences(read(path)), *inline(read(path))]:
        for module, *arguments in (call[1:] for call in commands(code, "python") if call[0] == "-m"):
            assert module == "pytest" or (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
            if module == aot.__name__:
                aot._parse(arguments)


@pytest.mark.parametrize("path", GUIDES, ids=by_name)
def test_stages_and_flags_in_the_text_exist(path):
    """Of commands that stand in a sentence, perhaps without all they need."""
    for code in inline(read(path)):
        for call in commands(code, "retmask") if code.startswith("retmask ") else ():
            assert call[0] in parser.STAGES, code
            stage = call[:2] if call[0] == "bench" and len(call) > 1 else call[:1]
            assert flags(call) <= flags_of(*stage), code
        if code.startswith("--") and not code.startswith("--config."):
            everywhere = [[stage] for stage in parser.STAGES] + [["bench", name] for name in parser.BENCHMARKS]
            assert any(flags(code.split()) <= flags_of(*stage) for stage in everywhere), code


def test_config_keys_that_are_named_exist(known_keys):
    for path in GUIDES:
        text = read(path)
        named = set(re.findall(r"--config\.([\w.]+?)\.?(?=[=\s'`,;)]|$)", text))
        sections_known = {key.split(".")[0] for key in known_keys if "." in key}
        for code in inline(text):
            found = re.fullmatch(r"(?:config\.)?(\w+(?:\.\w+)+)(?:=.*)?", code)
            if (
                found
                and found[1].split(".")[0] in sections_known
                and not re.search(r"\.(py|json|npz|html|jsonl|gz)$", found[1])
            ):
                named.add(found[1])
        new = {"KEY"} | set(re.findall(r"^(suites\.\w+) = ConfigDict", text, re.MULTILINE))  # of a worked example
        assert not named - known_keys - new, by_name(path)


def test_the_settings_by_group_are_all_that_there_are():
    (table,) = [rows for rows in tables(read(RECIPES_PAGE)) if rows[0][0] == "keys"]
    assert sorted(name for row in table[1:] for name in inline(row[0])) == sorted(load_recipe("default"))


def test_the_page_of_recipes_has_every_recipe_in_its_table_and_no_other():
    """Whose settings are valid is in test_assets.py."""
    (table,) = [rows for rows in tables(read(RECIPES_PAGE)) if rows[0][:2] == ["recipe", "model"]]
    named = [name for row in table[1:] for name in inline(row[0])]
    assert sorted(named) == sorted(RECIPES)
    assert {name for path in GUIDES for name in re.findall(r"--config=(\w+)\b(?!\.)", read(path))} <= set(RECIPES)


@pytest.fixture(scope="module")
def known_keys():
    """Sections and keys of all recipes, with those of their tasks."""
    keys = set()

    def walk(node, prefix):
        for name, value in node.items():
            keys.add(prefix + name)
            if hasattr(value, "items"):
                walk(value, f"{prefix}{name}.")

    for name in ("default", *RECIPES):
        walk(load_recipe(name), "")
    return keys


def flags(words):
    """Flags among the words of a command, but for config keys and --config itself."""
    return {word.partition("=")[0] for word in words if re.match(r"--\w", word) and not re.match(r"--config[.=]", word)}


@functools.cache
def flags_of(*stage):
    """The flags that `retmask STAGE --help` lists."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        parser.parse([*stage, "--help"])
    return set(re.findall(r"--[\w-]+", printed.getvalue()))
