"""Building blocks of an HTML page, which escape their text, and how numbers are written in it."""

import html
from collections.abc import Iterable, Mapping, Sequence


def document(title: str, sections: Iterable[str]) -> str:
    """The whole page; sections are HTML."""
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(sections))


def heading(title: str) -> str:
    """The heading of a section."""
    return f"<h2>{html.escape(title)}</h2>\n"


def section(title: str, sentences: Iterable[str], *parts: str) -> str:
    """A heading, a line per sentence, and what follows them (HTML)."""
    return "\n".join([heading(title), lines(*sentences), *parts])


def figure(drawings: Iterable[str], caption: str) -> str:
    """Drawings (HTML) side by side, as many as fit, over a caption."""
    return "<figure><div>" + "\n".join(drawings) + f"</div>\n<figcaption>{html.escape(caption)}</figcaption></figure>"


def lines(*sentences: str) -> str:
    """A line each; empty ones are left out."""
    return "\n".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences if sentence)


def table(head: Sequence[str], rows: Iterable[Sequence], note: str = "") -> str:
    """A table that scrolls sideways on a narrow screen, with a note below."""
    parts = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    parts += ["<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    after = f"<p class=note>{html.escape(note)}</p>" if note else ""
    return "<div class=table><table>" + "\n".join(parts) + f"</table></div>{after}"


def folded(summary: str, content: str) -> str:
    """Content (HTML) that a click on its summary opens."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


# --- numbers ---


def interval(number: Mapping) -> str:
    """Value with its interval, if it has one."""
    if number["low"] is None:
        return f"{number['value']:.4g}"
    return f"{fixed(number['value'])} [{fixed(number['low'])},\N{NO-BREAK SPACE}{fixed(number['high'])}]"


def change(number: Mapping) -> str:
    """A difference with its interval, all signed."""
    if number["low"] is None:
        return signed(number["value"])
    return f"{signed(number['value'])} [{signed(number['low'])},\N{NO-BREAK SPACE}{signed(number['high'])}]"


def count(n: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def fixed(value: float | None) -> str:
    """Three decimals; integers as they are; None as a dash."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def exact(value: float | None) -> str:
    """Six significant digits; None as a dash."""
    return "–" if value is None else f"{value:.6g}"


def p_value(p: float) -> str:
    """Four decimals, or what it is below."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def signed(value: float, digits: int = 3) -> str:
    """A change with its sign, a real minus; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def span(values: Sequence[float]) -> str:
    """The smallest and the largest change."""
    low, high = signed(min(values)), signed(max(values))
    return low if low == high else f"{low} to {high}"


# --- looks ---

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Arial, sans-serif; color: #222;
       background: white; max-width: 1100px; margin: 0 auto; padding: 0 14px 40px; }
h1 { font-size: 1.6em; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.25em; margin: 2em 0 0.4em; border-bottom: 1px solid #ccc; }
p { max-width: 46em; margin: 0.4em 0; overflow-wrap: anywhere; }
figure { margin: 1em 0; }
figure div { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
figure svg, figure img { max-width: 100%; height: auto; }
figcaption, .note { font-size: 0.85em; color: #555; max-width: 54em; }
.table { overflow-x: auto; margin: 0.8em 0; }
table { border-collapse: collapse; font-size: 0.85em; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td:first-child { min-width: 7em; }
summary { cursor: pointer; }
@media print {
  body { font-size: 11px; max-width: none; padding: 0; }
  figure svg, figure img { width: 31%; }
  figure svg, figure img, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .table { overflow: visible; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
