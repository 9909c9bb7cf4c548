"""A study's folder: which files it has, how they are read, and how they are written so that a kill leaves none torn.

`sweep.json` is the configuration, `journal.log` Optuna's. The others follow the journal, plain, for tables, figures and
MLflow: `trials.jsonl` has a row per finished trial, `increases.jsonl` what they cost beside the baseline, which becomes
better known while the sweep runs, `rounds.jsonl` the rounds of confirming, `confirmed.jsonl` what they say of some
trials, `fronts.jsonl` the front each time a sweep ended, `outcome.json` how the last one did.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from ..files import Scalar, write_atomically
from .schema import Row


class SpaceSettings(TypedDict):
    """The space that is searched."""

    name: str
    cap_accounting: NotRequired[str]
    constraints: NotRequired[list[Limit]]


class Limit(TypedDict):
    metric: str
    relation: Literal["<=", ">="]
    limit: float


class StudySettings(TypedDict):
    """The keys of `sweep.json` that tables, figures and the report read; older studies lack some."""

    study: str
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
    def fronts(self) -> Path:
        return self.path / "fronts.jsonl"

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
    def lock(self) -> Path:
        """Held by the driver."""
        return self.path / "driver.lock"

    @property
    def store(self) -> Path:
        """Shared by all studies next to this one: what one has measured, none measures again."""
        return self.path.parent / ".store"

    @property
    def exists(self) -> bool:
        """Whether there are results."""
        return self.trials.is_file()

    def read_configuration(self) -> dict[str, Any]:
        return dict(json.loads(self.configuration.read_text()))

    def write_configuration(self, values: Mapping[str, object]) -> None:
        write_atomically(self.configuration, json.dumps(values, indent=2) + "\n")

    def read_outcome(self) -> tuple[str | None, float | None]:
        """How the sweep ended (FINISHED, FAILED or KILLED) and when, in seconds since 1970; None of one that runs, or
        was killed outright."""
        if not self.outcome.is_file():
            return None, None
        outcome = json.loads(self.outcome.read_text())
        return outcome["status"], outcome["ended_at"]

    def write_outcome(self, status: str) -> None:
        write_atomically(self.outcome, json.dumps({"status": status, "ended_at": time.time()}) + "\n")

    def forget_the_end(self) -> None:
        """A sweep goes on: how it ended, and what was confirmed, holds no more."""
        for path in (self.outcome, self.confirmed):
            path.unlink(missing_ok=True)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file, none if it does not exist; of rows of the same trial the last counts. Raises
    UsageError for rows of a later version."""
    rows = [Row.from_json(json.loads(line), str(path)) for line in whole_lines(path)]
    return list({row.trial: row for row in rows}.values())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_atomically(path, "".join(f"{json.dumps(row.to_json())}\n" for row in rows))


def append_row(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row.to_json()) + "\n")


def whole_lines(path: Path) -> list[str]:
    """Those of a file that have their end, none if it does not exist: a last line without it is being written, or was
    when the sweep was killed."""
    whole, _, _ = path.read_text().rpartition("\n") if path.is_file() else ("", "", "")
    return whole.splitlines()


def append_line(path: Path, line: str) -> None:
    """Takes a torn last line away first."""
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    with path.open("a") as file:
        file.write(f"{line}\n")
