"""Keeps `trials.jsonl` up to date while a sweep runs."""

from __future__ import annotations

from collections.abc import Sequence

from streamllm.results.checks import measured_row
from streamllm.results.schema import Row
from streamllm.results.study import FIXED
from streamllm.results.study_folder import StudyFolder, append_row, mend_lines, write_rows

_OF_A_START = {"reused", "finished_at", "commit"}
"""Keys that differ in the rows of reference and baseline each time a sweep goes on."""


class TrialsFile:
    """An observer of the sweep that appends each finished trial."""

    def __init__(self, folder: StudyFolder, rows: Sequence[Row]) -> None:
        """Writes what the study has finished; what trials are compared with, itself no trial, stays as it was."""
        folder.forget_the_end()
        self.path = folder.trials
        known = mend_lines(self.path, measured_row, "it is made anew from the journal")
        self._fixed = {row.trial: row for row in known if row.trial in FIXED}
        written = [*self._fixed.values(), *rows]
        self.count = len(written)
        write_rows(self.path, written)

    def trial_finished(self, row: Row) -> None:
        if row.trial in FIXED:
            before = self._fixed.get(row.trial)
            if before is not None and _measured(row) == _measured(before):
                return
            self._fixed[row.trial] = row
        append_row(self.path, row)
        self.count += 1


def _measured(row: Row) -> dict[str, object]:
    return {name: value for name, value in row.items() if name not in _OF_A_START}
