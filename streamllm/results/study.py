"""A study's results: its rows, as tables, figures and MLflow read them, in one unit and compared with one baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from ..errors import UsageError
from ..measuring.reference_time import WORKER, ReferencePool, ReferenceTime, speedup
from .checks import measured_row
from .constraint import Constraint, judged
from .damaged import AGAIN, DamagedError, all_told
from .front import study_front
from .schema import Row
from .study_folder import StudyFolder, StudySettings, rows_and_damage

EXPERIMENT = "streamllm-sweep"
"""The name of the experiment in MLflow that holds all studies."""
VIEW = "mlflow.sharedViewState."
"""Tag of an MLflow experiment: a view of it, at the address `#/experiments/ID/runs?viewStateShareKey=NAME`."""
FRONTS = ":fronts"
"""The name of the view of all studies' fronts: none that `view_of` makes of a study's."""
STRICT, BASELINE = "strict", "baseline"
"""Names for what trials are compared with, in place of a trial's number."""
FIXED = (STRICT, BASELINE)
HARDLY = 0.05
"""The probability below which what a search has not found does not matter."""


def view_of(study: str) -> str:
    """The study's name in characters that MLflow takes in the name of a tag."""
    return re.sub(r"[^\w. -]", lambda other: f":{ord(other[0]):x}", study)


@dataclass(frozen=True)
class StudyResults:
    """Rows have one value of a name: the confirmed one where a trial was confirmed (`rounds` says how often), else the
    search's. Times are paired either way, and in one unit."""

    name: str
    folder: Path
    configuration: StudySettings
    baseline: Row | None
    trials: Sequence[Row]
    strict: Row | None = None
    """The reference of times and qualities."""
    searched: Sequence[Row] = ()
    """The trials as the search measured them, all alike; the baseline, where there is one, first."""
    references: Sequence[ReferenceTime] = ()
    """The reference's time on each kind of worker: the unit of all milliseconds."""
    problems: Sequence[str] = ()
    """What could not be read, a sentence without its end per file."""

    @property
    def objectives(self) -> dict[str, str]:
        """Name -> "minimize" or "maximize"."""
        return dict(self.configuration["objectives"])

    @property
    def files(self) -> StudyFolder:
        return StudyFolder(self.folder)

    @property
    def fixed(self) -> list[Row]:
        """What the trials are compared with, as far as it is known: strict StreamingLLM, then the baseline."""
        return [row for row in (self.strict, self.baseline) if row is not None]

    @property
    def is_matrix(self) -> bool:
        """Its trials are cells, of several texts, protocols or number formats: no front is made of them."""
        return "columns" in self.configuration.get("space", {})

    @property
    def is_confirmed(self) -> bool:
        return any(row.get("rounds") for row in self.trials)

    @cached_property
    def front(self) -> list[Row]:
        """The front: of the confirmed trials, where there are any, those that can be told apart. Computed once."""
        return [] if self.is_matrix else study_front(self.trials, self.objectives)


def load_study(study: str) -> StudyResults:
    """A study by name, under `sweeps/` of the working directory, or by the path of its folder; nothing is written.
    Raises DamagedError where too little of it can be read, UsageError."""
    found = _found(study)
    configuration, problems = _settings(found)
    measured, lacking = rows_and_damage(found.trials, measured_row)
    if lacking and not measured:
        raise DamagedError(f"{all_told(lacking)}; {AGAIN}")
    (increased, no_increases), (again, not_confirmed) = map(rows_and_damage, (found.increases, found.confirmed))
    problems += [f"{all_told(wrong)}; left out, {AGAIN}" for wrong in (lacking, no_increases, not_confirmed) if wrong]
    if found.read_outcome()[0] == "":
        problems.append(f"{found.outcome}: damaged, how the sweep ended is not known; {AGAIN}")
    increases, confirmed = ({row.trial: row for row in rows} for rows in (increased, again))
    measured = [row | increases.get(row.trial, _NOTHING) for row in measured]
    merged = [_confirmed(row, confirmed.get(row.trial)) for row in measured]
    pool = ReferencePool([*measured, *(row for row in merged if row.rounds)])
    fixed = {row.trial: pool.with_time(_as_unit(row)) for row in merged if row.trial in FIXED}
    baseline = fixed.get(BASELINE)
    space = configuration.get("space")
    limits = space.get("constraints", []) if space is not None else []
    constraints = [Constraint(**limit) for limit in limits]
    return StudyResults(
        name=configuration["study"],
        folder=found.path,
        configuration=configuration,
        baseline=baseline,
        trials=[_finished(pool.with_time(row), baseline, constraints) for row in merged if row.trial not in FIXED],
        strict=_finished(fixed[STRICT], baseline, ()) if STRICT in fixed else None,
        searched=[pool.with_time(row) for row in measured if row.trial != STRICT],
        references=pool.times(),
        problems=problems,
    )


_NOTHING: Mapping[str, object] = {}


def _confirmed(row: Row, again: Row | None) -> Row:
    """With what the rounds say in its place; who timed them, and what is not known of them, included."""
    if again is None:
        return row
    return row | (dict.fromkeys(WORKER) if again.device is not None else _NOTHING) | again


def _as_unit(row: Row) -> Row:
    """The reference takes one reference's time, whatever it was measured to take beside itself."""
    if row.trial != STRICT:
        return row
    return row | dict.fromkeys(name for name in row if name.startswith("time_ratio")) | {"time_ratio": 1.0}


def _finished(row: Row, baseline: Row | None, constraints: Sequence[Constraint]) -> Row:
    """Beside the baseline as it was timed last, and judged by the values that are shown."""
    if row.state != "complete":
        return row
    if baseline is not None and "time_ratio" in row and "time_ratio" in baseline and not row.rounds:
        row = row | speedup(row, baseline)
    return row | {"violated": None} | judged(row, constraints) if constraints else row


def _found(study: str) -> StudyFolder:
    """The folder with the study's results. Raises DamagedError, UsageError."""
    folders = _folders(study)
    for folder in folders:
        if folder.exists:
            return folder
    for folder in folders:
        if folder.configuration.is_file():
            raise DamagedError(f"{folder.trials}: no file with results; {AGAIN}")
    known = ", ".join(sorted(path.parent.name for path in Path("sweeps").glob("*/trials.jsonl"))) or "none yet"
    raise UsageError(f"study {study!r}: neither a folder with results nor one of sweeps/ ({known})")


def _settings(folder: StudyFolder) -> tuple[StudySettings, list[str]]:
    """The study's settings, and what is wrong with the file that says them. Raises DamagedError."""
    known, wrong = folder.known_configuration()
    if known is None:
        raise DamagedError(f"{all_told(wrong) if wrong else f'{folder.configuration}: no such file'}; {AGAIN}")
    return cast(StudySettings, known), [f"{all_told(wrong)}; the journal's copy is read, {AGAIN}" for _ in wrong[:1]]


def is_study(study: str) -> bool:
    """Whether `load_study` finds it, damaged or not."""
    return any(folder.exists or folder.configuration.is_file() for folder in _folders(study))


def _folders(study: str) -> tuple[StudyFolder, StudyFolder]:
    return StudyFolder(Path(study)), StudyFolder(Path("sweeps") / study)
