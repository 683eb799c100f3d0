"""Progress is a bar where a line can be drawn over, lines in a log, nothing on hosts but the first, and never silent for
long: a minute of work shows a line, in one item or in many short bars."""

import io
import re
import sys
import time

import pytest

from retmask_jax.utils import progress
from retmask_jax.utils.progress import track, with_rate


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Every item is shown, however fast."""
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(progress, "_REDRAW", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 0.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, items=(0, 1, 2)):
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(track(items, len(items), "needles", "prompt")) == list(items)
    return stream.getvalue()


def test_a_log_gets_whole_lines_with_rate_and_time_left(monkeypatch):
    lines = shown(monkeypatch, io.StringIO()).split("\n")
    assert len(lines) >= 3 and lines.pop() == "" and "needles: 33% (1 of 3)" in lines[1]
    for line in lines:
        assert line.isprintable() and "left" in line and "prompt/s" in line
    assert "100% (3 of 3)" in lines[-1]


def test_a_terminal_has_one_line_that_is_cleared(monkeypatch):
    text = shown(monkeypatch, Terminal())
    assert "\n" not in text and text.count("\r") >= 4 and "3/3" in text
    assert text.rstrip("\r").split("\r")[-1].strip() == ""


def test_a_notebook_has_one_line_too(monkeypatch):
    from ipykernel.iostream import OutStream

    class Cell(OutStream):
        def __init__(self):
            self.text = io.StringIO()

        def __del__(self):
            pass

        def isatty(self):
            return False

        def write(self, text):
            return self.text.write(text)

        def flush(self):
            pass

        def getvalue(self):
            return self.text.getvalue()

    assert "\n" not in shown(monkeypatch, Cell())


def test_the_rate_is_that_of_this_run(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with track(None, 1148, "train", "step", 1000) as bar:
        time.sleep(0.05)
        bar.update()
    assert "(1001 of 1148)" in stream.getvalue() and float(re.search(r"([\d.]+)step/s", stream.getvalue())[1]) < 20


def test_other_hosts_and_short_work_show_nothing(monkeypatch):
    monkeypatch.setattr(progress, "primary", lambda: False)
    assert shown(monkeypatch, io.StringIO()) == ""
    monkeypatch.setattr(progress, "primary", lambda: True)
    monkeypatch.setattr(progress, "_DELAY", 60.0)
    assert shown(monkeypatch, io.StringIO()) == shown(monkeypatch, Terminal()) == ""


@pytest.fixture
def silent(monkeypatch):
    """A log in which no item of its own would show: the silence before a line is a twentieth of a second."""
    monkeypatch.setattr(progress, "_DELAY", 60.0)
    monkeypatch.setattr(progress, "_EVERY", 60.0)
    monkeypatch.setattr(progress, "_SILENCE", 0.05)
    progress._silence.broken()


def test_an_item_that_takes_long_shows_a_line_before_it_is_done(monkeypatch, silent):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with track(None, 3, "needles", "prompt"):
        begun = time.monotonic()
        while not stream.getvalue() and time.monotonic() - begun < 10:  # the thread that looks sleeps for a second
            time.sleep(0.01)
        assert stream.getvalue().startswith("needles: 0% (0 of 3)")


def test_many_short_bars_one_after_the_other_show_a_line_now_and_then(monkeypatch, silent):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    for i in range(10):
        with track(None, 1, f"condition {i}", "text") as bar:
            time.sleep(0.02)
            bar.update()
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 5 and "100% (1 of 1)" in lines[0]


def test_a_line_that_was_drawn_in_between_is_cleared_from_a_terminal(monkeypatch, silent):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with track(None, 3, "needles", "prompt") as bar:
        bar.refresh()
    assert "needles" in stream.getvalue() and stream.getvalue().rstrip("\r").split("\r")[-1].strip() == ""


def test_tokens_a_second_are_shown_beside_the_items(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(with_rate(("a", "b"), lambda item: 10, 2, "pairs")) == ["a", "b"]
    assert "tokens/s" in stream.getvalue().splitlines()[-1] and "answer/s" in stream.getvalue()
