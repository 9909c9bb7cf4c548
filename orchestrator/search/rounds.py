"""Rounds of confirming: in each the candidates that are not settled and the baseline are timed anew, in turn, on one
worker.

A round is a line of `rounds.jsonl`, written when all of it has been measured: it counts whole, or not at all, so that
what it says of one candidate beside another was measured at the same time. Times are ratios to the reference beside
them.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

from streamllm.configuration import Configuration
from streamllm.engine.methods import METHODS
from streamllm.measuring.jobs import Job, Plan
from streamllm.measuring.store import code_digest
from streamllm.results.checks import checked_round
from streamllm.results.damaged import read_lines
from streamllm.results.schema import AnyRow
from streamllm.results.study_folder import StudyFolder, append_line

from ..scheduler import Scheduler
from ..waiting import JobError
from ..workers.messages import Subject, SweepError

if TYPE_CHECKING:
    from ..workers.kinds import Kind


@dataclass(frozen=True, slots=True)
class Round:
    """One round's results, by trial (its number, or `baseline`) as text."""

    ratios: dict[str, list[float]]
    """Time over the reference's, segment by segment."""
    times: dict[str, AnyRow]
    """The raw milliseconds of both, when, the load, and the kind of worker."""
    failed: dict[str, str]
    """Why a candidate has no times."""
    code: str
    """The engine's, when it was measured."""
    line: int = 0
    """Line in the file, counted from 1."""

    @property
    def members(self) -> set[str]:
        return {*self.ratios, *self.failed}

    def is_of(self, kind: Mapping[str, object]) -> bool:
        """Whether today's code measured it, on that kind of worker."""
        alike = (time.get(name) == value for time in self.times.values() for name, value in kind.items())
        return self.code == _code() and all(alike)


def read_rounds(folder: StudyFolder) -> list[Round]:
    """All whole rounds of a study, the oldest first; a line that was torn by a kill, or is damaged, is none."""
    found, _ = read_lines(folder.rounds, checked_round)
    names = {field.name for field in fields(Round)}
    return [
        Round(**{name: value for name, value in one.items() if name in names} | {"line": number})
        for number, one in found.items()
    ]


def rounds_so_far(folder: StudyFolder, kind: Kind = ()) -> list[Round]:
    """Those that count beside rounds of today: of the same engine and kind of worker."""
    return [one for one in read_rounds(folder) if one.is_of(dict(kind))]


def take_rounds(
    folder: StudyFolder,
    scheduler: Scheduler,
    subject: Subject,
    rows: Sequence[AnyRow],
    count: int,
    until: float = math.inf,
    kind: Kind = (),
) -> list[Round]:
    """`count` more rounds of all `rows`, on workers of that kind, one at a time on a machine; but for the study's first
    none that would not be finished `until` then, by the monotonic clock.

    Raises SweepError where no worker of the kind is left."""
    rounds = _Rounds(folder, scheduler, subject, rows, rounds_so_far(folder, kind))
    while rounds.running or (rounds.missing(count) and rounds.fits(until)):
        while rounds.missing(count) and rounds.fits(until) and (worker := rounds.next_worker(kind)) is not None:
            rounds.begin(worker)
        if not rounds.running and not scheduler.is_restarting and kind not in scheduler.members():
            raise SweepError("the front could not be confirmed: no worker of its kind is left")
        scheduler.assign()
        scheduler.step()
    return rounds.taken


class _Rounds:
    """Rounds under way, at most one on a machine."""

    def __init__(
        self,
        folder: StudyFolder,
        scheduler: Scheduler,
        subject: Subject,
        rows: Sequence[AnyRow],
        earlier: Sequence[Round],
    ) -> None:
        self.taken: list[Round] = []
        self.running: dict[str, int] = {}
        """Machine -> the worker that began it there."""
        self._folder = folder
        self._scheduler = scheduler
        self._subject = subject
        self._rows = rows
        self._earlier = earlier
        self._begun = 0
        self._took = 0.0
        self._used: Counter[int] = Counter()

    def missing(self, count: int) -> bool:
        return self._begun < count

    def fits(self, until: float) -> bool:
        return not (self._earlier or self.taken) or time.monotonic() + self._took <= until

    def next_worker(self, kind: Kind) -> int | None:
        """The one that has had the fewest, on a machine without a round."""
        free = [
            worker
            for host, workers in self._scheduler.members().get(kind, {}).items()
            if host not in self.running
            for worker in workers
        ]
        return min(free, key=lambda worker: (self._used[worker], worker), default=None)

    def begin(self, worker: int) -> None:
        self._begun += 1
        self._used[worker] += 1
        host = next(
            host for of in self._scheduler.members().values() for host, workers in of.items() if worker in workers
        )
        self.running[host] = worker
        started = time.monotonic()
        failed = {trial: reason for one in (*self._earlier, *self.taken) for trial, reason in one.failed.items()}
        number = len(self._earlier) + self._begun

        def done(one: Round | JobError) -> None:
            assert isinstance(one, Round), "its failures are in it"
            del self.running[host]
            self._took = time.monotonic() - started
            kept = replace(one, line=len(read_rounds(self._folder)) + 1)
            append_line(self._folder.rounds, json.dumps(asdict(kept)))
            self.taken.append(kept)

        self._scheduler.start(_round(self._rows, number, failed), self._subject, done, on=worker)


def _round(rows: Sequence[AnyRow], number: int, failed: Mapping[str, str]) -> Plan[Round]:
    """Measures a round. Trials that failed in an earlier one are not tried again."""
    one = Round({}, {}, dict(failed), _code())
    for row in rows:
        trial = str(row["trial"])
        if trial in one.failed:
            continue
        try:
            (done,) = yield [Job("times", Configuration.of_row(row), run=number)]
        except JobError as error:
            one.failed[trial] = str(error)
        else:
            times = dict(done.measurement.record)
            one.ratios[trial] = times.pop("ratios")
            one.times[trial] = times | done.keys.conditions.kind
    return one


def _code() -> str:
    """Digest of the engine with all methods: a round covers several."""
    return code_digest(*METHODS)
