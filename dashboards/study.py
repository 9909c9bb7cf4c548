"""A sweep's output folder as dashboards read it: `sweep.json`, a row per finished trial in `trials.jsonl`, what they
cost beside the baseline in `increases.jsonl`, what confirming added to some of them in `confirmed.jsonl`, and how it
ended in `outcome.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_spaces import Constraint, judged
from streamllm.errors import UsageError
from streamllm.reference_time import ReferencePool, ReferenceTime, speedup

from .front import Row, study_front

EXPERIMENT = "streamllm-sweep"
"""Of all studies in MLflow."""
VIEW = "mlflow.sharedViewState."
"""Tag of an MLflow experiment: a view of it, at the address `#/experiments/ID/runs?viewStateShareKey=NAME`."""


def view_of(study: str) -> str:
    """The study's name in characters that MLflow takes in the name of a tag."""
    return re.sub(r"[^\w. -]", lambda other: f":{ord(other[0]):x}", study)


@dataclass(frozen=True, slots=True)
class StudyResults:
    """Rows have one value of a name: the confirmed one where a trial was confirmed (`rounds` says how often), else the
    search's. Times are paired either way, and in one unit."""

    name: str
    folder: Path
    configuration: dict[str, Any]
    baseline: Row | None
    trials: Sequence[Row]
    strict: Row | None = None
    """The reference of times and qualities."""
    searched: Sequence[Row] = ()
    """The trials as the search measured them, all alike; the baseline, where there is one, first."""
    references: Sequence[ReferenceTime] = ()
    """The reference's time on each kind of worker: the unit of all milliseconds."""

    @property
    def objectives(self) -> dict[str, str]:
        """Name -> "minimize" or "maximize"."""
        return dict(self.configuration["objectives"])

    @property
    def is_confirmed(self) -> bool:
        return any(row.get("rounds") for row in self.trials)

    @property
    def front(self) -> list[Row]:
        """Of the confirmed trials, where there are any, those that can be told apart."""
        return study_front(self.trials, self.objectives)


def load_study(study: str) -> StudyResults:
    """A study by name, under `sweeps/` of the working directory, or by the path of its folder. Raises UsageError."""
    folder = next((folder for folder in _folders(study) if (folder / "trials.jsonl").is_file()), None)
    if folder is None:
        known = ", ".join(sorted(path.parent.name for path in Path("sweeps").glob("*/trials.jsonl"))) or "none yet"
        raise UsageError(f"study {study!r}: neither a folder with results nor one of sweeps/ ({known})")
    configuration = json.loads((folder / "sweep.json").read_text())
    measured = read_rows(folder / "trials.jsonl")
    increases, confirmed = (
        {row["trial"]: row for row in read_rows(folder / f"{name}.jsonl")} for name in ("increases", "confirmed")
    )
    measured = [{**row, **increases.get(row["trial"], {})} for row in measured]
    merged = [{**row, **confirmed.get(row["trial"], {})} for row in measured]
    pool = ReferencePool([*measured, *(row for row in merged if row.get("rounds"))])
    fixed = {row["trial"]: pool.with_time(_as_unit(row)) for row in merged if row["trial"] in FIXED}
    baseline = fixed.get("baseline")
    constraints = [Constraint(**limit) for limit in configuration.get("space", {}).get("constraints", ())]
    return StudyResults(
        name=str(configuration["study"]),
        folder=folder,
        configuration=configuration,
        baseline=baseline,
        trials=[_finished(pool.with_time(row), baseline, constraints) for row in merged if row["trial"] not in FIXED],
        strict=_finished(fixed["strict"], baseline, ()) if "strict" in fixed else None,
        searched=[pool.with_time(row) for row in measured if row["trial"] != "strict"],
        references=pool.times(),
    )


FIXED = ("strict", "baseline")
"""In place of a trial's number."""


def _as_unit(row: Row) -> Row:
    """The reference takes one reference's time, whatever it was measured to take beside itself."""
    if row["trial"] != "strict":
        return row
    return {name: value for name, value in row.items() if not name.startswith("time_ratio")} | {"time_ratio": 1.0}


def _finished(row: Row, baseline: Row | None, constraints: Sequence[Constraint]) -> Row:
    """Beside the baseline as it was timed last, and judged by the values that are shown."""
    if row.get("state") != "complete":
        return row
    if baseline is not None and "time_ratio" in row and "time_ratio" in baseline and not row.get("rounds"):
        row = {**row, **speedup(row, baseline)}
    if constraints:
        row = {name: value for name, value in row.items() if name != "violated"} | judged(row, constraints)
    return row


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
