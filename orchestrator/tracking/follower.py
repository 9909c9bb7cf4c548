"""Keeps MLflow up to date while a sweep runs: a process that follows `trials.jsonl` at the server's pace.

It is a process and not a thread: MLflow takes longer for a run than the driver for a trial, and would take that out of
the same interpreter's time.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import reduction, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from streamllm.results.schema import Row
from streamllm.results.study import load_study

from ..trials_file import TrialsFile
from .client import told
from .mlflow_runs import Projection, Report

_FIRST_PAUSE_SEC, _LONGEST_PAUSE_SEC = 1.0, 60.0
_DEATHS = 3
"""Of the process, one after another, before it is not started again."""
_NICENESS = 15
"""On a CPU, logging must not show in the timings."""


class Tracker:
    """An observer of the sweep. A server that is away is asked again later, each time after a longer pause."""

    def __init__(
        self, projection: Projection, trials: TrialsFile, longest_pause_sec: float = _LONGEST_PAUSE_SEC
    ) -> None:
        self._trials = trials
        self._follower = _Follower(projection, trials.path, longest_pause_sec)
        self._listening = threading.Lock()
        self._report: Report | None = None
        self._deaths = self._furthest = 0
        self._begin()

    def _begin(self) -> None:
        self._done = 0
        self._problem: str | None = None
        self._refused: str | None = None
        self.address = ""
        """Where MLflow shows the study; "" as long as nobody knows."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        arguments = (theirs, reduction.DupFd(self._said.fileno()))
        self._process = context.Process(
            target=_run_and_exit, args=(self._follower, *arguments), name="mlflow", daemon=True
        )
        # Ctrl-C is the driver's, who says when to finish: the process has it blocked from its first moment. Spawning
        # starts the resource tracker first if it is not there, which would unblock it here.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        if self._report is not None:
            self._tell(self._report)

    def trial_finished(self, row: Row) -> None:
        self._listen()
        self._ends_well()

    @property
    def backlog(self) -> int:
        """Finished trials that MLflow does not have yet."""
        self._listen()
        return max(self._trials.count - self._done, 0)

    @property
    def problem(self) -> str | None:
        """Why MLflow cannot be written to just now."""
        self._listen()
        return self._problem

    def finish(
        self,
        report: Report,
        progress: Callable[[int], None],
        patience_sec: float = 20.0,
        limit_sec: float = 600.0,
    ) -> str | None:
        """Waits until MLflow has everything, the report included; gives up on a server that is away for `patience_sec`,
        or after `limit_sec`. Returns what is wrong, if anything is. `progress` is told the backlog every second."""
        self._report = report
        self._tell(report)
        started = away_since = time.monotonic()
        while self._process.exitcode != 0:
            self._process.join(1.0)
            if not self._ends_well():
                return f"the process that writes to MLflow keeps dying: {self._why_died()}"
            progress(self.backlog)
            now = time.monotonic()
            if self.problem is None:
                away_since = now
            if now - away_since > patience_sec or now - started > limit_sec:
                return self.problem or f"{self.backlog} runs are waiting"
        self._listen()
        return self._refused

    def _ends_well(self) -> bool:
        """Starts the process anew if it has died; False if it did so too often without getting anywhere."""
        if not self._process.exitcode:
            return True
        self._listen()
        self._deaths = 1 if self._done > self._furthest else self._deaths + 1
        self._furthest = max(self._furthest, self._done)
        if self._deaths > _DEATHS:
            return False
        self._begin()
        return True

    def _why_died(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        code = self._process.exitcode or 0
        return lines[-1][:300] if lines else f"signal {-code}" if code < 0 else f"exit code {code}"

    def _tell(self, report: Report) -> None:
        with suppress(OSError):  # it may be no more
            self._pipe.send(report)

    def _listen(self) -> None:
        """Takes in what the follower has said; the display's thread asks too."""
        with self._listening, suppress(EOFError, OSError):
            while self._pipe.poll():
                self._done, self._problem, self._refused, self.address = self._pipe.recv()


class _Follower:
    """The part that runs in the process; it ends when the sweep does, however that ends."""

    def __init__(self, projection: Projection, trials: Path, longest_pause_sec: float) -> None:
        self._projection = projection
        self._trials = trials
        self._longest_pause_sec = longest_pause_sec
        self._pause = _FIRST_PAUSE_SEC
        self._report: Report | None = None
        self._failed = False
        self._done = 0

    def run(self, pipe: Connection, said: Any) -> None:
        """What is printed goes to the file `said`, a duplicated descriptor: the terminal is the display's."""
        os.nice(_NICENESS)
        os.dup2(said.detach(), 2)
        self._pipe = pipe
        try:
            while not self._finished():
                self._wait(self._pause)
                self._pause = min(2 * self._pause, self._longest_pause_sec)
        except (EOFError, BrokenPipeError):
            pass  # the driver is no more; the next one begins here

    def _finished(self) -> bool:
        """Follows the sweep to its end; False if MLflow did not let it."""
        try:
            self._follow()
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:  # whatever it is, the sweep goes on, and MLflow is asked again
            self._failed = True
            self._say(told(error))
            return False
        return True

    def _follow(self) -> None:
        """Logs each line of `trials.jsonl`, from the first, as they come; then, asked to finish, the rest."""
        self._projection.open(self._say)
        self._projection.reopen_parent()
        gc.freeze()  # MLflow's half a million objects stay; to look through them for garbage costs a sixth of all time
        self._done = 0
        self._say()
        with self._trials.open() as file, self._projection.system_metrics():
            while True:
                closing = self._report is not None
                for _ in self._projection.log_all(_whole_lines(file)):
                    self._done += 1
                    self._pause = _FIRST_PAUSE_SEC
                    self._say()
                if closing:
                    break
                self._wait(_FIRST_PAUSE_SEC)
        if self._failed:  # what was asked for in vain may have been done after all
            self._projection.open()
        self._projection.close(load_study(str(self._trials.parent)), self._report or Report())
        self._say()

    def _wait(self, seconds: float) -> None:
        """Until then, or until the driver asks to finish. Raises EOFError when it is gone."""
        if self._pipe.poll(seconds):
            self._report = self._pipe.recv()

    def _say(self, problem: str | None = None) -> None:
        refused = self._projection.refused
        self._pipe.send((self._done, problem, refused[0] if refused else None, self._projection.address))


def _run_and_exit(follower: _Follower, pipe: Connection, said: Any) -> None:
    """All is written when `run` returns: taking MLflow's hundreds of modules down in order would have the sweep wait
    for a second or more."""
    follower.run(pipe, said)
    os._exit(0)


def _whole_lines(file: IO[str]) -> Iterator[Row]:
    """The rows from where the file stands to the last line that has its end."""
    while True:
        position = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(position)
            return
        yield Row.from_json(json.loads(line), file.name)
