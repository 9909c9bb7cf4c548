"""What long work says, on a terminal and elsewhere."""

import os
import pty
import re
import sys
import time

import pytest

from streamllm import progress
from streamllm.progress import spoken, working


@pytest.fixture
def quick(monkeypatch):
    """As if hours were tenths of seconds."""
    for name, seconds in (("_QUIET_SEC", 0.1), ("LINE_SEC", 0.1), ("_FRAME_SEC", 0.02)):
        monkeypatch.setattr(progress, name, seconds)


def test_lines_where_there_is_no_terminal(quick, capsys):
    with working("losses", "timing") as step:
        time.sleep(0.15)
        step(25, 100)
        time.sleep(0.1)
        step(100, 100)
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"losses: \d s so far", lines[0])
    assert any(re.fullmatch(r"losses: 25 of 100, \d+ s left", line) for line in lines)
    assert re.fullmatch(r"losses: timing, \d+ s so far", lines[-1])


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
        with working("losses") as step:
            step(1, 4)
            time.sleep(0.3)
        print("end", file=terminal, flush=True)
        shown = os.read(ours, 100_000).decode()
    assert re.search(r"losses: 1 of 4, \d+ s left", shown)
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
