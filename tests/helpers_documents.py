"""Markdown as the tests of documents read it: code, prose, headings, links, tables and commands."""

import itertools
import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("colab", "configs", "retmask_jax", "tests")
PAGES = [*sorted(ROOT.glob("*.md")), *(page for name in FOLDERS for page in sorted((ROOT / name).rglob("*.md")))]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(
    r'\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)="([^"]+)"', re.MULTILINE
)


def read(path: Path) -> str:
    """The text of a page, or of a notebook's markdown cells."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def prose(text: str) -> str:
    """Without the code between fences."""
    return _FENCE.sub("\n", text)


def fences(text: str, language: str = "") -> list[str]:
    """Code between fences of a language; "": of none, or the shell."""
    wanted = {language} if language else {"", "sh", "bash", "shell", "console"}
    return [code for name, code in _FENCE.findall(text) if name in wanted]


def inline(text: str) -> list[str]:
    """Code between backticks, on one line each."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(text))]


def sections(text: str) -> dict[str, str]:
    """{heading: what stands under it, up to the next heading of any level}; "" is what stands before the first."""
    places = [m.start() for m in _FENCE.finditer(text)], [m.end() for m in _FENCE.finditer(text)]
    headings = [
        m
        for m in re.finditer(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE)
        if not any(a <= m.start() < b for a, b in zip(*places, strict=True))
    ]
    ends = [m.start() for m in headings[1:]] + [len(text)]
    found = {"": text[: headings[0].start()] if headings else text}
    for heading, end in zip(headings, ends, strict=False):
        name = heading[1]
        while name in found:
            name += " "  # GitHub takes equal headings apart, too
        found[name] = text[heading.end() : end]
    return found


def blocks(text: str) -> list[str]:
    """Paragraphs, lists, tables and fenced code in their order, as empty lines part them."""
    pieces = re.split(r"(^```.*?^```[ \t]*$)", text, flags=re.DOTALL | re.MULTILINE)
    parts = [
        part for piece in pieces for part in ([piece] if piece.startswith("```") else re.split(r"\n[ \t]*\n", piece))
    ]
    return [part.strip() for part in parts if part.strip()]


def anchors(text: str) -> set[str]:
    """What #anchors of a page may be, as GitHub makes them from its headings; and ids that are set."""
    found: list[str] = re.findall(r'(?:id|name)="([^"]+)"', text)
    for heading in filter(None, sections(text)):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        same = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{same}" if same else slug)
    return set(found)


def broken_links(path: Path, text: str) -> list[str]:
    """Links and images of a page to files or sections that are not there; addresses of other hosts are not looked at."""
    wrong = []
    for link in ("".join(groups) for groups in _LINK.findall(prose(text))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        page = text if not name else read(target) if target.suffix in (".md", ".ipynb") and target.exists() else ""
        if not target.exists() or (anchor and anchor not in anchors(page)):
            wrong.append(link)
    return wrong


def tables(text: str) -> list[list[list[str]]]:
    """Tables as rows of cells, the header first."""
    blocks = re.findall(r"(?:^\|.*\n?)+", prose(text), re.MULTILINE)
    rows = [
        [[cell.strip() for cell in line.strip().strip("|").split(" |")] for line in block.splitlines()]
        for block in blocks
    ]
    return [[header, *body] for header, _, *body in (block for block in rows if len(block) > 2)]


def commands(code: str, program: str) -> list[list[str]]:
    """Arguments of each call of a program in shell code: also after others, in quotes, and with one {a,b} expanded."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        if program in line:
            found += _calls(shlex.split(line, comments=True), program)
    return found


def _calls(words: list[str], program: str) -> list[list[str]]:
    found = []
    for i, word in enumerate(words):
        if " " in word and f"{program} " in word:
            found += _calls(shlex.split(word), program)
        if word == program or word.endswith(f"/bin/{program}"):
            call = itertools.takewhile(lambda word: word not in ("&&", "||", "|", ";", "&"), words[i + 1 :])
            found += map(list, itertools.product(*(_either(word) for word in call)))
    return found


def _either(word: str) -> list[str]:
    return word[1:-1].split(",") if re.fullmatch(r"\{[^{}]+,[^{}]+\}", word) else [word]
