"""optuna-dashboard beside studies that run: it shows their journals as they grow, and can change none of them.

Its pages have forms that write: notes, tags, a study's deletion. A journal's writer is its sweep, so here whatever
writes fails. Needs the packages optuna and optuna_dashboard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_CREATE_STUDY, _CREATE_TRIAL = 0, 4
"""Of `optuna.storages.journal._storage.JournalOperation`: what a journal's file numbers its operations by."""


class ReadOnlyJournals:
    """Several journals, each of one study, as one that nobody can write to: what Optuna calls a journal's backend.

    Studies and trials are numbered as they are found, as Optuna does."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._journals = [_Journal(path) for path in paths]
        self._logs: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._trials = 0

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        for journal in self._journals:
            self._logs += [self._renumbered(log, journal) for log in journal.new_lines()]
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Raises PermissionError."""
        raise PermissionError("read-only: the study's journal is its sweep's")

    def _renumbered(self, log: dict[str, Any], journal: _Journal) -> dict[str, Any]:
        if log["op_code"] == _CREATE_STUDY:
            journal.study = len(self._names)
            name, copy = log["study_name"], 1
            while (called := f"{name} ({copy})" if copy > 1 else name) in self._names:  # Optuna has one of each name
                copy += 1
            self._names.append(called)
            log = log | {"study_name": called}
        if log["op_code"] == _CREATE_TRIAL:
            journal.trials.append(self._trials)
            self._trials += 1
        changed = {"study_id": journal.study} if "study_id" in log else {}
        if "trial_id" in log:
            changed["trial_id"] = journal.trials[log["trial_id"]]
        return log | changed


class _Journal:
    """A file that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        """Bytes."""
        self.study = 0
        self.trials: list[int] = []
        """Number of a trial here -> number among all."""

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Those that have their end, since the last time."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        return map(json.loads, whole.splitlines())


def main(arguments: Sequence[str]) -> None:
    """Serves: HOST JOURNAL ... --port PORT."""
    from optuna.storages import JournalStorage
    from optuna_dashboard import run_server

    host, *journals, _, port = arguments
    run_server(JournalStorage(ReadOnlyJournals([*map(Path, journals)])), host, int(port))
