"""A study's folder: which files it has, how they are read, and how they are written so that a kill leaves none torn.

`sweep.json` is the configuration, `journal.log` Optuna's. The others follow the journal, plain, for tables, figures and
MLflow: `trials.jsonl` has a row per finished trial, `increases.jsonl` what they cost beside the baseline, which becomes
better known while the sweep runs, `timing.json` whether accelerators disturb one another, `rounds.jsonl` the rounds of
confirming, `confirmed.jsonl` what they say of some trials, `fronts.jsonl` the front each time a sweep ended,
`expected.jsonl` what its sampler expected of all else, `outcome.json` how the last one did, `mlflow.json` where MLflow
has its runs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

from ..files import Scalar, write_atomically
from .checks import checked_front, checked_outcome, checked_round, checked_row, checked_settings, checked_tracking
from .damaged import DamagedError, keep_aside, read_json, read_lines
from .schema import NewerFormatError, Row

T = TypeVar("T")
SETTINGS = "settings"
"""The attribute of the journal's study that keeps what `sweep.json` says."""


class SpaceSettings(TypedDict):
    """The space that is searched."""

    name: str
    cap_accounting: NotRequired[str]
    constraints: NotRequired[list[Limit]]
    description: NotRequired[str]
    columns: NotRequired[dict[str, list[str]]]
    """Of a matrix, which searches nothing: protocol -> measures of its table."""


class Limit(TypedDict):
    metric: str
    relation: Literal["<=", ">="]
    limit: float


class Completeness(TypedDict):
    """What a search that ended leaves to be found."""

    share: float
    """Of the front's hypervolume."""
    chance: float
    """That the configurations that were not timed would add so much, or more."""
    timed: int
    points: int
    """Configurations of the space."""


class StudySettings(TypedDict):
    """The keys of `sweep.json` that tables, figures and the report read; older studies lack some."""

    study: str
    study_id: NotRequired[str]
    summary: str
    model: str
    quantization: str
    source: dict[str, Scalar]
    """Fields of a `TextSource`."""
    cap: int
    objectives: dict[str, str]
    """Name -> "minimize" or "maximize"."""
    seed: int
    commit: str
    space: NotRequired[SpaceSettings]
    sampler: NotRequired[str]
    max_ppl_increase: NotRequired[float | None]
    versions: NotRequired[dict[str, str]]
    completeness: NotRequired[Completeness]
    effects: NotRequired[dict[str, dict[str, float]]]
    """Objective -> knob -> the share of its variance over the space that the knob accounts for by itself, as far as the
    sampler knows."""


@dataclass(frozen=True, slots=True)
class StudyFolder:
    path: Path

    @property
    def trials(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def increases(self) -> Path:
        return self.path / "increases.jsonl"

    @property
    def confirmed(self) -> Path:
        return self.path / "confirmed.jsonl"

    @property
    def rounds(self) -> Path:
        return self.path / "rounds.jsonl"

    @property
    def expected(self) -> Path:
        return self.path / "expected.jsonl"

    @property
    def fronts(self) -> Path:
        return self.path / "fronts.jsonl"

    @property
    def cells(self) -> Path:
        """Of a matrix: a file with the results of each cell."""
        return self.path / "results"

    @property
    def configuration(self) -> Path:
        return self.path / "sweep.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal.log"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def tracking(self) -> Path:
        """Where MLflow has the study's runs."""
        return self.path / "mlflow.json"

    @property
    def timing(self) -> Path:
        """What was found out about accelerators that are timed at once."""
        return self.path / "timing.json"

    @property
    def lock(self) -> Path:
        """Held by the driver."""
        return self.path / "driver.lock"

    @property
    def mlflow_lock(self) -> Path:
        """Held by all who write the study's runs to MLflow."""
        return self.path / "mlflow.lock"

    @property
    def locks(self) -> tuple[Path, ...]:
        """What says nothing of the study."""
        return self.lock, self.mlflow_lock

    @property
    def store(self) -> Path:
        """Shared by all studies next to this one: what one has measured, none measures again."""
        return self.path.parent / ".store"

    @property
    def exists(self) -> bool:
        """Whether there are results."""
        return self.trials.is_file()

    def read_configuration(self) -> dict[str, Any]:
        """Raises DamagedError, where it is not there too."""
        return read_json(self.configuration, checked_settings)

    def kept_configuration(self) -> dict[str, Any] | None:
        """The copy of it that the journal keeps; None if there is none, as older versions kept none."""
        found, _ = read_lines(self.journal, _kept)
        return next((settings for settings in reversed(found.values()) if settings is not None), None)

    def known_configuration(self) -> tuple[dict[str, Any] | None, list[str]]:
        """What it says or, where it is damaged or gone, what the journal keeps of it, if anything; and what is
        wrong."""
        try:
            return self.read_configuration(), []
        except DamagedError as error:
            kept = self.kept_configuration()
            is_new = kept is None and not os.path.lexists(self.configuration)
            return kept, [] if is_new else [str(error)]

    def write_configuration(self, values: Mapping[str, object]) -> None:
        write_atomically(self.configuration, json.dumps(values, indent=2) + "\n")

    def read_outcome(self) -> tuple[str | None, float | None]:
        """How the sweep ended (FINISHED, FAILED or KILLED; empty if that cannot be read) and when, in seconds since
        1970; None of one that runs, or was killed outright."""
        if not os.path.lexists(self.outcome):
            return None, None
        try:
            return read_json(self.outcome, checked_outcome)
        except DamagedError:
            return "", None

    def write_outcome(self, status: str) -> None:
        write_atomically(self.outcome, json.dumps({"status": status, "ended_at": time.time()}) + "\n")

    def read_tracking(self) -> tuple[str, str]:
        """The URI of MLflow's store, without a password, and the experiment with the study's runs; both empty where
        that was not noted, or cannot be read."""
        try:
            return read_json(self.tracking, checked_tracking)
        except DamagedError:
            return "", ""

    def write_tracking(self, uri: str, experiment: str) -> None:
        if self.read_tracking() != (uri, experiment):
            write_atomically(self.tracking, json.dumps({"uri": uri, "experiment": experiment}) + "\n")

    def forget_the_end(self) -> None:
        """A sweep goes on: how it ended, and what was confirmed, holds no more. What is damaged of the files that are
        added to is taken away. Raises UsageError."""
        for path in (self.outcome, self.confirmed, self.expected):
            if path.is_file() or path.is_symlink():
                path.unlink()
            elif path.exists():
                keep_aside(path, [f"{path}: no file"], "it is made anew when the sweep ends")
        for path, parse in ((self.increases, checked_row), (self.rounds, checked_round), (self.fronts, checked_front)):
            mend_lines(path, parse)


def read_rows(path: Path) -> list[Row]:
    """The rows of trials in a JSON-lines file that can be read, none if it does not exist; of rows of the same trial
    the last counts. Raises NewerFormatError."""
    return rows_and_damage(path)[0]


def rows_and_damage(path: Path, parse: Callable[[object], Row] | None = None) -> tuple[list[Row], list[str]]:
    """The rows, and what is wrong with other lines. parse: `measured_row` for `trials.jsonl`."""
    found, wrong = read_lines(path, parse or checked_row)
    return list({row.trial: row for row in found.values()}.values()), wrong


def mend_lines(path: Path, parse: Callable[[object], T], instead: str = "") -> list[T]:
    """What `parse` makes of the lines that can be read. If some cannot they are taken away and that is said, with what
    comes `instead`; the file as it was is kept aside. Raises UsageError."""
    try:
        found, wrong = read_lines(path, parse)
    except NewerFormatError as error:  # the journal, which was read before, has no such rows
        found, wrong = {}, [str(error)]
    if wrong:
        lines = path.read_bytes().split(b"\n") if found else []
        keep_aside(path, wrong, instead or f"left out, {len(found)} other lines are kept")
        write_atomically(path, b"".join(lines[number - 1] + b"\n" for number in found))
    return list(found.values())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_atomically(path, "".join(f"{json.dumps(row.to_json())}\n" for row in rows))


def append_row(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row.to_json()) + "\n")


def append_line(path: Path, line: str) -> None:
    """Takes a torn last line away first."""
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    with path.open("a") as file:
        file.write(f"{line}\n")


def _kept(line: object) -> dict[str, Any] | None:
    """The settings that a line of the journal keeps. Raises ValueError."""
    attributes = line.get("user_attr") if isinstance(line, dict) else None
    return checked_settings(attributes[SETTINGS]) if isinstance(attributes, dict) and SETTINGS in attributes else None
