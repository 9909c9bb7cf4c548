"""A sweep's output folder as dashboards read it: `sweep.json`, and a JSON row per finished trial in `trials.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamllm.errors import UsageError

from .front import Row, pareto_front


@dataclass(frozen=True, slots=True)
class StudyResults:
    name: str
    folder: Path
    configuration: dict[str, Any]
    baseline: Row | None
    trials: list[Row]

    @property
    def objectives(self) -> dict[str, str]:
        """Name -> "minimize" or "maximize"."""
        return dict(self.configuration["objectives"])

    @property
    def front(self) -> list[Row]:
        return pareto_front(self.trials, self.objectives)


def load_study(study: str) -> StudyResults:
    """A study by name, under `sweeps/` of the working directory, or by the path of its folder. Raises UsageError."""
    folders = [Path(study), Path("sweeps") / study]
    folder = next((folder for folder in folders if (folder / "trials.jsonl").is_file()), None)
    if folder is None:
        known = ", ".join(sorted(path.parent.name for path in Path("sweeps").glob("*/trials.jsonl"))) or "none yet"
        raise UsageError(f"study {study!r}: neither a folder with results nor one of sweeps/ ({known})")
    configuration = json.loads((folder / "sweep.json").read_text())
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    baseline = next((row for row in rows if row["trial"] == "baseline"), None)
    trials = [row for row in rows if row["trial"] != "baseline"]
    return StudyResults(str(configuration["study"]), folder, configuration, baseline, trials)
