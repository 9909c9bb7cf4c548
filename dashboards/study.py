"""A sweep's output folder as dashboards read it: `sweep.json`, a row per finished trial in `trials.jsonl`, what
confirming added to some of them in `confirmed.jsonl`, and how it ended in `outcome.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamllm.errors import UsageError

from .front import Row, pareto_front

EXPERIMENT = "streamllm-sweep"
"""Of all studies in MLflow."""
VIEW = "mlflow.sharedViewState."
"""Tag of an MLflow experiment: a view of it, at the address `#/experiments/ID/runs?viewStateShareKey=NAME`."""


@dataclass(frozen=True, slots=True)
class StudyResults:
    name: str
    folder: Path
    configuration: dict[str, Any]
    baseline: Row | None
    trials: Sequence[Row]

    @property
    def objectives(self) -> dict[str, str]:
        """Name -> "minimize" or "maximize"."""
        return dict(self.configuration["objectives"])

    @property
    def front(self) -> list[Row]:
        """Of the confirmed trials, by their confirmed values, where there are any."""
        return pareto_front([row for row in self.trials if "front_probability" in row] or self.trials, self.objectives)


def load_study(study: str) -> StudyResults:
    """A study by name, under `sweeps/` of the working directory, or by the path of its folder. Raises UsageError."""
    folder = next((folder for folder in _folders(study) if (folder / "trials.jsonl").is_file()), None)
    if folder is None:
        known = ", ".join(sorted(path.parent.name for path in Path("sweeps").glob("*/trials.jsonl"))) or "none yet"
        raise UsageError(f"study {study!r}: neither a folder with results nor one of sweeps/ ({known})")
    configuration = json.loads((folder / "sweep.json").read_text())
    confirmed = {row["trial"]: row for row in read_rows(folder / "confirmed.jsonl")}
    rows = [row | confirmed.get(row["trial"], {}) for row in read_rows(folder / "trials.jsonl")]
    baseline = next((row for row in rows if row["trial"] == "baseline"), None)
    trials = [row for row in rows if row["trial"] != "baseline"]
    return StudyResults(str(configuration["study"]), folder, configuration, baseline, trials)


def is_study(study: str) -> bool:
    """Whether `load_study` finds it."""
    return any((folder / "trials.jsonl").is_file() for folder in _folders(study))


def _folders(study: str) -> tuple[Path, Path]:
    return Path(study), Path("sweeps") / study


def read_outcome(folder: Path) -> tuple[str | None, float | None]:
    """How the sweep ended (FINISHED, FAILED or KILLED) and when, in seconds since 1970; None of one that runs, or was
    killed outright."""
    path = folder / "outcome.json"
    if not path.is_file():
        return None, None
    outcome = json.loads(path.read_text())
    return outcome["status"], outcome["ended_at"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, none if it does not exist; of rows of the same trial the last counts. A last line
    without its end is being written, or was when the sweep was killed: it is not read."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    rows = [json.loads(line) for line in whole.splitlines()]
    return list({row["trial"]: row for row in rows}.values())
