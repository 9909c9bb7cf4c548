"""Long work says so: a bar on a terminal, elsewhere a line every half minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .printing import say

if TYPE_CHECKING:
    from ..engine.decoding import Progress

_QUIET_SEC = 2.0
"""Anything shorter shows nothing."""
LINE_SEC = 30.0
_FRAME_SEC = 0.5


@contextmanager
def working(what: str, then: str = "") -> Iterator[Progress]:
    """Shows on standard error that something takes a while: for how long, and how long it will still, as soon as what
    is yielded has been told steps. What comes after the last step is called `then`."""
    work = _Work(what, then)
    shown = _bar(work) if sys.stderr.isatty() else regularly(lambda: say(str(work), sys.stderr), LINE_SEC)
    with shown:
        yield work.step


@contextmanager
def regularly(do: Callable[[], None], seconds: float) -> Iterator[None]:
    """Does it in the background, over and over."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            do()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Work:
    def __init__(self, what: str, then: str) -> None:
        self.what = what
        self.then = then
        self.started = time.monotonic()
        self.done = self.total = 0

    def step(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def __str__(self) -> str:
        elapsed = time.monotonic() - self.started
        if self.total and self.done >= self.total and self.then:
            return f"{self.what}: {self.then}, {spoken(elapsed)} so far"
        if not self.done:
            return f"{self.what}: {spoken(elapsed)} so far"
        left = elapsed * (self.total - self.done) / self.done
        return f"{self.what}: {self.done} of {self.total}, {spoken(left)} left"


@contextmanager
def _bar(work: _Work) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)

    def draw() -> None:
        if time.monotonic() - work.started < _QUIET_SEC:
            return
        total = work.total if work.done < work.total else None
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(total, work.done if total else 0, width=20, pulse=not total), str(work))
        live.start()
        live.update(line, refresh=True)

    try:
        with regularly(draw, _FRAME_SEC):
            yield
    finally:
        live.stop()


def spoken(seconds: float) -> str:
    """A time in the unit that people would say it in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
