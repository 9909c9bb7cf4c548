"""Rounds of confirming: in each every candidate and the baseline are timed anew, in turn, on one worker.

A round is a line of `rounds.jsonl`, written when all of it has been measured: it counts whole, or not at all, so that
all that is compared was measured at the same time. Times are ratios to the reference beside them.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Protocol

from streamllm.configuration import Configuration
from streamllm.engine.methods import METHODS
from streamllm.measuring.store import code_digest
from streamllm.results.checks import checked_round
from streamllm.results.damaged import read_lines
from streamllm.results.schema import AnyRow
from streamllm.results.study_folder import StudyFolder, append_line

from ..workers.messages import SweepError, TrialMeasurement, TrialSpec
from ..workers.pool import Finished

_ATTEMPTS = 2


class Pool(Protocol):
    def submit(self, worker: int, spec: TrialSpec) -> None: ...

    def wait(self, timeout: float) -> Iterable[Finished]: ...


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


def take_rounds(
    folder: StudyFolder,
    pool: Pool,
    workers: Sequence[int],
    rows: Sequence[AnyRow],
    count: int,
    announce: Callable[[int, TrialSpec], None],
    until: float = math.inf,
    kind: Mapping[str, object] | None = None,
) -> list[Round]:
    """`count` rounds of all `rows`, each on the next of the ready `workers`; fewer, but one, where the next would not
    be finished `until` then, by the monotonic clock. Those that are there count, if every one of the rows is in them,
    and they are of the same engine and kind of worker.

    announce: told worker and spec before each measurement.
    kind: of all `workers` (`reference_time.WORKER`); one that comes back as another is not asked."""
    kind = kind or {}
    needed = {str(row["trial"]) for row in rows}
    found = [one for one in read_rounds(folder) if needed <= one.members and one.is_of(kind)][-count:]
    failed = {trial: reason for one in found for trial, reason in one.failed.items()}
    turns = _Turns(pool, workers, announce, kind)
    took = 0.0
    for number in range(len(found) + 1, count + 1):
        if found and time.monotonic() + took > until:
            break
        started = time.monotonic()
        turns.next_worker()
        one = _take(turns, rows, number, failed)
        failed |= one.failed
        one = replace(one, line=len(read_rounds(folder)) + 1)
        append_line(folder.rounds, json.dumps(asdict(one)))
        found.append(one)
        took = time.monotonic() - started
    return found


def _take(turns: _Turns, rows: Sequence[AnyRow], number: int, failed: dict[str, str]) -> Round:
    """Measures a round. Trials that failed in an earlier one are not tried again."""
    one = Round({}, {}, dict(failed), _code())
    for row in rows:
        trial = str(row["trial"])
        if trial in one.failed:
            continue
        result = turns.measure(TrialSpec(Configuration.of_row(row), round=number))
        if isinstance(result, str):
            one.failed[trial] = result
        else:
            one.ratios[trial], one.times[trial] = list(result.ratios), dict(result.record)
    return one


def _code() -> str:
    """Digest of the engine with all methods: a round covers several."""
    return code_digest(*METHODS)


class _Turns:
    """One measurement at a time, on a worker that is ready."""

    def __init__(
        self,
        pool: Pool,
        workers: Sequence[int],
        announce: Callable[[int, TrialSpec], None],
        kind: Mapping[str, object],
    ) -> None:
        self._pool = pool
        self._kind = kind
        self._ready = deque(workers)
        self._starting: set[int] = set()
        self._announce = announce

    def next_worker(self) -> None:
        self._ready.rotate(-1)

    def measure(self, spec: TrialSpec) -> TrialMeasurement | str:
        """The measurement, or why there is none; after the worker's death on the next one, once. Raises SweepError
        where no worker is left: a round is no worse for that."""
        reason = "no worker is left"
        for _ in range(_ATTEMPTS):
            if not self._recovered():
                raise SweepError(f"the front could not be confirmed: {reason}")
            worker = self._ready[0]
            self._announce(worker, spec)
            self._pool.submit(worker, spec)
            finished = self._answer(worker)
            if finished.measurement is not None:
                return finished.measurement
            reason = str(finished.error)
            if not finished.died:
                break
            self._ready.popleft()
            if not finished.lost:
                self._starting.add(worker)
        return reason

    def _answer(self, worker: int) -> Finished:
        while True:
            for finished in self._pool.wait(timeout=0.5):
                if finished.worker == worker:
                    return finished
                self._noticed(finished)

    def _recovered(self) -> bool:
        """Waits for a worker that is ready; False if there will be none."""
        while not self._ready and self._starting:
            for finished in self._pool.wait(timeout=0.5):
                self._noticed(finished)
        return bool(self._ready)

    def _noticed(self, finished: Finished) -> None:
        """Takes in a worker that has started, forgets one that never will."""
        if finished.description is not None:
            self._starting.discard(finished.worker)
            if all(finished.description.get(name) == value for name, value in self._kind.items()):
                self._ready.append(finished.worker)
        elif finished.lost or not finished.died:
            self._starting.discard(finished.worker)
