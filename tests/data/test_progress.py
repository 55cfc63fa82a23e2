"""Long work is seen, short work is not, and standard output stays clean."""

import io
import sys

import pytest

from psa_fast.data import progress as module
from psa_fast.data.progress import progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def work(clock, things, seconds_each, total=None):
    with progress("checking images", total) as advance:
        for _ in range(things):
            clock.now += seconds_each
            advance(1)


def test_a_log_gets_a_line_every_ten_seconds(clock, capsys):
    work(clock, 3500, 0.01, total=4000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"checking images: {n},000 of 4,000, {n}0 s" for n in (1, 2, 3)]
    work(clock, 15, 1.0)
    assert capsys.readouterr().err == "checking images: 10, 10 s\n"


def test_what_is_done_in_a_moment_is_not_shown(clock, capsys):
    work(clock, 900, 0.01)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_that_goes_away(clock, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for seconds, seen in ((0.1, False), (2.0, True)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        work(clock, 5, seconds, total=5)
        shown = terminal.getvalue()
        assert ("checking images" in shown) == seen
        if seen:
            assert "5/5" in shown
            assert shown.endswith("\x1b[2K"), "its line is wiped at the end"
    assert capsys.readouterr().out == ""


def test_a_failure_in_the_work_comes_through(clock):
    with pytest.raises(ValueError, match="mine"), progress("reading"):
        raise ValueError("mine")
