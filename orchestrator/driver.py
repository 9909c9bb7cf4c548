"""The driver: asks the study, keeps every worker busy, tells what came back."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from streamllm.errors import UsageError

from .pool import Finished, WorkerPool
from .results import baseline_row, baseline_spec, failed_row, trial_row
from .study import OpenTrial, Study
from .trial import TrialMeasurement, TrialSpec

_ATTEMPTS = 2
"""Workers a trial may take down before it counts as failed."""


class Observer(Protocol):
    """Watches a sweep: the display, MLflow."""

    def worker_ready(self, worker: int, description: dict[str, Any]) -> None: ...

    def trial_started(self, worker: int, spec: TrialSpec) -> None: ...

    def trial_finished(self, row: dict[str, Any]) -> None: ...


class SweepError(RuntimeError):
    """The sweep cannot go on; what is finished is kept."""


class Driver:
    def __init__(self, study: Study, pool: WorkerPool, cap: int, trials: int, observers: list[Observer]) -> None:
        self.study = study
        self.pool = pool
        self.cap = cap
        self.observers = observers
        self.baseline: TrialMeasurement | None = None
        self._budget = trials - len(study.rows)
        self._idle: deque[int] = deque()
        self._running: dict[int, OpenTrial | None] = {}
        """Worker -> its trial; None is the baseline."""
        self._retries: deque[OpenTrial | None] = deque([None])
        """To be handed out before anything new is asked for: at first, the baseline."""
        self._attempts: dict[int | None, int] = {}
        self._unpaired: list[tuple[OpenTrial, TrialMeasurement, int]] = []
        """Measured before the baseline was."""
        self._lost: set[int] = set()

    @property
    def idle(self) -> tuple[int, ...]:
        """Workers that are ready and have nothing to do."""
        return tuple(self._idle)

    def run(self) -> None:
        """Runs trials until the budget is spent or the space is exhausted. Raises SweepError, UsageError."""
        while self._assign() or self._running or self._retries or self.baseline is None:
            for finished in self.pool.wait(timeout=0.5):
                self._handle(finished)

    def _assign(self) -> bool:
        """Gives idle workers something to do; whether there was anything."""
        assigned = False
        while self._idle:
            if self._retries:
                trial = self._retries.popleft()
            elif self._budget > 0 and (asked := self.study.ask()) is not None:
                self._budget -= 1
                trial = asked
            else:
                break
            worker = self._idle.popleft()
            spec = baseline_spec(self.cap) if trial is None else trial.spec
            self._running[worker] = trial
            self.pool.submit(worker, spec)
            for observer in self.observers:
                observer.trial_started(worker, spec)
            assigned = True
        return assigned

    def _handle(self, finished: Finished) -> None:
        worker = finished.worker
        if finished.description is not None:
            for observer in self.observers:
                observer.worker_ready(worker, finished.description)
        elif worker not in self._running:
            self._never_ready(finished)
        else:
            trial = self._running.pop(worker)
            if finished.measurement is not None:
                self._measured(trial, finished.measurement, worker)
            else:
                self._failed(trial, finished)
        if finished.died:
            if finished.lost:
                self._lost.add(worker)
        else:
            self._idle.append(worker)
        if len(self._lost) == self.pool.count:
            raise SweepError(f"no worker is left: {finished.error}")

    def _never_ready(self, finished: Finished) -> None:
        if not finished.died:  # what one worker cannot load, none can
            raise UsageError(finished.error)

    def _measured(self, trial: OpenTrial | None, measurement: TrialMeasurement, worker: int) -> None:
        if trial is None:
            self.baseline = measurement
            self._announce(baseline_row(measurement))
        else:
            self._unpaired.append((trial, measurement, worker))
        if self.baseline is not None:
            for waiting, measured, by in self._unpaired:
                self._tell(waiting, trial_row(waiting, measured, self.baseline, by))
            self._unpaired.clear()

    def _failed(self, trial: OpenTrial | None, finished: Finished) -> None:
        number = trial.number if trial is not None else None
        self._attempts[number] = self._attempts.get(number, 0) + 1
        if finished.died and self._attempts[number] < _ATTEMPTS:
            self._retries.append(trial)
        elif trial is None:
            raise SweepError(f"the baseline could not be measured: {finished.error}")
        else:
            self._tell(trial, failed_row(trial, str(finished.error), finished.worker))

    def _tell(self, trial: OpenTrial, row: dict[str, Any]) -> None:
        self.study.tell(trial.number, row)
        self._announce(row)

    def _announce(self, row: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.trial_finished(row)
