"""A sweep whose workers measure nothing, slowly, and whose driver ends itself by `kill -9` at a chosen moment."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

from optuna.storages.journal import JournalFileBackend

from orchestrator import sweep
from orchestrator.screen import display
from orchestrator.workers import pool

from .faulty_workers import Slow
from .preloaded import begin

MOMENTS = ("measuring", "between a row and its state", "within a row", "confirming", "never")
_TRIALS = 2
"""How far it goes before it ends."""


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_measuring() -> None:
    """When a worker has begun with one trial more."""
    started, begun = display.Display.job_started, set()

    def job_started(self, worker, job):
        started(self, worker, job)
        if job.what.method not in ("ring", "recompute"):  # what trials are compared with
            begun.add(job.what)
        if len(begun) > _TRIALS:
            die()

    display.Display.job_started = job_started


def die_writing(torn: bool) -> None:
    """In a write of a trial's row: after the row itself, or in the middle of it."""
    append, rows = JournalFileBackend.append_logs, []

    def append_and_die(self, logs):
        mine = [number for number, log in enumerate(logs) if "row" in log.get("user_attr", ())]
        rows.extend(mine)
        if len(rows) < _TRIALS:
            return append(self, logs)
        if torn:
            with Path(self._file_path).open("ab") as file:
                file.write(json.dumps(logs[mine[0]]).encode()[:100])
        else:
            append(self, logs[: mine[0] + 1])
        die()

    JournalFileBackend.append_logs = append_and_die


def die_confirming() -> None:
    display.Display.confirming = die


def run(moment: str, folder: Path, arguments: list[str]) -> None:
    """The whole command, in a process of its own; what it prints goes to `folder/stdout` and `folder/stderr`."""
    begin(folder, folder)
    pool.WorkerPool = partial(pool.WorkerPool, worker_class=Slow)
    moments = [die_measuring, partial(die_writing, False), partial(die_writing, True), die_confirming, lambda: None]
    dict(zip(MOMENTS, moments, strict=True))[moment]()
    sys.exit(sweep.main(arguments))
