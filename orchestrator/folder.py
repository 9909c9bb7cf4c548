"""A study's folder as tables, figures and MLflow read it: plain files that follow the journal.

`trials.jsonl` has a row per finished trial, `increases.jsonl` what they cost beside the baseline, which becomes better
known while the sweep runs, `rounds.jsonl` the rounds of confirming, `confirmed.jsonl` what they say of
some trials, `fronts.jsonl` the front each time a sweep ended, `outcome.json` how the last did. MLflow is made of these
files and the measurement store alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dashboards import report
from dashboards.figures import write_figures
from dashboards.front import Row, dominators
from dashboards.pareto import export
from dashboards.published import write_published
from dashboards.recommendation import recommended, record
from dashboards.report import FIGURES
from dashboards.study import StudyResults, read_rows

from .results import BASELINE, STRICT
from .trial import TrialSpec

_OF_A_START = {"reused", "finished_at", "commit"}
"""What differs in the rows of reference and baseline each time a sweep goes on."""


class TrialsFile:
    """An observer of the sweep that appends each finished trial to `trials.jsonl`."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Writes what the study has finished; what trials are compared with, itself no trial, stays as it was."""
        for name in ("outcome.json", "confirmed.jsonl"):
            (folder / name).unlink(missing_ok=True)
        self.path = folder / "trials.jsonl"
        self._fixed = {row["trial"]: row for row in read_rows(self.path) if row["trial"] in (STRICT, BASELINE)}
        written = [*self._fixed.values(), *rows]
        self.count = len(written)
        write_rows(self.path, written)

    def worker_ready(self, worker: int, description: dict[str, Any]) -> None:
        pass

    def trial_started(self, worker: int, spec: TrialSpec) -> None:
        pass

    def trial_finished(self, row: dict[str, Any]) -> None:
        if row["trial"] in (STRICT, BASELINE):
            before = self._fixed.get(row["trial"])
            if before is not None and _measured(row) == _measured(before):
                return
            self._fixed[row["trial"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.count += 1


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    _replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_outcome(folder: Path, status: str) -> None:
    """status: FINISHED, FAILED or KILLED. A folder without one is of a sweep that runs, or was killed outright."""
    _replace(folder / "outcome.json", json.dumps({"status": status, "ended_at": time.time()}) + "\n")


def keep_recommendation(results: StudyResults) -> None:
    """Adds what is recommended, why and its command to `sweep.json`."""
    path = results.folder / "sweep.json"
    found = record(results, recommended(results, results.front))
    _replace(path, json.dumps(json.loads(path.read_text()) | {"recommendation": found}, indent=2) + "\n")


def keep_front(results: StudyResults) -> list[str]:
    """Adds the study's front to `fronts.jsonl`. Returns why trials are no longer on it, a line each."""
    path, front = results.folder / "fronts.jsonl", results.front
    lines = path.read_text().splitlines() if path.is_file() else []
    before = json.loads(lines[-1])["front"] if lines else []
    now = [row["trial"] for row in front]
    left = [row for row in results.trials if row["trial"] in set(before) - set(now)]
    reasons = [
        f"trial {row['trial']} is no longer on the front: {_why_left(row, better, now)}"
        for row, better in zip(left, dominators(left, results.trials, results.objectives), strict=True)
    ]
    if now != before:
        entry = {"at": time.time(), "trials": len(results.trials), "front": now, "left": reasons}
        _replace(path, "".join(f"{line}\n" for line in [*lines, json.dumps(entry)]))
    return reasons


def _why_left(row: Row, better: Row | None, front: Sequence[Any]) -> str:
    if not row.get("feasible", True):
        return f"measured again, it breaks {row['violated']}"
    if better is not None:
        return f"measured again, trial {better['trial']} is better in every objective"
    if not row.get("rounds"):
        return "it was not confirmed this time"
    alike = [trial for trial in row.get("not_told_from", ()) if trial in front]
    return f"it cannot be told from {' and '.join(f'trial {trial}' for trial in alike) or 'others'}, which is on it"


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
