"""What long work says, on a terminal and elsewhere."""

import io
import os
import pty
import re
import select
import sys
import time

import pytest

from streamllm.terminal import progress
from streamllm.terminal.progress import spoken, working

from .waiting import wait_until


@pytest.fixture
def quick(monkeypatch):
    """As if hours were tenths of seconds."""
    for name, seconds in (("_QUIET_SEC", 0.1), ("LINE_SEC", 0.1), ("_FRAME_SEC", 0.02)):
        monkeypatch.setattr(progress, name, seconds)


def test_lines_where_there_is_no_terminal(quick, monkeypatch):
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())

    def is_said(line):
        return lambda: re.search(line, said.getvalue(), re.MULTILINE)

    with working("losses", "timing") as step:
        wait_until(is_said(r"^losses: \d+ s so far$"))
        step(25, 100)
        wait_until(is_said(r"^losses: 25 of 100, \d+ s left$"))
        step(100, 100)
        wait_until(is_said(r"^losses: timing, \d+ s so far$"))


def test_short_work_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SEC", 60.0)
    started = time.monotonic()
    with working("losses"):
        pass
    assert time.monotonic() - started < 30, "and is not held up"
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_that_is_gone_afterwards(quick, monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        shown = ""

        def is_drawn(pattern=r"losses: 1 of 4, \d+ s left"):
            nonlocal shown
            if select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 100_000).decode()
            return re.search(pattern, shown)

        with working("losses") as step:
            step(1, 4)
            wait_until(is_drawn)
        print("end", file=terminal, flush=True)
        wait_until(lambda: is_drawn("end"))
    assert shown.rstrip().endswith("end") and "\x1b[2K" in shown, "the line was cleared"


def test_an_error_ends_it(quick, capsys):
    with pytest.raises(ValueError, match="nope"), working("losses"):
        raise ValueError("nope")
    capsys.readouterr()
    time.sleep(0.25)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (150, "2 min"), (5000, "83 min"), (8000, "2.2 h")]
)
def test_times_as_people_say_them(seconds, text):
    assert spoken(seconds) == text
