"""A study's folder as tables, figures and MLflow read it: plain files that follow the journal.

`trials.jsonl` has a row per finished trial, `confirmed.jsonl` what confirming added to some of them, `outcome.json` how
the sweep ended. MLflow is made of these files and the measurement store alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dashboards import report
from dashboards.figures import write_figures
from dashboards.front import Row
from dashboards.pareto import export
from dashboards.published import write_published
from dashboards.report import FIGURES
from dashboards.study import StudyResults, read_rows

from .results import BASELINE
from .trial import TrialSpec

_OF_A_START = {"reused", "finished_at", "commit"}
"""What differs in the baseline's row each time a sweep goes on."""


class TrialsFile:
    """An observer of the sweep that appends each finished trial to `trials.jsonl`."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Writes what the study has finished; the baseline, which is no trial of it, stays as it was."""
        for name in ("outcome.json", "confirmed.jsonl"):
            (folder / name).unlink(missing_ok=True)
        self.path = folder / "trials.jsonl"
        self._baseline = next((row for row in read_rows(self.path) if row["trial"] == BASELINE), None)
        written = [*([self._baseline] if self._baseline else []), *rows]
        self.count = len(written)
        write_rows(self.path, written)

    def worker_ready(self, worker: int, description: dict[str, Any]) -> None:
        pass

    def trial_started(self, worker: int, spec: TrialSpec) -> None:
        pass

    def trial_finished(self, row: dict[str, Any]) -> None:
        if row["trial"] == BASELINE:
            if self._baseline is not None and _measured(row) == _measured(self._baseline):
                return
            self._baseline = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.count += 1


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    _replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_outcome(folder: Path, status: str) -> None:
    """status: FINISHED, FAILED or KILLED. A folder without one is of a sweep that runs, or was killed outright."""
    _replace(folder / "outcome.json", json.dumps({"status": status, "ended_at": time.time()}) + "\n")


def write_report(results: StudyResults) -> list[Path]:
    """Tables, figures and the report made of them, as files of the folder; of the space `paper` the source documents'
    main table too."""
    figures = write_figures([results], results.folder, ("png",), only=FIGURES).paths
    theirs = write_published(results) if results.configuration.get("space", {}).get("name") == "paper" else []
    html = report.write_report(results, figures=figures)
    return [*export(results, ("md", "csv")), *theirs, *figures, html]


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _OF_A_START}


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)
