"""The parts of an HTML page, rendered from `templates/`, and how numbers are written in it.

The templates escape every text; what is HTML already is `Markup`.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from retmask_jax.runs.workdir import Example
from retmask_jax.utils.numbers import Number


def render(template: str, **values: Any) -> Markup:
    """A template of `templates/` by name, filled in."""
    return Markup(_environment().get_template(f"{template}.html").render(values))


def document(title: str, sections: Iterable[Markup]) -> Markup:
    """The whole page, with the script of its tooltips if it has any."""
    sections = list(sections)
    return render("page", title=title, sections=sections, tips=any(" data-tips=" in part for part in sections))


def section(title: str, sentences: Iterable[str], *parts: Markup) -> Markup:
    """A heading, a line per sentence, and the parts that follow them."""
    return render("section", title=title, parts=[lines(*sentences), *parts])


def figure(drawings: Iterable[Markup], caption: str) -> Markup:
    """Drawings side by side, as many as fit, over a caption."""
    return render("figure", drawings=drawings, caption=caption)


def lines(*sentences: str) -> Markup:
    """A line per sentence; empty ones are left out."""
    return render("lines", sentences=sentences)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> Markup:
    """A table that scrolls sideways on a narrow screen, with a note below."""
    return render("table", head=head, rows=rows, note=note)


def replies(examples: Sequence[Example]) -> Markup:
    """A few questions with the replies to them; nothing where there are none."""
    if not examples:
        return Markup()
    expected = any(example.expected is not None for example in examples)
    rows = [
        [example.question, *([example.expected] if expected else []), *example.replies.values()] for example in examples
    ]
    return table(["question", *(["expected"] if expected else []), *examples[0].replies], rows)


def folded(summary: str, content: Markup) -> Markup:
    """Content that a click on its summary opens."""
    return render("folded", summary=summary, content=content)


# --- numbers ---


def interval(number: Number) -> str:
    """The value with its interval, if it has one."""
    if number.value is None:
        return "–"
    if number.low is None:
        return f"{number.value:.4g}"
    return f"{fixed(number.value)} [{fixed(number.low)},\N{NO-BREAK SPACE}{fixed(number.high)}]"


def change(number: Number) -> str:
    """A difference with its interval, all signed."""
    if number.value is None:
        return "–"
    if number.low is None or number.high is None:
        return signed(number.value)
    return f"{signed(number.value)} [{signed(number.low)},\N{NO-BREAK SPACE}{signed(number.high)}]"


def count(n: int, noun: str) -> str:
    """A number of things, such as "3 heads"."""
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
    """Four decimals, or "< 0.0001"."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def signed(value: float, digits: int = 3) -> str:
    """A change with its sign (a minus sign, not a hyphen); a change that rounds to 0 has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def span(values: Sequence[float]) -> str:
    """The smallest and the largest change."""
    low, high = signed(min(values)), signed(max(values))
    return low if low == high else f"{low} to {high}"


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("retmask_jax.reports")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
