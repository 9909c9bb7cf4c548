"""How a sweep is asked to end: Ctrl-C, SIGTERM as Slurm sends it, SIGHUP of a closed terminal; all mean the same."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

WORDS = "interrupted: the same command goes on from here"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONE_SEC = 3.0
"""Within which further signals are the same: shells, schedulers and impatient users send several."""
_HEARD_SEC = 15.0
"""A library in whose depths no signal is heard for so long is not waited for: nothing finished is only in memory."""


class AskedToEnd(KeyboardInterrupt):
    """A class of its own: of a plain one that passed through certain calls, even if it was caught at last, Python dies
    in the end instead of returning our exit code."""


class Ending:
    """A context in which each of the signals raises AskedToEnd in the main thread, over and over until it `was_heard`:
    libraries swallow exceptions. A signal that was ignored before, as by `nohup`, still is."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came first."""
        self._at = 0.0
        self._heard = False
        self._over = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # which alone is sent signals
            handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in handled}
            threading.Thread(target=self._insist, name="ending", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """As shells have it."""
        return 128 + (self.number or signal.SIGINT)

    def was_heard(self) -> None:
        self._heard = True

    def is_why(self, error: BaseException) -> bool:
        """Whether an error is this end, which was heard then. Schedulers send the signal to all, Ray's processes too,
        whose loss may be found before a signal that a library swallowed has come again."""
        if self.number is None and not isinstance(error, KeyboardInterrupt):
            return False
        self.was_heard()
        return True

    def say(self) -> None:
        print(f"\n{WORDS}", file=sys.stderr, flush=True)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._at = number, now
        elif self._heard and now - self._at < _ONE_SEC:
            return
        raise AskedToEnd

    def _insist(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._over.wait(1.0):
            if self.number is None or self._heard:
                continue
            if time.monotonic() - self._at > _HEARD_SEC:
                self.say()
                os._exit(self.exit_code)
            signal.pthread_kill(main, self.number)
